"""One frozen recipe a verb: the single source of the flags, the YAML keys and the Python keywords.

A field's docstring is its help. Only the first argument is positional. Sections stand in sections.py. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from cyclopts import Parameter

from halflap.commands.sections import (
    Decoding,
    Listening,
    Phase,
    Sampling,
    Text,
    Vllm,
)
from halflap.errors import RecipeError
from halflap.recipe import (
    ANY_TEXT,
    COMMON,
    SWITCH,
    TRAINING,
    Common,
    File,
    Files,
    Model,
    Positive,
    Positives,
    Seed,  # noqa: F401  of the fields that ExportCommon inherits, whose types are looked up here
    Shape,
    StudyName,
    flat,
    section,
)
from halflap.train.config import Fit


@dataclass(frozen=True, kw_only=True)
class InspectRecipe:
    """Pattern, parameter counts, FLOPs and cache of a model; reads no weights."""

    model: Shape | None = field(default=None, kw_only=False)
    """Hugging Face directory, run directory, preset, or YAML of a model."""
    context: Positives = (8192, 65536)
    """Context lengths for the cache and FLOP columns."""
    batch: Positive = 1
    """Sequences at once."""
    cache_bits: Positive = 16
    """Bits a key or value takes; SSM states take twice as many, as in the memory budget."""
    list_presets: Annotated[bool, SWITCH, Parameter(name="--list")] = False
    """Print the presets and stop."""
    common: Common = Common()


@dataclass(frozen=True, kw_only=True)
class ImportRecipe:
    """GGUF, Megatron's tensors or another dialect of a known family to a Hugging Face directory."""

    source: File = field(kw_only=False)
    """GGUF file or checkpoint directory; one of Megatron's tensors has NeMo's model_config.yaml, or a config.json."""
    common: Common = Common()


@flat(COMMON)
@dataclass(frozen=True, kw_only=True)
class ExportCommon(Common):
    """The common fields, with a type of numbers that only files have."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights written; auto keeps the stored ones."""


@dataclass(frozen=True, kw_only=True)
class ExportRecipe:
    """Write a checkpoint in the form that stock tools load."""

    model: Model = field(kw_only=False)
    """Hugging Face directory or run directory."""
    format: Literal["hf", "gguf", "megatron"] = "hf"
    """Target form: stock classes of transformers; a file for llama.cpp; Megatron's names and fused QKV (Nemotron-4)."""
    pad_to_stock: Annotated[bool, SWITCH] = False
    """Pad with zeros what makes layers unequal, missing parts too, so that stock classes load them, logits equal."""
    quantize: Literal["int8", "int4", "fp8", "off"] | None = None
    """Pack linear maps to 8 or 4 bits (hf), or write packed ones plain; as they are when not given."""
    group_size: Literal[32, 64, 128] | None = None
    """Inputs that share a scale: 32 for int4 when not given, all of a row for int8 and always for fp8."""
    keep: tuple[str, ...] | None = None
    """Parts that are not packed, of z x B C dt q k v o out gate up down embedding head; dt and embedding when not
    given, and head for fp8."""
    common: ExportCommon = ExportCommon()


@dataclass(frozen=True, kw_only=True)
class TokenizerRecipe:
    """Train a byte-level BPE tokenizer."""

    text: Text = Text()
    vocab_size: Positive = 8192
    """Entries, special tokens included."""
    common: Common = Common()


@dataclass(frozen=True, kw_only=True)
class CorpusRecipe:
    """Text to memory-mapped token shards with a manifest."""

    text: Text = Text()
    tokenizer: File | None = None
    """Directory with the tokenizer (or a checkpoint that has one)."""
    common: Common = Common()


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe:
    """Train a model from text."""

    shape: Shape = field(kw_only=False)
    """Preset, YAML of a model, or a checkpoint to go on from."""
    text: Text = Text()
    tokens: Positive = 10_000_000
    """Tokens to train on."""
    phases: File | None = None
    """YAML of phases, each with its tokens, blend, learning rate and batch, in place of --tokens and the schedule."""
    tokenizer: File | None = None
    """Directory with the tokenizer; token shards bring their own."""
    eval_data: Files = ()
    """Held-out text for the loss curve."""
    fit: Annotated[Fit, section(TRAINING)] = Fit()
    common: Common = Common()


