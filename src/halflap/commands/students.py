"""What the verbs of compression do: open the teacher, choose text, measure, cut, certify, train, judge.

Each function is one step and knows nothing of the steps around it; `compress.py` says in which order they come.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halflap.checkpoints.checkpoint import Checkpoint, float_dtype, load_model, write_checkpoint
from halflap.checkpoints.config import (
    Lineage,
    find_directory,
    lineage_step,
    read_config,
    read_json,
    read_lineage,
)
from halflap.checkpoints.streamed import StreamedModel
from halflap.commands.cards import CERTIFICATE, write_card
from halflap.commands.corpora import Corpora, tokenizer_place
from halflap.commands.device import choose_device
from halflap.commands.sections import Budgets
from halflap.compress.cost_table import CostTable
from halflap.compress.costs import BUDGETS, Budget, costs
from halflap.compress.local import trained_tensors
from halflap.compress.plan import PLAN, PruningPlan
from halflap.compress.prune import apply_plan
from halflap.compress.verify import verify
from halflap.data.batch import Batch
from halflap.data.loader import Loader
from halflap.data.tokenizer import Tokenizer
from halflap.errors import CheckFailed, HalflapError
from halflap.evaluate.documents import documents_of
from halflap.evaluate.held_out import evaluate_text
from halflap.files import write_json
from halflap.models.config import ModelConfig
from halflap.models.count import count_parameters
from halflap.models.layout import layout
from halflap.models.model import HybridModel
from halflap.recipe import Common
from halflap.train.losses import mean_loss
from halflap.train.numerics import resolve_dtype
from halflap.train.objectives.agreement import Agreement, GreedyBatch, with_teacher_tokens
from halflap.train.objectives.language import NextToken

BLOCKS = "blocks"
"""Folder of a search with the variants that it trained."""
VERIFYING = ".verifying"
"""Folder of a student with what a comparison has so far."""
CERTIFIED_AT_ONCE = 300_000_000
"""Parameters up to which a student is certified as soon as it is written: seconds then, and many minutes for 8 B."""


@dataclass(frozen=True)
class Teacher:
    """A checkpoint to compress, and where and in which precision to compute."""

    checkpoint: Checkpoint
    tokenizer_place: Path
    device: torch.device
    dtype: str
    seed: int

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Opened when text is read: a model without one can be cut. Raises HalflapError when there is none."""
        tokenizer = Tokenizer.load(self.tokenizer_place)
        tokenizer.check_matches(self.config.vocab_size)
        return tokenizer

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    @property
    def digest(self) -> str:
        return self.checkpoint.digest

    @property
    def teaches_in(self) -> str:
        """The dtype it is loaded in to teach: on a GPU that of the arithmetic, at half the memory; float32 on a CPU."""
        narrow = self.device.type == "cuda" and resolve_dtype(self.dtype, self.device) == torch.bfloat16
        return "bfloat16" if narrow else "float32"

    def load(self, dtype: str = "float32") -> HybridModel:
        """The model, in float32 whatever it is stored in, if nothing else is said."""
        return load_model(self.checkpoint.path, dtype, self.device)

    def stream(self, dtype: str = "float32") -> StreamedModel:
        """The same, read a block at a time."""
        return StreamedModel.of(self.checkpoint, float_dtype(dtype), self.device)


def open_teacher(path: str | Path, common: Common, data: Sequence[str] = ()) -> Teacher:
    """A checkpoint whose text is read with its own tokenizer, or with that of the token shards among `data`."""
    directory = find_directory(path)
    place = tokenizer_place(directory, data)
    teacher = Teacher(Checkpoint.open(directory), place, choose_device(common.device), common.dtype, common.seed)
    if (place / "tokenizer.json").is_file():
        _ = teacher.tokenizer  # one that does not match is refused before any work
    return teacher


