"""Removal of blocks: every row by itself, ranks of rows, one after another, and passes that are killed and go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halflap.compress import partial
from halflap.compress.axes import Sizes, depth_units
from halflap.compress.depth import DEPTH_METRICS, Removal, depth_scores, depth_scores_by, remove_one_by_one
from halflap.compress.importance import Importance, Scoring
from halflap.compress.metrics import collect, collect_all
from halflap.compress.partial import NOWHERE, Scratch
from halflap.compress.ranking import drop_order, kept_blocks, rank_blocks, ranks_blocks
from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.config import ModelConfig
from halflap.models.model import HybridModel

Make = Callable[[str], HybridModel]
OUTPUTS = ("out_proj", "o_proj", "down_proj")


def silence(model: HybridModel, *blocks: int) -> HybridModel:
    """Output projections of these blocks become 0: removal, but that their keys and values are still read."""
    with torch.no_grad():
        for index in blocks:
            for name in OUTPUTS:
                if hasattr(model.blocks[index].mixer, name):
                    getattr(model.blocks[index].mixer, name).weight.zero_()
    return model


@torch.no_grad()
def outputs(model: HybridModel, text: Batch) -> tuple[Tensor, Tensor]:
    hidden = model.hidden_states(text.tokens, segments=text.segments)
    return hidden, hidden @ model.head_weight.T


def row_scores(full: HybridModel, without: HybridModel, text: Batch, metric: str) -> tuple[list[float], float]:
    """The score of every row that has targets, and that of all together, from whole passes."""
    (hidden, logits), (hidden_without, logits_without) = outputs(full, text), outputs(without, text)
    log_p, log_q = logits.log_softmax(-1), logits_without.log_softmax(-1)
    over = {
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "loss": (log_p - log_q).gather(-1, text.targets[..., None])[..., 0],
        "hidden_mse": (hidden - hidden_without).square().mean(-1),
        "logit_mse": (logits - logits_without).square().sum(-1),
    }[metric]
    under = logits.square().sum(-1) if metric == "logit_mse" else torch.ones_like(over)
    used = text.weights > 0
    rows = [float(a[u].sum() / b[u].sum()) for a, b, u in zip(over, under, used, strict=True) if u.any()]
    return rows, float(over[used].sum() / under[used].sum())


@pytest.mark.parametrize("metric", DEPTH_METRICS)
def test_means_and_ranks_are_those_of_whole_models(metric: str, family: str, make: Make, text: Batch) -> None:
    """Four rows have text; ranks are how many blocks score lower on a row, averaged."""
    model, found = make(family), depth_scores(make(family), [text], metric)
    table, means = [], []
    for index in range(len(model.blocks)):
        rows, mean = row_scores(model, silence(make(family), index), text, metric)
        table.append(rows)
        means.append(mean)
    columns = list(zip(*table, strict=True))
    ranks = [
        sum(sum(other < mine for other in column) for mine, column in zip(row, columns, strict=True)) / len(row)
        for row in table
    ]
    assert found.mean.tolist() == pytest.approx(means, rel=1e-5)
    assert len(table[0]) == 4 and found.rank.tolist() == pytest.approx(ranks)


def test_several_metrics_in_one_pass_are_each_alone(family: str, make: Make, text: Batch) -> None:
    together = depth_scores_by(tuple(DEPTH_METRICS), make(family), [text])
    for metric, scores in together.items():
        alone = depth_scores(make(family), [text], metric)
        assert all(torch.equal(one, other) for one, other in zip(scores, alone, strict=True)), metric


@pytest.mark.parametrize("metric", DEPTH_METRICS)
def test_batch_size_and_order_of_rows_change_nothing(metric: str, family: str, make: Make, text: Batch) -> None:
    parts = [text.rows(index, index + 1) for index in (3, 2, 0, 4, 1)]
    for one, other in zip(*(depth_scores(make(family), rows, metric) for rows in ([text], parts)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


@pytest.mark.filterwarnings("ignore:gradients of .* are all 0")
def test_a_block_without_output_scores_zero_by_every_metric(family: str, make: Make, text: Batch) -> None:
    model = silence(make(family), 0)
    for metric in DEPTH_METRICS:
        scores = depth_scores(model, [text], metric)
        assert abs(scores.mean[0]) < 1e-12, metric
        assert metric == "loss" or scores.rank[0] == 0  # the loss may fall without a block
        assert (scores.mean[1:].abs() > 1e-9).all()
    for metric, name in (("activation", "block_influence"), ("taylor", "taylor")):
        scores = collect(model, [text], metric).depth[name]
        assert scores[0].abs() < 1e-12 and (scores[1:] > 1e-9).all()


def test_two_blocks_without_output_rank_alike(make: Make, text: Batch) -> None:
    assert depth_scores(silence(make("nemotron_h"), 1, 3), [text], "hidden_mse").rank[[1, 3]].tolist() == [0, 0]


def test_no_single_row_decides_ranks(make: Make, text: Batch) -> None:
    """The mean follows the row with the largest scores; the rank counts it once."""
    model = make("nemotron_h")
    rows = torch.tensor([[row_scores(model, silence(make("nemotron_h"), i), text.rows(r, r + 1), "kl")[1]
                          for i in range(4)] for r in (0, 1, 2, 4)])  # fmt: skip
    found = depth_scores(model, [text], "kl").rank
    expected = rows.argsort(1).argsort(1).double().mean(0)
    torch.testing.assert_close(found.double(), expected)


# ---- one after another


def one_by_one(
    model: HybridModel, batches: Sequence[Batch], metric: str, average: str, count: int, scratch: Scratch = NOWHERE
) -> Removal:
    score = lambda gone: depth_scores(model, batches, metric, gone=gone, scratch=scratch)
    return remove_one_by_one(model.config, score, average, count)


def greedy(make: Callable[[], HybridModel], text: Batch, metric: str, count: int) -> tuple[int, ...]:
    """Whole models, rebuilt for every question."""
    full, gone = make(), ()
    while len(gone) < count:
        left = [index for index in range(len(full.blocks)) if index not in gone]
        scores = [row_scores(full, silence(make(), *gone, index), text, metric)[1] if index in left else 0.0
                  for index in range(len(full.blocks))]  # fmt: skip
        first = rank_blocks(scores, full.config, gone)[len(gone)]
        gone += next(unit for unit in depth_units(full.config) if first in unit)
    return gone


@pytest.mark.parametrize("metric", ["hidden_mse", "kl"])
def test_removal_one_by_one_is_greedy_against_the_full_model(metric: str, family: str, make: Make, text: Batch) -> None:
    count = 1 if family == "mamba1" else 2
    found = one_by_one(make(family), [text], metric, "mean", count)
    assert found.removed == greedy(lambda: make(family), text, metric, count)
    assert found.scores.mean.isfinite().all() and len(found.removed) == count


def test_what_was_removed_goes_first_and_the_rest_by_the_last_round(make: Make, text: Batch) -> None:
    model = make("nemotron_h")
    found = one_by_one(model, [text], "kl", "rank", 2)
    again = depth_scores(model, [text], "kl", gone=found.removed[:1])
    left = [index for index in range(4) if index not in found.removed]
    assert again.mean[found.removed[0]].isnan() and torch.equal(found.scores.rank[left], again.rank[left])
    importance = Importance("x", {}, {"kl_rank": found.scores.rank}, depth_metric="kl_rank", removed=found.removed)
    order = drop_order(importance, model.config)
    assert order[:2] == found.removed and sorted(order) == [0, 1, 2, 3]
    assert kept_blocks(importance, model.config, Sizes(num_blocks=2)) == tuple(left)


def test_the_named_metric_ranks(make: Make) -> None:
    config: ModelConfig = make("nemotron_h").config
    depth = {"kl": torch.tensor([4.0, 3.0, 2.0, 1.0]), "kl_rank": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    named = Importance("x", {}, depth, depth_metric="kl_rank")
    assert drop_order(Importance("x", {}, depth), config)[0] == 3 and drop_order(named, config)[0] == 0
    assert drop_order(named, config, keep_kinds=True)[0] == 1  # the only M and * go last


def test_counts_of_each_type_take_final_hidden_states_by_ranks_where_no_metric_is_named(make: Make) -> None:
    config: ModelConfig = make("nemotron_h").config
    depth = {"kl": torch.tensor([4.0, 3.0, 2.0, 1.0]), "hidden_mse_rank": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    unnamed, named = Importance("x", {}, depth), Importance("x", {}, depth, depth_metric="kl")
    assert ranks_blocks(unnamed) == ranks_blocks(named, by_type=True) == "kl"
    assert ranks_blocks(unnamed, by_type=True) == "hidden_mse_rank"
    assert drop_order(unnamed, config)[0] == 3 and drop_order(unnamed, config, by_type=True)[0] == 0


@pytest.mark.parametrize(("family_name", "count"), [("nemotron_h", 4), ("nemotron_h", 9), ("llama", 1), ("llama", 4)])
def test_counts_that_cannot_be_are_refused(family_name: str, count: int, make: Make, text: Batch) -> None:
    with pytest.raises(HalflapError, match="correct --depth-iterative"):
        one_by_one(make(family_name), [text], "kl", "mean", count)


def test_a_block_that_breaks_the_outputs_is_named(make: Make, text: Batch) -> None:
    model = make("nemotron_h")
    with torch.no_grad():
        model.blocks[3].mixer.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(HalflapError, match="without block 0"):
        depth_scores(model, [text], "kl")


# ---- killed and gone on with


class Killed(BaseException):
    pass


class Deadly(Sequence[Batch]):
    """Batches of which the one at `fatal` kills whoever asks for it, once."""

    def __init__(self, batches: Sequence[Batch], fatal: int) -> None:
        self.batches, self.fatal, self.asked = batches, fatal, list[int]()

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        self.asked.append(index)
        if index == self.fatal:
            self.fatal = -1
            raise Killed
        return self.batches[index]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def measured(model: HybridModel, batches: Sequence[Batch], metric: str, scratch: Scratch) -> bytes:
    if metric in ("activation", "taylor"):
        scorings = [Scoring(), Scoring(mamba="z" if metric == "taylor" else "flap", batch="mean")]
        found = collect_all(model, batches, metric, scorings, scratch=scratch)
        return b"".join(importance.to_bytes() for importance in found)
    scores, removed = one_by_one(model, batches, metric, "rank", 2, scratch)
    return Importance("x", {}, {"mean": scores.mean, "rank": scores.rank}, removed=removed).to_bytes()


@pytest.mark.parametrize("metric", ["activation", "taylor", "kl", "logit_mse"])
@pytest.mark.parametrize("fatal", [1, 3])
def test_a_killed_pass_ends_in_the_same_bytes(
    metric: str, fatal: int, make: Make, text: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "SECONDS_BETWEEN_SAVES", 0.0)
    model, scratch = make("nemotron_h").float(), Scratch(tmp_path, "this")
    rows = [text.rows(index, index + 1) for index in range(5)]
    whole = measured(model, rows, metric, Scratch())
    batches = Deadly(rows, fatal)
    with pytest.raises(Killed):
        measured(model, batches, metric, scratch)
    batches.asked.clear()
    assert measured(model, batches, metric, scratch) == whole
    assert batches.asked[: 5 - fatal] == list(range(fatal, 5))
    batches.asked.clear()
    assert measured(model, batches, metric, scratch) == whole and not batches.asked  # nothing is left to do


def test_a_later_round_goes_on_where_it_was(make: Make, text: Batch, tmp_path: Path) -> None:
    """Without saves in between a round is lost at most."""
    model, rows = make("llama"), [text.rows(0, 2), text.rows(2, 5)]
    whole = measured(model, rows, "kl", Scratch())

    class DiesInSecondRound(Deadly):
        def __getitem__(self, index: Any) -> Any:
            if len(self.asked) == 3:
                self.fatal = index
            return super().__getitem__(index)

    config = make("nemotron_h")
    batches = DiesInSecondRound(rows, -1)
    with pytest.raises(Killed):
        one_by_one(config, batches, "kl", "mean", 2, Scratch(tmp_path, "a"))
    batches = Deadly(rows, -1)
    found = one_by_one(config, batches, "kl", "mean", 2, Scratch(tmp_path, "a"))
    assert batches.asked == [0, 1] and found.removed == one_by_one(config, rows, "kl", "mean", 2).removed
    assert whole == measured(model, rows, "kl", Scratch(tmp_path, "b"))


@pytest.mark.parametrize("change", ["made from other text", "damaged", "no count"])
def test_sums_of_anything_else_are_not_gone_on_with(change: str, make: Make, text: Batch, tmp_path: Path) -> None:
    import safetensors.torch

    model, rows = make("nemotron_h"), [text]
    whole = measured(model, rows, "activation", Scratch(tmp_path, "this"))
    file = tmp_path / "activation.safetensors"
    if change == "damaged":
        file.write_bytes(b"nonsense")
    elif change == "no count":
        file.write_bytes(safetensors.torch.save({"rows": torch.zeros(1)}, {"made_from": json.dumps("this")}))
    batches = Deadly(rows, -1)
    assert measured(model, batches, "activation", Scratch(tmp_path, "other" if "other" in change else "this")) == whole
    assert batches.asked == [0]
