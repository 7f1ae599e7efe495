"""Tokens a second of greedy decoding from a cache, bfloat16, batches of 1 and 16, ours and transformers'.

Both sides run a bare loop over their model with their own cache after the same prompt: no sampling, no stopping rules,
no tokenizer. The rate counts the tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from common import Report, arguments, both_models, interleave, random_tokens, spread
from halflap.models.cache import Cache
from halflap.models.decoder import Decoder
from halflap.models.model import HybridModel


def our_decode(model: HybridModel, prompt: torch.Tensor, steps: int) -> Callable[[], None]:
    dtype = model.head_weight.dtype
    with torch.inference_mode():
        start = Cache.create(model.config, len(prompt), prompt.shape[1] + steps, dtype)
        model(prompt, cache=start)

    step = Decoder(model)

    def decode() -> None:
        with torch.inference_mode():
            cache, token = start.clone(), prompt[:, -1:]
            for _ in range(steps):
                token = step(token, cache=cache)[:, -1].argmax(-1, keepdim=True)

    return decode


def their_decode(model: Any, prompt: torch.Tensor, steps: int) -> Callable[[], None]:
    def prefill() -> Any:
        with torch.inference_mode():
            return model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values

    waiting: list[Any] = []

    def decode() -> None:
        cache, token = waiting.pop(), prompt[:, -1:]
        with torch.inference_mode():
            for _ in range(steps):
                logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
                token = logits[:, -1].argmax(-1, keepdim=True)

    decode.prepare = lambda: waiting.append(prefill())  # type: ignore[attr-defined]  # it changes its cache in place
    return decode


def main() -> None:
    chosen = arguments(__doc__, prompt=64, steps=32, batches=[1, 16])
    report = Report("decode", chosen.out, chosen.threads)
    for size in chosen.sizes:
        ours, theirs = both_models(size, torch.bfloat16)
        for batch in chosen.batches:
            prompt = random_tokens(ours, batch, chosen.prompt)
            sides = {
                "halflap": our_decode(ours, prompt, chosen.steps),
                "transformers": their_decode(theirs, prompt, chosen.steps),
            }
            times = interleave(sides, chosen.repeats)
            rates = {name: spread(t, batch * chosen.steps) for name, t in times.items()}
            ratio = rates["halflap"]["median"] / rates["transformers"]["median"]
            report.add(size=size, batch=batch, dtype="bfloat16", prompt=chosen.prompt, **rates, ratio=ratio)
    report.write()


if __name__ == "__main__":
    main()
