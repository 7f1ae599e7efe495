"""A training step (forward, backward, AdamW) on one row of 2048 tokens: tokens a second, ours and transformers'.

float32; bfloat16 mixed precision, for which transformers gets the better of autocast with float32 weights and weights
in bfloat16 throughout. `gemm_share` is the time that the matrix products of the step would take at the canary's rate,
over the time it took: 1 is the machine's limit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from common import Report, arguments, both_models, interleave, random_tokens, spread
from halflap.models.model import HybridModel
from halflap.ops.vocabulary_loss import cross_entropy_sum


def our_step(model: HybridModel, tokens: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
    weights = torch.ones(targets.shape)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = model.hidden_states(inputs)
            loss = cross_entropy_sum(hidden.flatten(0, 1), model.head_weight, targets, weights) / len(targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def their_step(model: Any, tokens: torch.Tensor, autocast: bool) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def matrix_flops(model: HybridModel) -> int:
    """FLOPs of a token's matrix products, forward and backward, embeddings' look-up left out."""
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and name != "embedding.weight")
    return 6 * weights


def main() -> None:
    chosen = arguments(__doc__, tokens=2048)
    report = Report("training_step", chosen.out, chosen.threads)
    for size in chosen.sizes:
        ours, theirs = both_models(size)
        tokens = random_tokens(ours, 1, chosen.tokens + 1)
        flops = matrix_flops(ours)
        for dtype in (torch.float32, torch.bfloat16):
            sides = {"halflap": our_step(copy.deepcopy(ours), tokens, dtype)}
            if dtype == torch.float32:
                sides["transformers"] = their_step(copy.deepcopy(theirs), tokens, False)
            else:
                sides["transformers_autocast"] = their_step(copy.deepcopy(theirs), tokens, True)
                sides["transformers_bfloat16"] = their_step(copy.deepcopy(theirs).to(torch.bfloat16), tokens, False)
            rates = {name: spread(t, chosen.tokens) for name, t in interleave(sides, chosen.repeats).items()}
            best = max(rate["median"] for name, rate in rates.items() if name != "halflap")
            name = str(dtype).removeprefix("torch.")
            peak = report.before[f"{name}_gflops"] * 1e9
            report.add(
                size=size, dtype=name, tokens=chosen.tokens, **rates,
                ratio=rates["halflap"]["median"] / best,
                gemm_share=rates["halflap"]["median"] * flops / peak,
            )  # fmt: skip
    report.write()


if __name__ == "__main__":
    main()
