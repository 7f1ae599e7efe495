"""`analyze`: what attention, SSM and meta tokens do, layer by layer; analysis.json and the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halflap.checkpoints.checkpoint import load_model
from halflap.checkpoints.config import find_directory
from halflap.commands.config import AnalyzeRecipe
from halflap.commands.device import choose_device
from halflap.data.tokenizer import Tokenizer
from halflap.errors import HalflapError, RecipeError
from halflap.evaluate.analyze import analyze as analyze_model
from halflap.evaluate.analyze import shared_rows
from halflap.evaluate.documents import documents_of
from halflap.evaluate.sensitivity import sensitivity
from halflap.models.quantization import Quantization
from halflap.report.page import build as build_report
from halflap.run import Run


def analyze(recipe: AnalyzeRecipe, run: Run) -> dict[str, Any]:
    """Each path of --data is a domain of its own."""
    if recipe.group_size is not None and recipe.quantize is None:
        raise RecipeError("group_size says how weights are packed; add --quantize int8 or int4")
    if not recipe.text.data:
        raise HalflapError("no text was given; name files or folders with --data, each a domain of its own")
    directory = find_directory(recipe.model)
    tokenizer = Tokenizer.load(directory)
    model = load_model(directory, "float32", choose_device(recipe.common.device))
    if recipe.quantize is not None and model.quantization is not None:
        raise HalflapError(
            f"{directory} holds {model.quantization.name} weights already; give the checkpoint that they were made from"
        )
    tokenizer.check_matches(model.config.vocab_size)
    texts = {
        name: documents_of([path], tokenizer, field=recipe.text.field, limit=recipe.tokens)
        for name, path in _domains(recipe.text.data).items()
    }
    context = min(recipe.context, model.config.max_position_embeddings)
    found = analyze_model(model, texts, context=context, tokens=recipe.tokens, removal_tokens=recipe.removal_tokens)
    costs = None
    if recipe.quantize is not None:
        rows = shared_rows(texts, context, recipe.tokens, recipe.removal_tokens)
        costs = sensitivity(model, rows, Quantization.asked(recipe.quantize, recipe.group_size))
    result = {
        "pattern": model.config.pattern(),
        "meta_tokens": model.config.num_meta_tokens,
        "context": context,
        "tokens": sum(found.tokens_by_domain.values()),
        **dataclasses.asdict(found),
        **({} if costs is None else {"quantization": costs}),
    }
    run.save_json("analysis.json", result)
    return result | {"report": str(build_report([run.path], run.path / "report.html"))}


def _domains(paths: Sequence[str]) -> dict[str, str]:
    """Paths by short names that tell them apart: the file's, its folder's, or the whole path."""
    places = [Path(path).resolve() for path in paths]
    stems = [place.name.partition(".")[0] for place in places]
    for names in (stems, [place.parent.name for place in places], [str(place) for place in places]):
        if len(set(names)) == len(paths):
            return dict(zip(names, paths, strict=True))
    raise HalflapError(f"data names {paths[0]!r} more than once; each path is a domain of its own: name it once")
