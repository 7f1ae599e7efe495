"""One block class and one model class for every family: a list of `x + mixer(norm(x))`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from halflap.models.attention import AttentionMixer
from halflap.models.cache import BlockState, Cache
from halflap.models.config import (
    AttentionConfig,
    BlockConfig,
    HybridConfig,
    LinearConfig,
    Mamba1Config,
    Mamba2Config,
    MLPConfig,
    ModelConfig,
)
from halflap.models.context import Context, GroupedContext, SequenceContext, stretch
from halflap.models.hybrid import HybridMixer
from halflap.models.layout import is_offset_gain
from halflap.models.linear import Linear, LinearMixer
from halflap.models.mamba1 import Mamba1Mixer
from halflap.models.mamba2 import Mamba2Mixer
from halflap.models.meta import Widened, at_places, widen, with_meta_tokens
from halflap.models.mlp import MLPMixer
from halflap.models.norm import NORMS
from halflap.models.quantization import Quantization
from halflap.models.quantized import Packed
from halflap.ops import select
from halflap.ops.ssd import segment_runs

MIXERS: dict[type, type[nn.Module]] = {
    AttentionConfig: AttentionMixer,
    Mamba2Config: Mamba2Mixer,
    MLPConfig: MLPMixer,
    Mamba1Config: Mamba1Mixer,
    HybridConfig: HybridMixer,
    LinearConfig: LinearMixer,
}

# Families whose fresh output projections (those that write into the residual stream) are divided by sqrt(blocks), as
# Megatron does and Nemotron-H's `rescale_prenorm_residual` says. Nemotron-4 and Hymba have one deviation for all.
SHRINK_OUTPUT_PROJECTIONS = ("nemotron_h", "llama")
OUTPUT_PROJECTIONS = ("out_proj", "o_proj", "down_proj")
SAMPLED = 16  # numbers of a parameter that tell whether it has changed unseen


class Block(nn.Module):
    """x + mixer(norm(x)): x (B, T, D) to (B, T, D)."""

    def __init__(self, config: BlockConfig, model: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.norm = NORMS[model.norm](model.hidden_size, model.norm_eps, before_mixer=True)
        self.mixer = MIXERS[type(config)](config, model.hidden_size)

    def forward(self, x: Tensor, context: Context, state: BlockState | list[BlockState | None] | None = None) -> Tensor:
        context.block = self.index
        return x + self.mixer(self.norm(x), context, state)


class HybridModel(nn.Module):
    """A decoder-only language model whose blocks are its config's list.

    recompute: torch.utils.checkpoint.checkpoint or its like. Where it is set, a pass with gradients keeps what enters
    each block alone, and backward runs the block again. quantization: how its matrices are packed, if they are
    (`models/quantized.py`). more_ends: ids that end a text beside the config's `eos_token_id`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute: Callable[..., Tensor] | None = None
        self.quantization: Quantization | None = None
        self.more_ends: tuple[int, ...] = ()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        meta = (config.num_meta_tokens, config.hidden_size)
        self.meta_tokens = nn.Parameter(torch.zeros(meta)) if config.num_meta_tokens else None
        self.blocks = nn.ModuleList(Block(block, config, index) for index, block in enumerate(config.blocks))
        self.norm = NORMS[config.norm](config.hidden_size, config.norm_eps)
        self.head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        sources = ((i, b.attention.key_value_source) for i, b in enumerate(config.blocks) if b.attention is not None)
        self.readers = {source: index for index, source in sources if source is not None}  # the last of each
        self._meta_state: tuple[object, Cache] | None = None

    @property
    def head_weight(self) -> Tensor:
        """The output embedding (V, D): the language head's, or the input embedding when tied. Unpacked on each call."""
        reader = self.embedding if self.head is None else self.head
        return reader.dequantized().to(self.dtype) if isinstance(reader, Packed) else reader.weight

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states and of weights that are not packed."""
        return self.norm.weight.dtype  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device  # type: ignore[return-value]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) to logits (..., V), in float32 or wider."""
        reader = self.embedding if self.head is None else self.head
        logits = reader.product(hidden) if isinstance(reader, Packed) else select.linear(hidden, reader.weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) to what enters the first block (B, T, D)."""
        hidden = self.embedding(tokens)
        return hidden.to(self.dtype) if isinstance(self.embedding, Packed) else hidden

    def forward(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Cache | Sequence[Cache] | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) in float32 (float64 for a float64 model) of tokens (B, T) int64.

        segments (B, T) separate documents packed in a row (0 is padding); cache continues sequences, and lengths (B,)
        then says how many right-padded tokens of each row count. Of several caches, the rows of each follow those of
        the one before.
        """
        return self.logits(self.hidden_states(tokens, segments=segments, cache=cache, lengths=lengths))

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Cache | Sequence[Cache] | None = None,
        lengths: Tensor | None = None,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """The normalised final hidden states (B, T, D) that the language head reads.

        counts: of several caches of one row, how many of the tokens (1, sum of counts) each goes on by, one after the
        other; nothing is padded then.
        """
        if cache is not None:
            if segments is not None:
                raise ValueError("a cached pass continues one document a row; pass lengths, not segments")
            return self._continue(tokens, [cache] if isinstance(cache, Cache) else cache, lengths, counts)
        hidden, context = self.enter(tokens, segments)
        return self.leave(self._run(hidden, context), context)

    def enter(self, tokens: Tensor, segments: Tensor | None = None) -> tuple[Tensor, SequenceContext]:
        """What the first block of a pass without a cache is given: the residual stream (B, L, D), and the context.

        L is T and the meta tokens. With `context_of`, the blocks and `leave`, a pass can be made in pieces.
        """
        context, wide = self._layout(tokens, segments)
        if wide is not None:
            assert self.meta_tokens is not None
            hidden = with_meta_tokens(self.embed(wide.tokens), wide.slot, self.meta_tokens)
        else:
            hidden = self.embed(tokens)
            if self.meta_tokens is not None:
                hidden = torch.cat([self.meta_tokens.to(hidden.dtype).expand(len(tokens), -1, -1), hidden], 1)
        return self._residual(hidden), context

    def context_of(self, tokens: Tensor, segments: Tensor | None = None) -> SequenceContext:
        """The context of a pass without a cache, as `enter` gives it; reads no weight."""
        return self._layout(tokens, segments)[0]

    def leave(self, hidden: Tensor, context: SequenceContext) -> Tensor:
        """The normalised final hidden states (B, T, D) of the text from what the last block put out (B, L, D)."""
        if context.places is not None:
            hidden = at_places(hidden, context.places)
        elif context.meta:
            hidden = hidden[:, context.meta :]
        return self.norm(hidden)

    def _layout(self, tokens: Tensor, segments: Tensor | None) -> tuple[SequenceContext, Widened | None]:
        """The context of a pass without a cache, and where packed rows have room for meta tokens."""
        meta = self.config.num_meta_tokens
        if segments is None:
            steps = torch.arange(meta + tokens.shape[1], device=tokens.device)
            return self._context(steps.expand(len(tokens), -1)), None
        if not meta:
            return self._context(_steps(tokens), segment_runs(segments)), None
        wide = widen(tokens, segments, meta)
        return self._context(_steps(wide.tokens), wide.runs, wide.place), wide

    def _continue(
        self, tokens: Tensor, caches: Sequence[Cache], lengths: Tensor | None, counts: Sequence[int] | None
    ) -> Tensor:
        """Hidden states of the next tokens (B, T) of the caches' rows, or (1, T) of one after the other."""
        groups: list[tuple[slice, SequenceContext]] = []
        start, along = 0, 0 if counts is None else 1
        for cache, size in zip(caches, counts or [len(cache.lengths) for cache in caches], strict=True):
            if self.meta_tokens is not None and not cache.started:
                cache.start_from(self.meta_state(cache.dtype, tokens.device))
            where = slice(start, start := start + size)
            count = None if lengths is None else lengths[where]
            groups.append((where, self._cached_context(_steps(stretch(tokens, where, along)), cache, count)))
        context = groups[0][1] if len(groups) == 1 else GroupedContext(groups, along)
        hidden = self._run(self.embed(tokens), context, caches)
        for cache, (_, inner) in zip(caches, groups, strict=True):
            if cache.held is None:
                advance(cache, inner.time, inner.lengths)
        return self.norm(hidden)

    def _run(self, hidden: Tensor, context: Context, caches: Sequence[Cache] = ()) -> Tensor:
        """All blocks."""
        hidden = self._residual(hidden)
        recompute = self.recompute if not caches and torch.is_grad_enabled() else None
        if recompute is not None and self.readers:  # gradients of keys and values pass between blocks in this form only
            recompute = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
        for index, block in enumerate(self.blocks):
            if recompute is not None:
                hidden = recompute(block, hidden, context)
            else:
                states = [cache.blocks[index] for cache in caches]
                hidden = block(hidden, context, states if len(states) > 1 else next(iter(states), None))
        return hidden

    def _residual(self, hidden: Tensor) -> Tensor:
        """In the dtype of the residual stream."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return hidden.to(wide) if self.config.residual_in_fp32 else hidden

    def _context(self, steps: Tensor, runs: Tensor | None = None, places: Tensor | None = None) -> SequenceContext:
        """Of a pass without a cache: steps (B, T) count from each row's start."""
        meta = self.config.num_meta_tokens
        if runs is None:
            return SequenceContext(positions=steps, meta=meta, readers=self.readers)
        starts = torch.where(F.pad(runs[:, 1:] != runs[:, :-1], (1, 0), value=True), steps, 0).cummax(1).values
        return SequenceContext(
            positions=steps - starts, runs=runs, starts=starts, places=places, meta=meta, readers=self.readers
        )

    def _cached_context(self, steps: Tensor, cache: Cache, lengths: Tensor | None) -> SequenceContext:
        before = cache.meta + cache.used
        return SequenceContext(
            positions=cache.meta + cache.lengths[:, None] + steps,
            lengths=lengths,
            past=before > 0,
            uniform=cache.uniform,
            used=before + steps.shape[1],
            meta=cache.meta,
            decode_window_compat=cache.decode_window_compat,
            readers=self.readers,
            held=cache.held,
        )

    def meta_state(self, dtype: torch.dtype, device: torch.device | str) -> Cache:
        """What the meta tokens leave in the cache of every sequence; computed once for weights and dtype.

        Keys and values of positions 0 .. M-1, convolution tails and SSM states, of one row. Where gradients are wanted
        it is computed for this pass with its graph, without which they would silently miss a part.
        """
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            return self._read_meta_tokens(dtype, device)
        kind = torch.device(device).type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (dtype, str(device), autocast, _fingerprint(self))
        if self._meta_state is None or self._meta_state[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # in this order: leaving inference turns gradients on
                self._meta_state = key, self._read_meta_tokens(dtype, device)
        return self._meta_state[1]

    def _read_meta_tokens(self, dtype: torch.dtype, device: torch.device | str) -> Cache:
        assert self.meta_tokens is not None
        state = Cache.for_meta_tokens(self.config, dtype, device)
        rows = self.meta_tokens[None]
        self._run(rows, self._cached_context(_steps(rows), state, None), [state])
        return state

    def forget_meta_state(self) -> None:
        """To be called when what the blocks compute changes while their parameters do not."""
        self._meta_state = None


def _steps(rows: Tensor) -> Tensor:
    """0, 1, 2, ... in each row: (B, T) for rows (B, T, ...)."""
    return torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[:2])


