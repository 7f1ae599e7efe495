"""A model read a block at a time gives the scores of the model in memory, after interruptions too, in less memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from halflap.checkpoints.checkpoint import Checkpoint, load_model, save_model, write_checkpoint
from halflap.checkpoints.streamed import ENTRY, EXIT, StreamedModel, largest_part, part_names
from halflap.compress import streamed as streamed_module
from halflap.compress.axes import depth_units
from halflap.compress.depth import DEPTH_METRICS, depth_scores, remove_one_by_one
from halflap.compress.importance import Scoring
from halflap.compress.metrics import collect_all
from halflap.compress.partial import Scratch
from halflap.compress.streamed import collect_streamed, depth_scores_streamed
from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.layout import layout
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import hymba, preset
from halflap.models.streams import Stream

HYMBA = hymba(5, hidden=32, mlp=24, heads=(4, 2), state=4, window=4, meta=3, vocab=64, context=64, original_context=16)
NAMES = ("nemotron-h-tiny", "llama-tiny", "nemotron-4-tiny")
CONFIGS = {"hymba": HYMBA} | {name: dataclasses.replace(preset(name), vocab_size=64) for name in NAMES}
SCORINGS = [Scoring(), Scoring("pre", "flap", "flap", "l2", "mean"), Scoring("post", "z", "x", "signed_mean", "l2")]
TOKENS = torch.randint(0, 64, (2, 2, 17), generator=torch.Generator().manual_seed(0))
PACKED = torch.tensor([[1] * 16, [1] * 5 + [2] * 6 + [3] * 2 + [0] * 3])


def batches(packed: bool = True) -> list[Batch]:
    segments = PACKED if packed else None
    weights = (PACKED > 0).float() if packed else torch.ones(2, 16)
    return [Batch(rows[:, :-1], rows[:, 1:], weights, segments) for rows in TOKENS]


def write(name: str, directory: Path, dtype: str = "bfloat16") -> Checkpoint:
    model = HybridModel(CONFIGS[name])
    initialize(model, 0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("proj.weight"):
                parameter.mul_(5)
    return write_checkpoint(directory, model.config, model.state_dict().items(), dtype=dtype, max_shard_bytes=30_000)


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Of every family, in bfloat16 and several shards."""
    return write(request.param, tmp_path_factory.mktemp(request.param))


def in_memory(checkpoint: Checkpoint, packed: bool, metric: str, depth_metric: str) -> list[bytes]:
    model, text = load_model(checkpoint.path), batches(packed)
    found = collect_all(model, text, metric, SCORINGS)
    depth = found[0].depth
    if depth_metric == "block_influence" and metric == "weight_norm":
        depth = {**depth, **collect_all(model, text[:1], "activation", [Scoring()])[0].depth}
    elif depth_metric not in depth:
        scores = depth_scores(model, text[:1], depth_metric)
        depth = {**depth, depth_metric: scores.mean, f"{depth_metric}_rank": scores.rank}
    return [dataclasses.replace(one, depth=depth).to_bytes() for one in found]


def streamed(
    checkpoint: Checkpoint, directory: Path, packed: bool, metric: str, depth_metric: str, made_from: str = ""
) -> list[bytes]:
    model, scratch = StreamedModel.of(checkpoint, torch.float32), Scratch(directory, made_from)
    found = collect_streamed(model, batches(packed), metric, (depth_metric,), SCORINGS, scratch)
    return [one.to_bytes() for one in found]


@pytest.mark.parametrize("depth_metric", [*DEPTH_METRICS, "block_influence"])
def test_scores_are_equal_bit_for_bit(checkpoint: Checkpoint, tmp_path: Path, depth_metric: str) -> None:
    assert len(list(checkpoint.path.glob("*.safetensors"))) > 2
    for packed in (True, False) if depth_metric == "kl" else (True,):
        expected = in_memory(checkpoint, packed, "activation", depth_metric)
        found = streamed(checkpoint, tmp_path / "scratch", packed, "activation", depth_metric)
        assert found == expected and len(set(found)) == len(SCORINGS)
        assert not any((tmp_path / "scratch").iterdir())


