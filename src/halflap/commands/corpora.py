"""From the text a recipe names to token rows: opened shards or newly built ones, and the documents kept back.

Text is tokenised once into the run's own `corpus/` folder, so a resumed run finds it. When no text is given to judge
on, a share of the documents, chosen by a hash of their text, is kept back and never trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halflap.commands.sections import Text
from halflap.data.batch import Batch
from halflap.data.corpus import Corpus, build_corpus, is_corpus, open_corpus
from halflap.data.loader import Loader
from halflap.data.text import is_held_out
from halflap.data.tokenizer import Tokenizer
from halflap.errors import HalflapError

HELD_OUT_TOKENS = 131_072
"""At most this many tokens are judged on while training."""


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


def open_corpora(text: Text, tokenizer: Tokenizer, place: Path, eval_data: Sequence[str] = ()) -> Corpora:
    """Open shards as they are and tokenise other text under `place`; keep documents back when no `eval_data` is given."""
    if not text.data:
        raise HalflapError("no text was given; name files, folders or token shards with --data")
    share = 0.0 if eval_data else text.held_out
    train: list[Corpus] = []
    held_out: list[Corpus] = []
    for number, path in enumerate(text.data):
        if is_corpus(path):
            train.append(open_corpus(path, tokenizer))
            continue
        train.append(_build(path, text.field, tokenizer, place / f"train-{number}", keep_held_out=False, share=share))
        if share:
            held_out.append(
                _build(path, text.field, tokenizer, place / f"held-out-{number}", keep_held_out=True, share=share)
            )
    for number, path in enumerate(eval_data):
        if is_corpus(path):
            held_out.append(open_corpus(path, tokenizer))
        else:
            held_out.append(
                _build(path, text.field, tokenizer, place / f"eval-{number}", keep_held_out=True, share=1.0)
            )
    return Corpora(tuple(train), tuple(held_out), _described(eval_data, share, bool(held_out)))


def _build(path: str, field: str, tokenizer: Tokenizer, out: Path, *, keep_held_out: bool, share: float) -> Corpus:
    build_corpus([path], tokenizer, out, field=field, keep=lambda text: is_held_out(text, share) == keep_held_out)
    return open_corpus(out, tokenizer)


def _described(eval_data: Sequence[str], share: float, any_held_out: bool) -> str:
    if eval_data:
        return "eval-data"
    return f"{share:g} of the documents, by a hash of their text" if any_held_out else "none"


def training_loader(corpora: Corpora, text: Text, sequence_length: int, rows: int, seed: int) -> Loader:
    """Batches of `rows` rows of this rank."""
    from halflap.parallel import mesh

    return Loader(
        corpora.train,
        sequence_length=sequence_length,
        micro_batch_size=rows,
        seed=seed,
        weights=text.weights or None,
        packing=text.packing,
        rank=mesh.rank(),
        world=mesh.world_size(),
    )


def held_out_batches(corpora: Corpora, sequence_length: int, rows: int, tokens: int = HELD_OUT_TOKENS) -> list[Batch]:
    """A fixed sample of the held-out rows, each at most once; empty when nothing was kept back."""
    if not corpora.held_out:
        return []
    loader = Loader(corpora.held_out, sequence_length=sequence_length, micro_batch_size=rows, seed=0)
    available = sum(loader.rows)
    count = max(1, min(available, tokens // sequence_length) // rows)
    return [loader.batch(index) for index in range(count)]