def _fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Changes with the parameters' content.

    Versions tell of every change in place but those that PyTorch does not count: of fused optimisers and of `.data`.
    Some numbers of each parameter tell of these.
    """
    parameters = list(model.parameters())
    some = [p.detach().flatten()[:: max(1, p.numel() // SAMPLED)][:SAMPLED].float() for p in parameters]
    versions = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters)
    return *versions, *torch.cat(some).tolist()


def advance(cache: Cache, tokens: int, lengths: Tensor | None = None) -> None:
    """Count so many tokens of every row as read, or `lengths` (B,) of them."""
    if lengths is None:
        cache.lengths = cache.lengths + tokens
        cache.used += tokens
    else:
        cache.advance(lengths)


@torch.no_grad()
def initialize(model: HybridModel, seed: int) -> None:
    """Random weights: normal of deviation `initializer_range`, output projections smaller in some families (the table).

    A is uniform in 1..16 a head, of Mamba-1 1, 2, .. over a channel's states; dt is log-uniform in 0.001..0.1; D and
    the norms' gains are one (stored as 0 where the stored weight is the distance from one).
    """
    generator = torch.Generator().manual_seed(seed)
    std = model.config.initializer_range
    shrink = math.sqrt(len(model.blocks)) if model.config.family in SHRINK_OUTPUT_PROJECTIONS else 1.0

    def uniform(tensor: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low

    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 2)[-2:]
        if leaf[-1] == "A_log" and parameter.ndim == 2:
            value = torch.arange(1, parameter.shape[1] + 1, dtype=torch.float64).log().expand(parameter.shape)
        elif leaf[-1] == "A_log":
            value = uniform(parameter, 1, 16).log()
        elif leaf[-1] == "dt_bias":
            step = uniform(parameter, math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
            value = step + torch.log(-torch.expm1(-step))
        elif is_offset_gain(model.config, name) or leaf == ["norm", "bias"]:
            value = torch.zeros(parameter.shape)
        elif leaf[-1] == "D" or leaf[0].endswith("norm"):
            value = torch.ones(parameter.shape)
        elif leaf[0] == "conv1d":  # PyTorch's Kaiming-uniform(a = sqrt 5) of a depthwise kernel is +-1/sqrt(W)
            bound = 1 / math.sqrt(_conv_width(model, name))
            value = uniform(parameter, -bound, bound)
        elif leaf[-1] == "bias":
            value = torch.zeros(parameter.shape)
        else:
            scale = std / shrink if leaf[0] in OUTPUT_PROJECTIONS else std
            value = torch.randn(parameter.shape, generator=generator) * scale
        parameter.copy_(value)


def _conv_width(model: HybridModel, name: str) -> int:
    ssm = model.config.blocks[int(name.split(".")[1])].ssm
    assert ssm is not None
    return ssm.conv_kernel