def teacher_of(student: Path, given: str | None) -> Path:
    """The teacher's directory: the given one, or the one that the student's lineage names, if it is still there."""
    if given is not None:
        return find_directory(given)
    cut = _cut_of(student)
    if cut is not None and Path(cut["teacher_path"]).is_dir():
        return find_directory(cut["teacher_path"])
    where = f"{cut['teacher_path']!r}, where its lineage says it was, is not there" if cut else "its lineage names none"
    raise HalflapError(f"the teacher of {str(student)!r} cannot be found: {where}; name it with --teacher")


def check_unchanged(student: Path, teacher: Teacher) -> None:
    """Raise HalflapError when the teacher that a student's lineage names is not what it was at the cut."""
    cut = _cut_of(student)
    if cut is not None and (before := cut["inputs"].get("teacher")) not in (None, teacher.digest):
        raise HalflapError(
            f"the teacher in {str(teacher.checkpoint.path)!r} has changed since {str(student)!r} was cut from it "
            f"({before[:12]}, now {teacher.digest[:12]}); if it is the right one, name it with --teacher"
        )


def check_vocabulary(student: Path, teacher: Teacher) -> None:
    """Raise HalflapError unless student and teacher read the same tokens."""
    here, there = read_config(student).vocab_size, teacher.config.vocab_size
    if here != there:
        raise HalflapError(
            f"the student in {str(student)!r} has {here} tokens and its teacher {there}; they must read the same: give "
            "a student cut from this teacher, or its own teacher with --teacher"
        )
    both = all((place / "tokenizer.json").is_file() for place in (student, teacher.tokenizer_place))
    if both and not Tokenizer.load(student).says_the_same(teacher.tokenizer):
        raise HalflapError(
            f"the tokenizer in {str(student)!r} is not that of the teacher in {str(teacher.checkpoint.path)!r}; they "
            "must read the same tokens: give a student cut from this teacher, or its own teacher with --teacher"
        )


def _cut_of(student: Path) -> dict[str, Any] | None:
    """The last step of a student's lineage that cut it from a teacher."""
    return next((step for step in reversed(read_lineage(student)) if "teacher_path" in step), None)


def has_ceiling(budgets: Budgets) -> bool:
    return any(getattr(budgets, name) is not None for name in BUDGETS)


def budget_of(budgets: Budgets, teacher: ModelConfig, table: CostTable | None = None) -> Budget:
    """The ceilings in absolute numbers; a share is of the teacher's own cost under the same context and bits.

    table: tells the times that budgets of latency and throughput need.
    """
    at: dict[str, Any] = {n: getattr(budgets, n) for n in ("phase", "context", "batch", "weight_bits", "cache_bits")}
    whole = costs(teacher, Budget(**at, table=table))
    ceilings: dict[str, Any] = {
        name: amount.of(whole.get(name, 0.0)) for name in BUDGETS if (amount := getattr(budgets, name)) is not None
    }
    if "memory" in ceilings:
        ceilings["memory"] = math.floor(ceilings["memory"])  # of weights of 4 bits a search counts half bytes too
    return Budget(**at, table=table, **ceilings)


# ---- text


def choosing(loader: Loader, tokens: int) -> list[Batch]:
    """The last batches of the first epoch: where there is text enough, neither calibrated on nor, in a short
    distillation, trained on."""
    most = sum(loader.rows) // loader.micro_batch_size or 1
    count = min(most, max(1, round(tokens / loader.tokens_per_batch)))
    return [loader.batch(most - 1 - index) for index in range(count)]


def choosing_remark(loader: Loader, what: str, flag: str, tokens: int, before: Mapping[str, int]) -> str | None:
    """Says where there was less text to choose by than was asked for, or where it was measured or learnt on too.

    before: what was done on the first tokens of the text, in words, to how many those were.
    """
    there, remarks = sum(loader.rows) * loader.sequence_length, []
    if there < tokens:
        remarks.append(f"{what} were to be scored on {tokens:,} tokens, and there were {there:,}: all were read")
    free = there - min(tokens, there)
    if seen := {done: min(read, there) for done, read in before.items() if read > free}:
        said = ", ".join(f"{done} on {read:,}" for done, read in seen.items())
        remarks.append(
            f"{said} of the {there:,} tokens of text, so that {what} are scored on {max(seen.values()) - free:,} of "
            f"these again; give more text, or lower {flag}"
        )
    return "; ".join(remarks) or None


