"""The sections that recipes of several verbs share: text, budgets, sizes, search space, settings of one method.

A field's docstring is its help. Fields of `flat` sections are flags without a section (`--params`); other sections
keep their name (`--sizes.hidden-size`). No torch here.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from halflap.amounts import Amount
from halflap.data.config import Data
from halflap.errors import RecipeError
from halflap.inference.requests import SamplingParams
from halflap.recipe import (
    ANY_TEXT,
    BUDGETS,
    DISTILLATION,
    IMPORTANCE,
    SAMPLING,
    SEARCH,
    SERVING,
    TEXT,
    VLLM,
    Bytes,
    Count,
    Duration,
    File,
    Files,
    Positive,
    Rate,
    Tokens,
    flat,
)

Phase = Literal["decode", "prefill"]
NormCorrection = Literal["none", "masked", "calibrated"]
WidthMetric = Literal["activation", "taylor", "weight_norm", "random"]
Loss = Literal["forward_kl", "reverse_kl", "symmetric_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "next_token"]
DepthMetric = Literal["kl", "block_influence", "loss", "hidden_mse", "logit_mse", "taylor"]
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#,]+")
REMOVING = ("kl", "loss", "hidden_mse", "logit_mse")
MambaSource = Literal["x", "z", "o", "flap"]


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
    """Limits on the student; several together are all kept."""

    params: Count | None = None
    """All parameters, embeddings too: 4.3B or 50%."""
    non_embedding_params: Count | None = None
    """Parameters but the embeddings and the head."""
    memory: Bytes | None = None
    """Weights and cache together: 31.7GiB or 50%."""
    latency: Duration | None = None
    """Time of one pass in the given phase: 20ms or 50%."""
    throughput: Rate | None = None
    """At least this many tokens a second in the given phase: 400, 0.5 or 150%."""
    flops: Count | None = None
    """Floating-point operations a token in the given phase."""
    costs: File | None = None
    """Cost table of this device that `bench --blocks` wrote; latency and throughput budgets measure one without it."""
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

    def __post_init__(self) -> None:
        for name, amount in vars(self).items():
            if isinstance(amount, Amount) and not amount.value > 0:
                raise RecipeError(f"{name} is {amount}, and a budget is above 0: correct --{name.replace('_', '-')}")


@flat(SEARCH)
@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How candidates are ranked."""

    method: Literal["homogeneous", "minipuzzle", "puzzle"] = "homogeneous"
    """One size an axis for all blocks, ranked by loss; numbers of blocks of each type and one width of all MLPs,
    ranked by the text's tokens and by the teacher's that a candidate says (minipuzzle); or a variant for each block by
    what it does in the teacher, ranked by loss (puzzle)."""
    first_look: int = 64
    """Of the candidates so many, the likeliest, are first scored on an eighth of `score_tokens`, and the best are the
    shortlist; 0 takes the likeliest for it."""
    shortlist: Positive = 8
    """Candidates that are built and scored by loss."""
    shortlist_tokens: Tokens = 0
    """Tokens that each of the best of the shortlist is distilled on, on average, and then scored again; 0 lets the
    ranking as cut decide."""
    refined: Positive = 3
    """How many of the shortlist those are."""
    rounds: Literal["halving", "equal"] = "halving"
    """Of these tokens in all, some for each of them, then as many again for the better half, twice as many for the
    better half of that, until two are left (halving); or equal shares."""
    score_tokens: Positive = 16384
    """Tokens on which a candidate's loss is measured."""
    loss_tolerance: float = 0.001
    """Losses within this of the lowest are equal, and throughput, then latency decide where a cost table tells them; by
    default the last digit of the losses that Minitron-SSM prints, whose best two were told apart so."""
    replacement_tokens: Tokens = 32768
    """Method puzzle: tokens on which each variant of each block is tried, at half a pass each."""
    block_tokens: Tokens = 0
    """Method puzzle: tokens on which each variant of a block first learns what its block does; 0 tries them as cut."""
    max_overlap: float = 0.8
    """Method puzzle: largest share of the blocks in which two candidates may be alike; of 1, all but one block."""

    def __post_init__(self) -> None:
        _require("first_look", self.first_look, self.first_look >= 0, "at least 0")
        _require("loss_tolerance", self.loss_tolerance, 0 <= self.loss_tolerance < math.inf, "at least 0 and finite")
        _require("max_overlap", self.max_overlap, 0 <= self.max_overlap <= 1, "from 0 to 1")


