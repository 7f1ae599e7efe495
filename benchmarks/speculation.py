"""What guessing ahead is worth: a student drafting for its teacher, and prompt lookup at its best and at its worst.

    python benchmarks/speculation.py [--model DIR] [--student DIR] [--data FILE...] [--prompts 8] [--batches 1 4]

DIR defaults to the demo's teacher; its student is what `make demo` leaves (runs/demo/checkpoint). Tasks:
  text     openings of held-out documents, greedy: what the student is for, and lookup's ordinary case
  editing  a passage to be written again: with a chat template an instruction to replace one word; without one the
           passage given twice and begun a third time, which is what editing is to a model that follows no instruction
  random   random tokens at temperature 1, where nothing that is guessed comes true: what speculation costs at worst
The same requests run through three engines that differ in `speculate` alone, in turns. `acceptance` is the share of
guesses that came true; replies must be the same token for token (but for near ties, which passes of different widths
may round either way), and `same_tokens` says what share is. Goals: faster on text and editing, at least 0.95 at random.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Report, arguments, interleave, spread
from halflap.checkpoints.checkpoint import load_model
from halflap.data.text import read_documents
from halflap.data.tokenizer import Tokenizer
from halflap.inference.engine import Engine
from halflap.inference.requests import EngineSettings, Request, SamplingParams
from halflap.models.model import HybridModel

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
STUDENT = ROOT / "runs" / "demo" / "checkpoint"
OPENING, BEGUN = 64, 16  # tokens of a document that a prompt has; of a passage that is begun again


def main() -> None:
    quick = {"prompts": 2, "tokens": 6, "passage": 24, "batches": [1]}
    chosen = arguments(
        __doc__, quick, model=DEMO / "teacher", student=STUDENT, data=[DEMO / "text" / "validation.jsonl.xz"],
        prompts=8, tokens=128, passage=160, batches=[1, 4],
    )  # fmt: skip
    report = Report("speculation", chosen.out, chosen.threads)
    model, tokenizer = load_model(chosen.model), Tokenizer.load(chosen.model)
    guessers: dict[str, Any] = {"off": None, "lookup": "lookup"}
    if chosen.student.is_dir():
        guessers["student"] = load_model(chosen.student)
    else:
        print(f"no student at {chosen.student}: `make demo` makes one, or give --student DIR; its rows are left out")
    tasks = requests(model, tokenizer, chosen)
    for batch in chosen.batches:
        engines = {name: Engine(model, tokenizer, settings(batch, guesser)) for name, guesser in guessers.items()}
        for task, asked in tasks.items():
            for row in compared(engines, asked, chosen.repeats):
                report.add(model=chosen.model.name, task=task, batch=batch, **row)
        for engine in engines.values():
            engine.close()
    report.write()


def settings(batch: int, guesser: HybridModel | str | None) -> EngineSettings:
    return EngineSettings(max_batch=batch, speculate=guesser)


def requests(model: HybridModel, tokenizer: Tokenizer, chosen: Any) -> dict[str, list[Request]]:
    """Each task's requests, the same at every run."""
    chance, least = random.Random(0), max(OPENING, chosen.passage)
    texts = (tokenizer.encode(text) for text in read_documents(chosen.data))
    documents = [ids for ids in texts if len(ids) >= least][: chosen.prompts]
    ordinary = range(len(tokenizer.prefix_ids) + 3, tokenizer.vocab_size)
    start = tokenizer.prefix_ids
    prompts = {
        "text": [(*start, *ids[:OPENING]) for ids in documents],
        "editing": [editing(tokenizer, ids[: chosen.passage]) for ids in documents],
        "random": [(*start, *chance.choices(ordinary, k=OPENING)) for _ in documents],
    }
    sampling = {name: SamplingParams(temperature=float(name == "random")) for name in prompts}
    return {
        name: [Request(ids, chosen.tokens, sampling[name], ignore_eos=True) for ids in of_task]
        for name, of_task in prompts.items()
    }


def editing(tokenizer: Tokenizer, passage: Sequence[int]) -> tuple[int, ...]:
    if tokenizer.chat_template is None:
        return (*tokenizer.prefix_ids, *passage, *passage, *passage[:BEGUN])
    text = tokenizer.decode(passage, skip_special_tokens=True)
    word = Counter(word for word in text.split() if word.isalpha() and len(word) > 3).most_common(1)[0][0]
    wish = f'Write the following text again, with "{word.upper()}" in place of every "{word}":\n\n{text}'
    return tuple(tokenizer.encode_chat([{"role": "user", "content": wish}]))


def compared(engines: dict[str, Engine], asked: list[Request], repeats: int) -> list[dict[str, Any]]:
    """A row for each engine that guesses: its rate and the plain one's, what was guessed and what came true."""
    sides = {name: Side(engine, asked) for name, engine in engines.items()}
    amount = sum(request.max_new_tokens for request in asked)
    times = interleave(sides, repeats)
    rates = {name: spread(taken, amount) for name, taken in times.items()}
    found = []
    for name in [name for name in sides if name != "off"]:
        stats = engines[name].stats()
        guessed, right = (stats[key] - sides[name].before[key] for key in ("guessed", "right"))
        same = sum(a == b for a, b in zip(sides["off"].replies, sides[name].replies, strict=True))
        found.append({
            "speculate": name, "tokens_per_second": rates[name], "without": rates["off"],
            "speed_up": rates[name]["median"] / rates["off"]["median"], "guessed": guessed,
            "acceptance": right / guessed if guessed else None, "same_tokens": same / len(asked),
        })  # fmt: skip
    return found


class Side:
    """All requests of a task through one engine, as many at once as it has slots for."""

    def __init__(self, engine: Engine, asked: list[Request]) -> None:
        self.engine, self.asked, self.before = engine, asked, engine.stats()
        self.replies: list[list[int]] = []

    def __call__(self) -> None:
        streams = [self.engine.submit(request) for request in self.asked]
        self.replies = [[token.id for token in piece.tokens] for stream in streams for piece in stream.result()]


if __name__ == "__main__":
    main()
