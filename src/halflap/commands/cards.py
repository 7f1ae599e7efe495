"""The model card of a student: what was cut, whether that is certified, and how it was judged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halflap.checkpoints.card import CARD, license_of, model_card, more_of
from halflap.checkpoints.config import find_directory, read_config, read_json, read_lineage
from halflap.commands.show_compress import sizes_text, stored_text
from halflap.compress import elastic
from halflap.compress.library import Variant
from halflap.compress.plan import PLAN, PruningPlan
from halflap.files import atomic_write
from halflap.models.count import count_parameters
from halflap.report.shapes import size_rows

CERTIFICATE = "certificate.json"
NESTED = "## What can be cut from it"


def write_card(
    directory: Path,
    *,
    certificate: Mapping[str, Any] | None = None,
    rows: Mapping[str, Mapping[str, Any]] | None = None,
    judged_on: str = "",
    latency: Mapping[str, Any] | None = None,
    stored: Mapping[str, Any] | None = None,
) -> None:
    """Write README.md of a student anew, with everything that is known of it.

    rows: judgement by arm, as `scores.json` has them; judged_on: which text that was, in words;
    latency: the student's time, as `latency.json` has it; stored: what the teacher's stored logits take and lose.
    """
    directory = find_directory(directory)
    if certificate is None and (directory / CERTIFICATE).exists():
        certificate = read_json(directory / CERTIFICATE)
    parts = []
    if (directory / PLAN).exists():
        parts.append(_cut(PruningPlan.load(directory / PLAN)))
        parts.append(_certificate(certificate))
    if stored:
        parts.append(f"Distillation: {stored_text(stored)}.\n\n")
    if (directory / elastic.FILE).exists():
        parts.append(_nested(directory))
    if rows:
        parts.append(_judgement(rows, judged_on))
    if latency:
        parts.append(_latency(latency))
    text = model_card(directory, read_config(directory), read_lineage(directory), license_of(directory), "".join(parts))
    with atomic_write(directory / CARD, "w") as file:
        file.write(text)


def carried(source: Path, changed: Sequence[str]) -> str:
    """Of the card of a checkpoint what is true of a copy in another form too, and how that one was `changed` since."""
    sections = re.split(r"^(?=## )", more_of(source), flags=re.MULTILINE)
    kept = "".join(section for section in sections if not section.startswith(NESTED))  # the copy is no elastic one
    return kept + f"All this is of the student before {' and '.join(changed)}.\n\n" if kept and changed else kept


def _cut(plan: PruningPlan) -> str:
    """What of which axis is left, what else became of which blocks, and which went."""
    before, after = count_parameters(plan.teacher_config), count_parameters(plan.student)
    lines = [
        f"| {name} | {was} | {now} |" for name, was, now in size_rows(plan.teacher_config, plan.student) if was != now
    ]
    changed = [f"{index} ({Variant(change=change).name})" for index, change in plan.changes.items()]
    other = f"\nChanged blocks of the teacher: {', '.join(changed)}.\n" if changed else ""
    dropped = [str(i) for i in range(len(plan.teacher_config.blocks)) if i not in plan.keep_blocks]
    gone = f"\nDropped blocks of the teacher: {', '.join(dropped)}.\n" if dropped else ""
    return f"""## What was cut

{after:,} of the teacher's {before:,} parameters are left ({after / before:.1%}); `{PLAN}` has the indices.

| | teacher | student |
|---|---|---|
{chr(10).join(lines) or ("" if changed else "| nothing | | |")}
{other}{gone}
"""


def _nested(directory: Path) -> str:
    """Which sizes lie in an elastic checkpoint, and how they are cut from it."""
    found = elastic.Elastic.load(directory, len(read_config(directory).blocks))
    lines = [f"| {one.budget} | {sizes_text(one.sizes.to_json())} |" for one in found.nested]
    return f"""{NESTED}

Every axis is sorted by importance, so the first indices of each are a student, which
`halflap prune DIR --from-elastic --params 60%` (or sizes) writes. Trained together with the whole:

| budget | sizes |
|---|---|
{chr(10).join(lines) or "| none | |"}

"""


def _certificate(certificate: Mapping[str, Any] | None) -> str:
    if certificate is None:
        return "Not certified; `halflap verify` compares a student as cut with its masked teacher.\n\n"
    verdict = "equals" if certificate["passed"] else "DIFFERS from"
    return (
        f"Certificate: as cut, before any training, it {verdict} {certificate['reference']}: logits of up to "
        f"{certificate['logit_scale']:.3g} differ by at most {certificate['exact_max_abs_error']:.2g} in "
        f"{certificate['arithmetic']} and {certificate['max_abs_error']:.2g} as stored ({certificate['stored']}).\n\n"
    )


def _judgement(rows: Mapping[str, Mapping[str, Any]], judged_on: str) -> str:
    lines = []
    for name, row in rows.items():
        low, high = row.get("loss_interval") or (None, None)
        span = "" if low is None else f" ({low:.4f} to {high:.4f})"
        trained = f"{row['tokens_trained']:,}" if row.get("tokens_trained") else ""
        numbers = f"{row['loss']:.4f}{span} | {row['perplexity']:.2f} | {row['bits_per_byte']:.4f}"
        lines.append(f"| {name.replace('_', '-')} | {row['parameters']:,} | {trained} | {numbers} |")
    return f"""## How it does

| | parameters | tokens trained | loss (95 % interval) | perplexity | bits a byte |
|---|---|---|---|---|---|
{chr(10).join(lines)}

Judged on {judged_on or "held-out text"}.

"""


def _latency(row: Mapping[str, Any]) -> str:
    """Measured, predicted and allowed times of a pass."""
    times = {
        "student": row["seconds"],
        "teacher": row["teacher_seconds"],
        "student, as predicted": row["predicted_seconds"],
    }
    if row["budget_seconds"] is not None:
        over = row["seconds"] / row["budget_seconds"] - 1
        times[f"budget, EXCEEDED by {over:.1%}" if over > 0 else "budget, kept"] = row["budget_seconds"]
    lines = [f"| {name} | {1e3 * seconds:,.4g} |" for name, seconds in times.items()]
    return f"""| {row["phase"]} at context {row["context"]:,}, batch {row["batch"]} | ms a pass |
|---|---|
{chr(10).join(lines)}

"""