@flat(IMPORTANCE)
@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """How importance is measured. Every combination of sources and aggregations is a file of its own, of one pass."""

    metric: WidthMetric = "activation"
    """What ranks widths: activations, or taylor, which is by gradients; weight_norm and random are controls."""
    neuron_source: tuple[Literal["post", "pre"], ...] = ("post",)
    """Score neurons after their activation function or before; of several values here and below the first ranks."""
    mamba_source: tuple[MambaSource, ...] = ("x",)
    """Score Mamba channels by the input projection's x or z, by o, the input of the output projection, or by FLAP."""
    hybrid_source: tuple[MambaSource, ...] = ("o",)
    """The same for hybrid heads, whose o has both branches."""
    sequence_aggregation: tuple[Literal["mean", "l2", "signed_mean"], ...] = ("mean",)
    """Over the tokens of a row: mean of absolute values, L2 norm, or mean of the values with their signs."""
    batch_aggregation: tuple[Literal["l2", "mean"], ...] = ("l2",)
    """Over rows: L2 norm or mean."""
    depth_metric: DepthMetric | None = None
    """What ranks blocks: the effect of leaving one out, taylor's estimate of it, or how little it moves the stream;
    when not given kl, and for method minipuzzle hidden_mse by ranks, both of one pass."""
    depth_average: Literal["mean", "rank"] = "mean"
    """Average the scores over the text, or the ranks of blocks within each row."""
    depth_iterative: Positive | None = None
    """Remove so many blocks one after another, scoring the rest again after each; scored once when not given."""

    def __post_init__(self) -> None:
        lists = ("neuron_source", "mamba_source", "hybrid_source", "sequence_aggregation", "batch_aggregation")
        for name in lists:
            value = getattr(self, name)
            _require(name, value, 0 < len(value) == len(set(value)), "at least one value and each once")
        given = [name for name in lists if getattr(self, name) != getattr(ScoreSettings, name)]
        if self.metric in ("weight_norm", "random") and given:
            raise RecipeError(
                f"metric is {self.metric}, which reads no activations, and {given[0]} was given; leave that out"
            )
        if self.metric == "taylor" and "sequence_aggregation" in given:
            raise RecipeError(
                "metric is taylor, which sums gradients over a row, so sequence_aggregation means nothing: leave it out"
            )
        if self.metric == "taylor" and "flap" in self.mamba_source + self.hybrid_source:
            raise RecipeError(
                "metric is taylor, and flap is a score of its own; choose x, z or o, or metric activation"
            )
        for name, asked in (("depth_average", self.depth_average == "rank"), ("depth_iterative", self.depth_iterative)):
            if asked and self.metric == "random":
                raise RecipeError(f"{name} was given with metric random, which draws scores of blocks; leave it out")
            if asked and self.depth_metric not in (None, *REMOVING):
                raise RecipeError(
                    f"{name} was given with depth_metric {self.depth_metric}, which does not leave blocks out; choose "
                    f"{', '.join(REMOVING)} with --depth-metric"
                )


@flat(DISTILLATION)
@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What the student learns from its teacher."""

    loss: Loss = "forward_kl"
    """Divergence to the teacher's distribution (symmetric_kl is half of Jeffreys'), or plain next-token loss."""
    temperature: float = 1.0
    """Temperature of both distributions."""
    skew_alpha: float = 0.1
    """Share of the other distribution that skew_kl and skew_reverse_kl mix in."""
    next_token_share: float = 0.0
    """Share of next-token loss in a mix with the divergence."""
    top_k: int = 0
    """Keep only this many teacher logits a token; 0 keeps all."""
    top_k_tail: Literal["bucket", "renormalise"] = "bucket"
    """All other tokens as one category, or the kept logits as the whole distribution."""
    top_k_from: Literal["disk", "live"] = "disk"
    """Compute the kept logits once and store them, or at every step."""
    top_k_in: str | None = None
    """Directory for stored logits, which runs that read the same text in the same order share; by default the run's."""
    intermediate: tuple[Literal["embedding", "blocks", "mamba_x"], ...] = ()
    """Inner states to learn too: the embedding's output, blocks' outputs, the x of Mamba."""
    intermediate_loss: Literal["mse", "cosine"] = "mse"
    """Mean squared difference, or 1 - cosine; states of another width than the teacher's get a learned projection."""
    intermediate_weight: float | None = None
    """Weight of the inner states' loss; balanced with the rest of the loss at every step when not given."""
    intermediate_blocks: tuple[int, ...] = ()
    """The student's blocks whose states are learned; all when not given."""
    block_map: tuple[int, ...] = ()
    """The teacher's block for each of the student's; by the pruning plan, else in proportion, when not given."""

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, self.temperature > 0, "above 0")
        _require("skew_alpha", self.skew_alpha, 0 < self.skew_alpha < 1, "above 0 and below 1")
        _require("next_token_share", self.next_token_share, 0 <= self.next_token_share < 1, "from 0 to below 1")
        _require("top_k", self.top_k, self.top_k >= 0, "at least 0")
        weight = self.intermediate_weight
        _require("intermediate_weight", weight, weight is None or weight >= 0, "at least 0")
        if self.loss == "next_token" and (self.top_k or self.intermediate or self.next_token_share):
            raise RecipeError(
                "loss is next_token, which has no teacher, and top_k, intermediate or next_token_share was given; "
                "leave those out or choose a divergence with --loss"
            )
        if self.top_k and (self.loss != "forward_kl" or self.temperature != 1):
            raise RecipeError(
                f"top_k is {self.top_k} with loss {self.loss} at temperature {self.temperature:g}; a teacher's best "
                "logits allow forward_kl at temperature 1: leave out --top-k, or the others"
            )
        if self.top_k and self.top_k_from == "disk" and self.intermediate:
            raise RecipeError(
                "intermediate states need a teacher that runs, and top_k_from is disk; choose --top-k-from live"
            )


