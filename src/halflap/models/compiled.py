"""A model's blocks written down as instructions of native code (ops/native/program.py), of the weights it has then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from halflap.models.attention import AttentionMixer
from halflap.models.config import AttentionConfig, Mamba1Config, Mamba2Config
from halflap.models.hybrid import HybridMixer
from halflap.models.linear import Linear, LinearMixer
from halflap.models.mamba1 import Mamba1Inner, Mamba1Mixer
from halflap.models.mamba2 import Mamba2Inner, Mamba2Mixer
from halflap.models.mlp import MLPMixer
from halflap.models.model import Block, HybridModel
from halflap.models.norm import LayerNorm1P, RMSNorm
from halflap.models.quantized import Packed, QuantizedLinear
from halflap.models.rope import inverse_frequencies
from halflap.ops.native import program as native
from halflap.ops.native.common import DTYPES
from halflap.ops.native.program import ACTIVATIONS, NORMS, Norm, Place, Program
from halflap.ops.native.quantized import words_of

FLOAT_BITS = {torch.float32: 32, torch.bfloat16: 16}


class _Unknown(Exception):
    """A module or type that has no instruction."""


def compiled(model: HybridModel, head: nn.Module | None = None) -> Program | None:
    """From embedded tokens in the first columns of the workspace to logits in the output; None where it cannot be."""
    if type(model) is not HybridModel or model.dtype not in DTYPES or model.device.type != "cpu":
        return None
    writer = _Writer(model)
    try:
        for index, block in enumerate(model.blocks):
            if type(block) is not Block or any(m._forward_hooks or m._forward_pre_hooks for m in block.modules()):
                return None
            writer.block(index, block)
        writer.head(model.norm, head or model.head or model.embedding, model.config.vocab_size)
    except _Unknown:
        return None
    return writer.program


class _Writer:
    """Writes a model's instructions. Buffers of a block lie behind the residual stream; the next block has the same."""

    def __init__(self, model: HybridModel) -> None:
        self.program = Program(width=model.config.hidden_size)
        self.residual = Place(0, model.config.hidden_size, 0)
        self.meta = model.config.num_meta_tokens
        self.index = 0
        self.displaced: dict[int, Place] = {}  # where what new keys and values displace is put aside, by block
        self._top = 0

    def block(self, index: int, block: Block) -> None:
        if type(block.mixer) not in MIXERS:
            raise _Unknown
        self.index, self._top = index, self.residual.stride
        MIXERS[type(block.mixer)](self, block.mixer, self.norm(block.norm))

    def head(self, last: nn.Module, reader: nn.Module, vocab_size: int) -> None:
        norm, to = self.norm(last), Place(-1, vocab_size, 0)
        if isinstance(reader, Packed):
            self.packed(reader, self.residual, to, norm=norm)
        elif type(reader) is Linear or type(reader) is nn.Embedding:
            self.product(reader.weight, None, self.residual, to, norm=norm)
        else:
            raise _Unknown

    def buffer(self, columns: int) -> Place:
        place = Place(self._top, columns, 0)
        self._top += -(-columns // 16) * 16  # rows of a buffer are dense; buffers begin on a cache line
        self.program.width = max(self.program.width, self._top)
        return place

    def norm(self, module: nn.Module) -> Norm:
        keep = self.program.keep
        if type(module) is RMSNorm:
            return Norm(NORMS["rms"], keep(module.weight, torch.float32), None, module.eps)
        if type(module) is LayerNorm1P:
            gain = module.weight.detach().float() + 1
            return Norm(NORMS["layer1p"], keep(gain), keep(module.bias, torch.float32), module.eps)
        if type(module) is nn.Identity:
            return Norm()
        raise _Unknown

    def linear(self, module: nn.Module, source: Place, to: Place, **how: Any) -> None:
        """to (+)= activation(module(norm(source))), as `Product` says."""
        if type(module) is Linear:
            self.product(module.weight, module.bias, source, to, **how)
        elif type(module) is QuantizedLinear:
            self.packed(module, source, to, bias=module.bias, **how)
        else:
            raise _Unknown

    def product(self, weight: Tensor, bias: Tensor | None, source: Place, to: Place, **how: Any) -> None:
        if weight.dtype not in FLOAT_BITS:
            raise _Unknown
        keep, (outputs, inputs) = self.program.keep, weight.shape
        self._product(
            source, to, inputs, outputs, FLOAT_BITS[weight.dtype],
            weight=keep(weight), bias=keep(bias, torch.float32), **how,
        )  # fmt: skip

    def packed(self, module: Packed, source: Place, to: Place, *, bias: Tensor | None = None, **how: Any) -> None:
        """The runs of packed and kept rows, each by itself."""
        m, at = module.matrix, {True: 0, False: 0}
        beside, waits, begin = how.pop("beside", None), how.pop("waits", True), 0
        for rows, is_packed in m.runs:
            first = at[is_packed]
            at[is_packed] += rows
            own = {
                **how, "waits": waits, "beside": None if beside is None else beside.behind(begin),
                "bias": self.program.keep(None if bias is None else bias[begin : begin + rows], torch.float32),
            }  # fmt: skip
            if is_packed:
                words, format = words_of(module.weight_packed[first : first + rows], m.bits)
                if words is None:
                    raise _Unknown
                scales = self.program.keep(module.weight_scale[first : first + rows])
                narrow = int(module.weight_scale.dtype == torch.bfloat16)
                self._product(
                    source, to.behind(begin), m.inputs, rows, format,
                    weight=self.program.keep(words), scales=scales, group=m.group_size, narrow_scales=narrow, **own,
                )  # fmt: skip
            else:
                assert module.weight_kept is not None
                kept = module.weight_kept[first : first + rows]
                self._product(
                    source, to.behind(begin), m.inputs, rows, FLOAT_BITS[kept.dtype],
                    weight=self.program.keep(kept), **own,
                )  # fmt: skip
            begin, waits = begin + rows, False

    def _product(
        self,
        source: Place,
        to: Place,
        inputs: int,
        outputs: int,
        bits: int,
        *,
        norm: Norm | None = None,
        activation: str | None = None,
        beside: Place | None = None,
        adds: bool = False,
        waits: bool = True,
        **more: Any,
    ) -> None:
        self.program.add(
            native.Product, waits=waits, source=source, to=to, beside=beside or Place(), norm=norm or Norm(),
            inputs=inputs, outputs=outputs, format=bits, activation=ACTIVATIONS[activation],
            gated=int(beside is not None), adds=int(adds), **more,
        )  # fmt: skip

    def attend(self, config: AttentionConfig, query: Place, own: tuple[Place, Place] | None, to: Place) -> None:
        rope = config.rope
        speed = torch.empty(0) if rope is None else inverse_frequencies(rope, config.head_dim).float()
        block = self.index if config.key_value_source is None else config.key_value_source
        step = {
            "heads": config.num_attention_heads, "key_heads": config.num_key_value_heads, "size": config.head_dim,
            "value_size": config.value_dim, "rotary": 2 * len(speed), "meta": self.meta, "scale": config.head_dim**-0.5,
            "window": -1 if config.window is None else config.window, "speed": self.program.keep(speed),
        }  # fmt: skip
        key, value = own or (Place(), Place())
        if own is not None:
            row = 0 if config.window is None else config.num_key_value_heads * (config.head_dim + config.value_dim)
            self.displaced[block] = self.program.aside(row)
            self.program.add(native.Keep, key=key, value=value, held=self.displaced[block], state=2 * block, **step)
        self.program.add(
            native.Attention, query=query, key=key, value=value, to=to, held=self.displaced[block], state=2 * block,
            own=int(own is not None), **step,
        )  # fmt: skip

    def mamba2(self, module: Mamba2Inner, source: Place, to: Place, *, waits: bool = True) -> None:
        c: Mamba2Config = module.config
        keep, wide = self.program.keep, torch.float32
        self.program.add(
            native.Mamba2, waits=waits, source=source, to=to, state=2 * self.index + 1,
            held=self.program.aside(c.inner_size + c.conv_size + c.num_heads), heads=c.num_heads,
            channels=c.head_dim, groups=c.num_groups, states=c.state_size, width=c.conv_kernel,
            low=c.time_step_limit[0], high=c.time_step_limit[1], eps=c.norm_eps,
            conv_weight=keep(module.conv1d.weight[:, 0].T, wide), conv_bias=keep(module.conv1d.bias, wide),
            dt_bias=keep(module.dt_bias, wide), A_log=keep(module.A_log, wide), D=keep(module.D, wide),
            norm_weight=keep(module.norm.weight, wide),
        )  # fmt: skip

    def mamba1(self, module: Mamba1Inner, source: Place, to: Place) -> None:
        c: Mamba1Config = module.config
        keep, wide, state = self.program.keep, torch.float32, 2 * self.index + 1
        u, read, dt = self.buffer(c.inner_size), self.buffer(c.dt_rank + 2 * c.state_size), self.buffer(c.inner_size)
        B, C = read.behind(c.dt_rank), read.behind(c.dt_rank + c.state_size)
        self.program.add(
            native.Convolution, source=source, to=u, held=self.program.aside(c.inner_size), state=state,
            channels=c.inner_size, width=c.conv_kernel,
            weight=keep(module.conv1d.weight[:, 0].T, wide), bias=keep(module.conv1d.bias, wide),
        )  # fmt: skip
        self.linear(module.x_proj, u, read)
        self.linear(module.dt_proj, read, dt, norm=self.norm(module.dt_norm) if c.inner_norms else None)
        for place, norm in ((B, "B_norm"), (C, "C_norm")) if c.inner_norms else ():
            own = self.norm(getattr(module, norm))
            self.program.add(
                native.Normalise, waits=False, source=place, to=place, beside=Place(), size=c.state_size, norm=own
            )
        self.program.add(
            native.Selective, u=u, dt=dt, B=B, C=C, gate=source.behind(c.inner_size), to=to, state=state,
            held=self.program.aside(2 * c.inner_size + c.state_size), channels=c.inner_size, states=c.state_size,
            A=keep(-torch.exp(module.A_log.detach().float())), D=keep(module.D, wide),
            dt_bias=keep(module.dt_bias, wide),
        )  # fmt: skip


def _attention_mixer(w: _Writer, mixer: AttentionMixer, norm: Norm) -> None:
    c = mixer.config
    query, to = w.buffer(c.num_attention_heads * c.head_dim), w.buffer(c.num_attention_heads * c.value_dim)
    w.linear(mixer.q_proj, w.residual, query, norm=norm)
    own = None
    if c.key_value_source is None:
        own = w.buffer(c.num_key_value_heads * c.head_dim), w.buffer(c.num_key_value_heads * c.value_dim)
        w.linear(mixer.k_proj, w.residual, own[0], norm=norm, waits=False)
        w.linear(mixer.v_proj, w.residual, own[1], norm=norm, waits=False)
    w.attend(c, query, own, to)
    w.linear(mixer.o_proj, to, w.residual, adds=True)


def _mamba2_mixer(w: _Writer, mixer: Mamba2Mixer, norm: Norm) -> None:
    c = mixer.config
    projected, to = w.buffer(c.inner_size + c.conv_size + c.num_heads), w.buffer(c.inner_size)
    w.linear(mixer.in_proj, w.residual, projected, norm=norm)
    w.mamba2(mixer, projected, to)
    w.linear(mixer.out_proj, to, w.residual, adds=True)


def _mamba1_mixer(w: _Writer, mixer: Mamba1Mixer, norm: Norm) -> None:
    c = mixer.config
    projected, to = w.buffer(2 * c.inner_size), w.buffer(c.inner_size)
    w.linear(mixer.in_proj, w.residual, projected, norm=norm)
    w.mamba1(mixer, projected, to)
    w.linear(mixer.out_proj, to, w.residual, adds=True)


def _hybrid_mixer(w: _Writer, mixer: HybridMixer, norm: Norm) -> None:
    a, s = mixer.config.attention, mixer.config.ssm
    projected, attended, scanned = w.buffer(sum(mixer.widths)), w.buffer(s.inner_size), w.buffer(s.inner_size)
    starts = [sum(mixer.widths[:n]) for n in range(len(mixer.widths))]
    w.linear(mixer.in_proj, w.residual, projected, norm=norm)
    own = (projected.behind(starts[1]), projected.behind(starts[2])) if a.key_value_source is None else None
    w.attend(a, projected, own, attended)
    inputs = projected.behind(starts[-1])
    if isinstance(mixer.ssm, Mamba1Inner):
        w.mamba1(mixer.ssm, inputs, scanned)
    else:
        w.mamba2(mixer.ssm, inputs, scanned, waits=False)
    w.program.add(
        native.Normalise, source=attended, beside=scanned, to=attended, size=s.inner_size, averages=1,
        norm=w.norm(mixer.attention_norm), other=w.norm(mixer.ssm_norm),
    )  # fmt: skip
    w.linear(mixer.out_proj, attended, w.residual, adds=True)


def _mlp_mixer(w: _Writer, mixer: MLPMixer, norm: Norm) -> None:
    c, beside = mixer.config, None
    if c.gated:
        beside = w.buffer(c.intermediate_size)
        w.linear(mixer.gate_proj, w.residual, beside, norm=norm)
    up = w.buffer(c.intermediate_size)
    w.linear(mixer.up_proj, w.residual, up, norm=norm, activation=c.activation, beside=beside)
    w.linear(mixer.down_proj, up, w.residual, adds=True)


def _linear_mixer(w: _Writer, mixer: LinearMixer, norm: Norm) -> None:
    size = w.residual.stride
    copy = w.buffer(size)  # the product adds to what it reads
    w.program.add(native.Normalise, source=w.residual, to=copy, beside=Place(), size=size, norm=norm)
    w.linear(mixer.out_proj, copy, w.residual, adds=True)


MIXERS: dict[type, Callable[[_Writer, Any, Norm], None]] = {
    AttentionMixer: _attention_mixer,
    Mamba2Mixer: _mamba2_mixer,
    Mamba1Mixer: _mamba1_mixer,
    HybridMixer: _hybrid_mixer,
    MLPMixer: _mlp_mixer,
    LinearMixer: _linear_mixer,
}
