"""A verb's result for people: on a terminal in colour, in a pipe as plain text. `--json` never comes here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from halflap.commands import show_compress
from halflap.commands.tables import fit_text, generic, number, records, short, size

PIPE_WIDTH = 10_000  # columns of a file or pipe: a row is a line, and no number is cut
COLOURS = {"M": "cyan", "S": "blue", "*": "bold yellow", "H": "magenta", "-": "green"}
KINDS = {"M": "Mamba-2", "S": "Mamba-1", "*": "attention", "H": "attention and SSM", "-": "MLP"}


def show(verb: str, result: Mapping[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    VIEWS.get(verb, generic)(result, console)


def strip(pattern: str) -> Text:
    """The model at a glance: one coloured symbol a block."""
    text = Text()
    for symbol in pattern:
        text.append(symbol, style=COLOURS.get(symbol, ""))
    return text


def inspect(result: Mapping[str, Any], console: Console) -> None:
    if "presets" in result:
        console.print(records(result["presets"], ""))
        return
    pattern = result["pattern"]
    console.print(strip(pattern))
    counts = ", ".join(f"{pattern.count(symbol)} {KINDS.get(symbol, symbol)}" for symbol in dict.fromkeys(pattern))
    grid = Table.grid(padding=(0, 2))
    for name, value in (
        ("family", result["family"]),
        ("blocks", f"{len(pattern)} ({counts})"),
        ("parameters", f"{result['parameters']:,} ({short(result['parameters'])})"),
        ("without embeddings", f"{result['non_embedding_parameters']:,}"),
        ("hidden size", f"{result['hidden_size']:,}"),
        ("vocabulary", f"{result['vocab_size']:,}"),
        *([("meta tokens", f"{result['num_meta_tokens']:,}")] if result["num_meta_tokens"] else []),
    ):
        grid.add_row(Text(name, style="bold"), value)
    console.print(grid)
    console.print()
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("context", "cache", "FLOPs a token, decode", "prefill"):
        table.add_column(column, justify="right")
    for context, cached in result["cache_bytes"].items():
        decode, prefill = (result["flops"][phase][context] for phase in ("decode", "prefill"))
        table.add_row(f"{int(context):,}", size(cached), short(decode), short(prefill))
    console.print(table)
    console.print()
    if published := result["cache_as_published"]:
        _published_cache(result, published, console)
    console.print(records(_runs(result["blocks"]), ""))
    if readers := [f"{block} of {source}" for block, source in result["key_value_sources"].items()]:
        console.print(f"keys and values: block {', '.join(readers)}")


def _published_cache(result: Mapping[str, Any], published: Mapping[str, Any], console: Console) -> None:
    """What the cache holds, and its sums as papers quote them."""
    rows = [
        {"context": int(context)} | {f"{name}, MB": f"{value / 1e6:,.3f}" for name, value in parts.items()}
        for context, parts in result["cache_parts"].items()
    ]
    console.print(records(rows, ""))
    sums = ", ".join(f"{name.replace('_', ' ')} {value / 1e6:,.3f}" for name, value in published["bytes"].items())
    console.print(
        f"as published, at {published['context']:,} tokens, all in {published['dtype']}, MB of 10^6 bytes: {sums}\n"
    )


def _runs(blocks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Blocks of equal kind and sizes in one row."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for index, block in enumerate(blocks):
        row = rows.setdefault((block["symbol"], block["sizes"]), {"block": block["symbol"], "how many": 0})
        row["how many"] += 1
        row.setdefault("first", index)
        row |= {"kind": block["kind"], "parameters each": block["parameters"], "sizes": block["sizes"]}
    return list(rows.values())


def doctor(result: Mapping[str, Any], console: Console) -> None:
    for heading in ("versions", "device", "kernels"):
        console.print(Text(heading, style="bold"))
        grid = Table.grid(padding=(0, 2))
        for name, value in result[heading].items():
            if isinstance(value, Mapping):
                value = ", ".join(f"{key} {item}" for key, item in value.items())
            if value not in ("", None):
                grid.add_row(f"  {name}", size(int(value)) if name.endswith("_bytes") else number(value))
        console.print(grid)
    for line in result["missing"] or ["nothing is missing"]:
        console.print(Text(f"- {line}" if result["missing"] else line))


def evaluate(result: Mapping[str, Any], console: Console) -> None:
    if result["loss"] is not None:
        grid = Table.grid(padding=(0, 2))
        for name, unit in (("loss", "nats a token"), ("perplexity", "a token"), ("bits_per_byte", "")):
            low, high = result[f"{name}_interval"] or (None, None)
            span = "" if low is None else f"95 % in {low:.4f} to {high:.4f}"
            grid.add_row(Text(name.replace("_", " "), style="bold"), f"{result[name]:.4f} {unit}".rstrip(), span)
        of = f"{result['tokens']:,} tokens of {result['documents']:,} documents, {result['bytes']:,} bytes"
        console.print(grid)
        console.print(f"{of}; windows of {result['context']:,} every {result['stride']:,}")
    probes = {name: metrics for name, metrics in result["tasks"].items() if "by_length" in metrics}
    for name, metrics in result["tasks"].items():
        if name in probes:
            continue
        row = [
            f"{metric.replace('_', ' ')} {value:.4f}"
            + (f" ± {metrics[f'{metric}_stderr']:.4f}" if f"{metric}_stderr" in metrics else "")
            for metric, value in metrics.items()
            if metric != "items" and not metric.endswith(("_stderr", "_interval"))
        ]
        console.print(Text(name, style="bold"), f" {', '.join(row)} ({metrics.get('items', 0):,} items)")
    if truncated := result.get("truncated_prompts"):
        console.print(f"{truncated:,} prompts were longer than the window and lost their beginning")
    if probes:
        _probes(probes, console)


def _probes(probes: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Each probe by length, and the right answers of those that have depths by depth."""
    rows = []
    for name, metrics in probes.items():
        for cell in metrics["by_length"]:
            low, high = cell["acc_interval"]
            row = {"probe": name, "length": cell["length"], "right": f"{cell['acc']:.1%}"}
            row["95 % in"] = f"{low:.1%} to {high:.1%}"
            if "choice_acc" in cell:
                row |= {"likeliest": f"{cell['choice_acc']:.1%}", "chance": f"{cell['chance']:.1%}"}
            else:
                row["tokens right"] = f"{cell['token_acc']:.1%}"
            rows.append(row | {"loss": f"{cell['loss']:.4f}", "items": cell["items"]})
    console.print(records(rows, ""))
    for name, metrics in probes.items():
        table: dict[int, dict[str, Any]] = {}
        for cell in metrics.get("by_depth", ()):
            row = table.setdefault(cell["length"], {"length": cell["length"]})
            row[f"{cell['depth']:.0%}"] = f"{cell['acc']:.1%}, loss {cell['loss']:.3f}"
        if table:
            console.print(records(list(table.values()), f"{name}: right answers by depth (0 % is the beginning)"))


