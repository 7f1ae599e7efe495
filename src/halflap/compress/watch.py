"""Importance from activations: one forward pass over calibration rows serves every axis, source and aggregation.

For an activation a (B, T, C), m = mean over time of |a| for each row, then score = sqrt(sum over rows of m^2)
(Muralidharan et al. 2024; Taghibakhshi et al. 2025); `importance.Scoring` has the other ways. Rows are reduced one by
one, so the batch size changes nothing, and padding and meta tokens count nowhere. Hooks watch modules, in small pieces
that stay in the cache, and change nothing. Beside the scores of `sites.py` there are

    block influence   1 - cos(block input, block output)
    energy, mean      of what every norm divides by its root mean square, for the `calibrated` norm correction
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halflap.compress.axes import block_of, short_name
from halflap.compress.importance import Importance, Scoring, score_shapes
from halflap.compress.partial import NOWHERE, Scratch, Sums, resumable
from halflap.compress.sites import Site, sites, source_of
from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.hybrid import HybridMixer
from halflap.models.layout import layout
from halflap.models.mamba1 import Mamba1Inner
from halflap.models.mamba2 import Mamba2Inner
from halflap.models.meta import text_places
from halflap.models.model import HybridModel
from halflap.models.norm import RMSNorm
from halflap.progress import Progress

CHUNK = 1 << 19  # elements reduced at once: temporaries stay in the cache

Function = Callable[[Tensor], Tensor]


def _same(a: Tensor) -> Tensor:
    return a


def _as_it_is(a: Tensor, runs: Tensor | None) -> Tensor:
    del runs
    return a


# What is summed over time, and what a row's value is of that sum and the row's length, by `Scoring.sequence`.
SEQUENCES: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "mean": ("abs", lambda total, count: total / count),
    "l2": ("square", lambda total, count: total.sqrt()),
    "signed_mean": ("plain", lambda total, count: total / count),
}
FUNCTIONS: dict[str, Function] = {"abs": torch.abs, "square": torch.square, "plain": _same}

# What is summed over rows, and the score of that sum and the number of rows, by `Scoring.batch`.
BATCHES: dict[str, tuple[Function, Callable[[Tensor, Tensor], Tensor]]] = {
    "l2": (torch.square, lambda total, rows: total.sqrt()),
    "mean": (_same, lambda total, rows: total.abs() / rows),
}


def activation(
    model: HybridModel,
    batches: Sequence[Batch],
    scorings: Sequence[Scoring],
    scratch: Scratch = NOWHERE,
    seed: int = 0,
) -> list[Importance]:
    """Scores of each scoring, with energies and block influence, from one forward pass over the batches."""
    del seed
    watch = Watch(model, scorings)
    progress = Progress("score activations", len(batches), unit="batches")
    with torch.inference_mode(), progress, watch.hooks([*range(len(model.blocks)), None]):
        device = model.embedding.weight.device
        for batch in resumable(batches, watch.sums, "activation", scratch, progress, device):
            watch.begin(batch)
            watch.count()
            model.hidden_states(batch.tokens, segments=batch.segments)
            progress.advance()
            if not watch.is_finite():
                break  # whoever checks the scores says where
    return watch.result()


class Watch:
    """Sums over calibration rows while a model runs; hooks call `score`, `deviation`, `norm` and `influence`."""

    def __init__(self, model: HybridModel, scorings: Sequence[Scoring]) -> None:
        self.model, self.config, self.scorings = model, model.config, list(scorings)
        self.sums: Sums = {}
        self.sequences = sorted({scoring.sequence for scoring in scorings})
        self.batches = sorted({scoring.batch for scoring in scorings})
        self.functions = {name: FUNCTIONS[name] for name in (SEQUENCES[way][0] for way in self.sequences)}
        self.columns: dict[str, Tensor] = {}  # squared norms of the columns of projections, for FLAP
        self.batch: Batch | None = None
        self.masks: dict[int, Tensor | None] = {}
        self.runs: Tensor | None = None
        self.counts = torch.zeros(0)

    # ---- what is watched

    @contextmanager
    def hooks(self, parts: Sequence[int | None]) -> Iterator[None]:
        """Watch these blocks, and for None the final norm, until the `with` block ends; others need no weights."""
        handles = list(self._hooks(parts))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, parts: Sequence[int | None]) -> Iterator[Any]:
        """Handles of hooks, which are set as this is read."""
        for site in sites(self.model, self.scorings):
            if short_name(site.name) != "norm" and block_of(site.name) in parts:
                yield from self._site_hooks(site)
        for name, norm in _norms(self.model):
            if block_of(name) in parts:
                yield norm.register_forward_hook(self._norm_hook(name, norm))
        for name, module, gain in _gated_norms(self.model):
            if block_of(name) in parts:
                yield module.register_forward_pre_hook(partial(self._gated, name, gain))
        for index, block in enumerate(self.model.blocks):
            if index in parts:
                yield block.register_forward_hook(partial(self._passed, index))

    def _site_hooks(self, site: Site) -> Iterator[Any]:
        block = self.config.blocks[block_of(site.name) or 0]
        asked = {source_of(block, site.name, scoring) for scoring in self.scorings}
        if site.source in asked:
            transform = site.transform or _as_it_is
            yield site.hook(lambda a: self.score(site.key, transform(a[..., site.channels], self.runs)))
        if site.source == "o" and "flap" in asked:
            weight: Any = site.module.weight
            self.columns[site.name] = weight.detach().double().square().sum(0)
            yield site.hook(lambda a: self.deviation(site.name, a))

    def _norm_hook(self, name: str, norm: Any) -> Callable[..., None]:
        """A pre-norm's output is its score; without bias and gain it is what the `calibrated` correction asks about."""
        bias, gain = getattr(norm, "bias", None), norm.weight if isinstance(norm, RMSNorm) else 1 + norm.weight
        is_score = name.startswith("blocks.") and name.count(".") == 2

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self.norm(name, output, gain, bias, is_score)

        return hook

    def _gated(self, name: str, gain: Tensor, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.norm(name, args[0], gain)

    def _passed(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.influence(index, args[0], output)

    # ---- sums

    def begin(self, batch: Batch) -> None:
        """What runs from here on is this batch; padding (segment 0) counts nowhere."""
        full = torch.full((len(batch.tokens),), batch.tokens.shape[1], device=batch.tokens.device)
        self.batch, self.masks, segments = batch, {}, batch.segments
        self.runs = None if segments is None else self.model.context_of(batch.tokens, segments).runs
        self.counts = full if batch.segments is None else (batch.segments > 0).sum(1)

    def count(self) -> None:
        """Once for each batch, however often it is begun."""
        self._add("rows", (self.counts > 0).sum().double())
        self._add("tokens", self.counts.sum().double())

    def score(self, key: str, a: Tensor) -> None:
        """Add what every row of a (B, T, C) gives, in all aggregations."""
        self._add_scores(key, self._totals(a, self.functions))

    def deviation(self, key: str, a: Tensor) -> None:
        """Add what the variance over all tokens needs: squares about each row's mean, and the rows' means."""
        count = self.counts[:, None]
        total = self._totals(a, {"plain": _same})["plain"]
        mean = total / count.clamp_min(1)
        about = mean.to(torch.promote_types(a.dtype, torch.float32))[:, None]
        self._add(f"{key}|within", self._totals(a, {"": lambda part: (part - about).square()})[""].sum(0))
        self._add(f"{key}|total", total.sum(0))
        self._add(f"{key}|squares", (count * mean.square()).sum(0))

    def norm(self, name: str, a: Tensor, gain: Tensor, bias: Tensor | None = None, is_score: bool = False) -> None:
        """Add the mean over time of (a / gain)^2 of every row, with a bias also that of a / gain, both less the bias.

        A channel whose gain is 0 has none.
        """
        functions = dict(self.functions) if is_score else {}
        energy = "square" if bias is None else "energy"
        functions[energy] = torch.square if bias is None else lambda part: (part - bias).square()
        if bias is not None:
            functions["mean"] = lambda part: part - bias
        totals = self._totals(a, functions)
        if is_score:
            self._add_scores(f"{name}@", totals)
        gain = gain.detach().double()
        self._add(f"{name}.weight|energy", self._without_gain(totals[energy], gain.square()))
        if bias is not None:
            self._add(f"{name}.bias|offset", self._without_gain(totals["mean"], gain))

    def _without_gain(self, totals: Tensor, divisor: Tensor) -> Tensor:
        mean = (totals / self.counts.clamp_min(1)[:, None]).sum(0)
        return torch.where(divisor == 0, 0.0, mean / divisor)

    def influence(self, index: int, before: Tensor, after: Tensor) -> None:
        """Add the mean over time of cos(before, after) of every row."""
        wide = torch.promote_types(before.dtype, torch.float32)
        x, y = before.to(wide), after.to(wide)
        norms = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
        cosine = (x * y).sum(-1) / norms.clamp_min(torch.finfo(wide).tiny)
        total = self._totals(cosine[..., None], {"": _same})[""]
        self._add(f"{index}|cosine", (total / self.counts.clamp_min(1)[:, None]).sum())

    def _add_scores(self, key: str, totals: Mapping[str, Tensor]) -> None:
        count = self.counts.clamp_min(1)[:, None]
        for sequence in self.sequences:
            function, of_row = SEQUENCES[sequence]
            row = of_row(totals[function], count)
            for batch in self.batches:
                self._add(f"{key}|{sequence}|{batch}", BATCHES[batch][0](row).sum(0))

    def _totals(self, a: Tensor, functions: Mapping[str, Function]) -> dict[str, Tensor]:
        """Sums over valid time (B, C) of functions of a (B, T, C), added up in float32 or wider."""
        wide = torch.promote_types(a.dtype, torch.float32)
        totals: dict[str, Any] = dict.fromkeys(functions, 0)
        valid = self._valid(a.shape[1])
        length = max(1, CHUNK // max(1, a.shape[0] * a.shape[2]))
        for start in range(0, a.shape[1], length):
            piece = a[:, start : start + length].to(wide)
            for name, function in functions.items():
                part = function(piece)
                if valid is not None:
                    part = part * valid[:, start : start + length, None]
                totals[name] = totals[name] + part.sum(1)
        return {name: total.double() for name, total in totals.items()}

    def _valid(self, time: int) -> Tensor | None:
        """Which positions (B, T) of a pass are text, None for all; with meta tokens there are more than tokens."""
        if time not in self.masks:
            assert self.batch is not None
            tokens, segments = self.batch.tokens, self.batch.segments
            valid = torch.ones_like(tokens, dtype=torch.bool) if segments is None else segments > 0
            if time != tokens.shape[1]:
                places = text_places(tokens, segments, self.config.num_meta_tokens)
                valid = valid.new_zeros(len(valid), time).scatter(1, places, valid)
            self.masks[time] = None if bool(valid.all()) else valid
        return self.masks[time]

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def is_finite(self) -> bool:
        return bool(torch.stack([total.sum() for total in self.sums.values()]).isfinite().all())

    # ---- results

    def result(self) -> list[Importance]:
        rows = self.sums.get("rows")
        if rows is None or not rows:
            raise HalflapError("no calibration text was read, so nothing can be scored; give at least one document")
        energies, means = self._means("energy"), self._means("offset")
        cosines = torch.stack([self.sums[f"{index}|cosine"] for index in range(len(self.config.blocks))])
        table = layout(self.config)
        grids = {name: [axis.size for axis in table[name][0][0]] for name in energies}
        common = Importance(
            metric="activation",
            widths={},
            depth={"block_influence": (1 - cosines / rows).clamp_min(0).float().cpu()},
            energy={name: value.reshape(grids[name]) for name, value in energies.items()},
            mean=means,
            tokens=int(self.sums["tokens"]),
        )
        return [
            dataclasses.replace(common, widths=self._widths(scoring), scoring=dataclasses.asdict(scoring))
            for scoring in self.scorings
        ]

    def _widths(self, scoring: Scoring) -> dict[str, Tensor]:
        def found(name: str, source: str) -> Tensor:
            if source == "flap":
                return self._flap(name)
            total = self.sums[f"{name}@{source}|{scoring.sequence}|{scoring.batch}"]
            return BATCHES[scoring.batch][1](total, self.sums["rows"])

        return widths_of(self.model, scoring, found)

    def _flap(self, name: str) -> Tensor:
        within, total, squares = (self.sums[f"{name}|{part}"] for part in ("within", "total", "squares"))
        tokens = self.sums["tokens"]
        variance = within / tokens + (squares / tokens - (total / tokens).square()).clamp_min(0)
        return (self.columns[name] * variance).sqrt()

    def _means(self, kind: str) -> dict[str, Tensor]:
        """Means over rows, by parameter."""
        ends = f"|{kind}"
        found = {name.removesuffix(ends): total for name, total in self.sums.items() if name.endswith(ends)}
        return {name: (total / self.sums["rows"]).cpu().float() for name, total in found.items()}


def widths_of(model: HybridModel, scoring: Scoring, found: Callable[[str, str], Tensor]) -> dict[str, Tensor]:
    """`Importance.widths` from found(name, source), scores (C,) of channels."""
    config = model.config
    widths = {"hidden": torch.stack([found(f"blocks.{index}.norm", "") for index in range(len(config.blocks))])}
    for name, shape in score_shapes(config).items():
        if name != "hidden":
            source = source_of(config.blocks[block_of(name) or 0], name, scoring)
            parts = (f"{name}.B", f"{name}.C") if name.endswith(".state") else (name,)
            widths[name] = _on_grid(name, [found(part, source) for part in parts], shape)
    return {name: value.float().cpu() for name, value in widths.items()}


def _on_grid(name: str, parts: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Per-channel scores to the grid of the axis: queries take the L2 norm over their channels, states join B and C."""
    if name.endswith(".query"):
        return torch.linalg.vector_norm(parts[0].reshape(*shape, -1), dim=-1)
    return (parts[0] if len(parts) == 1 else (parts[0] * parts[1]).sqrt()).reshape(shape)


def _norms(model: HybridModel) -> Iterator[tuple[str, Any]]:
    """Norms that are modules, by name."""
    for index, block in enumerate(model.blocks):
        mixer: Any = block.mixer
        yield f"blocks.{index}.norm", block.norm
        inner: Any = mixer.ssm if isinstance(mixer, HybridMixer) else mixer
        prefix = f"blocks.{index}.mixer"
        if isinstance(mixer, HybridMixer):
            yield f"{prefix}.attention_norm", mixer.attention_norm
            if isinstance(inner, Mamba1Inner):
                yield f"{prefix}.ssm_norm", mixer.ssm_norm
            prefix += ".ssm"
        if isinstance(inner, Mamba1Inner) and inner.config.inner_norms:
            yield from ((f"{prefix}.{name}", getattr(inner, name)) for name in ("dt_norm", "B_norm", "C_norm"))
    yield "norm", model.norm


def _gated_norms(model: HybridModel) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Mamba-2's, which lie within their mixers: the module whose input is their output, and their gain."""
    for index, block in enumerate(model.blocks):
        mixer: Any = block.mixer
        if isinstance(mixer, Mamba2Inner):
            yield f"blocks.{index}.mixer.norm", mixer.out_proj, mixer.norm.weight  # type: ignore[misc]
        elif isinstance(mixer, HybridMixer) and isinstance(mixer.ssm, Mamba2Inner):  # an identity stands for its norm
            yield f"blocks.{index}.mixer.ssm.norm", mixer.ssm_norm, mixer.ssm.norm.weight
