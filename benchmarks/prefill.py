"""Tokens a second of reading a prompt into a cache, bfloat16, 2048 and 8192 tokens, ours and transformers'.

Both sides make their cache and the logits of the last token. `mamba_blocks` is the same rate for our Mamba-2 blocks
alone, where time should grow with the prompt and no faster: the ratio of the longest to the shortest is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from common import Report, arguments, both_models, interleave, random_tokens, spread
from halflap.models.cache import Cache
from halflap.models.config import Mamba2Config
from halflap.models.context import SequenceContext
from halflap.models.model import HybridModel


def our_prefill(model: HybridModel, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    batch, time = tokens.shape

    def prefill() -> torch.Tensor:
        with torch.inference_mode():
            cache = Cache.create(model.config, batch, time, model.dtype)
            return model.logits(model.hidden_states(tokens, cache=cache)[:, -1])

    return prefill


def their_prefill(model: Any, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    def prefill() -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=tokens, use_cache=True, logits_to_keep=1).logits

    return prefill


def mamba_blocks(model: HybridModel, tokens: torch.Tensor) -> Callable[[], None]:
    blocks = [b for b, config in zip(model.blocks, model.config.blocks) if isinstance(config, Mamba2Config)]
    hidden = model.embedding(tokens).detach()
    context = SequenceContext(positions=torch.arange(tokens.shape[1]).expand(tokens.shape))

    def run() -> None:
        with torch.inference_mode():
            for block in blocks:
                block(hidden, context)

    return run


def main() -> None:
    chosen = arguments(__doc__, prompts=[2048, 8192])
    report = Report("prefill", chosen.out, chosen.threads)
    for size in chosen.sizes:
        ours, theirs = both_models(size, torch.bfloat16)
        alone = {}
        for prompt in chosen.prompts:
            tokens = random_tokens(ours, 1, prompt)
            sides = {
                "halflap": our_prefill(ours, tokens),
                "transformers": their_prefill(theirs, tokens),
                "mamba_blocks": mamba_blocks(ours, tokens),
            }
            rates = {name: spread(t, prompt) for name, t in interleave(sides, chosen.repeats).items()}
            alone[prompt] = rates["mamba_blocks"]["median"]
            ratio = rates["halflap"]["median"] / rates["transformers"]["median"]
            report.add(size=size, prompt=prompt, dtype="bfloat16", **rates, ratio=ratio)
        longest, shortest = max(alone), min(alone)
        report.add(size=size, mamba_blocks_ratio=alone[longest] / alone[shortest], prompts=[shortest, longest])
    report.write()


if __name__ == "__main__":
    main()
