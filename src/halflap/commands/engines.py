"""A model behind an engine, from the words of a recipe: what `serve` and `chat` share."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from halflap.amounts import parse_amount
from halflap.checkpoints.checkpoint import load_model
from halflap.checkpoints.config import find_directory, read_config, read_quantization
from halflap.commands.device import check_memory, choose_device, choose_dtype
from halflap.commands.sections import Decoding
from halflap.data.tokenizer import Tokenizer
from halflap.errors import HalflapError, RecipeError
from halflap.inference.engine import Engine
from halflap.inference.requests import EngineSettings
from halflap.models.config import ModelConfig
from halflap.models.count import cache_bytes
from halflap.models.model import HybridModel
from halflap.recipe import Common


class Opened(NamedTuple):
    """An engine and what it was made from."""

    engine: Engine
    tokenizer: Tokenizer
    config: ModelConfig
    max_context: int


def open_engine(path: str | Path, decoding: Decoding, common: Common) -> Opened:
    """Load a checkpoint and start an engine for it. Raises HalflapError, before loading, for what does not fit."""
    directory = find_directory(path)
    config = read_config(directory)
    tokenizer = Tokenizer.load(directory)
    tokenizer.check_matches(config.vocab_size)
    context = decoding.max_context or config.max_position_embeddings
    prefix = _prefix_bytes(decoding.prefix_cache)
    device = choose_device(common.device)
    dtype = choose_dtype(common.dtype, device)
    one = cache_bytes(config, context, kv_bits=32 if device.type == "cpu" and dtype != "bfloat16" else 16)
    beside = {f"a reply of {context:,} tokens": one, "the prefix cache": prefix}
    check_memory(config, dtype, device, beside, read_quantization(directory, config))
    settings = EngineSettings(
        max_batch=decoding.max_batch,
        max_context=context,
        memory=None if decoding.cache_memory is None else int(decoding.cache_memory.value),
        prefill_chunk=decoding.prefill_chunk,
        prefix_cache=prefix,
        speculate=_guesser(decoding.speculate, tokenizer, dtype, common),
    )
    model = load_model(directory, dtype, device)
    return Opened(Engine(model, tokenizer, settings), tokenizer, config, context)


def _prefix_bytes(value: str) -> int:
    if value == "off":
        return 0
    try:
        return int(parse_amount(value, "bytes", share=False).value)
    except HalflapError as error:
        raise RecipeError(f"prefix_cache: {error}, or off") from None


def _guesser(value: str, tokenizer: Tokenizer, dtype: str, common: Common) -> HybridModel | str | None:
    """What guesses tokens: nothing, the text itself, or a draft model."""
    if value in ("off", "lookup"):
        return None if value == "off" else value
    if not Path(value).is_dir():
        raise RecipeError(f"speculate is {value!r}; allowed are off, lookup, or the directory of a model: correct it")
    directory, device = find_directory(value), choose_device(common.device)
    if Tokenizer.load(directory).digest != tokenizer.digest:
        raise HalflapError(f"speculate: {value} has another tokenizer than the model; take a student of that model")
    config = read_config(directory)
    check_memory(config, dtype, device, quantization=read_quantization(directory, config))
    return load_model(directory, dtype, device)
