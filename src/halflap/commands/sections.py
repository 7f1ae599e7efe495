"""The sections that recipes of several verbs share: text, budgets, sizes, search space, settings of one method.

A field's docstring is its help. Fields of `flat` sections are flags without a section (`--params`); other sections
keep their name (`--sizes.hidden-size`). No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from halflap.data.config import Data
from halflap.recipe import (
    BUDGETS,
    DISTILLATION,
    IMPORTANCE,
    SEARCH,
    TEXT,
    Bytes,
    Count,
    Duration,
    Files,
    Positive,
    Tokens,
    flat,
)

Phase = Literal["decode", "prefill"]
NormCorrection = Literal["none", "masked", "calibrated"]
WidthMetric = Literal["activation", "weight_norm", "random"]
DepthMetric = Literal["kl", "block_influence", "loss", "hidden_mse", "logit_mse"]


@flat(TEXT)
@dataclass(frozen=True, kw_only=True)
class Text:
    """Text to read."""

    data: Files = ()
    """Text files (.txt, .jsonl, .json, .parquet, plain or .gz/.xz/.zst), folders of those, or token shards."""
    field: Annotated[str, Parameter(name="--data.field")] = "text"
    """Column of the records that holds the text."""
    weights: Annotated[tuple[float, ...], Parameter(name="--data.weights")] = ()
    """Share of each path in the blend; in proportion to its size when not given."""
    packing: Annotated[Literal["segments", "stream"], Parameter(name="--data.packing")] = "segments"
    """Keep the documents packed into a row apart (segments), or let the model read across (stream)."""
    held_out: Annotated[float, Parameter(name="--data.held-out")] = 0.05
    """Share of the documents, by a hash of their text, kept back to judge on when no other text is given for it."""

    def source(self, sequence_length: int) -> Data:
        """The same as the data section of lower levels, in rows of `sequence_length` tokens."""
        return Data(self.data, self.field, self.weights or None, sequence_length, self.packing, self.held_out)


@flat(BUDGETS)
@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Ceilings on the student; several together are all kept."""

    params: Count | None = None
    """All parameters, embeddings too: 4.3B or 50%."""
    non_embedding_params: Count | None = None
    """Parameters but the embeddings and the head."""
    memory: Bytes | None = None
    """Weights and cache together: 31.7GiB or 50%."""
    latency: Duration | None = None
    """Time of one pass in the given phase: 20ms or 50%."""
    throughput: Count | None = None
    """At least this many tokens a second in the given phase."""
    flops: Count | None = None
    """Floating-point operations a token in the given phase."""
    phase: Phase = "decode"
    """Phase that latency, throughput and FLOPs are meant in."""
    context: Positive = 8192
    """Context length of the memory, latency and FLOP budgets, in tokens."""
    batch: Positive = 1
    """Sequences at once in the memory, latency and throughput budgets."""
    weight_bits: Positive = 16
    """Bits a weight takes in the memory budget."""
    cache_bits: Positive = 16
    """Bits a key or value takes in the memory budget; SSM states take twice as many."""


@flat(SEARCH)
@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How candidates are ranked."""

    method: Literal["homogeneous"] = "homogeneous"
    """One size an axis for all blocks."""
    shortlist: Positive = 8
    """Candidates that are built and scored by loss."""
    shortlist_tokens: Tokens = 0
    """Tokens the best of the shortlist are distilled on and then scored again; 0 lets the loss as cut decide."""
    refined: Positive = 3
    """How many of the shortlist those are."""
    score_tokens: Positive = 16384
    """Tokens on which a candidate's loss is measured."""


@flat(IMPORTANCE)
@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """How importance is measured."""

    metric: WidthMetric = "activation"
    """What ranks widths; weight_norm and random are controls."""
    depth_metric: DepthMetric = "kl"
    """What ranks blocks: the effect of leaving one out, or how little it moves the residual stream."""


@flat(DISTILLATION)
@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What the student learns from its teacher."""

    loss: Literal["forward_kl", "next_token"] = "forward_kl"
    """Divergence to the teacher's distribution, or plain next-token loss."""
    temperature: float = 1.0
    """Temperature of both distributions."""
    top_k: int = 0
    """Keep only this many teacher logits a token; 0 keeps all."""