@flat(DISTILLATION)
@dataclass(frozen=True, kw_only=True)
class DistillSettings(LossSettings):
    """The same, and the schedule of `distill`."""

    phases: File | None = None
    """YAML of phases, each with its tokens, blend, learning rate and batch, in place of --tokens and the schedule."""


@flat(DISTILLATION)
@dataclass(frozen=True, kw_only=True)
class CompressSettings(LossSettings):
    """The same, and what `compress` may do before and between distillations."""

    steps: Positive = 1
    """Cut and distil in so many steps, the budget falling by the same factor at each; the first teacher teaches all."""
    teacher_correction: Tokens = 0
    """Tokens of the text to train the teacher on first, where it has not seen such text; 0 leaves it as it is."""


def _require(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise RecipeError(f"{name} is {value!r}; it must be {allowed}: correct --{name.replace('_', '-')}")


@flat(SAMPLING)
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token; above it samples."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0 is all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens of this total probability."""
    min_p: float = 0.0
    """Sample among tokens at least this share as likely as the likeliest; 0 is all."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the text so far less likely."""

    def __post_init__(self) -> None:
        SamplingParams(**asdict(self))  # refuses what cannot be


@flat(SERVING)
@dataclass(frozen=True, kw_only=True)
class Decoding:
    """What the engine may hold and guess."""

    max_context: Positive | None = None
    """Tokens of a prompt and its reply; the model's own when not given."""
    max_batch: Positive = 16
    """Replies written at once."""
    prefill_chunk: Positive = 512
    """Tokens of prompts read in one pass, between which replies go on."""
    cache_memory: Bytes | None = None
    """Memory that decode state may take, the prefix cache apart; most of what weights and prefix cache leave free when
    not given."""
    ssm_dtype: Literal["float32", "bfloat16"] | None = None
    """How states of Mamba blocks are kept between tokens: bfloat16 takes half the memory, rounds, and decodes more
    slowly on a CPU; what config.json says (mamba_ssm_cache_dtype), else float32, when not given."""
    prefix_cache: str = "1GiB"
    """Memory for what was read before and may come again; off keeps nothing."""
    speculate: str = "off"
    """Guess tokens ahead, which leaves texts as they are: lookup (in the text itself), or the directory of a small
    model with the same tokenizer."""


@flat(SERVING)
@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where a server listens, whom it answers, and how much of it one may ask."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is all."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    uds: str | None = None
    """Unix socket to listen on instead: a path, guarded by the permissions of its folder."""
    api_key: tuple[str, ...] = ()
    """Keys, one of which a request must bring; without any, the one in $HALFLAP_API_KEY; else anybody may ask."""
    allow_origin: tuple[str, ...] = ()
    """Web pages elsewhere that may ask, by origin: https://app.example, http://localhost:5173, or * for all."""
    engine: Literal["halflap", "vllm"] = "halflap"
    """What runs the model: halflap itself, or vLLM, which is installed apart, on checkpoints of stock classes."""
    replicas: Positive = 1
    """Copies of the model in processes of their own, which share the requests, and the cores (or each has its GPU)."""
    served_model_name: str | None = None
    """The model's id; its directory's name when not given."""
    queue: int = 4096
    """Replies that may wait beside those that run, several of one request too; more are told to come again."""
    max_body: Bytes = Amount(8 << 20, "bytes")
    """Largest body of a request."""
    max_time: Duration = Amount(600.0, "seconds")
    """Longest time a request may take."""
    grace: Duration = Amount(30.0, "seconds")
    """Time that running requests get when the server is told to stop."""

    def __post_init__(self) -> None:
        _require("queue", self.queue, self.queue >= 0, "at least 0")
        for origin in self.allow_origin:
            form = "as browsers send it, such as https://app.example or http://localhost:5173, or *"
            _require("allow_origin", origin, origin == "*" or bool(ORIGIN.fullmatch(origin)), form)
        for name in ("max_body", "max_time"):
            _require(name, getattr(self, name).value, getattr(self, name).value > 0, "above 0")


@flat(VLLM)
@dataclass(frozen=True, kw_only=True)
class Vllm:
    """What vLLM alone can do."""

    vllm_command: str | None = None
    """How vLLM is called, such as /opt/vllm/bin/vllm; `vllm` beside this Python or on PATH when not given."""
    tensor_parallel: Positive = 1
    """GPUs that share the work of every layer."""
    pipeline_parallel: Positive = 1
    """Groups of GPUs that take some of the layers each."""
    ray: str | None = None
    """Spread a replica over a Ray cluster: host:port, or auto (the one this machine is part of)."""
    engine_args: Annotated[str | None, ANY_TEXT] = None
    """Words for `vllm serve` itself, in one text: '--quantization fp8 --gpu-memory-utilization 0.8'."""
