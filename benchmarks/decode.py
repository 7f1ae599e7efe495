"""Tokens a second of greedy decoding from a cache, batches of 1 and 16, ours and transformers'.

Both sides run a bare loop over their model with their own cache after the same prompt: no sampling, no stopping rules,
no tokenizer. The rate counts the tokens of all rows. Both have the same weights in bfloat16 and in float32; our int8
weights (arithmetic in float32) stand against transformers' bfloat16, which it has no smaller form beside.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch

from common import Report, arguments, both_models, interleave, our_model, packed_model, random_tokens, spread
from halflap.checkpoints.checkpoint import save_model
from halflap.models.cache import Cache
from halflap.models.decoder import Decoder
from halflap.models.model import HybridModel
from halflap.models.quantization import Quantization


def our_decode(model: HybridModel, prompt: torch.Tensor, steps: int) -> Callable[[], None]:
    dtype = model.dtype
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
    quick = {"sizes": ["nemotron-h-tiny"], "prompt": 8, "steps": 4, "batches": [1, 2]}
    chosen = arguments(__doc__, quick, prompt=64, steps=32, batches=[1, 16], forms=["bfloat16", "float32", "int8"])
    report = Report("decode", chosen.out, chosen.threads)
    for size in chosen.sizes:
        for form in chosen.forms:
            against = torch.float32 if form == "float32" else torch.bfloat16
            ours, theirs = both_models(size, against)
            if form == "int8":
                with tempfile.TemporaryDirectory() as directory:
                    save_model(our_model(size), directory)
                    ours = packed_model(directory, Quantization.asked("int8", None))
            for batch in chosen.batches:
                prompt = random_tokens(ours, batch, chosen.prompt)
                sides = {
                    "halflap": our_decode(ours, prompt, chosen.steps),
                    "transformers": their_decode(theirs, prompt, chosen.steps),
                }
                times = interleave(sides, chosen.repeats)
                rates = {name: spread(t, batch * chosen.steps) for name, t in times.items()}
                ratio = rates["halflap"]["median"] / rates["transformers"]["median"]
                dtypes = {"dtype": form, "transformers_dtype": str(against).removeprefix("torch.")}
                report.add(size=size, batch=batch, **dtypes, prompt=chosen.prompt, **rates, ratio=ratio)
    report.write()


if __name__ == "__main__":
    main()
