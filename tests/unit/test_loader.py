"""Rows, batches, blends and phases on streams small enough to read."""

import bisect
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.data.batch import Batch
from halflap.data.config import Data
from halflap.data.corpus import build_corpus, open_corpus
from halflap.data.loader import Loader
from halflap.data.order import Blend, key_of, shuffled
from halflap.data.packing import count_rows, cut_row
from halflap.data.tokenizer import train_tokenizer
from halflap.errors import HalflapError
from halflap.train.phases import Phase, Plan


class Documents:
    """A stream in memory: document d of n tokens is 100 d + 1, ..., 100 d + n - 1, and the end token 2."""

    def __init__(self, *lengths):
        parts = [[*range(100 * d + 1, 100 * d + n), 2] for d, n in enumerate(lengths, 1)]
        self.ids = np.array([token for part in parts for token in part])
        self.starts = np.cumsum([0, *lengths])
        self.tokens = len(self.ids)

    def read(self, start, stop):
        assert 0 <= start <= stop <= self.tokens
        return self.ids[start:stop].copy()


def test_a_row_numbers_its_documents_and_never_predicts_across_their_border():
    row = cut_row(Documents(3, 2, 4), 0, 6)
    assert row.tokens.tolist() == [101, 102, 2, 201, 2, 301]
    assert row.segments.tolist() == [1, 1, 1, 2, 2, 3]
    assert row.weights.tolist() == [1, 1, 0, 1, 0, 1]  # the last target lies past the row, in the same document
    assert row.targets[[0, 1, 3, 5]].tolist() == [102, 2, 2, 302]


def test_the_last_row_is_padded():
    stream = Documents(3, 2, 4)
    assert count_rows(stream, 6) == 2
    row = cut_row(stream, 1, 6, padding=7)
    assert row.tokens.tolist() == [302, 303, 2, 7, 7, 7]
    assert row.segments.tolist() == [1, 1, 1, 0, 0, 0]
    assert row.weights.tolist() == [1, 1, 0, 0, 0, 0]


def test_a_border_exactly_at_the_row_end_has_no_target():
    row = cut_row(Documents(4, 4), 0, 4)
    assert row.segments.tolist() == [1, 1, 1, 1]
    assert row.weights.tolist() == [1, 1, 1, 0]
    row = cut_row(Documents(4, 4), 1, 4)
    assert row.segments.tolist() == [1, 1, 1, 1]


def test_documents_of_one_token_are_segments_without_targets():
    row = cut_row(Documents(1, 1, 2), 0, 4)
    assert row.segments.tolist() == [1, 2, 3, 3]
    assert row.weights.tolist() == [0, 0, 1, 0]


# ---- order