@dataclass(frozen=True, kw_only=True)
class EvaluateRecipe:
    """Loss on held-out text, tasks of lm-evaluation-harness, and recall probes."""

    model: Model = field(kw_only=False)
    """Hugging Face directory or run directory."""
    data: Files = ()
    """Held-out text: files (.txt, .jsonl, .json, .parquet, plain or compressed), folders of those, or token shards."""
    field: Annotated[str, Parameter(name="--data.field")] = "text"
    """Column of the records that holds the text."""
    join: Annotated[bool, SWITCH, Parameter(name="--data.join")] = False
    """Score all documents as one text, joined by blank lines, where records are parts of one (WikiText as rows)."""
    eval_data: Files = ()
    """The same as --data, by the name that other verbs give to text to judge on."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness (`..._local` ones read files in $HALFLAP_DATA or ../shared/data), or probes."""
    probe_lengths: Annotated[Positives, Parameter(name="--probes.length")] = ()
    """Tokens of a recall probe; 256, 512, 1024 and 2048, as far as the model reads, when not given."""
    limit: Positive | None = None
    """Items of each task at most; of each recall probe and length, 50 when not given."""
    tokens: Positive | None = None
    """Tokens of text at most; all when not given."""
    context: Positive | None = None
    """Window in tokens; the model's, at most 2048, when not given."""
    stride: Positive | None = None
    """Step between windows; the window when not given."""
    batch_size: Positive = 4
    """Windows at once."""
    stream: Annotated[bool, SWITCH] = False
    """Read the weights a block at a time, as is done anyway when they do not fit in free memory; same numbers."""
    common: Common = Common()


@dataclass(frozen=True, kw_only=True)
class BenchRecipe:
    """Prefill and decode speed, memory and cache over a grid."""

    model: Shape = field(kw_only=False)
    """Hugging Face directory, run directory or preset (random weights)."""
    prompt: Positives = (512,)
    """Prompt lengths in tokens."""
    output: Positives = (32,)
    """Tokens to decode."""
    batch: Positives = (1,)
    """Sequences at once."""
    repeats: Positive = 3
    """Timed passes of each cell, or rounds over all blocks; the median is reported."""
    blocks: Annotated[bool, SWITCH] = False
    """Measure every kind of block at many sizes instead, at each prompt length (the context) and batch: costs.json,
    which budgets of latency and throughput need."""
    phase: tuple[Phase, ...] = ("decode", "prefill")
    """Phases that --blocks measures."""
    common: Common = Common()


