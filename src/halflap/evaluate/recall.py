"""How well a model recalls: the probes asked at each length, as accuracy with intervals and loss of the right answers.

Of text an answer is right (`acc`) when greedy decoding writes it: exactly, or within 48 tokens and the line for the
open probes. Small models get a graded signal besides: `choice_acc`, whether the right answer is likelier than wrong
ones of its kind (`chance` is what a blind guess gets; ties count in part), and `loss`, in nats a token of that answer.
Of ids `acc` is whole answers and `token_acc` their tokens. Items weigh equally, however many questions they ask.
Intervals hold 95 %: Wilson's of shares, with items as trials, and the normal one of the loss.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from halflap.data.tokenizer import Tokenizer
from halflap.errors import HalflapError
from halflap.evaluate.held_out import default_context
from halflap.evaluate.probe_ids import depth_of
from halflap.evaluate.probe_prompts import WRITTEN, Prompt, text_prompt
from halflap.evaluate.probes import PROBES, probe_batch, probe_names
from halflap.inference.answers import Answer, score_answers
from halflap.inference.generate import generate, require_positions
from halflap.inference.log_probs import length_batches, score_tokens
from halflap.models.config import ModelConfig
from halflap.models.model import HybridModel
from halflap.progress import Progress

LENGTHS = (256, 512, 1024, 2048)  # when none are given, as far as the model reads
ITEMS = 50  # of each probe and length
TIE = 1e-5  # nats within which two answers are equally likely
Z = 1.96  # of 95 %

NOT_FINITE = "a probe's loss is not a number; the weights are broken or overflow: try --dtype float32"

Advance = Callable[[float], None]


@dataclass(frozen=True)
class Outcome:
    """One item: its numbers by metric, each a mean over its questions."""

    index: int
    metrics: dict[str, float]


def run_probes(
    model: HybridModel,
    tokenizer: Tokenizer | None,
    names: Sequence[str],
    *,
    lengths: Sequence[int] = (),
    limit: int | None = None,
    context: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """{name: metrics, their `_stderr`, `items`, `by_length` (and `by_depth`)} of each probe, `probes` naming all.

    Without a tokenizer the probes are asked in ids of the model's whole vocabulary. lengths in tokens, answers
    included; `limit` items a length; `batch_size` times the longest length is the tokens read at once. `log` gets a
    row for each probe and length. Raises HalflapError for unknown names and lengths that the model cannot read.
    """
    names = probe_names(names)
    lengths = probe_lengths(model.config, lengths, context)
    items = ITEMS if limit is None else limit
    if items < 1:
        raise HalflapError(f"limit is {items}; it must be at least 1: give the number of items of each task")
    found: dict[str, dict[str, Any]] = {}
    with Progress("probes", len(names) * len(lengths) * items, unit="items") as progress:
        for name in names:
            cells: dict[int, list[Outcome]] = {}
            for length in lengths:
                progress.note(probe=name, length=length)
                settings = (name, length, items, seed, batch_size * max(lengths), progress.advance)
                cells[length] = (
                    ask_ids(model, *settings) if tokenizer is None else ask_text(model, tokenizer, *settings)
                )
                if log is not None:
                    log({"task": name, "length": length, **summary(cells[length])})
            found[name] = {"form": "ids" if tokenizer is None else "text", **_result(name, cells)}
    return found


def probe_lengths(config: ModelConfig, lengths: Sequence[int] = (), context: int | None = None) -> tuple[int, ...]:
    """The lengths to ask at, ascending; raises HalflapError when one is longer than the context or the positions."""
    most = default_context(config) if context is None else context
    lengths = tuple(sorted(set(lengths))) or tuple(n for n in LENGTHS if n <= most) or (most,)
    if context is not None and lengths[-1] > context:
        raise HalflapError(
            f"a probe of {lengths[-1]} tokens does not fit the context of {context}; "
            "shorten --probes.length or lengthen --context"
        )
    require_positions(config, lengths[-1], "the longest probe takes")
    return lengths


# ---- asking


@torch.inference_mode()
def ask_ids(
    model: HybridModel,
    name: str,
    length: int,
    items: int,
    seed: int,
    batch_tokens: int = 8192,
    advance: Advance = lambda _: None,
    *,
    vocab_size: int | None = None,
) -> list[Outcome]:
    """Ask a probe in ids, whole answers at once: that they are predicted given their own earlier tokens."""
    outcomes: list[Outcome] = []
    rows = max(1, batch_tokens // length)
    for start in range(0, items, rows):
        indices = range(start, min(start + rows, items))
        batches = [probe_batch(name, seed, i, length, vocab_size or model.config.vocab_size) for i in indices]
        tokens, targets, weights = (
            torch.cat([getattr(batch, part) for batch in batches]).to(model.device)
            for part in ("tokens", "targets", "weights")
        )
        wanted = weights > 0
        scores = score_tokens(model, tokens, targets, wanted)
        right, lost = (torch.zeros(wanted.shape, dtype=torch.float64, device=tokens.device) for _ in range(2))
        right[wanted], lost[wanted] = scores.greedy.double(), -scores.log_probs.double()
        for i, row in enumerate(indices):
            outcomes.append(_id_outcome(row, wanted[i].tolist(), right[i].tolist(), lost[i].tolist()))
        advance(len(indices))
    return outcomes


def _id_outcome(index: int, wanted: list[bool], right: list[float], lost: list[float]) -> Outcome:
    answers: list[float] = []  # of each run of wanted positions, whether all of it is right
    for place, here in enumerate(wanted):
        if here and (place == 0 or not wanted[place - 1]):
            answers.append(1.0)
        if here:
            answers[-1] *= right[place]
    tokens = sum(wanted)
    if not math.isfinite(sum(lost)):
        raise HalflapError(NOT_FINITE)
    metrics = {"acc": statistics.fmean(answers), "token_acc": sum(right) / tokens, "loss": sum(lost) / tokens}
    return Outcome(index, metrics)


def ask_text(
    model: HybridModel,
    tokenizer: Tokenizer,
    name: str,
    length: int,
    items: int,
    seed: int,
    batch_tokens: int = 8192,
    advance: Advance = lambda _: None,
) -> list[Outcome]:
    """Ask a probe as text: rank the right answer among the others, and write answers where the probe is open."""
    prompts = [text_prompt(name, seed, index, length, tokenizer) for index in range(items)]
    asked = [(prompt, question) for prompt in prompts for question in prompt.questions]
    pairs = [(prompt.page, candidate.tokens) for prompt, question in asked for candidate in question.candidates]
    scored = [candidate.scored for _, question in asked for candidate in question.candidates]
    share = 0.5 if PROBES[name].open else 1.0  # of an item's work
    answers = score_answers(
        model,
        pairs,
        scored=scored,
        batch_tokens=batch_tokens,
        advance=lambda done: advance(done * share * items / len(pairs)),
    )
    written = (
        _written(model, tokenizer, prompts, batch_tokens, lambda done: advance(done / 2)) if PROBES[name].open else None
    )
    outcomes, at = [], 0
    for index, prompt in enumerate(prompts):
        rows = []
        for number, question in enumerate(prompt.questions):
            count = len(question.candidates)
            row = _judge(answers[at : at + count], scored[at])
            if written is not None:
                row["acc"] = float(question.answer.casefold() in written[index][number].casefold())
            rows.append(row)
            at += count
        outcomes.append(Outcome(index, {metric: statistics.fmean(row[metric] for row in rows) for metric in rows[0]}))
    return outcomes


def _judge(answers: Sequence[Answer], tokens: int) -> dict[str, float]:
    """Metrics of one question from its candidates, the right one of `tokens` tokens first."""
    best = max(answer.log_prob for answer in answers)
    if not all(math.isfinite(answer.log_prob) for answer in answers):
        raise HalflapError(NOT_FINITE)
    first = [answer.log_prob >= best - TIE for answer in answers]
    return {
        "acc": float(answers[0].greedy),
        "choice_acc": first[0] / sum(first),
        "chance": 1 / len(answers),
        "loss": -answers[0].log_prob / tokens,
    }


def _written(
    model: HybridModel, tokenizer: Tokenizer, prompts: Sequence[Prompt], batch_tokens: int, advance: Advance
) -> list[list[str]]:
    """What greedy decoding writes after each question of each prompt, up to the end of the line."""
    flat = [(index, [*prompt.page, *q.given]) for index, prompt in enumerate(prompts) for q in prompt.questions]
    texts = [""] * len(flat)
    for rows in length_batches([len(ids) + WRITTEN for _, ids in flat], batch_tokens):
        done = generate(model, [flat[row][1] for row in rows], WRITTEN, stop=("\n",), tokenizer=tokenizer)
        for row, completion in zip(rows, done, strict=True):
            texts[row] = completion.text
        advance(len(rows) * len(prompts) / len(flat))
    found: list[list[str]] = [[] for _ in prompts]
    for (index, _), text in zip(flat, texts, strict=True):
        found[index].append(text)
    return found


# ---- numbers


def _result(name: str, cells: dict[int, list[Outcome]]) -> dict[str, Any]:
    """Over all lengths, then by length, and by depth where the probe has one."""
    everything = [outcome for outcomes in cells.values() for outcome in outcomes]
    means = _means(everything)
    result: dict[str, Any] = {}
    for metric, mean in means.items():
        result[metric] = mean
        if metric != "chance":
            values = [outcome.metrics[metric] for outcome in everything]
            result[f"{metric}_stderr"] = _standard_error(values)
    result["items"] = len(everything)
    result["by_length"] = [{"length": length, **summary(outcomes)} for length, outcomes in cells.items()]
    if PROBES[name].by_depth:
        result["by_depth"] = [
            {"length": length, "depth": depth, **summary(there)}
            for length, outcomes in cells.items()
            for depth in sorted({depth_of(outcome.index) for outcome in outcomes})
            if (there := [outcome for outcome in outcomes if depth_of(outcome.index) == depth])
        ]
    return result


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Mean and `_interval` of each metric over items, and how many `items` there are."""
    found: dict[str, Any] = {}
    for metric, mean in _means(outcomes).items():
        found[metric] = mean
        if metric == "loss":
            reach = Z * _standard_error([outcome.metrics[metric] for outcome in outcomes])
            found["loss_interval"] = [mean - reach, mean + reach] if len(outcomes) > 1 else None
        elif metric != "chance":
            found[f"{metric}_interval"] = wilson(mean, len(outcomes))
    return found | {"items": len(outcomes)}


def _means(outcomes: Sequence[Outcome]) -> dict[str, float]:
    return {metric: statistics.fmean(o.metrics[metric] for o in outcomes) for metric in outcomes[0].metrics}


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def wilson(share: float, trials: int) -> list[float]:
    """The 95 % interval of a share of trials (Wilson 1927); for means of several questions a trial it is too wide."""
    spread = Z**2 / trials
    middle = (share + spread / 2) / (1 + spread)
    reach = Z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return [max(0.0, middle - reach), min(1.0, middle + reach)]