def bench(result: Mapping[str, Any], console: Console) -> None:
    if "seconds_by_kind" in result["rows"][0]:
        _block_costs(result, console)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("in+out", "batch", "prefill/s", "decode/s", "first", "step", "peak", "cache"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result["rows"]:
        rates = [
            f"{row[name]:,.{0 if row[name] >= 100 else 2}f} ±{100 * row[f'{name}_spread'] / row[name]:.0f}%"
            for name in ("prefill_tokens_per_second", "decode_tokens_per_second")
        ]
        times = [f"{row[name]:,.3g} ms" for name in ("time_to_first_token_ms", "decode_step_ms")]
        sizes = [size(row[name]) for name in ("peak_memory_bytes", "cache_bytes")]
        table.add_row(f"{row['prompt']}+{row['output']}", str(row["batch"]), *rates, *times, *sizes)
    console.width = max(console.width, 100)
    console.print(table)
    hardware, dtype = result["hardware"], result["rows"][0]["dtype"]
    chosen = result["kernels"]["gpu"] if "gpu" in hardware else result["kernels"]
    kernels = ", ".join(f"{op} {kind}" for op, kind in chosen["ops"].items())
    console.print(f"{hardware.get('gpu') or hardware['processor']}, {hardware['threads']} threads, {dtype}; {kernels}")
    console.print(
        f"tokens a second of the batch, time to the first token and of a step: medians of {result['repeats']}"
    )


def _block_costs(result: Mapping[str, Any], console: Console) -> None:
    """A cost table: the model's pass by kind of block, and how well it was fitted."""
    for row in result["rows"]:
        kinds = ", ".join(f"{kind} {1e3 * seconds:,.3g}" for kind, seconds in row["seconds_by_kind"].items())
        console.print(f"{row['phase']} at context {row['context']:,}, batch {row['batch']}", style="bold")
        console.print(f"  a pass of the model {1e3 * row['seconds']:,.3g} ms: {kinds}")
        console.print(f"  {fit_text(row)}")
    machine = result["hardware"]
    threads = "" if machine["threads"] is None else f"{machine['threads']} threads, "
    console.print(f"{machine['name']}, {threads}{machine['dtype']}, {machine['kernels']} kernels; {result['path']}")


def generate(result: Mapping[str, Any], console: Console) -> None:
    if result.get("shown"):  # it was printed while it was written
        return
    texts = result["text"] if isinstance(result["text"], list) else [result["text"]]
    for text in texts:
        print(text, file=console.file)  # as it is: rich would make emoji of `:x:`, and spaces of tabs


def study(result: Mapping[str, Any], console: Console) -> None:
    """A column for each thing that was measured of any arm."""
    rows, seeds = result["arms"], len(result["seeds"])
    alike = equal_tokens(rows)
    console.print(f"{result['study']}, {result['size']}: {result['asks']}", style="bold")
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "arm": lambda row: row["name"],
        "parameters": lambda row: short(row["parameters"]),
        "tokens": lambda row: "" if alike else short(row["tokens_trained"]),
        "as cut": lambda row: _mean(row, "loss_as_cut"),
        "loss": lambda row: _mean(row, "loss"),
        f"to {result['baseline']}": lambda row: _difference(row.get("loss_against_baseline")),
        "step": lambda row: _difference(row.get("loss_against_previous")),
        "latency": lambda row: f"{1e3 * row['latency_seconds']:.3g} ms" if "latency_seconds" in row else "",
        "train/s": lambda row: short(row["training_tokens_per_second"]),
        "prefill/s": lambda row: short(row["prefill_tokens_per_second"]) if "prefill_tokens_per_second" in row else "",
        "decode/s": lambda row: short(row["decode_tokens_per_second"]) if "decode_tokens_per_second" in row else "",
        "cache": lambda row: size(row["cache_bytes"]) if "cache_bytes" in row else "",
        "recall": lambda row: f"{100 * row['recall']:.1f} %" if "recall" in row else "",
    }
    table = Table(box=None, header_style="bold", pad_edge=False)
    shown = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    for name in (shown := {name: cells for name, cells in shown.items() if any(cells)}):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for cells in zip(*shown.values(), strict=True):
        table.add_row(*cells)
    console.width = max(console.width, 125)
    console.print(table)
    for claim in result["claims"]:
        difference = _difference({name: claim[name] for name in ("difference", "p_value")})
        console.print(f"{VERDICTS[claim['verdict']]}: {claim['says']} ({claim['measure']} {difference})")
    for reading in result["readings"]:
        console.print(reading["says"])
    named = [f"{row['name']} from {row['previous']}" for row in rows if row.get("previous")]
    console.print(f"step: {', '.join(named)}; p of the differences by seed, uncorrected for their number")
    speed = (
        f"; decode and cache: batch {rows[0]['batch']} after {rows[0]['prompt']:,} tokens" if "batch" in rows[0] else ""
    )
    teacher = f"; the teacher's is {result['teacher']['loss']:.3f}" if result["teacher"] else ""
    tokens = f" of {short(result['tokens'])} tokens" if alike else ""
    console.print(
        f"loss: mean over {seeds} seeds{tokens}, ± standard deviation{teacher}{speed}; judged on {result['held_out']}"
    )
    console.print(f"report: {result['report']}")