def learning_remark(loader: Loader, what: str, tokens: int) -> str | None:
    """Says where there was less text to learn from than was asked for."""
    there = sum(loader.rows) * loader.sequence_length
    if there >= tokens:
        return None
    return f"{what} were to learn on {tokens:,} tokens, and there were {there:,}, which were read more than once"


def judge(
    model: HybridModel, corpora: Corpora, teacher: Teacher, tokens: int, context: int | None = None
) -> dict[str, Any]:
    """Loss, perplexity and bits a byte on the held-out documents, with intervals, in windows of `context` tokens."""
    documents = documents_of(corpora.held_out, teacher.tokenizer, limit=tokens)
    model = model.to(teacher.device).eval()
    scores = evaluate_text(model, documents, context=context, tokens=tokens, seed=teacher.seed).to_json()
    return {"parameters": count_parameters(model.config), **scores}


# ---- students


def build(model: HybridModel, plan: PruningPlan) -> HybridModel:
    """The student of a teacher that is in memory."""
    return fill(plan.student, apply_plan(plan, model.state_dict().items()))


def fill(config: ModelConfig, tensors: Iterator[tuple[str, Tensor]]) -> HybridModel:
    with torch.device("meta"):
        student = HybridModel(config)
    student.load_state_dict({name: tensor.clone() for name, tensor in tensors}, strict=True, assign=True)
    return student.requires_grad_(True).eval()


def with_trained_blocks(student: HybridModel, plan: PruningPlan, run: Path) -> HybridModel:
    """The student, in place, with the blocks that a search in directory `run` has trained."""
    if (run / BLOCKS).is_dir():
        student.load_state_dict(trained_tensors(run / BLOCKS, plan), strict=False)
    return student


def next_token_loss(model: Any, batches: Sequence[Batch], teacher: Teacher) -> dict[str, float]:
    """`loss` of a model, or of the hidden states that come of one (`candidates.Coming`)."""
    dtype = resolve_dtype(teacher.dtype, teacher.device)
    return mean_loss(model, NextToken(), batches, teacher.device, dtype)


def with_teacher_tokens_of(teacher: Teacher, batches: Sequence[Batch]) -> list[GreedyBatch]:
    """The batches with the likeliest tokens of a teacher, who is gone from memory then."""
    dtype = resolve_dtype(teacher.dtype, teacher.device)
    return with_teacher_tokens(teacher.load().eval(), batches, teacher.device, dtype)


def agreement(model: Any, batches: Sequence[GreedyBatch], teacher: Teacher) -> dict[str, float]:
    """The same, and shares of the text's and of the teacher's likeliest tokens that the model says."""
    dtype = resolve_dtype(teacher.dtype, teacher.device)
    return mean_loss(model, Agreement(), batches, teacher.device, dtype)


def write_student(
    directory: Path, teacher: Teacher, plan: PruningPlan, tensors: Iterator[tuple[str, Tensor]]
) -> Checkpoint:
    """A student as cut, in the teacher's stored types, with tokenizer and plan."""
    source = teacher.checkpoint
    types = {
        student: dtype for name, dtype in source.dtypes.items() if (student := plan.student_name(name)) is not None
    }
    types |= {name: source.dtypes[plan.teacher_name(name)] for name in layout(plan.student) if name not in types}
    cut = {"parameters": count_parameters(plan.student), "norm_correction": plan.norm_correction}
    where = {"teacher_path": str(source.path.resolve())}
    verb = "sort" if plan.keep and plan.student == plan.teacher_config else "prune"
    lineage = [*source.lineage, lineage_step(verb, {"teacher": teacher.digest, "plan": plan.digest}, **cut, **where)]
    written = write_checkpoint(
        directory,
        plan.student,
        tensors,
        dtype=types,
        tokenizer_from=source.path,
        lineage=lineage,
        extra_files={PLAN: json.dumps(plan.to_json()) + "\n"},
    )
    write_card(directory)
    return written


