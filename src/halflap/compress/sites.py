"""Where the activations of every axis are: a module, whether its input or its output is read, and which channels.

hidden    output of every block's norm             query   input of o_proj
neuron    post: input of down_proj; pre: what the activation function reads (of gated MLPs the gate)
inner     x, z: rows of in_proj, before the convolution; o: input of out_proj, which in hybrid blocks has both
          branches
state     rows of B and C; `transform` gives them as the scan reads them, after convolution or norms
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halflap.compress.axes import short_name
from halflap.compress.importance import Scoring
from halflap.models.attention import AttentionMixer
from halflap.models.config import (
    AttentionConfig,
    BlockConfig,
    HybridConfig,
    LinearConfig,
    Mamba1Config,
    Mamba2Config,
    MLPConfig,
)
from halflap.models.hybrid import HybridMixer
from halflap.models.mamba1 import Mamba1Inner, Mamba1Mixer
from halflap.models.mamba2 import Mamba2Inner, Mamba2Mixer
from halflap.models.mlp import MLPMixer
from halflap.models.model import HybridModel
from halflap.ops.conv import causal_conv

ALL = slice(None)


class Site(NamedTuple):
    """An activation (B, T, C) that scores an axis.

    name      of the score; `blocks.i.norm` is row i of `hidden`, `blocks.i.state.B` and `.C` make `blocks.i.state`
    source    a value of `Scoring`; empty where there is no choice
    channels  of the module's input or output
    transform of these and the runs (B, T) that number a row's documents, if it has several; keeps their number
    """

    name: str
    source: str
    module: nn.Module
    is_output: bool
    channels: slice = ALL
    transform: Callable[[Tensor, Tensor | None], Tensor] | None = None

    @property
    def key(self) -> str:
        return f"{self.name}@{self.source}"

    def hook(self, use: Callable[[Tensor], None]) -> Any:
        """Hand the whole input or output to `use` at every pass; returns the hook's handle."""

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            use(args[0])

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            use(output)

        module = self.module
        return module.register_forward_hook(after) if self.is_output else module.register_forward_pre_hook(before)


def sites(model: HybridModel, scorings: Iterable[Scoring]) -> list[Site]:
    """Of every axis of every block, what these scorings read."""
    scorings = list(scorings)
    found = []
    for index, block in enumerate(model.blocks):
        config, prefix = model.config.blocks[index], f"blocks.{index}"
        found.append(Site(f"{prefix}.norm", "", block.norm, True))  # type: ignore[arg-type]
        for site in SITES[type(config)](block.mixer, prefix):
            if site.source in {place_of(config, site.name, scoring) for scoring in scorings}:
                found.append(site)
    return found


def source_of(config: BlockConfig, name: str, scoring: Scoring) -> str:
    """The source that a scoring asks for; empty for scores that leave no choice."""
    axis = short_name(name)
    if axis == "inner":
        return scoring.hybrid if isinstance(config, HybridConfig) else scoring.mamba
    return scoring.neuron if axis == "neuron" else ""


def place_of(config: BlockConfig, name: str, scoring: Scoring) -> str:
    """The source whose activation is read: FLAP is another statistic of "o"."""
    source = source_of(config, name, scoring)
    return "o" if source == "flap" else source


def _mamba2(mixer: Mamba2Mixer, prefix: str) -> Iterator[Site]:
    yield from _projected_mamba2(mixer, mixer.in_proj, prefix, 0)
    yield Site(f"{prefix}.inner", "o", mixer.out_proj, False)


def _projected_mamba2(inner: Mamba2Inner, projection: nn.Module, prefix: str, start: int) -> Iterator[Site]:
    """From z, x, B, C and dt, which begin at channel `start`."""
    c = inner.config
    x = start + c.inner_size
    yield Site(f"{prefix}.inner", "z", projection, True, slice(start, x))
    yield Site(f"{prefix}.inner", "x", projection, True, slice(x, x + c.inner_size))
    for number, name in enumerate("BC"):
        first = c.inner_size + number * c.num_groups * c.state_size
        rows = slice(first, first + c.num_groups * c.state_size)
        where = slice(x + rows.start, x + rows.stop)
        yield Site(f"{prefix}.state.{name}", "", projection, True, where, partial(_convolved, inner, rows))


def _convolved(inner: Mamba2Inner, rows: slice, a: Tensor, runs: Tensor | None) -> Tensor:
    """In float32 or wider, as the model convolves."""
    conv, wide = inner.conv1d, torch.promote_types(a.dtype, torch.float32)
    bias = None if conv.bias is None else conv.bias[rows].to(wide)
    return F.silu(causal_conv(a.to(wide), conv.weight[rows, 0].to(wide), bias, runs=runs))


def _mamba1(mixer: Mamba1Mixer, prefix: str) -> Iterator[Site]:
    yield from _projected_mamba1(mixer, mixer.in_proj, prefix, 0)
    yield Site(f"{prefix}.inner", "o", mixer.out_proj, False)


def _projected_mamba1(inner: Mamba1Inner, projection: nn.Module, prefix: str, start: int) -> Iterator[Site]:
    """From x and z, which begin at channel `start`, and the projection of x to dt, B and C."""
    c = inner.config
    z = start + c.inner_size
    yield Site(f"{prefix}.inner", "x", projection, True, slice(start, z))
    yield Site(f"{prefix}.inner", "z", projection, True, slice(z, z + c.inner_size))
    for number, name in enumerate("BC"):
        first = c.dt_rank + number * c.state_size
        if c.inner_norms:
            yield Site(f"{prefix}.state.{name}", "", getattr(inner, f"{name}_norm"), True)
        else:
            yield Site(f"{prefix}.state.{name}", "", inner.x_proj, True, slice(first, first + c.state_size))


def _hybrid(mixer: HybridMixer, prefix: str) -> Iterator[Site]:
    start = sum(mixer.widths[:-1])
    if isinstance(mixer.ssm, Mamba2Inner):
        yield from _projected_mamba2(mixer.ssm, mixer.in_proj, prefix, start)
    else:
        yield from _projected_mamba1(mixer.ssm, mixer.in_proj, prefix, start)
    yield Site(f"{prefix}.inner", "o", mixer.out_proj, False)


def _attention(mixer: AttentionMixer, prefix: str) -> Iterator[Site]:
    yield Site(f"{prefix}.query", "", mixer.o_proj, False)


def _mlp(mixer: MLPMixer, prefix: str) -> Iterator[Site]:
    yield Site(f"{prefix}.neuron", "pre", mixer.gate_proj if mixer.config.gated else mixer.up_proj, True)
    yield Site(f"{prefix}.neuron", "post", mixer.down_proj, False)


SITES: dict[type, Callable[[Any, str], Iterator[Site]]] = {
    Mamba2Config: _mamba2,
    Mamba1Config: _mamba1,
    AttentionConfig: _attention,
    HybridConfig: _hybrid,
    MLPConfig: _mlp,
    LinearConfig: lambda mixer, prefix: iter(()),
}