def test_controls_are_equal_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for depth_metric in ("loss", "block_influence"):
        found = streamed(checkpoint, tmp_path, True, "weight_norm", depth_metric)
        assert found == in_memory(checkpoint, True, "weight_norm", depth_metric)
    expected = collect_all(load_model(checkpoint.path), [], "random", SCORINGS)
    assert streamed(checkpoint, tmp_path, True, "random", "kl") == [one.to_bytes() for one in expected]


@pytest.mark.parametrize("killed_in", ["a block", "the comparison"])
def test_a_killed_sweep_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    """Killed while the streams of block 6 are half written, or when three blocks' removals have been compared."""
    checkpoint = write("hymba", tmp_path / "model")
    whole = streamed(checkpoint, tmp_path / "scratch", True, "activation", "kl")
    seen: list[int] = []
    through, compare = Stream.through, DEPTH_METRICS["kl"]
    budget = {"a block": 30, "the comparison": 6}  # of two rows a block

    def spend() -> None:
        budget[killed_in] -= 1
        if budget[killed_in] < 0:
            raise KeyboardInterrupt

    def step(self: Stream, index: int, block: Any) -> Stream:
        seen.append(index)
        if killed_in == "a block":
            spend()
        return through(self, index, block)

    def compared(*given: Any) -> tuple[float, float]:
        if killed_in == "the comparison":
            spend()
        return compare(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "through", step)
        patch.setitem(streamed_module.DEPTH_METRICS, "kl", compared)
        with pytest.raises(KeyboardInterrupt):
            streamed(checkpoint, tmp_path / "scratch", True, "activation", "kl")
        stopped, budget[killed_in] = seen[-1], 1000
        seen.clear()
        again = streamed(checkpoint, tmp_path / "scratch", True, "activation", "kl")
    assert again == whole
    assert min(seen, default=None) == (stopped if killed_in == "a block" else None)
    assert budget[killed_in] == 1000 - (2 * (len(HYMBA.blocks) - 3) if killed_in == "the comparison" else len(seen))


