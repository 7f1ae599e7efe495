"""Results of the verbs that make a model smaller, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from halflap.commands.tables import number, records, short, size
from halflap.compress.library import summary

SIZE_WORDS = {
    "hidden_size": "hidden",
    "intermediate_size": "neurons",
    "mamba_num_heads": "Mamba heads",
    "mamba_intermediate_size": "Mamba channels",
    "mamba_head_dim": "channels",
    "ssm_state_size": "states",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "key/value heads",
    "num_blocks": "blocks",
    "num_mamba_blocks": "Mamba blocks",
    "num_attention_blocks": "attention blocks",
    "num_mlp_blocks": "MLP blocks",
}
SHOWN_CANDIDATES = 10
JUDGED = ("", "parameters", "trained on", "loss", "95 % interval", "perplexity", "bits a byte")


def sizes_text(sizes: Mapping[str, Any]) -> str:
    """What is cut, in a line: `hidden 64, neurons 224`."""
    parts = [
        f"{SIZE_WORDS.get(name, name.replace('_', ' '))} {number(value)}" for name, value in sizes.items() if value
    ]
    return ", ".join(parts) or "nothing"


def score(result: Mapping[str, Any], console: Console) -> None:
    console.print(f"importance by {result['metric']} on {result['tokens']:,} tokens, in {result['path']}")
    console.print(f"axes: {sizes_text({row['axis']: row['size'] for row in result['axes']})}")
    for metric, scores in result["depth"].items():
        least = sorted(range(len(scores)), key=lambda index: scores[index])[:8]
        listed = ", ".join(f"{index} ({scores[index]:.2g})" for index in least)
        ranks = " (which ranks)" if metric == result["ranks_blocks"] and len(result["depth"]) > 1 else ""
        console.print(f"least important blocks by {metric.replace('_', ' ')}{ranks}: {listed}")
    if result["removed"]:
        console.print(f"removed one after another: {', '.join(map(str, result['removed']))}")
    if result["others"]:
        console.print(f"other scorings of the same pass: {', '.join(result['others'])}")
    if result["remark"]:
        console.print(result["remark"])


def search(result: Mapping[str, Any], console: Console) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    rows, sweep = result["candidates"], result.get("sweep")
    bests = [rows[best["candidate"]] | {"value": best["value"]} for best in sweep["values"]] if sweep else []
    shown = bests or rows[:SHOWN_CANDIDATES]
    rounds = sorted({done["tokens"] for row in rows for done in row["rounds"]})
    shares = [name for name in ("accuracy", "agreement") if any(row[name] is not None for row in rows)]
    for column in ("parameters", *shares, "loss as cut", *(f"after {short(tokens)}" for tokens in rounds)):
        table.add_column(column, justify="right")
    by_block = any(row["variants"] for row in rows)
    table.add_column("blocks" if by_block else "sizes")
    if sweep:
        table.add_column(sweep["budget"].replace("_", " "), justify="right")
    for row in shown:
        after = {done["tokens"]: done["loss"] for done in row["rounds"]}
        losses = ["" if loss is None else f"{loss:.4f}" for loss in (row["loss"], *map(after.get, rounds))]
        said = ["" if row[name] is None else f"{100 * row[name]:.1f} %" for name in shares]
        style = "bold" if row["chosen"] and not sweep else ""
        value = [row["value"]] if sweep else []
        kept = _kept(row, result["pattern"])
        table.add_row(number(row["costs"]["params"]), *said, *losses, kept, *value, style=style)
    console.print(table)
    if rounds:
        spent = sum(row["rounds"][-1]["tokens"] for row in rows if row["rounds"])
        taken = [sum(len(row["rounds"]) > place for row in rows) for place in range(len(rounds))]
        each = ", ".join(f"{count} to {short(tokens)}" for count, tokens in zip(taken, rounds, strict=True))
        console.print(f"short distillation: {each} tokens each, {short(spent)} in all")
    if by_block:
        count = f"{result['tried']:,} variants of {len(result['pattern'])} blocks"
        console.print(f"{len(rows):,} chosen from {count}; all of them in {result['path']}")
    else:
        console.print(f"{len(rows):,} of {result['tried']:,} sizes fit; all of them in {result['path']}")
    looked_at = sum(row.get("glance") is not None for row in rows)
    look = f"{looked_at:,} looked at, " if looked_at else ""
    console.print(f"{look}{sum(row['loss'] is not None for row in rows):,} scored")
    if result["remark"]:
        console.print(result["remark"])
    if "report" in result:
        console.print(f"report: {result['report']}")


def _kept(row: Mapping[str, Any], pattern: str) -> str:
    """What a candidate keeps: its sizes, or what becomes of each block."""
    if not row["variants"]:
        return sizes_text(row["sizes"])
    text = summary(pattern, row["variants"])
    for name, word in SIZE_WORDS.items():
        text = text.replace(name, word)
    return text


def latency_text(row: Mapping[str, Any]) -> str:
    """A student's time beside its prediction, budget and teacher."""

    def ms(name: str) -> str:
        return f"{1e3 * row[name]:,.3g} ms"

    late = ", which it EXCEEDS" if row.get("within_budget") is False else ""
    budget = "" if row["budget_seconds"] is None else f", budget {ms('budget_seconds')}{late}"
    beside = f"predicted {ms('predicted_seconds')}{budget}, teacher {ms('teacher_seconds')}"
    condition = f"{row['phase']} at context {row['context']:,}, batch {row['batch']}"
    took = f"{ms('seconds')} ± {ms('seconds_spread')} a pass, {row['tokens_per_second']:,.4g} tokens a second"
    return f"{condition}: {took} ({beside})"