@dataclass(frozen=True, kw_only=True)
class GenerateRecipe:
    """Write text."""

    model: Model = field(kw_only=False)
    """Hugging Face directory or run directory."""
    prompt: tuple[str, ...] = ()
    """Prompts; standard input when not given."""
    max_new_tokens: Positive | None = None
    """New tokens at most; 128, or as many as the model has positions for, when not given."""
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are cut away."""
    ignore_eos: Annotated[bool, SWITCH] = False
    """Go on after the end token."""
    json_schema: Annotated[str | None, ANY_TEXT] = None
    """A JSON schema that the answer matches: the file of one, or the schema itself."""
    regex: Annotated[str | None, ANY_TEXT] = None
    """A regular expression (of Rust's crate regex) that the answer matches."""
    common: Common = Common()

    def __post_init__(self) -> None:
        if self.json_schema is not None and self.regex is not None:
            raise RecipeError("json_schema and regex both say what the answer matches; give one of the two")
        if "" in self.stop:
            raise RecipeError("stop has an empty text, which every answer holds: leave it out of --stop")


@dataclass(frozen=True, kw_only=True)
class ServeRecipe:
    """Answer over HTTP as OpenAI's API does; docs/serving.md has the whole of it."""

    model: Model = field(kw_only=False)
    """Hugging Face directory or run directory."""
    listening: Listening = Listening()
    decoding: Decoding = Decoding()
    vllm: Vllm = Vllm()
    common: Common = Common()

    def __post_init__(self) -> None:
        if self.listening.engine == "halflap" and self.vllm != Vllm():
            raise RecipeError(
                "the engine is halflap and a flag of vLLM's is given; add --engine vllm, or leave that out"
            )
        if self.listening.engine == "vllm" and self.decoding.speculate != "off":
            raise RecipeError(
                f"speculate is {self.decoding.speculate}, which is halflap's; with --engine vllm leave it out, or give "
                "vLLM's own --speculative-config in --engine-args"
            )


@dataclass(frozen=True, kw_only=True)
class ChatRecipe:
    """Talk with a model on the terminal: /help lists its commands, Ctrl-C ends a reply."""

    model: Model = field(kw_only=False)
    """Hugging Face directory or run directory."""
    prompt: tuple[str, ...] = ()
    """What is said, turn by turn; standard input when not given."""
    system: Annotated[str | None, ANY_TEXT] = None
    """What the model is told before the conversation."""
    max_new_tokens: Positive = 1024
    """New tokens of a reply at most."""
    sampling: Sampling = Sampling(temperature=0.7)
    decoding: Decoding = Decoding()
    common: Common = Common()


@dataclass(frozen=True, kw_only=True)
class ReportRecipe:
    """One self-contained HTML page from finished runs."""

    runs: Files = field(default=(), kw_only=False)
    """Run directories."""
    common: Common = Common()


@dataclass(frozen=True, kw_only=True)
class DoctorRecipe:
    """Versions, kernels chosen, device limits, and what is missing."""

    common: Common = Common()


@dataclass(frozen=True, kw_only=True)
class StudyRecipe:
    """Compare architectures, or ways to compress a teacher, under identical settings: same text, order and schedule."""

    study: StudyName = field(kw_only=False)
    """File of a study, or a shipped one: hymba-ladder, group-aware, ... (docs/studies)."""
    size: Literal["smoke", "small", "paper"] = "small"
    """Which of its sizes: a minute, an hour or more on two cores, the published one."""
    teacher: Model | None = None
    """The model that is compressed, instead of the study's."""
    text: Text = Text()
    eval_data: Files = ()
    """Text to judge on, instead of the study's; with neither, a share of the documents, by a hash, is kept back."""
    eval_tokens: Positive | None = None
    """Tokens to judge on at most, instead of the study's."""
    tokenizer: File | None = None
    """Directory with the tokenizer of shapes trained from scratch; without one the study trains its own."""
    tokens: Positive | None = None
    """Tokens each arm and seed reads, instead of the study's."""
    seeds: tuple[int, ...] = ()
    """Seeds, instead of the study's."""
    workers: Positive = 1
    """Processes that train arms side by side."""
    ray: str | None = None
    """Train arms on a Ray cluster that sees these paths too: host:port, ray://host:port, auto (the one this machine is
    part of), or local."""
    ray_cpus: Positive = 1
    """Cores of each arm on the cluster; with --device cuda an arm also takes a GPU."""
    common: Common = Common()


@dataclass(frozen=True, kw_only=True)
class AnalyzeRecipe:
    """What attention, SSM and meta tokens do, layer by layer."""

    model: Model = field(kw_only=False)
    """Hugging Face directory or run directory."""
    text: Text = Text()
    tokens: Positive = 8192
    """Tokens read of each path of --data; a path is a domain of its own."""
    removal_tokens: Positive = 4096
    """Tokens on which branches are left out, and parts rounded, one by one."""
    quantize: Literal["int8", "int4", "fp8"] | None = None
    """Also measure what packing each part of the model to so many bits costs, alone."""
    group_size: Literal[32, 64, 128] | None = None
    """Inputs that share a scale then: 32 for int4 when not given, all of a row for int8 and always for fp8."""
    context: Positive = 512
    """Tokens of a row."""
    common: Common = Common()
