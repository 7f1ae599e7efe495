"""A model behind an engine, from the words of a recipe: what `serve` and `chat` share."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from halflap.amounts import parse_amount
from halflap.checkpoints.checkpoint import load_model
from halflap.checkpoints.config import find_directory, read_config, read_json, read_quantization
from halflap.commands.device import check_memory, choose_device, choose_dtype
from halflap.commands.sections import Decoding
from halflap.data.tokenizer import Tokenizer
from halflap.errors import HalflapError, RecipeError
from halflap.inference.engine import Engine
from halflap.inference.generate import require_positions
from halflap.inference.memory import Budget
from halflap.inference.requests import NARROW_GUESSES, SSM_DTYPES, EngineSettings
from halflap.models.config import ModelConfig
from halflap.models.model import HybridModel
from halflap.models.quantization import weight_bytes
from halflap.recipe import Common

GUESSES = ("off", "lookup")
OF_LEFT = 0.85  # what replies may take of the memory that is left; passes need some, and others on the machine may


class Opened(NamedTuple):
    """An engine and what it was made from."""

    engine: Engine
    tokenizer: Tokenizer
    config: ModelConfig
    max_context: int
    memory: int
    """Bytes that decode state may take."""
    remark: str | None


class Plan(NamedTuple):
    """An engine that has been checked and not loaded."""

    directory: Path
    config: ModelConfig
    tokenizer: Tokenizer
    max_context: int
    device: torch.device
    dtype: str
    prefix_cache: int
    memory: int
    """Bytes that decode state may take."""
    ssm_dtype: str
    remark: str | None
    """What a user did not ask for and should know."""


def plan_engine(path: str | Path, decoding: Decoding, common: Common, replicas: int = 1) -> Plan:
    """What an engine will be, so many times. Raises HalflapError for what does not fit together or into memory."""
    directory = find_directory(path)
    config = read_config(directory)
    tokenizer = Tokenizer.load(directory)
    tokenizer.check_matches(config.vocab_size)
    context = decoding.max_context or config.max_position_embeddings
    require_positions(config, context, "--max-context needs")
    prefix = _prefix_bytes(decoding.prefix_cache)
    device = choose_device(common.device)
    dtype = choose_dtype(common.dtype, device)
    keeping, beside = [config], {"the prefix cache": prefix}
    if decoding.speculate not in GUESSES and Path(decoding.speculate).is_dir():
        other = find_directory(decoding.speculate)
        guesser = read_config(other)
        packed = read_quantization(other, guesser)
        beside["the model that guesses"] = weight_bytes(guesser, packed, 4 if dtype == "float32" else 2)
        keeping.append(guesser)
    kind = torch.float32 if dtype == "float32" else torch.bfloat16  # `auto` is the stored type of a model on a GPU
    given = None if decoding.cache_memory is None else int(decoding.cache_memory.value)
    if decoding.ssm_dtype == "bfloat16" and decoding.speculate != "off":
        raise HalflapError(NARROW_GUESSES)
    states = decoding.ssm_dtype or ("float32" if decoding.speculate != "off" else _said_of_states(directory))
    budget = Budget(keeping, kind, given, torch.bfloat16 if states == "bfloat16" else None)
    context, remark = _context_within(budget, context, decoding.max_context is not None)
    one = budget.row(context)
    beside[f"a reply of {context:,} tokens (--max-context and --cache-memory bound it)"] = one
    left = check_memory(config, dtype, device, beside, read_quantization(directory, config), replicas=replicas)
    memory = round(one + OF_LEFT * left) if given is None else given
    return Plan(directory, config, tokenizer, context, device, dtype, prefix, memory, states, remark)


def _said_of_states(directory: Path) -> str:
    """How config.json says that states of Mamba blocks are kept, where that is a way of ours."""
    file = directory / "config.json"
    said = read_json(file).get("mamba_ssm_cache_dtype") if file.exists() else None
    return said if said in SSM_DTYPES else SSM_DTYPES[0]


def _context_within(budget: Budget, context: int, asked: bool) -> tuple[int, str | None]:
    """The context that --cache-memory has room for, and what there is to say about it."""
    longest = budget.longest(context) if budget.bytes is not None else context
    if longest == context:
        return context, None
    need = f"a context of {context:,} tokens takes {budget.row(context):,} bytes of cache and --cache-memory is "
    need += f"{budget.bytes:,}"
    if asked or longest < 2:
        raise HalflapError(f"{need}: give more memory, or a --max-context of at most {longest:,}")
    return longest, f"{need}, so a prompt and its reply may have {longest:,} tokens together"


def open_engine(path: str | Path, decoding: Decoding, common: Common) -> Opened:
    """Load a checkpoint and start an engine for it. Raises HalflapError, before loading, for what does not fit."""
    plan = plan_engine(path, decoding, common)
    settings = EngineSettings(
        max_batch=decoding.max_batch,
        max_context=plan.max_context,
        memory=plan.memory,
        ssm_dtype=plan.ssm_dtype,
        prefill_chunk=decoding.prefill_chunk,
        prefix_cache=plan.prefix_cache,
        speculate=_guesser(decoding.speculate, plan.tokenizer, plan.dtype, common),
    )
    model = load_model(plan.directory, plan.dtype, plan.device)
    engine = Engine(model, plan.tokenizer, settings)
    return Opened(engine, plan.tokenizer, plan.config, plan.max_context, plan.memory, plan.remark)


def _prefix_bytes(value: str) -> int:
    if value == "off":
        return 0
    try:
        return int(parse_amount(value, "bytes", share=False).value)
    except HalflapError as error:
        raise RecipeError(f"prefix_cache: {error}, or off") from None


def _guesser(value: str, tokenizer: Tokenizer, dtype: str, common: Common) -> HybridModel | str | None:
    """What guesses tokens: nothing, the text itself, or a draft model."""
    if value in GUESSES:
        return None if value == "off" else value
    if not Path(value).is_dir():
        raise RecipeError(f"speculate is {value!r}; allowed are off, lookup, or the directory of a model: correct it")
    directory, device = find_directory(value), choose_device(common.device)
    if Tokenizer.load(directory).digest != tokenizer.digest:
        raise HalflapError(f"speculate: {value} has another tokenizer than the model; take a student of that model")
    return load_model(directory, dtype, device)