def test_shuffling_differs_by_key_and_looks_mixed():
    orders = [[shuffled(i, 1000, key_of(seed, 0)) for i in range(1000)] for seed in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    for order in orders:
        assert sorted(order) == list(range(1000))
        assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1
        assert sum(b == a + 1 for a, b in itertools.pairwise(order)) < 10


def test_a_blend_interleaves_evenly():
    blend = Blend.of([(0, [3, 1])])
    assert [blend.locate(slot)[0] for slot in range(8)] == [0, 0, 1, 0, 0, 0, 1, 0]
    assert blend.counts(8) == (6, 2)


def test_phases_go_on_counting():
    blend = Blend.of([(0, [1, 0]), (4, [1, 1]), (8, [0, 1])])
    assert [blend.locate(slot) for slot in range(10)] == [
        (0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (0, 5), (1, 1), (1, 2), (1, 3),
    ]  # fmt: skip


# ---- loader


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    tokenizer = train_tokenizer(["some words here"] * 9, 270)
    opened = []
    for name, count in (("a", 60), ("b", 25)):
        texts = [f"{name}{number} " + "some words " * (number % 5) for number in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        build_corpus([folder / f"{name}.jsonl"], tokenizer, folder / name, shard_tokens=200)
        opened.append(open_corpus(folder / name))
    return opened


def loader(corpora, **options):
    return Loader(corpora, **{"sequence_length": 32, "micro_batch_size": 2, "seed": 5, **options})


def test_a_batch_has_the_promised_shapes(corpora):
    batch = loader(corpora).batch(3)
    for name, dtype in (("tokens", torch.int64), ("targets", torch.int64), ("segments", torch.int64)):
        assert getattr(batch, name).dtype == dtype
        assert getattr(batch, name).shape == (2, 32)
    assert batch.weights.dtype == torch.float32
    assert loader(corpora, packing="stream").batch(3).segments is None
    assert torch.equal(loader(corpora, packing="stream").batch(3).weights, batch.weights)
    assert isinstance(batch.to("cpu"), Batch)
    assert torch.equal(batch.rows(1, 2).tokens, batch.tokens[1:])


def test_an_epoch_reads_every_row_once_and_the_next_in_another_order(corpora):
    one = loader(corpora[:1], micro_batch_size=1)
    rows = one.rows[0]
    epochs = [[tuple(one.batch(e * rows + i).tokens[0].tolist()) for i in range(rows)] for e in range(2)]
    everything = [tuple(cut_row(corpora[0], i, 32, padding=2).tokens.tolist()) for i in range(rows)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(everything)
    assert epochs[0] != epochs[1] != everything
    assert one.epochs(2 * rows) == (2.0,)


def test_by_default_all_corpora_finish_their_epoch_together(corpora):
    both = loader(corpora, micro_batch_size=1)
    assert both.epochs(sum(both.rows)) == (1.0, 1.0)


def test_phases_are_parts_of_the_run(corpora):
    total = 40 * 2 * 32  # 40 micro-batches
    phased = loader(corpora, phases=[(0.75, [1, 0]), (0.25, [0, 1])], total_tokens=total)
    sources = [[phased.blend.locate(2 * i + j)[0] for j in range(2)] for i in range(40)]
    assert sources == [[0, 0]] * 30 + [[1, 1]] * 10
    assert phased.blend.locate(81)[0] == 1  # the last phase stays
    assert phased.tokens_per_batch == 64


@settings(max_examples=25)
@given(
    tokens=st.lists(st.integers(1, 2000), min_size=2, max_size=4),
    ramp=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    threshold=st.integers(1, 1500),
    world=st.integers(1, 2),
)
def test_a_plan_of_phases_changes_blend_and_batch_on_the_same_step(corpora, tokens, ramp, threshold, world):
    """Each step's rows come from its phase's source alone, and a loader that starts anew has the same rows."""
    weights = [(1.0, 0.0), (0.0, 1.0)]
    phases = tuple(Phase(count, end=1e-3, weights=weights[i % 2]) for i, count in enumerate(tokens))
    plan = Plan(phases, 32, tuple((i * threshold, rows) for i, rows in enumerate(ramp)), world)

    def fresh(rank):
        return loader(corpora, phases=plan.blend((1, 1)), total_tokens=plan.tokens, rank=rank, world=world)

    whole, borders = fresh(0), [0, *plan.ends]
    for step in range(plan.steps):
        slot, count = plan.rows(step)
        phase = bisect.bisect_right(borders, plan.tokens_before(step)) - 1
        assert {whole.blend.locate(slot + i)[0] for i in range(count * world)} == {phase % 2}
    for step in {0, plan.steps // 2, plan.steps - 1}:
        slot, count = plan.rows(step)
        parts = [fresh(rank).rows_from(slot, count).tokens for rank in range(world)]
        expected = [torch.from_numpy(whole.row(slot + i).tokens) for i in range(count * world)]
        assert torch.equal(torch.cat(parts), torch.stack(expected))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sequence_length": 0}, "sequence_length is 0; it must be at least 1"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"rank": 2, "world": 2}, "rank is 2; it must be from 0 to 1"),
        ({"packing": "rows"}, "packing is 'rows'; allowed are segments, stream"),
        ({"weights": [1.0]}, "1 blend weights were given for 2 corpora"),
        ({"weights": [1.0, -1]}, r"blend weights are \[1.0, -1\]; each must be a number of at least 0"),
        ({"weights": [0, 0]}, "one above 0"),
        ({"weights": [float("nan"), 1]}, "each must be a number"),
        ({"phases": [(1.0, [1, 1])]}, "give total_tokens and no weights"),
        ({"phases": [(0.5, [1, 1])], "total_tokens": 99}, r"phases of a blend last \[0.5\] of the run; .* sum to 1"),
        ({"corpora": []}, "no corpus was given"),
    ],
)
def test_wrong_settings_are_refused(corpora, options, sentence):
    with pytest.raises(HalflapError, match=sentence):
        loader(options.pop("corpora", corpora), **options)


def test_corpora_of_different_tokenizers_are_refused(corpora, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    build_corpus([tmp_path / "a.txt"], train_tokenizer(["other text"] * 9, 262), tmp_path / "out")
    with pytest.raises(HalflapError, match="were made by different tokenizers"):
        loader([*corpora, open_corpus(tmp_path / "out")])


def test_the_recipe_section_checks_its_values():
    assert Data(paths=("a", "b"), weights=(0.5, 0.5)).packing == "segments"
    for options, sentence in [
        ({"paths": ("a",), "weights": (1.0, 2.0)}, "2 shares for 1 paths"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"sequence_length": 0}, "sequence_length is 0"),
    ]:
        with pytest.raises(HalflapError, match=sentence):
            Data(**options)
