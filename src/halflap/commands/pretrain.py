"""From text to a model: train a tokenizer, cut text into token shards, pretrain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from halflap.checkpoints.checkpoint import load_model, save_model
from halflap.checkpoints.config import find_directory, lineage_step, read_lineage
from halflap.commands.config import CorpusRecipe, PretrainRecipe, TokenizerRecipe
from halflap.commands.corpora import Corpora, choose_tokenizer, held_out_batches, open_corpora, training_loader
from halflap.commands.device import choose_device
from halflap.commands.resolve import plan_of, shape_of
from halflap.data.corpus import build_corpus
from halflap.data.text import read_documents
from halflap.data.tokenizer import Tokenizer, train_tokenizer
from halflap.errors import HalflapError
from halflap.models.config import ModelConfig
from halflap.models.model import HybridModel, initialize
from halflap.models.utilization import CONVENTIONS, peak_flops_per_second, training_flops_per_token
from halflap.parallel import mesh
from halflap.run import Run
from halflap.train.fit import fit
from halflap.train.objectives.language import NextToken


def tokenizer(recipe: TokenizerRecipe, run: Run) -> dict[str, Any]:
    """Train a byte-level BPE tokenizer; its files are the run's."""
    trained = train_tokenizer(read_documents(recipe.text.data, recipe.text.field), recipe.vocab_size)
    trained.save(run.path)
    sample = next(read_documents(recipe.text.data, recipe.text.field))
    return {
        "vocab_size": trained.vocab_size,
        "tokens": len(trained.encode(sample)),
        "bytes": len(sample.encode()),
        "path": str(run.path),
    }


def corpus(recipe: CorpusRecipe, run: Run) -> dict[str, Any]:
    """Tokenise text into the run's directory, which is then a folder of token shards with its tokenizer beside."""
    if recipe.tokenizer is None:
        raise HalflapError("no tokenizer was given; name a directory that has one with --tokenizer")
    chosen = Tokenizer.load(recipe.tokenizer)
    manifest = build_corpus(recipe.text.data, chosen, run.path, field=recipe.text.field)
    chosen.save(run.path)
    numbers = {"tokens": manifest.tokens, "bytes": manifest.bytes, "documents": manifest.documents}
    return numbers | {"duplicates": manifest.tally.duplicates, "path": str(run.path)}


def pretrain(recipe: PretrainRecipe, run: Run) -> dict[str, Any]:
    """Train a model from text, from random weights or from a checkpoint's."""
    checkpoint = find_directory(recipe.shape) if Path(recipe.shape).is_dir() else None
    wanted = shape_of(recipe.shape).vocab_size
    chosen = choose_tokenizer(recipe.tokenizer, recipe.text, run.path, wanted, checkpoint)
    model, lineage = _start_model(recipe.shape, recipe.common.seed)
    chosen.check_matches(model.config.vocab_size)
    corpora = open_corpora(recipe.text, chosen, run.path / "corpus", recipe.eval_data)
    plan = plan_of(recipe.phases, recipe.fit, len(corpora.train), mesh.world_size())
    loader = training_loader(
        corpora, recipe.text, recipe.fit.sequence_length, recipe.fit.batch_size, recipe.common.seed, plan
    )
    tokens = recipe.tokens if plan is None else plan.tokens
    device = choose_device(recipe.common.device)
    result = fit(
        model,
        NextToken(),
        loader.batch if plan is None else lambda step: loader.rows_from(*plan.rows(step)),
        recipe.fit,
        tokens=tokens,
        directory=run.path / "training",
        log=run.log,
        held_out=held_out_batches(corpora.held_out, recipe.fit, tokens) or None,
        device=device,
        dtype=recipe.common.dtype,
        seed=recipe.common.seed,
        plan=plan,
    )
    result |= _utilization(model.config, recipe.fit.sequence_length, result["tokens_per_second"], device)
    if mesh.is_main():
        step = lineage_step("pretrain", _inputs(corpora), tokens=result["tokens"], loss=result["loss"])
        save_model(
            model.cpu(), run.checkpoint_dir, lineage=[*lineage, step], tokenizer_from=_save_tokenizer(chosen, run)
        )
    return result | {"held_out": corpora.held_out_is, "parameters": sum(p.numel() for p in model.parameters())}


def _utilization(config: ModelConfig, length: int, speed: float, device: torch.device) -> dict[str, Any]:
    """Operations a second by either convention, and their share of the device's peak where that is known."""
    rates = {name: training_flops_per_token(config, length, name) * speed for name in CONVENTIONS}
    peak = peak_flops_per_second(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    shares = {} if peak is None else {"mfu": {name: rate / peak / mesh.world_size() for name, rate in rates.items()}}
    return {"model_flops_per_second": rates} | shares


def _start_model(shape: str, seed: int) -> tuple[HybridModel, list[dict[str, Any]]]:
    """A model to train in float32 and how it came to be: random from a shape, or a checkpoint's weights."""
    path = Path(shape)
    if path.is_dir():
        directory = find_directory(path)
        return load_model(directory, dtype="float32"), read_lineage(directory)
    model = HybridModel(shape_of(shape))
    initialize(model, seed)
    return model, []


def _save_tokenizer(chosen: Tokenizer, run: Run) -> Path:
    chosen.save(run.path / "tokenizer")
    return run.path / "tokenizer"


def _inputs(corpora: Corpora) -> dict[str, str]:
    return {corpus.path.name: corpus.manifest.digest for corpus in corpora.train}
