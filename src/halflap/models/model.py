"""One block class and one model class for every family: a list of `x + mixer(norm(x))`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halflap.models.attention import AttentionMixer
from halflap.models.cache import BlockState, Cache
from halflap.models.config import AttentionConfig, BlockConfig, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.context import SequenceContext
from halflap.models.layout import is_offset_gain
from halflap.models.linear import Linear
from halflap.models.mamba2 import Mamba2Mixer
from halflap.models.mlp import MLPMixer
from halflap.models.norm import NORMS
from halflap.ops import select
from halflap.ops.ssd import segment_runs

MIXERS: dict[type, type[nn.Module]] = {
    AttentionConfig: AttentionMixer,
    Mamba2Config: Mamba2Mixer,
    MLPConfig: MLPMixer,
}


class Block(nn.Module):
    """x + mixer(norm(x)): x (B, T, D) to (B, T, D)."""

    def __init__(self, config: BlockConfig, model: ModelConfig) -> None:
        super().__init__()
        self.norm = NORMS[model.norm](model.hidden_size, model.norm_eps, before_mixer=True)
        self.mixer = MIXERS[type(config)](config, model.hidden_size)

    def forward(self, x: Tensor, context: SequenceContext, state: BlockState | None = None) -> Tensor:
        return x + self.mixer(self.norm(x), context, state)


class HybridModel(nn.Module):
    """A decoder-only language model whose blocks are its config's list."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(block, config) for block in config.blocks)
        self.norm = NORMS[config.norm](config.hidden_size, config.norm_eps)
        self.head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        # torch.utils.checkpoint.checkpoint or its like: blocks then keep their input alone and run again in the backward
        self.recompute: Callable[..., Tensor] | None = None

    @property
    def head_weight(self) -> Tensor:
        """The output embedding (V, D): the language head's, or the input embedding when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) in float32 (float64 for a float64 model) of tokens (B, T) int64.

        segments (B, T) separate documents packed in a row (0 is padding); cache continues sequences, and lengths (B,)
        then says how many right-padded tokens of each row count.
        """
        hidden = self.hidden_states(tokens, segments=segments, cache=cache, lengths=lengths)
        logits = select.linear(hidden, self.head_weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """The normalised final hidden states (B, T, D) that the language head reads."""
        context = self._context(tokens, segments, cache, lengths)
        hidden = self.embedding(tokens)
        if self.config.residual_in_fp32:
            hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        again = self.recompute if cache is None and torch.is_grad_enabled() else None
        for index, block in enumerate(self.blocks):
            if again is not None:
                hidden = again(block, hidden, context)
            else:
                hidden = block(hidden, context, None if cache is None else cache.blocks[index])
        if cache is not None:
            _advance(cache, tokens, lengths)
        return self.norm(hidden)

    def _context(
        self, tokens: Tensor, segments: Tensor | None, cache: Cache | None, lengths: Tensor | None
    ) -> SequenceContext:
        steps = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        if cache is not None:
            if segments is not None:
                raise ValueError("a cached pass continues one document a row; pass lengths, not segments")
            uniform = cache.uniform
            return SequenceContext(
                positions=cache.lengths[:, None] + steps,
                lengths=lengths,
                past=cache.used > 0,
                uniform=uniform,
                used=cache.used + tokens.shape[1],
            )
        if segments is None:
            return SequenceContext(positions=steps)
        runs = segment_runs(segments)
        starts = torch.where(F.pad(runs[:, 1:] != runs[:, :-1], (1, 0), value=True), steps, 0).cummax(1).values
        return SequenceContext(positions=steps - starts, runs=runs, starts=starts)


def _advance(cache: Cache, tokens: Tensor, lengths: Tensor | None) -> None:
    if lengths is None:
        cache.lengths = cache.lengths + tokens.shape[1]
        cache.used += tokens.shape[1]
    else:
        cache.lengths = cache.lengths + lengths
        cache.used = int(cache.lengths.max())
        cache.uniform = bool((cache.lengths == cache.lengths[0]).all())


@torch.no_grad()
def initialize(model: HybridModel, seed: int) -> None:
    """Random weights as Nemotron-H was trained from (Megatron): normal, output projections shrunk by sqrt(blocks).

    A is uniform in 1..16 and dt log-uniform in 0.001..0.1 a head; D and the norms' gains are one (stored as 0 where
    the stored weight is the distance from one).
    """
    generator = torch.Generator().manual_seed(seed)
    std, shrink = model.config.initializer_range, math.sqrt(len(model.blocks))

    def uniform(tensor: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low

    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 2)[-2:]
        if leaf[-1] == "A_log":
            value = uniform(parameter, 1, 16).log()
        elif leaf[-1] == "dt_bias":
            step = uniform(parameter, math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
            value = step + torch.log(-torch.expm1(-step))
        elif is_offset_gain(model.config, name) or leaf == ["norm", "bias"]:
            value = torch.zeros(parameter.shape)
        elif leaf[-1] == "D" or leaf[0] == "norm":
            value = torch.ones(parameter.shape)
        elif leaf[0] == "conv1d":  # PyTorch's Kaiming-uniform(a = sqrt 5) of a depthwise kernel is +-1/sqrt(W)
            bound = 1 / math.sqrt(_conv_width(model, name))
            value = uniform(parameter, -bound, bound)
        elif leaf[-1] == "bias":
            value = torch.zeros(parameter.shape)
        else:
            scale = std / shrink if leaf[0] in ("out_proj", "o_proj", "down_proj") else std
            value = torch.randn(parameter.shape, generator=generator) * scale
        parameter.copy_(value)


def _conv_width(model: HybridModel, name: str) -> int:
    block = model.config.blocks[int(name.split(".")[1])]
    assert isinstance(block, Mamba2Config)
    return block.conv_kernel
