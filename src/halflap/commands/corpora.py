"""From the text a recipe names to token rows: opened shards or newly built ones, and the documents kept back.

Text is tokenised once into the run's own `corpus/` folder, so a resumed run finds it. When no text is given to judge
on, a share of the documents, chosen by a hash of their text, is kept back and never trained on.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from halflap.commands.sections import Text
from halflap.data.batch import Batch
from halflap.data.corpus import Corpus, build_corpus, is_corpus, open_corpus
from halflap.data.loader import Loader
from halflap.data.text import cut_into_pieces, hash_position, held_out_from, read_documents
from halflap.data.tokenizer import Tokenizer, train_tokenizer
from halflap.errors import HalflapError
from halflap.files import atomic_write
from halflap.parallel import mesh
from halflap.train.config import Fit
from halflap.train.phases import Plan

HELD_OUT_TOKENS = (8192, 131_072)
"""At least and at most so many tokens are judged on at each point of a training run's curve."""
HELD_OUT_SHARE = 1 / 40
"""In between, this share of the tokens trained on: ten forward passes over it are a small part of the training."""
FEW_DOCUMENTS, PIECES, SHORTEST_PIECE = 20, 100, 1000
"""Text of fewer documents is cut into about so many pieces, each of at least so many characters, to keep some back."""


@dataclass(frozen=True)
class Corpora:
    """Corpora to train on, in the order of the recipe's paths, and those kept back (empty when there are none)."""

    train: tuple[Corpus, ...]
    held_out: tuple[Corpus, ...]
    held_out_is: str
    """What the held-out text is, in words for the result."""

    @property
    def bytes_per_token(self) -> float:
        tokens = sum(corpus.tokens for corpus in self.held_out)
        return sum(corpus.manifest.bytes for corpus in self.held_out) / tokens if tokens else 0.0


def tokenizer_place(checkpoint: Path, paths: Sequence[str]) -> Path:
    """Where the tokenizer lies: beside the checkpoint, or beside the first token shards when it has none."""
    own = (checkpoint / "tokenizer.json").is_file()
    beside = [Path(path) for path in paths if is_corpus(path) and (Path(path) / "tokenizer.json").is_file()]
    return checkpoint if own or not beside else beside[0]


def choose_tokenizer(
    given: str | None, text: Text, place: Path, vocab_size: int, checkpoint: Path | None = None
) -> Tokenizer:
    """The given one, else that beside the token shards or the checkpoint, else one trained on the text.

    A trained one has `vocab_size` entries and is kept in `place`/tokenizer, where a resumed run finds it.
    """
    beside = [given] if given else [path for path in text.data if is_corpus(path)]
    if not beside and checkpoint is not None:
        beside = [str(checkpoint)]
    if beside:
        return Tokenizer.load(beside[0])
    trained = place / "tokenizer"
    if not (trained / "tokenizer.json").exists():
        train_tokenizer(read_documents(text.data, text.field), vocab_size).save(trained)
    return Tokenizer.load(trained)


def open_corpora(text: Text, tokenizer: Tokenizer, place: Path, eval_data: Sequence[str] = ()) -> Corpora:
    """Open shards as they are and tokenise other text under `place`; without `eval_data` keep documents back."""
    if not text.data:
        raise HalflapError("no text was given; name files, folders or token shards with --data")
    train: list[Corpus] = []
    held_out: list[Corpus] = []
    share = 0.0 if eval_data else text.held_out
    for number, path in enumerate(text.data):
        if is_corpus(path) or not share:
            train.append(_open(path, text.field, tokenizer, place / f"train-{number}"))
            continue
        source = _with_enough_documents(path, text.field, place / f"pieces-{number}.jsonl")
        border = held_out_from(read_documents([source], text.field), share)
        build = partial(_open, source, text.field, tokenizer)
        train.append(build(place / f"train-{number}", lambda text, border=border: hash_position(text) < border))
        if border < math.inf:
            back = build(place / f"held-out-{number}", lambda text, border=border: hash_position(text) >= border)
            held_out.append(back)
    for number, path in enumerate(eval_data):
        held_out.append(_open(path, text.field, tokenizer, place / f"eval-{number}"))
    return Corpora(tuple(train), tuple(held_out), _described(eval_data, share, bool(held_out)))


def _open(
    path: str | Path, field: str, tokenizer: Tokenizer, out: Path, keep: Callable[[str], bool] | None = None
) -> Corpus:
    """Token shards as they are; other text tokenised into `out`, by the first rank alone."""
    if is_corpus(path):
        return open_corpus(path, tokenizer)
    if mesh.is_main():
        build_corpus([path], tokenizer, out, field=field, keep=keep)
    mesh.barrier()
    return open_corpus(out, tokenizer)


def _with_enough_documents(path: str, field: str, pieces: Path) -> str | Path:
    """The same path, or the text of its few long documents cut into pieces, so that some can be kept back."""
    few = list(itertools.islice(read_documents([path], field), FEW_DOCUMENTS))
    if len(few) == FEW_DOCUMENTS:
        return path
    characters = max(SHORTEST_PIECE, sum(map(len, few)) // PIECES)
    if mesh.is_main():
        with atomic_write(pieces, "w") as file:
            for document in few:
                for piece in cut_into_pieces(document, characters):
                    file.write(json.dumps({field: piece}, ensure_ascii=False) + "\n")
    mesh.barrier()
    return pieces


def _described(eval_data: Sequence[str], share: float, any_held_out: bool) -> str:
    if eval_data:
        return "the text given with eval-data"
    if any_held_out:
        return f"the last {100 * share:g} % of the documents by a hash of their text, kept back from training"
    if not share:
        return "nothing: no share was to be kept back"
    return "nothing: token shards and single short documents cannot be split; give eval-data"


def training_loader(
    corpora: Corpora, text: Text, sequence_length: int, rows: int, seed: int, plan: Plan | None = None
) -> Loader:
    """Batches of `rows` rows of this rank, or with the blends of a plan; phases without weights keep the last ones."""
    build = partial(
        Loader,
        corpora.train,
        sequence_length=sequence_length,
        micro_batch_size=rows,
        seed=seed,
        packing=text.packing,
        rank=mesh.rank(),
        world=mesh.world_size(),
    )
    loader = build(weights=text.weights or None)
    if plan is None or all(phase.weights is None for phase in plan.phases):
        return loader
    return build(phases=plan.blend(text.weights or loader.rows), total_tokens=plan.tokens)


def held_out_batches(corpora: Sequence[Corpus], settings: Fit, training_tokens: int) -> list[Batch]:
    """A fixed sample of the rows of held-out corpora, each at most once; empty when nothing was kept back."""
    if not corpora:
        return []
    rows, length = settings.micro_batch_rows, settings.sequence_length
    loader = Loader(corpora, sequence_length=length, micro_batch_size=rows, seed=0)
    available = sum(loader.rows)
    least, most = HELD_OUT_TOKENS
    tokens = min(most, max(least, round(HELD_OUT_SHARE * training_tokens)))
    count = max(1, min(available, tokens // length) // rows)
    return [loader.batch(index) for index in range(count)]
