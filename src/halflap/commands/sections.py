"""The sections that recipes of several verbs share: text, budgets, sizes, search space, settings of one method.

A field's docstring is its help. Fields of `flat` sections are flags without a section (`--params`); other sections
keep their name (`--sizes.hidden-size`). No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from halflap.data.config import Data
from halflap.recipe import Bytes, Count, Duration, Files, Tokens, flat, section

Phase = Literal["decode", "prefill"]
NormCorrection = Literal["none", "masked", "calibrated"]
WidthMetric = Literal["l2_of_mean", "mean_of_mean", "l2_of_signed_mean", "random", "weight_norm"]
DepthMetric = Literal["block_influence", "kl", "loss"]


@flat("Text")
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


@flat("Budgets (ceilings, all kept; 50% is a share of the teacher's)")
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
    context: Tokens = 8192
    """Context length of the memory, latency and FLOP budgets, in tokens."""
    batch: int = 1
    """Sequences at once in the memory, latency and throughput budgets."""
    weight_bits: int = 16
    """Bits a weight takes in the memory budget."""
    cache_bits: int = 16
    """Bits a key or value takes in the memory budget; SSM states take 32."""


@section("Sizes of the student")
@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the student; a size not given stays the teacher's."""

    hidden_size: int | None = None
    """Width of the residual stream."""
    intermediate_size: int | None = None
    """Neurons of each MLP."""
    mamba_num_heads: int | None = None
    """Heads of each Mamba block, a multiple of its groups."""
    mamba_head_dim: int | None = None
    """Channels of a Mamba head."""
    ssm_state_size: int | None = None
    """State size of a Mamba block."""
    num_attention_heads: int | None = None
    """Query heads of each attention block, a multiple of its key/value heads."""
    num_key_value_heads: int | None = None
    """Key/value heads of each attention block."""
    num_blocks: int | None = None
    """How many blocks stay; the least important go."""
    drop_blocks: tuple[int, ...] = ()
    """Blocks that go, by index."""


@section("Search space (sizes to try; an axis not given is chosen automatically)")
@dataclass(frozen=True, kw_only=True)
class Space:
    """Sizes to try on each axis."""

    hidden_size: tuple[int, ...] = ()
    """Widths of the residual stream."""
    intermediate_size: tuple[int, ...] = ()
    """Neurons of each MLP."""
    mamba_num_heads: tuple[int, ...] = ()
    """Heads of each Mamba block."""
    mamba_head_dim: tuple[int, ...] = ()
    """Channels of a Mamba head."""
    ssm_state_size: tuple[int, ...] = ()
    """State sizes of a Mamba block."""
    num_attention_heads: tuple[int, ...] = ()
    """Query heads of each attention block."""
    num_key_value_heads: tuple[int, ...] = ()
    """Key/value heads of each attention block."""
    num_blocks: tuple[int, ...] = ()
    """Numbers of blocks that stay."""
    max_width_cut: float = 0.4
    """Largest share of an axis that automatic choices cut."""
    max_depth_cut: float = 0.2
    """Largest share of the blocks that automatic choices drop."""


@flat("Search")
@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How candidates are ranked."""

    method: Literal["homogeneous"] = "homogeneous"
    """One size an axis for all blocks."""
    shortlist: int = 8
    """Candidates that are built and scored by loss."""
    shortlist_tokens: Tokens = 0
    """Tokens each shortlisted candidate is distilled on before it is scored; 0 scores it as cut."""
    score_tokens: Tokens = 16384
    """Tokens on which a candidate's loss is measured."""


@flat("Importance")
@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """How importance is measured."""

    metric: WidthMetric = "l2_of_mean"
    """Statistic that ranks widths."""
    depth_metric: DepthMetric = "kl"
    """Statistic that ranks blocks."""


@flat("Distillation")
@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What the student learns from its teacher."""

    loss: Literal["forward_kl", "next_token"] = "forward_kl"
    """Divergence to the teacher's distribution, or plain next-token loss."""
    temperature: float = 1.0
    """Temperature of both distributions."""
    top_k: int = 0
    """Keep only this many teacher logits a token; 0 keeps all."""
