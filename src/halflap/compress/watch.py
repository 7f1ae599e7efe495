"""Importance from activations: one forward pass over calibration rows serves every axis.

For an activation a (B, T, C), m = mean over time of |a| for each row, then score = sqrt(sum over rows of m^2)
(Muralidharan et al. 2024; Taghibakhshi et al. 2025). Rows are reduced one by one, so the batch size changes nothing,
and padding and meta tokens count nowhere. Hooks watch modules and change nothing.

    hidden    output of every block's norm             query   input of o_proj, L2 over a head's channels
    neuron    input of down_proj                       inner   x rows of in_proj, before the convolution; of hybrid
    state     B and C as the scan reads them,                  heads the input of out_proj, which has both branches
              sqrt(s_B s_C)                            block influence   1 - cos(block input, block output)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from halflap.compress.importance import Importance, score_shapes
from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.attention import AttentionMixer
from halflap.models.config import AttentionConfig, HybridConfig, Mamba1Config, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.hybrid import HybridMixer
from halflap.models.layout import layout
from halflap.models.mamba1 import Mamba1Inner, Mamba1Mixer
from halflap.models.mamba2 import Mamba2Inner, Mamba2Mixer
from halflap.models.meta import text_places
from halflap.models.mlp import MLPMixer
from halflap.models.model import HybridModel
from halflap.models.norm import RMSNorm
from halflap.ops.conv import causal_conv

CHUNK = 1 << 19  # elements reduced at once: temporaries stay in the cache


@dataclass(frozen=True)
class Sources:
    """Which activations are watched, where the papers leave or study a choice.

    neuron   "post" the activation function (what multiplies W_down), or "pre"
    mamba    "x" of the input projection (best in Taghibakhshi et al. 2025), "z" of it, or "o", the input of out_proj
    hybrid   "o", the mean of both branches, or "x" or "z" of the SSM beside the attention
    """

    neuron: str = "post"
    mamba: str = "x"
    hybrid: str = "o"


DEFAULT_SOURCES = Sources()


def activation(model: HybridModel, batches: Iterable[Batch], sources: Sources, seed: int) -> Importance:
    """Scores, energies and block influence from one forward pass over the batches."""
    del seed
    watch = _Watch(model.config)
    handles = [handle for index in range(len(model.blocks)) for handle in _watch_block(model, index, watch, sources)]
    handles.append(model.norm.register_forward_hook(_norm_hook(watch, "norm", model.norm, None)))
    try:
        with torch.inference_mode():
            for batch in batches:
                watch.begin(batch)
                model.hidden_states(batch.tokens, segments=batch.segments)
    finally:
        for handle in handles:
            handle.remove()
    return watch.result()


class _Watch:
    """Sums over calibration rows while a model runs; hooks call `score`, `energy` and `influence`."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.scores: dict[str, Tensor] = {}
        self.energies: dict[str, Tensor] = {}
        self.means: dict[str, Tensor] = {}
        self.cosines = torch.zeros(len(config.blocks), dtype=torch.float64)
        self.batch: Batch | None = None
        self.masks: dict[int, Tensor | None] = {}
        self.counts = torch.zeros(0)
        self.rows = self.tokens = 0

    def begin(self, batch: Batch) -> None:
        """Padding (segment 0) counts nowhere."""
        full = torch.full((len(batch.tokens),), batch.tokens.shape[1], device=batch.tokens.device)
        self.batch, self.masks = batch, {}
        self.counts = full if batch.segments is None else (batch.segments > 0).sum(1)
        self.rows += int((self.counts > 0).sum())
        self.tokens += int(self.counts.sum())

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

    def score(self, name: str, a: Tensor) -> None:
        """Add (mean over time of |a|)^2 of every row; a (B, T, C)."""
        self._add(self.scores, name, self._mean(a, torch.abs).square().sum(0))

    def energy(self, name: str, a: Tensor, gain: Tensor) -> None:
        """Add the mean over time of (a / gain)^2 of every row; a channel whose gain is 0 has none."""
        mean = self._mean(a, torch.square).sum(0) / gain.detach().double().square()
        self._add(self.energies, name, torch.where(gain == 0, 0.0, mean))

    def mean(self, name: str, a: Tensor, gain: Tensor) -> None:
        """Add the mean over time of a / gain of every row; a channel whose gain is 0 has none."""
        mean = self._mean(a, lambda value: value).sum(0) / gain.detach().double()
        self._add(self.means, name, torch.where(gain == 0, 0.0, mean))

    def influence(self, index: int, before: Tensor, after: Tensor) -> None:
        """Add the mean over time of cos(before, after) of every row."""
        wide = torch.promote_types(before.dtype, torch.float32)
        x, y = before.to(wide), after.to(wide)
        norms = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
        cosine = (x * y).sum(-1) / norms.clamp_min(torch.finfo(wide).tiny)
        self.cosines[index] += self._mean(cosine[..., None], lambda value: value).sum().cpu()

    def _mean(self, a: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        """Mean over valid time (B, C) of a function of a (B, T, C), summed in float32 or wider."""
        wide = torch.promote_types(a.dtype, torch.float32)
        total: Any = 0
        valid = self._valid(a.shape[1])
        length = max(1, CHUNK // max(1, a.shape[0] * a.shape[2]))
        for start in range(0, a.shape[1], length):
            part = of(a[:, start : start + length].to(wide))
            if valid is not None:
                part = part * valid[:, start : start + length, None]
            total = total + part.sum(1)
        return total.double() / self.counts.clamp_min(1)[:, None]

    def _add(self, sums: dict[str, Tensor], name: str, value: Tensor) -> None:
        sums[name] = sums[name] + value if name in sums else value

    def result(self) -> Importance:
        if not self.rows:
            raise HalflapError("no calibration text was read, so nothing can be scored; give at least one document")
        shapes = score_shapes(self.config)
        found = {name: value.sqrt().cpu() for name, value in self.scores.items()}
        hidden = torch.stack([found.pop(f"blocks.{i}.norm") for i in range(len(self.config.blocks))])
        widths = {"hidden": hidden, **{name: _finish(name, value, shapes[name]) for name, value in found.items()}}
        assert {n: tuple(t.shape) for n, t in widths.items()} == shapes, "a module ran without being watched"
        energy = {name: (value / self.rows).cpu().float() for name, value in self.energies.items()}
        means = {name: (value / self.rows).cpu().float() for name, value in self.means.items()}
        table = layout(self.config)
        grids = {name: [axis.size for axis in table[name][0][0]] for name in energy}
        return Importance(
            metric="activation",
            widths={name: value.float() for name, value in widths.items()},
            depth={"block_influence": (1 - self.cosines / self.rows).clamp_min(0).float()},
            energy={name: value.reshape(grids[name]) for name, value in energy.items()},
            mean=means,
            tokens=self.tokens,
        )


def _finish(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Per-channel scores to the grid of the axis: queries take the L2 norm over their channels, states join B and C."""
    if name.endswith(".query"):
        return torch.linalg.vector_norm(value.reshape(*shape, -1), dim=-1)
    if name.endswith(".state"):
        B, C = value.reshape(2, *shape)
        return (B * C).sqrt()
    return value.reshape(shape)


def _norm_hook(watch: _Watch, name: str, norm: Any, score_name: str | None) -> Callable[..., None]:
    """What a norm puts out is its score; without bias and gain it is what the `calibrated` correction asks about."""
    bias, gain = getattr(norm, "bias", None), norm.weight if isinstance(norm, RMSNorm) else 1 + norm.weight

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if score_name is not None:
            watch.score(score_name, output)
        if bias is not None:
            output = output - bias
            watch.mean(f"{name}.bias", output, gain)
        watch.energy(f"{name}.weight", output, gain)

    return hook


def _watch_block(model: HybridModel, index: int, watch: _Watch, sources: Sources) -> list[RemovableHandle]:
    block, prefix = model.blocks[index], f"blocks.{index}"
    norm, mixer = block.norm, block.mixer
    assert isinstance(norm, nn.Module)
    hook = _norm_hook(watch, f"{prefix}.norm", norm, f"{prefix}.norm")
    own = WATCHERS[type(model.config.blocks[index])](mixer, prefix, watch, sources)

    def passed(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        watch.influence(index, args[0], output)

    return [norm.register_forward_hook(hook), block.register_forward_hook(passed), *own]


def _watch_mamba2(mixer: Mamba2Mixer, prefix: str, watch: _Watch, sources: Sources) -> list[RemovableHandle]:
    def projected(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        _projected_mamba2(mixer, output, prefix, watch, sources.mamba)

    def normalised(module: nn.Module, args: tuple[Any, ...]) -> None:
        if sources.mamba == "o":
            watch.score(f"{prefix}.inner", args[0])
        watch.energy(f"{prefix}.mixer.norm.weight", args[0], mixer.norm.weight)

    return [mixer.in_proj.register_forward_hook(projected), mixer.out_proj.register_forward_pre_hook(normalised)]


def _projected_mamba2(inner: Mamba2Inner, output: Tensor, prefix: str, watch: _Watch, source: str) -> None:
    """From z, x, B, C and dt (B, T, ...)."""
    c = inner.config
    bc = slice(c.inner_size, c.conv_size)
    z, xBC, _ = output.split([c.inner_size, c.conv_size, c.num_heads], -1)
    if source in ("x", "z"):
        watch.score(f"{prefix}.inner", z if source == "z" else xBC[..., : c.inner_size])
    bias = None if inner.conv1d.bias is None else inner.conv1d.bias[bc]
    watch.score(f"{prefix}.state", F.silu(causal_conv(xBC[..., bc], inner.conv1d.weight[bc, 0], bias)))


def _watch_mamba1(mixer: Mamba1Mixer, prefix: str, watch: _Watch, sources: Sources) -> list[RemovableHandle]:
    def projected(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        _projected_mamba1(output, prefix, watch, sources.mamba)

    handles = _watch_bottleneck(mixer, prefix, f"{prefix}.mixer", watch)
    if sources.mamba == "o":
        return [*handles, mixer.out_proj.register_forward_pre_hook(_score_hook(watch, f"{prefix}.inner"))]
    return [*handles, mixer.in_proj.register_forward_hook(projected)]


def _projected_mamba1(output: Tensor, prefix: str, watch: _Watch, source: str) -> None:
    """From x and z (B, T, 2I)."""
    x, z = output.chunk(2, -1)
    watch.score(f"{prefix}.inner", z if source == "z" else x)


def _watch_bottleneck(inner: Mamba1Inner, prefix: str, module: str, watch: _Watch) -> list[RemovableHandle]:
    """States, from B and C after their norms, and what these norms divide."""
    c = inner.config

    def read(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        parts = output.split([c.dt_rank, c.state_size, c.state_size], -1)[1:]
        if c.inner_norms:  # without their hooks
            parts = [norm.forward(part) for norm, part in zip((inner.B_norm, inner.C_norm), parts, strict=True)]
        watch.score(f"{prefix}.state", torch.cat([*parts], -1))

    norms = ("dt_norm", "B_norm", "C_norm") if c.inner_norms else ()
    hooks = [
        (norm, _norm_hook(watch, f"{module}.{name}", norm, None)) for name in norms if (norm := getattr(inner, name))
    ]
    return [inner.x_proj.register_forward_hook(read), *(norm.register_forward_hook(hook) for norm, hook in hooks)]


def _watch_hybrid(mixer: HybridMixer, prefix: str, watch: _Watch, sources: Sources) -> list[RemovableHandle]:
    ssm, own = mixer.ssm, f"{prefix}.mixer"

    def projected(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        inputs = output.split(mixer.widths, -1)[-1]
        if isinstance(ssm, Mamba2Inner):
            _projected_mamba2(ssm, inputs, prefix, watch, sources.hybrid)
        elif sources.hybrid in ("x", "z"):
            _projected_mamba1(inputs, prefix, watch, sources.hybrid)

    norm = mixer.attention_norm
    handles = [
        mixer.in_proj.register_forward_hook(projected),
        norm.register_forward_hook(_norm_hook(watch, f"{own}.attention_norm", norm, None)),
    ]
    if sources.hybrid == "o":
        handles.append(mixer.out_proj.register_forward_pre_hook(_score_hook(watch, f"{prefix}.inner")))
    if isinstance(ssm, Mamba2Inner):  # its gated group norm lies within it; an identity stands for the branch's norm

        def scanned(_: nn.Module, args: tuple[Any, ...]) -> None:
            watch.energy(f"{own}.ssm.norm.weight", args[0], ssm.norm.weight)

        return [*handles, mixer.ssm_norm.register_forward_pre_hook(scanned)]
    handles.append(mixer.ssm_norm.register_forward_hook(_norm_hook(watch, f"{own}.ssm_norm", mixer.ssm_norm, None)))
    return [*handles, *_watch_bottleneck(ssm, prefix, f"{own}.ssm", watch)]


def _score_hook(watch: _Watch, name: str) -> Callable[..., None]:
    """What goes into a projection is its score."""
    return lambda _, args: watch.score(name, args[0])


def _watch_attention(mixer: AttentionMixer, prefix: str, watch: _Watch, sources: Sources) -> list[RemovableHandle]:
    del sources
    return [mixer.o_proj.register_forward_pre_hook(_score_hook(watch, f"{prefix}.query"))]


def _watch_mlp(mixer: MLPMixer, prefix: str, watch: _Watch, sources: Sources) -> list[RemovableHandle]:
    def projected(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        watch.score(f"{prefix}.neuron", output)

    if sources.neuron == "pre":
        return [mixer.up_proj.register_forward_hook(projected)]
    return [mixer.down_proj.register_forward_pre_hook(_score_hook(watch, f"{prefix}.neuron"))]


WATCHERS: dict[type, Callable[..., list[RemovableHandle]]] = {
    Mamba2Config: _watch_mamba2,
    Mamba1Config: _watch_mamba1,
    AttentionConfig: _watch_attention,
    HybridConfig: _watch_hybrid,
    MLPConfig: _watch_mlp,
}