def stored_text(stored: Mapping[str, Any]) -> str:
    """What a teacher's stored logits take, and what of its distribution is lost."""
    each = f"{stored['bytes_per_token']:,.4g} bytes a token"
    return (
        f"the teacher's largest logits, as stored, take {size(stored['bytes'])}, {each}, and lose "
        f"{stored['error']:.3g} nats a token of its distribution"
    )


def verify(result: Mapping[str, Any], console: Console) -> None:
    console.print(f"passed: the student equals {result['reference']}")
    scale = f"of logits up to {result['logit_scale']:.3g}"
    console.print(f"largest difference {result['exact_max_abs_error']:.2g} {scale} in {result['arithmetic']}")
    console.print(f"as stored ({result['stored']}) {result['max_abs_error']:.2g}, tensors identical to a fresh cut")
    rows = [{name: row[name] for name in ("axis", "kept", "total", "max_abs_error")} for row in result["axes"]]
    if rows:
        console.print(records(rows, ""))


def compress(result: Mapping[str, Any], console: Console) -> None:
    if "nested" in result:
        _elastic(result, console)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in JUDGED:
        table.add_column(column, justify="left" if not column else "right")
    arms = [
        ("teacher", result["teacher"]),
        ("pruned only", result["pruned"]),
        ("pruned + distilled", result["student"]),
    ]
    for name, row in [*arms, *((row["name"].replace("_", "-"), row) for row in result["controls"])]:
        table.add_row(name, *_judged(row), style="bold" if row is result["student"] else "")
    console.print(table)
    ratio = f"{100 * result['parameters_ratio']:.1f} % of the teacher's parameters: {_kept(result, result['pattern'])}"
    proof = {True: ", certified", False: ", NOT certified", None: ""}[result["verified"]]
    console.print(f"{ratio}{proof}")
    if latency := result["latency"]:
        console.print(latency_text(latency))
    if stored := result.get("teacher_logits"):
        console.print(stored_text(stored))
    console.print(f"judged on {result['held_out']}")
    if result["remark"]:
        console.print(result["remark"])
    console.print(f"report: {result['report']}")


def _judged(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Cells of a judgement: parameters, tokens of training, loss, its interval, perplexity, bits a byte."""
    low, high = row["loss_interval"] or (None, None)
    span = "" if low is None else f"{low:.4f} to {high:.4f}"
    trained = f"{short(row['tokens_trained'])} tokens" if row["tokens_trained"] else ""
    loss = f"{row['loss']:.4f}"
    return f"{row['parameters']:,}", trained, loss, span, f"{row['perplexity']:.2f}", f"{row['bits_per_byte']:.4f}"


def _elastic(result: Mapping[str, Any], console: Console) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in (*JUDGED, "loss as cut"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in [
        ("teacher", result["teacher"]),
        ("whole, distilled", result["whole"]),
        *((row["budget"], row) for row in result["nested"]),
    ]:
        as_cut = "" if row.get("loss_as_cut") is None else f"{row['loss_as_cut']:.4f}"
        table.add_row(name, *_judged(row), as_cut)
    console.print(table)
    for row in result["nested"]:
        console.print(f"{row['budget']}: {sizes_text(row['sizes'])}")
    proof = {True: "equals", False: "DIFFERS from", None: "was not compared with"}[result["verified"]]
    console.print(f"the sorted model {proof} the teacher; judged on {result['held_out']}")
    if result["remark"]:
        console.print(result["remark"])
    console.print(f"any size: halflap prune {result['path']} --from-elastic --params 60%")
    console.print(f"report: {result['report']}")