def test_a_damaged_shelf_says_what_to_delete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write("llama-tiny", tmp_path / "model")
    monkeypatch.setattr(streamed_module._Scores, "_carry", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        streamed(checkpoint, tmp_path / "scratch", True, "activation", "kl")
    (file,) = (tmp_path / "scratch" / "streams").iterdir()
    file.write_bytes(b"x" * 40 + (0).to_bytes(8, "little"))
    with pytest.raises(HalflapError, match=r"after\.0 is damaged; delete '.*streams' to measure anew"):
        streamed(checkpoint, tmp_path / "scratch", True, "activation", "kl")


def test_streams_of_another_sweep_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write("llama-tiny", tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(streamed_module._Scores, "_leave", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            streamed(checkpoint, tmp_path / "scratch", False, "activation", "kl", "other text")
    again = streamed(checkpoint, tmp_path / "scratch", True, "activation", "kl", "this text")
    assert again == in_memory(checkpoint, True, "activation", "kl")


@pytest.mark.parametrize("name", ["hymba", "nemotron-h-tiny"])
def test_blocks_that_go_one_by_one_are_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the second round, whose streams lack what the first one took; the first is not read again."""
    checkpoint, text = write(name, tmp_path / "model"), batches()
    model, scratch = load_model(checkpoint.path), Scratch(tmp_path / "scratch", "")
    streamed_model = StreamedModel.of(checkpoint, torch.float32)
    count = 2 * len(depth_units(checkpoint.config)[0])
    whole = remove_one_by_one(checkpoint.config, lambda gone: depth_scores(model, text, "kl", gone=gone), "mean", count)
    score = lambda gone: depth_scores_streamed(streamed_model, text, "kl", gone, scratch)
    steps, through, most = list[int](), Stream.through, [10**6]

    def step(self: Stream, index: int, block: Any) -> Stream:
        if len(steps) == most[0]:
            raise KeyboardInterrupt
        steps.append(index)
        return through(self, index, block)

    monkeypatch.setattr(Stream, "through", step)
    blocks = len(checkpoint.config.blocks)
    first = len(text) * blocks * (blocks + 1) // 2
    most[0] = first + len(text) * (blocks + 3)
    with pytest.raises(KeyboardInterrupt):
        remove_one_by_one(checkpoint.config, score, "mean", count)
    steps.clear()
    most[0] = 10**6
    found = remove_one_by_one(checkpoint.config, score, "mean", count)
    assert found.removed == whole.removed and len(found.removed) == count and min(steps) > 0
    assert torch.equal(found.scores.mean, whole.scores.mean) and torch.equal(found.scores.rank, whole.scores.rank)


@pytest.mark.parametrize("metric", ["activation", "weight_norm"])
def test_no_text_is_an_error(tmp_path: Path, metric: str) -> None:
    model = StreamedModel.of(write("llama-tiny", tmp_path / "model"), torch.float32)
    with pytest.raises(HalflapError, match="no calibration text was read"):
        collect_streamed(model, [], metric, ("kl",), SCORINGS, Scratch(tmp_path / "scratch", ""))


def test_metrics_that_need_the_whole_model_are_refused(tmp_path: Path) -> None:
    checkpoint = write("llama-tiny", tmp_path / "model")
    with pytest.raises(HalflapError, match=r"'taylor' needs the whole model .* allowed are activation, weight_norm"):
        streamed(checkpoint, tmp_path, True, "taylor", "kl")
    with pytest.raises(HalflapError, match=r"allowed are block_influence, kl, .*: correct --depth-metric"):
        streamed(checkpoint, tmp_path, True, "activation", "taylor")


def test_what_is_not_finite_stops_the_sweep_at_its_block(tmp_path: Path) -> None:
    model = HybridModel(CONFIGS["llama-tiny"])
    initialize(model, 0)
    with torch.no_grad():
        model.blocks[3].mixer.up_proj.weight[0, 0] = torch.nan  # type: ignore[union-attr]
    checkpoint = save_model(model, tmp_path / "model")
    with pytest.raises(HalflapError, match="activations of block 3 are NaN or infinite"):
        streamed(checkpoint, tmp_path / "scratch", True, "activation", "kl")


# ---- memory


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_cover_the_layout(name: str) -> None:
    config = CONFIGS[name]
    parts = part_names(config)
    assert [*parts] == [ENTRY, *range(len(config.blocks)), EXIT]
    listed = [key for names in parts.values() for key in names]
    assert set(listed) == set(layout(config)) and len(listed) == len(layout(config)) + config.tie_word_embeddings


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_more_than_one_part_is_ever_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, live_bytes: Callable[[], int], dtype: str
) -> None:
    """Weighed when a part's last tensor is about to be read, and when a block first runs; streams of 4 tokens weigh
    little."""
    checkpoint = write("nemotron-h-tiny", tmp_path / "model", dtype)
    _, most = largest_part(checkpoint.config)
    before, weighed, ran = live_bytes(), [], []
    through = Stream.through

    def read(names: Sequence[str]) -> Any:
        for name in names:
            if name == names[-1]:
                weighed.append(live_bytes())
            yield name, checkpoint.read(name)

    def step(self: Stream, index: int, block: Any) -> Stream:
        if index not in ran:
            ran.append(index)
            weighed.append(live_bytes())
        return through(self, index, block)

    monkeypatch.setattr(Stream, "through", step)
    model = StreamedModel(checkpoint.config, read, torch.float32)
    text = [Batch(rows[:1, :4], rows[:1, 1:5], torch.ones(1, 4)) for rows in TOKENS]
    collect_streamed(model, text, "activation", ("kl", "hidden_mse"), SCORINGS[:1], Scratch(tmp_path / "scratch"))
    whole = sum(entry.spec.nbytes for entry in checkpoint.entries.values()) * (2 if dtype == "bfloat16" else 1)
    assert most * 4 < 0.4 * whole
    assert 0.9 * most * 4 < max(weighed) - before < 1.1 * most * 4 + 40_000