def prune(directory: Path, teacher: Teacher, plan: PruningPlan) -> dict[str, Any] | None:
    """Write the student as cut and certify it; of a large one, which takes minutes, `halflap verify` does.

    Raises CheckFailed when it is not its masked teacher; the student stays for `halflap verify` to look at.
    """
    complete = is_complete(directory, plan)
    if complete and (directory / CERTIFICATE).exists():
        return require_passed(read_json(directory / CERTIFICATE), directory)
    if not complete:
        write_student(directory, teacher, plan, apply_plan(plan, teacher.checkpoint.tensors()))
    if count_parameters(teacher.config) > CERTIFIED_AT_ONCE:
        return None
    return require_passed(certify(directory, teacher.checkpoint, plan, seed=teacher.seed), directory)


def require_passed(certificate: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The certificate of the student in `directory`. Raises CheckFailed, with the certificate, if it did not pass."""
    if not certificate["passed"]:
        raise CheckFailed(
            f"the student in {str(directory)!r} is not its masked teacher: logits differ by "
            f"{certificate['exact_max_abs_error']:.2g} of {certificate['logit_scale']:.2g}, as {CERTIFICATE} beside "
            "it says axis by axis: prune again (--overwrite), with a plan made anew if one was given",
            certificate,
        )
    return certificate


def is_whole(directory: Path) -> bool:
    """Whether all of a checkpoint lies there; its card is the last file to be written."""
    return (directory / "README.md").exists()


def is_complete(directory: Path, plan: PruningPlan) -> bool:
    """Whether a student lies there whole. Raises HalflapError for one of another plan."""
    if not is_whole(directory):
        return False
    if PruningPlan.load(directory / PLAN) != plan:
        raise HalflapError(
            f"{str(directory)!r} holds the student of another plan than is made now, as where times were measured anew "
            "on another machine: go on from that student with `halflap distill`, or start again with --overwrite"
        )
    return True


def save_trained(
    directory: Path,
    student: HybridModel,
    source: Path,
    step: Mapping[str, Any],
    lineage: Lineage | None = None,
) -> Checkpoint:
    """A student after training, in the types of the checkpoint it started from, with what `write_trained` adds."""
    tensors = student.cpu().state_dict().items()
    return write_trained(directory, student.config, tensors, source, step, lineage)


def write_trained(
    directory: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    source: Path,
    step: Mapping[str, Any],
    lineage: Lineage | None = None,
) -> Checkpoint:
    """Parameters after training, in the order of the layout, as a checkpoint in the types of the one they came from.

    It comes with that one's tokenizer, and with its plan and lineage unless another `lineage` is given.
    """
    cut = Checkpoint.open(source)
    keeps_plan = lineage is None and (source / PLAN).exists()
    written = write_checkpoint(
        directory,
        config,
        tensors,
        dtype=cut.dtypes,
        tokenizer_from=source,
        lineage=[*(cut.lineage if lineage is None else lineage), step],
        extra_files={PLAN: (source / PLAN).read_text("utf-8")} if keeps_plan else None,
    )
    write_card(directory)
    return written


def certify(
    directory: Path, teacher: Checkpoint, plan: PruningPlan, tokens: int = 256, seed: int = 0
) -> dict[str, Any]:
    """The certificate of a student on random tokens, which reach every part of the vocabulary; kept beside it."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, tokens) if tokens < 2 else (2, tokens // 2)
    ids = torch.randint(0, teacher.config.vocab_size, shape, generator=generator)
    scratch = directory / VERIFYING
    certificate = verify(Checkpoint.open(directory), teacher, plan, ids, scratch)
    write_json(directory / CERTIFICATE, certificate)
    shutil.rmtree(scratch)
    write_card(directory)
    return certificate
