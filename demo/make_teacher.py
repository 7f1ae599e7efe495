"""Turn the finished run of demo/teacher.yaml into demo/teacher: weights in bfloat16, log, loss curve and card.

Usage: python demo/make_teacher.py RUN   (the --out of `halflap pretrain --config demo/teacher.yaml`; needs matplotlib).
The result is in the repository, so that nobody needs to run this to see the demo.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import halflap
from halflap.checkpoints.checkpoint import save_model
from halflap.checkpoints.config import read_lineage

HERE = Path(__file__).parent
CARD = """---
library_name: transformers
license: apache-2.0
tags: [halflap, nemotron_h]
---

# The demo's teacher

A small hybrid of the Nemotron-H family, trained by this project with `demo/teacher.yaml` on freely licensed text:
public-domain books, OpenStax textbooks (CC BY 4.0), technical documentation (public domain, MIT or Apache-2.0,
CC BY 4.0) and Python source (BSD, MIT, Apache-2.0). Sources and licence texts are in `../text/`.

| | |
|---|---|
| pattern | `{pattern}` |
| parameters | {parameters:,} ({non_embedding:,} without embeddings) |
| hidden size, vocabulary | {hidden_size}, {vocab_size} |
| opens in | stock transformers (`NemotronHForCausalLM`) and halflap |
| trained on | {tokens:,} tokens (warmup-stable-decay, bfloat16 mixed precision, {hours:.1f} hours on two CPU cores) |
| held-out loss | {loss:.3f} nats a token on the corpora's validation files |

![Loss against tokens](loss_curve.svg)

`training_log.jsonl` is the run's log, `lineage.json` has the digests of the token shards. The model writes plausible
English clauses and little sense; it is here to be compressed, not to be used.
"""


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "halflap"  # the same picture gives the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for name, label, style in (("loss", "training", "-"), ("held_out_loss", "held out", "o-")):
        points = [(row["tokens"] / 1e6, row[name]) for row in rows if name in row]
        axes.plot(*zip(*points), style, label=label, linewidth=1, markersize=4)
    axes.set(xlabel="million tokens", ylabel="loss, nats a token", ylim=(2.5, 6.5))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, metadata={"Date": None})


def main(run: Path) -> None:
    place, model = HERE / "teacher", halflap.load(str(run), dtype="float32")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    shutil.rmtree(place, ignore_errors=True)
    checkpoint = run / "checkpoint"
    save_model(model, place, dtype="bfloat16", tokenizer_from=checkpoint, lineage=read_lineage(checkpoint))
    shutil.copy(run / "metrics.jsonl", place / "training_log.jsonl")
    draw(rows, place / "loss_curve.svg")
    told = halflap.inspect(str(place))
    last = [row for row in rows if "held_out_loss" in row][-1]
    trained = [row for row in rows if "seconds" in row][-1]
    card = CARD.format(
        pattern=told["pattern"],
        parameters=told["parameters"],
        non_embedding=told["non_embedding_parameters"],
        hidden_size=model.config.hidden_size,
        vocab_size=model.config.vocab_size,
        tokens=trained["tokens"],
        hours=trained["seconds"] / 3600,
        loss=last["held_out_loss"],
    )
    (place / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