def equal_tokens(arms: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a study's arms were trained on as many tokens, to a step or so."""
    trained = [arm["tokens_trained"] for arm in arms]
    return max(trained) <= 1.05 * min(trained)


VERDICTS = {"holds": "holds", "reversed": "reversed here", "open": "not told from chance"}


def _mean(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        return ""
    spread = row[f"{name}_spread"]
    return f"{row[name]:.3f}" + ("" if spread is None else f" ±{spread:.3f}")


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    chance = "" if found["p_value"] is None else f" (p {found['p_value']:.2g})"
    return f"{found['difference']:+.3f}{chance}"


def analyze(result: Mapping[str, Any], console: Console) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    targets = ("meta", "first", "self", "others") if result["meta_tokens"] else ("first", "self", "others")
    for column in ("block", "kind", *(f"on {name}" for name in targets), "entropy", "loss added without"):
        table.add_column(column, justify="left" if column in ("kind", "loss added without") else "right")
    for row in result["layers"]:
        shares = [f"{100 * row['attention'][name]:.1f} %" if "attention" in row else "" for name in targets]
        entropy = f"{row['entropy']:.2f}" if "entropy" in row else ""
        added = ", ".join(f"{name} {value:+.3f}" for name, value in row["loss_added_without"].items())
        table.add_row(str(row["block"]), row["kind"], *shares, entropy, added)
    console.print(table)
    console.print("shares of a token's attention, entropy in nats, loss in nats a token")
    if costs := result.get("quantization"):
        worst = sorted(costs["parts"], key=lambda part: -part["kl"])[:10]
        console.print(f"packed to {costs['weights']}: KL divergence {costs['whole']['kl']:.4f} nats a token; most by")
        for part in worst:
            where = part["parameter"] or f"all of block {part['block']}"
            console.print(f"  {part['kl']:.4f}  {where} {'' if part['slice'] == 'all' else part['slice']}".rstrip())
    for name, row in zip(result["domains"], result["similarity"], strict=True):
        alike = ", ".join(f"{other} {value:.3f}" for other, value in zip(result["domains"], row, strict=True))
        console.print(f"meta tokens of {name} as of {alike}")
    console.print(f"report: {result['report']}")


VIEWS: dict[str, Callable[[Mapping[str, Any], Console], None]] = {
    "inspect": inspect,
    "doctor": doctor,
    "evaluate": evaluate,
    "bench": bench,
    "generate": generate,
    "chat": generate,
    "score": show_compress.score,
    "search": show_compress.search,
    "verify": show_compress.verify,
    "compress": show_compress.compress,
    "study": study,
    "analyze": analyze,
}
