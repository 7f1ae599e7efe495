"""SSM states in bfloat16: half the bytes everywhere they are counted, and what rounding each pass's state gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from halflap.errors import HalflapError
from halflap.inference.memory import Budget
from halflap.inference.requests import EngineSettings, Request, SamplingParams
from halflap.inference.scheduler import Scheduler
from halflap.inference.stream import Stream
from halflap.models.cache import Cache, ConvSSMState, parts
from halflap.models.decoder import Decoder
from halflap.models.model import HybridModel
from halflap.ops import select

PROMPTS = [(5,), tuple(range(7, 25)), (200, 3, 17, 250, 9, 1, 1, 42)]
ROUNDED = EngineSettings(ssm_dtype="bfloat16", prefill_chunk=8, prefix_cache=1 << 20)


@pytest.fixture(params=["nemotron_h", "hymba", "hymba_mamba2"])
def hybrid(request: pytest.FixtureRequest, make: Callable[..., HybridModel]) -> HybridModel:
    return make(request.param)


@torch.inference_mode()
def test_a_state_is_rounded_once_a_pass(hybrid: HybridModel) -> None:
    """Logits are those of a float32 cache that is rounded by hand, and near those of one that is not.

    By hand to 1e-3 in the 2-norm: steps of the two differ in float32's last digit, by which some numbers of a state are
    rounded the other way. A rounding is 2^-9 of a state and decay forgets it: some of them are 2 % at most.
    """
    narrow, wide, exact = (
        Cache.create(hybrid.config, 2, 64, ssm_dtype=kind) for kind in (torch.bfloat16, torch.float32, None)
    )
    decode = Decoder(hybrid)
    assert narrow.ssm_dtypes == {torch.bfloat16} and wide.ssm_dtypes == exact.ssm_dtypes == {torch.float32}
    tokens = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    for part in (tokens[:, :9], tokens[:, 9:20], *tokens[:, 20:].split(1, 1)):
        run = decode if part.shape[1] == 1 else hybrid
        assert run is hybrid or decode.is_native(part, [narrow]) == select.native_is_on()
        found, expected, ideal = (run(part, cache=cache)[:, -1] for cache in (narrow, wide, exact))
        for state in parts(wide):
            if isinstance(state, ConvSSMState):
                state.ssm = state.ssm.bfloat16().float()
        assert (found - expected).norm() < 1e-3 * expected.norm()
        assert (found - ideal).norm() < 0.02 * ideal.norm()


def run(model: HybridModel, requests: list[Request], settings: EngineSettings = ROUNDED) -> list[list[int]]:
    scheduler = Scheduler(model, None, settings)
    streams = [Stream(request) for request in requests]
    for stream in streams:
        scheduler.add(stream)
    while scheduler.busy:
        scheduler.step()
    return [[token.id for token in stream.result()[0].tokens] for stream in streams]


def test_replies_together_are_those_alone(hybrid: HybridModel) -> None:
    requests = [Request(prompt, 12, SamplingParams(0.7, seed=i)) for i, prompt in enumerate(PROMPTS)]
    assert run(hybrid, requests) == [run(hybrid, [request])[0] for request in requests]


def test_bytes_are_counted(hybrid: HybridModel) -> None:
    one = Cache.create(hybrid.config, 1, 50, ssm_dtype=torch.bfloat16)
    budget = Budget([hybrid.config], torch.float32, None, torch.bfloat16)
    assert one.nbytes() == budget.row(50) == sum(budget.kinds([50]).values())
    states = sum(state.ssm.nbytes for state in parts(one) if isinstance(state, ConvSSMState))
    assert Budget([hybrid.config], torch.float32, None).row(50) == budget.row(50) + states
    both = Budget([hybrid.config, hybrid.config], torch.float32, None, torch.bfloat16)
    assert both.row(50) == 2 * budget.row(50) + states  # a draft model's stay float32
    scheduler = Scheduler(hybrid, None, ROUNDED)
    assert scheduler.prefix is not None and scheduler.prefix.smallest(50) == budget.row(50)
    scheduler.add(Stream(Request(PROMPTS[1], 30)))
    for _ in range(5):
        scheduler.step()
    group = scheduler.slots.groups[0]
    assert all(state.ssm.dtype == torch.bfloat16 for state in parts(group.cache) if isinstance(state, ConvSSMState))


def test_guesses_beside_rounded_states_are_refused() -> None:
    with pytest.raises(HalflapError, match="guesses, which make passes longer, would change texts"):
        EngineSettings(ssm_dtype="bfloat16", speculate="lookup")
