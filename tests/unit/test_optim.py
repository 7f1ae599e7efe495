"""Settings, schedules by tokens, and what weight decay touches."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.layout import layout
from halflap.models.model import HybridModel
from halflap.models.patterns import parse_pattern
from halflap.models.presets import preset
from halflap.train.config import Fit
from halflap.train.optim import DECAY_SHAPES, decays, learning_rate, make_optimizer, parameter_groups

BLOCKS = {
    "M": Mamba2Config(4, 4, 2, 4),
    "*": AttentionConfig(2, 1, 4, bias=True),
    "-": MLPConfig(16, gated=True, bias=True),
}
CONFIG = ModelConfig("nemotron_h", 31, 8, parse_pattern("M-*", BLOCKS))


def test_wsd_by_tokens() -> None:
    settings = Fit(learning_rate=2.0, min_learning_rate=0.1, warmup=100, decay_fraction=0.5, decay_shape="linear")
    rate = lambda seen: learning_rate(settings, seen, 1000)
    assert rate(1) == pytest.approx(0.02) and rate(50) == pytest.approx(1.0)
    assert rate(100) == rate(300) == rate(500) == 2.0
    assert rate(750) == pytest.approx(0.2 + 1.8 * 0.5)
    assert rate(1000) == pytest.approx(0.2) and rate(1010) == pytest.approx(0.2)


def test_cosine_and_constant() -> None:
    cosine = Fit(learning_rate=1.0, min_learning_rate=0.0, warmup=0.1, schedule="cosine")
    assert learning_rate(cosine, 100, 1000) == 1.0
    assert learning_rate(cosine, 550, 1000) == pytest.approx(0.5)
    assert learning_rate(cosine, 1000, 1000) == pytest.approx(0.0, abs=1e-12)
    constant = Fit(learning_rate=1.0, warmup=0, schedule="constant")
    assert learning_rate(constant, 1, 1000) == learning_rate(constant, 1000, 1000) == 1.0


def test_decay_shapes_are_the_published_ones() -> None:
    at = {name: shape(0.25) for name, shape in DECAY_SHAPES.items()}
    assert at == pytest.approx({
        "linear": 0.75, "cosine": (1 + math.cos(math.pi / 4)) / 2, "exponential": 2 * 0.5**0.25 - 1, "minus_sqrt": 0.5,
    })  # fmt: skip
    assert all(shape(0.0) == 1 and shape(1.0) == pytest.approx(0) for shape in DECAY_SHAPES.values())


@given(
    warmup=st.floats(0, 0.9),
    fraction=st.floats(0, 1),
    shape=st.sampled_from(sorted(DECAY_SHAPES)),
    schedule=st.sampled_from(["wsd", "cosine", "constant"]),
    at=st.floats(0.001, 1),
)
def test_rate_stays_between_floor_and_peak(
    warmup: float, fraction: float, shape: Any, schedule: Any, at: float
) -> None:
    settings = Fit(learning_rate=1.0, warmup=warmup, decay_fraction=fraction, decay_shape=shape, schedule=schedule)
    total, warm = 1e6, warmup * 1e6
    rate = learning_rate(settings, at * total, total)
    assert rate <= 1 + 1e-12
    assert rate >= 0.01 - 1e-12 if at * total >= warm else rate == pytest.approx(at * total / warm)


def test_no_decay_set() -> None:
    model = HybridModel(CONFIG)
    kept = {name for name, parameter in model.named_parameters() if not decays(name, parameter)}
    leaves = {name.rsplit(".", 1)[-1] for name in kept}
    assert leaves == {"A_log", "D", "dt_bias", "bias", "weight"}
    assert all("norm" in name for name in kept if name.endswith(".weight"))
    assert kept == {name for name, dims in layout(CONFIG).items() if len(dims) == 1}
    groups = parameter_groups(dict(model.named_parameters()), 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_what_never_decays_though_it_is_a_matrix() -> None:
    """Time scales of Mamba-1, a row for each channel, and meta tokens."""
    model = HybridModel(preset("hymba-tiny"))
    kept = {name for name, p in model.named_parameters() if not decays(name, p) and p.ndim > 1}
    assert kept == {"meta_tokens", *(f"blocks.{2 * layer}.mixer.ssm.A_log" for layer in range(8))}


def test_fused_adamw_is_adamw() -> None:
    torch.manual_seed(0)
    ours, plain = (torch.nn.Linear(5, 4) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    settings = Fit(weight_decay=0.3)
    fused = make_optimizer(dict(ours.named_parameters()), settings)
    groups = parameter_groups(dict(plain.named_parameters()), 0.3)
    reference = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for step in range(5):
        x = torch.randn(3, 5, generator=torch.Generator().manual_seed(step))
        for model, optimizer in ((ours, fused), (plain, reference)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, plain.weight)
    torch.testing.assert_close(ours.bias, plain.bias)


@pytest.mark.parametrize(
    ("field", "value"),
    [("learning_rate", 0.0), ("warmup", -1), ("batch_size", 0), ("micro_batch_size", 0), ("decay_fraction", 1.2),
     ("betas", (0.9, 1.0)), ("schedule", "linear"), ("decay_shape", "root"), ("save_every", -1)],
)  # fmt: skip
def test_bad_settings_name_field_value_and_what_is_allowed(field: str, value: Any) -> None:
    with pytest.raises(HalflapError, match=rf"fit\.{field} is .*must be"):
        Fit(**{field: value})


def test_derived_micro_batch() -> None:
    assert Fit(batch_size=16, sequence_length=512).micro_batch_rows == 4
    assert Fit(batch_size=2, sequence_length=512).micro_batch_rows == 2
    assert Fit(batch_size=16, sequence_length=8192).micro_batch_rows == 1
    assert Fit(batch_size=16, micro_batch_size=8).micro_batch_rows == 8


def test_settings_load_no_torch() -> None:
    code = "import sys, halflap.train.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
