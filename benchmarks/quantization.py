"""What weights of fewer bits cost and save: held-out loss, KL divergence, bytes, and the time of a decode step.

    python benchmarks/quantization.py [--model DIR|FILE.gguf] [--eval-data FILE...] [--tokens 60k] [--quick]

Forms: float32 (the checkpoint's weights), bfloat16 (rounded to it; arithmetic stays float32, so that the weights alone
differ), int8, fp8, and int4 in groups of 32, 64 and 128; then int4 in groups of 32 with nothing kept, or the head too.
Every form is judged on the same windows. `loss_added` is the difference from float32's loss and `kl` the divergence
from its predictions, both in nats a token. A decode step writes one token of each of 1, 4 and 16 rows behind 256.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import halflap
from common import RESULTS, THREADS, Report
from halflap.checkpoints.checkpoint import Checkpoint, fill_model
from halflap.data.tokenizer import Tokenizer
from halflap.evaluate.bench import bench
from halflap.evaluate.documents import documents_of
from halflap.evaluate.held_out import evaluate_text
from halflap.models.model import HybridModel
from halflap.models.quantization import Quantization, weight_bytes
from halflap.models.quantized import pack_tensors

ROOT = Path(__file__).resolve().parents[1]
FORMS: dict[str, Quantization | None] = {
    "float32": None,
    "bfloat16": None,
    "int8": Quantization.asked("int8", None),
    "fp8": Quantization.asked("fp8"),
    "int4, groups of 32": Quantization.asked("int4", 32),
    "int4, groups of 64": Quantization.asked("int4", 64),
    "int4, groups of 128": Quantization.asked("int4", 128),
    "int4, groups of 32, nothing kept": Quantization.asked("int4", 32, ()),
    "int4, groups of 32, head kept": Quantization.asked("int4", 32, ("dt", "embedding", "head")),
}
KL_ROWS, KL_TOKENS = 8, 512


def main() -> None:
    chosen = arguments()
    torch.set_num_threads(chosen.threads)
    report = Report("quantization", chosen.out, chosen.threads)
    with tempfile.TemporaryDirectory() as work:
        directory = Path(chosen.model)
        if directory.is_file():
            halflap.import_(str(directory), out=f"{work}/imported")
            directory = Path(work) / "imported"
        opened, tokenizer = Checkpoint.open(directory), Tokenizer.load(directory)
        documents = documents_of(chosen.eval_data, tokenizer, limit=chosen.tokens)
        long = [torch.from_numpy(d.tokens[:KL_TOKENS])[None] for d in documents if len(d.tokens) > 1]
        rows = sorted(long, key=lambda row: -row.shape[1])[: chosen.kl_rows]
        plain: list[torch.Tensor] = []
        first: dict[str, Any] | None = None
        for name, quantization in FORMS.items():
            model = form(opened, name, quantization)
            judged = evaluate_text(model, documents, tokens=chosen.tokens).to_json()
            first = first or judged
            predictions = [log_probs(model, row) for row in rows]
            plain = plain or predictions
            weight = weight_bytes(model.config, quantization, 2 if name == "bfloat16" else 4)
            report.add(
                model=Path(chosen.model).name,
                form=name,
                weight_bytes=weight,
                loss=judged["loss"],
                loss_interval=judged["loss_interval"],
                perplexity=judged["perplexity"],
                loss_added=judged["loss"] - first["loss"],
                kl=divergence(plain, predictions),
                tokens=judged["tokens"],
                decode=[] if name == "bfloat16" else decode(model, chosen),
            )
            del model
    report.write()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "demo" / "teacher"), help="checkpoint directory or GGUF file")
    parser.add_argument("--eval-data", nargs="+", default=[str(ROOT / "demo" / "text" / "validation.jsonl.xz")])
    parser.add_argument("--tokens", type=int, default=60_000, help="tokens judged")
    parser.add_argument("--kl-rows", type=int, default=KL_ROWS, help="rows whose predictions are compared")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], help="rows of a decode step")
    parser.add_argument("--steps", type=int, default=64, help="decode steps timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a trial at toy size; its figures mean nothing")
    if parser.parse_args().quick:
        place = Path(tempfile.gettempdir()) / "halflap-benchmarks"
        parser.set_defaults(tokens=1000, kl_rows=1, batch=[1], steps=2, repeats=1, out=place)
    return parser.parse_args()


def form(opened: Checkpoint, name: str, quantization: Quantization | None) -> HybridModel:
    """The checkpoint in that form, in float32 arithmetic."""

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for key, tensor in opened.tensors():
            yield key, tensor.bfloat16() if name == "bfloat16" and tensor.dim() == 2 else tensor

    if quantization is None:
        return fill_model(opened.config, tensors(), torch.float32)
    packed = pack_tensors(opened.tensors(), opened.config, quantization)
    return fill_model(opened.config, packed, torch.float32, quantization=quantization)


@torch.inference_mode()
def log_probs(model: HybridModel, row: torch.Tensor) -> torch.Tensor:
    return model(row)[0].log_softmax(-1)


def divergence(plain: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """KL from the plain model's predictions to those found, nats a token."""
    sums = [(p.exp() * (p - q)).sum(-1).double() for p, q in zip(plain, found, strict=True)]
    return float(torch.cat(sums).mean())


def decode(model: HybridModel, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    rows = bench(model, [256], [chosen.steps], chosen.batch, repeats=chosen.repeats, seed=0)
    wanted = ("batch", "decode_step_ms", "decode_step_ms_spread", "prefill_tokens_per_second")
    return [{key: row[key] for key in wanted} for row in rows]


if __name__ == "__main__":
    main()
