"""Every source and aggregation against plain float64 formulas, gradients against differences, planted indices."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from halflap.compress.axes import Sizes
from halflap.compress.importance import Importance, Scoring, score_shapes
from halflap.compress.metrics import METRICS, collect, collect_all
from halflap.compress.ranking import plan_for
from halflap.compress.sites import sites
from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, HybridConfig, Mamba1Config, Mamba2Config, MLPConfig
from halflap.models.meta import text_places
from halflap.models.model import HybridModel

Make = Callable[[str], HybridModel]
SOURCES = ("x", "z", "o", "flap")
EVERYTHING = [
    Scoring(neuron, mamba, mamba, sequence, batch)
    for neuron, mamba, sequence, batch in itertools.product(
        ("post", "pre"), SOURCES, ("mean", "l2", "signed_mean"), ("l2", "mean")
    )
]
GRADIENTS = [Scoring(neuron, mamba, mamba, batch=batch) for neuron, mamba, batch in
             itertools.product(("post", "pre"), "xzo", ("l2", "mean"))]  # fmt: skip


# ---- the reference: what every module was given and gave, and the formulas written out


class Recorder:
    """Inputs and outputs of all modules in one pass, at the positions of the text: a list of (T, C) for each row."""

    def __init__(self, model: HybridModel, batch: Batch) -> None:
        self.seen: dict[str, Tensor] = {}
        handles = [module.register_forward_hook(self.keep(name)) for name, module in model.named_modules()]
        with torch.no_grad():
            model(batch.tokens, segments=batch.segments)
        for handle in handles:
            handle.remove()
        assert batch.segments is not None
        runs = model.context_of(batch.tokens, batch.segments).runs
        assert runs is not None
        self.runs = runs
        self.text = batch.segments > 0
        meta = model.config.num_meta_tokens
        self.places = text_places(batch.tokens, batch.segments, meta) if meta else None

    def keep(self, name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            self.seen[f"{name}<"], self.seen[f"{name}>"] = args[0], output

        return hook

    def rows(self, a: str | Tensor) -> list[Tensor]:
        value = self.seen[a] if isinstance(a, str) else a
        if self.places is not None and value.shape[1] != self.text.shape[1]:
            value = torch.stack([row[at] for row, at in zip(value, self.places, strict=True)])
        return [row[used] for row, used in zip(value, self.text, strict=True) if used.any()]


def aggregate(rows: list[Tensor], scoring: Scoring) -> Tensor:
    of_row = {
        "mean": lambda a: a.abs().mean(0),
        "l2": lambda a: a.square().sum(0).sqrt(),
        "signed_mean": lambda a: a.mean(0),
    }[scoring.sequence]
    m = torch.stack([of_row(a.double()) for a in rows])
    return m.square().sum(0).sqrt() if scoring.batch == "l2" else m.mean(0).abs()


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, runs: Tensor) -> Tensor:
    """silu of the causal depthwise convolution of x (B, T, C), weight (C, 1, W), a step at a time, within its run."""
    width, out = weight.shape[-1], torch.zeros_like(x)
    for t, k in itertools.product(range(x.shape[1]), range(width)):
        if t - k >= 0:
            inside = runs[:, t - k, None] == runs[:, t, None]
            out[:, t] += torch.where(inside, x[:, t - k] * weight[:, 0, width - 1 - k], 0)
    return F.silu(out if bias is None else out + bias)


def inner_rows(rec: Recorder, mixer: Any, name: str, source: str) -> list[Tensor]:
    """Rows of z or x of the input projection, or of what goes into the output projection."""
    if source in ("o", "flap"):
        return rec.rows(f"{name}.out_proj<")
    inner = getattr(mixer, "ssm", mixer)
    c, first = inner.config, sum(mixer.widths[:-1]) if hasattr(mixer, "widths") else 0
    second = (source == "x") != isinstance(c, Mamba1Config)  # Mamba-1 has x before z
    start = first + c.inner_size * second
    return rec.rows(rec.seen[f"{name}.in_proj>"][..., start : start + c.inner_size])


def state_scores(rec: Recorder, mixer: Any, name: str, scoring: Scoring) -> Tensor:
    inner = getattr(mixer, "ssm", mixer)
    c = inner.config
    if isinstance(c, Mamba2Config):
        start = (sum(mixer.widths[:-1]) if hasattr(mixer, "widths") else 0) + 2 * c.inner_size
        BC = rec.seen[f"{name}.in_proj>"][..., start : start + 2 * c.num_groups * c.state_size]
        conv = inner.conv1d
        bias = None if conv.bias is None else conv.bias[c.inner_size :]
        scores = aggregate(rec.rows(convolved(BC, conv.weight[c.inner_size :], bias, rec.runs)), scoring)
        B, C = scores.reshape(2, c.num_groups, c.state_size)
        return (B * C).sqrt()
    prefix = f"{name}.ssm" if hasattr(mixer, "ssm") else name
    if c.inner_norms:
        B, C = (aggregate(rec.rows(f"{prefix}.{norm}>"), scoring) for norm in ("B_norm", "C_norm"))
    else:
        _, *parts = rec.seen[f"{prefix}.x_proj>"].split([c.dt_rank, c.state_size, c.state_size], -1)
        B, C = (aggregate(rec.rows(part), scoring) for part in parts)
    return (B * C).sqrt()


def reference(model: HybridModel, batch: Batch, scoring: Scoring, rec: Recorder) -> dict[str, Tensor]:
    found = {
        "hidden": torch.stack([aggregate(rec.rows(f"blocks.{i}.norm>"), scoring) for i in range(len(model.blocks))])
    }
    for index, block in enumerate(model.config.blocks):
        prefix, name, mixer = f"blocks.{index}", f"blocks.{index}.mixer", model.blocks[index].mixer
        if isinstance(block, MLPConfig):
            first = "gate_proj" if block.gated else "up_proj"
            place = f"{name}.down_proj<" if scoring.neuron == "post" else f"{name}.{first}>"
            found[f"{prefix}.neuron"] = aggregate(rec.rows(place), scoring)
        elif isinstance(block, AttentionConfig):
            scores = aggregate(rec.rows(f"{name}.o_proj<"), scoring)
            found[f"{prefix}.query"] = torch.linalg.vector_norm(
                scores.reshape(*shape_of(model, prefix, "query"), -1), dim=-1
            )
        else:
            source = scoring.hybrid if isinstance(block, HybridConfig) else scoring.mamba
            rows = inner_rows(rec, mixer, name, source)
            scores = aggregate(rows, scoring)
            if source == "flap":
                weight: Any = mixer.out_proj.weight
                scores = torch.linalg.vector_norm(weight, dim=0) * torch.cat(rows).var(0, unbiased=False).sqrt()
            found[f"{prefix}.inner"] = scores.reshape(shape_of(model, prefix, "inner"))
            found[f"{prefix}.state"] = state_scores(rec, mixer, name, scoring)
    return found


def shape_of(model: HybridModel, prefix: str, axis: str) -> tuple[int, ...]:
    return score_shapes(model.config)[f"{prefix}.{axis}"]


def test_one_pass_gives_every_source_and_aggregation(family: str, make: Make, text: Batch) -> None:
    """Rounded to float32 at the end, so 1e-6; a sum with signs loses digits of its terms."""
    model, passes = make(family), 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    handle = model.embedding.register_forward_hook(count)
    found = collect_all(model, [text], "activation", EVERYTHING)
    handle.remove()
    assert passes == 1 and len(found) == len(EVERYTHING)
    recorder = Recorder(model, text)
    for scoring, importance in zip(EVERYTHING, found, strict=True):
        expected = reference(model, text, scoring, recorder)
        assert set(importance.widths) == set(expected) and importance.scoring["mamba"] == scoring.mamba
        for name, value in expected.items():
            torch.testing.assert_close(importance.widths[name], value.detach().float(), rtol=2e-6, atol=1e-6, msg=name)
        assert importance.tokens == 41


def test_variances_do_not_cancel(make: Make, text: Batch) -> None:
    """An activation far from 0 that hardly moves: E[x^2] - E[x]^2 in float32 would be noise alone."""
    model = make("nemotron_h").float()
    mixer: Any = model.blocks[0].mixer
    moved = mixer.out_proj.register_forward_pre_hook(lambda _, args: (1000 + 0.01 * args[0],))
    seen: list[Tensor] = []
    keep = mixer.out_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = collect(model, [text], scoring=Scoring(mamba="flap")).widths["blocks.0.inner"].flatten()
    moved.remove(), keep.remove()
    assert text.segments is not None
    deviation = seen[0][text.segments > 0].double().var(0, unbiased=False).sqrt()
    expected = torch.linalg.vector_norm(mixer.out_proj.weight.double(), dim=0) * deviation
    torch.testing.assert_close(found, expected.detach().float(), rtol=2e-2, atol=0)  # float32 keeps 1000 to 6e-5


# ---- gradients


def row_losses(model: HybridModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        logits = model(batch.tokens, segments=batch.segments)
        losses = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view(
            batch.tokens.shape
        )
        return (losses * batch.weights).sum(1) / batch.weights.sum(1).clamp_min(1)


def gated_losses(model: HybridModel, batch: Batch, module: Any, is_output: bool, channels: Any, value: float) -> Tensor:
    """Losses of the rows with some channels of a module's output or input multiplied by `value`."""

    def scaled(a: Tensor) -> Tensor:
        a = a.clone()
        a[..., channels] *= value
        return a

    if is_output:
        handle = module.register_forward_hook(lambda _, args, output: scaled(output))
    else:
        handle = module.register_forward_pre_hook(lambda _, args: (scaled(args[0]), *args[1:]))
    try:
        return row_losses(model, batch)
    finally:
        handle.remove()


def derivative(model: HybridModel, batch: Batch, module: Any, is_output: bool, channels: Any) -> Tensor:
    """Of the rows' losses by that gate at 1, by central differences."""
    step = 1e-5
    up, down = (gated_losses(model, batch, module, is_output, channels, 1 + sign * step) for sign in (1, -1))
    return ((up - down) / (2 * step)).abs()


def joined(rows: Tensor, batch: str, counted: int) -> float:
    return float(rows.square().sum().sqrt() if batch == "l2" else rows.sum() / counted)


def test_gradient_scores_are_derivatives_of_gates(family: str, make: Make, text: Batch) -> None:
    """Central differences in float64 with a step of 1e-5 are good to about 1e-8 of losses of order 1."""
    model, generator = make(family), torch.Generator().manual_seed(0)
    found = dict(zip(GRADIENTS, collect_all(model, [text], "taylor", GRADIENTS), strict=True))
    axes = {name.rsplit(".", 1)[-1] for name in score_shapes(model.config)} - {"hidden"} | {"norm"}
    for scoring in GRADIENTS[::3]:
        widths, done = found[scoring].widths, set()
        places = {site.name: site for site in sites(model, [scoring])}
        for site in places.values():
            index, axis = int(site.name.split(".")[1]), site.name.split(".")[2]
            score = widths["hidden"][index] if axis == "norm" else widths[f"blocks.{index}.{axis}"].flatten()
            unit, size = int(torch.randint(len(score), (), generator=generator)), 1
            if axis == "query":
                size = model.config.blocks[index].attention.value_dim  # type: ignore[union-attr]
            both = [places[f"blocks.{index}.state.{part}"] for part in "BC"] if axis == "state" else [site]
            gates = []
            for one in both:
                start = (one.channels.start or 0) + unit * size
                slope = derivative(model, text, one.module, one.is_output, slice(start, start + size))
                gates.append(joined(slope, scoring.batch, 4))
            expected = (gates[0] * gates[-1]) ** 0.5
            assert float(score[unit]) == pytest.approx(expected, rel=1e-3, abs=2e-6), site
            done.add(axis)
        assert done == axes
    blocks = found[GRADIENTS[0]].depth["taylor"]
    for index, block in enumerate(model.blocks):
        expected = joined(derivative(model, text, block.mixer, True, slice(None)), "mean", 4)
        assert float(blocks[index]) == pytest.approx(expected, rel=1e-3, abs=2e-6)


def test_gradients_leave_the_model_as_it_was(make: Make, text: Batch) -> None:
    model = make("hymba")
    model.norm.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    collect(model, [text], "taylor")
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- properties of importance


def parts_of(text: Batch) -> list[Batch]:
    return [text.rows(index, index + 1) for index in (2, 0, 4, 3, 1)]


@pytest.mark.parametrize("metric", METRICS)
def test_batch_size_and_order_of_rows_change_nothing(family: str, metric: str, make: Make, text: Batch) -> None:
    scorings = {"activation": EVERYTHING[::5], "taylor": GRADIENTS[::5]}.get(metric, [Scoring()])
    model = make(family)
    whole, parts = (collect_all(model, batches, metric, scorings) for batches in ([text], parts_of(text)))
    for one, other in zip(whole, parts, strict=True):
        for ours, theirs in ((one.widths, other.widths), (one.depth, other.depth), (one.energy, other.energy)):
            assert ours.keys() == theirs.keys()
            for name in ours:
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7, msg=name)
        assert one.tokens == other.tokens


def test_scores_scale_with_the_activation(family: str, make: Make, text: Batch) -> None:
    """Whatever a site of the last block reads, times 3: its scores are 3 times as large. States, whose scores are
    those of what a convolution or norm makes of B and C, do not follow their site so simply."""
    model = make(family)
    index = len(model.blocks) - (2 if family != "mamba1" else 1)
    before = collect_all(model, [text], "activation", EVERYTHING)
    for site in sites(model, EVERYTHING):
        axis = site.name.removeprefix(f"blocks.{index}.")
        if "." in axis:
            continue
        handle = tripled(site)
        after = collect_all(model, [text], "activation", EVERYTHING)
        handle.remove()
        for scoring, one, other in zip(EVERYTHING, before, after, strict=True):
            place = {"neuron": scoring.neuron, "inner": scoring.mamba.replace("flap", "o")}.get(axis, "")
            if place == site.source:
                name, row = ("hidden", index) if axis == "norm" else (site.name, slice(None))
                torch.testing.assert_close(other.widths[name][row], 3 * one.widths[name][row], rtol=1e-5, atol=1e-6)


def tripled(site: Any) -> Any:
    def scaled(a: Tensor) -> Tensor:
        a = a.clone()
        a[..., site.channels] *= 3
        return a

    if site.is_output:
        return site.module.register_forward_hook(lambda _, args, output: scaled(output))
    return site.module.register_forward_pre_hook(lambda _, args: (scaled(args[0]), *args[1:]))


def plant(rows: Tensor, dead: int, loud: int) -> None:
    """Rows of a weight but that of index `loud` become a thousandth, that of `dead` 0: nothing saturates so."""
    with torch.no_grad():
        kept = rows[loud].clone()
        rows *= 1e-3
        rows[dead], rows[loud] = 0, kept


def planted(model: HybridModel, index: int, source: str, dead: int, loud: int) -> str:
    """Plant a dead and a loud index where `source` of block `index` sees them; returns the score's name."""
    mixer: Any = model.blocks[index].mixer
    block = model.config.blocks[index]
    if source == "hidden":
        norm: Any = model.blocks[index].norm
        offset = 1.0 if model.config.norm == "layer1p" else 0.0
        with torch.no_grad():
            norm.weight += offset
        plant(norm.weight, dead, loud)
        with torch.no_grad():
            norm.weight -= offset
        if offset:
            plant(norm.bias, dead, loud)
        return "hidden"
    if isinstance(block, MLPConfig):
        for projection in (mixer.gate_proj, mixer.up_proj) if block.gated else (mixer.up_proj,):
            plant(projection.weight, dead, loud)
        return f"blocks.{index}.neuron"
    if isinstance(block, AttentionConfig):  # heads of a group share values, so only a gate tells them apart

        def gate(module: Any, args: Any) -> Any:
            heads = args[0].unflatten(-1, (block.num_attention_heads, -1)).movedim(-2, 0).clone()
            plant(heads, dead, loud)
            return (heads.movedim(0, -2).flatten(-2),)

        mixer.o_proj.register_forward_pre_hook(gate)
        return f"blocks.{index}.query"
    inner, start = getattr(mixer, "ssm", mixer), sum(mixer.widths[:-1]) if hasattr(mixer, "widths") else 0
    size, mamba1 = inner.config.inner_size, isinstance(inner.config, Mamba1Config)
    if source in ("x", "z"):
        second = (source == "x") != mamba1
        plant(mixer.in_proj.weight[start + size * second :][:size], dead, loud)
        return f"blocks.{index}.inner"
    gains = [mixer.attention_norm.weight] if hasattr(mixer, "attention_norm") else []
    if not mamba1:
        gains.append(inner.norm.weight)
    elif hasattr(mixer, "ssm_norm"):
        gains.append(mixer.ssm_norm.weight)
    else:  # the gate multiplies what comes out
        gains.append(mixer.in_proj.weight[size : 2 * size])
    for gain in gains:
        plant(gain, dead, loud)
    return f"blocks.{index}.inner"


@pytest.mark.parametrize("metric", ["activation", "taylor"])
def test_planted_indices_rank_first_and_last(metric: str, family: str, make: Make, text: Batch) -> None:
    """A dead index scores 0 and below all others in every aggregation, a loud one above all others."""
    kinds = {type(block): index for index, block in reversed(list(enumerate(make(family).config.blocks)))}
    for kind, index in kinds.items():
        sources = {MLPConfig: ("post", "pre"), AttentionConfig: ("",)}.get(kind, SOURCES)
        for source in (*sources, "hidden"):
            if metric == "taylor" and source == "flap":
                continue
            model = make(family)
            name = planted(model, index, source, dead=3, loud=1)
            asked = [s for s in (EVERYTHING if metric == "activation" else GRADIENTS)
                     if source in (s.neuron, s.mamba, "", "hidden")]  # fmt: skip
            for scoring, found in zip(asked, collect_all(model, [text], metric, asked), strict=True):
                scores = found.widths["hidden"][index] if name == "hidden" else found.widths[name].flatten()
                case = (name, source, scoring)
                assert scores.argmin() == 3 and scores[3] == 0, case
                if metric == "activation" or source not in ("x", "z"):  # whose loudness a group norm takes out again
                    assert scores.argmax() == 1, case


def test_planted_states_rank_first_and_last(family: str, make: Make, text: Batch) -> None:
    model = make(family)
    for index, block in enumerate(model.config.blocks):
        mixer: Any = model.blocks[index].mixer
        inner = getattr(mixer, "ssm", mixer)
        if isinstance(block.ssm, Mamba1Config):
            c = inner.config
            gain = inner.B_norm.weight if c.inner_norms else inner.x_proj.weight[c.dt_rank : c.dt_rank + c.state_size]
            plant(gain, dead=3, loud=1)
        elif isinstance(block.ssm, Mamba2Config):
            start = inner.config.inner_size
            count = inner.config.num_groups * inner.config.state_size
            plant(inner.conv1d.weight[start : start + count], dead=3, loud=1)
            plant(inner.conv1d.bias[start : start + count], dead=3, loud=1)
        else:
            continue
        for metric, batch in itertools.product(("activation", "taylor"), ("l2", "mean")):
            scores = collect(model, [text], metric, scoring=Scoring(batch=batch)).widths[f"blocks.{index}.state"]
            assert scores.flatten()[3] == 0 and scores.argmin() == 3 and scores.argmax() == 1


def test_weight_norms_see_planted_weights(make: Make) -> None:
    model = make("nemotron_h")
    mixer: Any = model.blocks[1].mixer
    plant(mixer.up_proj.weight, dead=3, loud=1)
    plant(mixer.down_proj.weight.t(), dead=3, loud=1)
    scores = collect(model, [], "weight_norm").widths["blocks.1.neuron"]
    assert scores.argmin() == 3 and scores[3] == 0 and scores.argmax() == 1


@pytest.mark.parametrize("scoring", [s for s in EVERYTHING if s.neuron == "post"], ids=str)
def test_nested_ranking_is_of_whole_channels_and_equal_groups(scoring: Scoring, make: Make, text: Batch) -> None:
    """From any source, and recomputed for every candidate: heads by the kept channels alone."""
    model = make("nemotron_h")
    importance = collect(model, [text], scoring=scoring)
    scores = importance.widths["blocks.0.inner"].double()
    for heads, channels in itertools.product((4, 8), range(1, 7)):
        plan = plan_for(importance, "", model.config, Sizes(mamba_num_heads=heads, mamba_head_dim=channels))
        everything = plan.keep.get("blocks.0.channel", tuple(range(6)))
        assert len(everything) == channels  # one set for all heads
        by_channel = scores.square().sum((0, 1))
        assert set(everything) == set(torch.sort(by_channel, descending=True, stable=True).indices[:channels].tolist())
        by_head = scores[..., list(everything)].square().sum(-1)
        for group, kept in enumerate(plan.keep.get("blocks.0.head", ((0, 1),) * 4)):
            assert len(kept) == heads // 4
            assert heads == 8 or kept == (int(by_head[group].argmax()),)


def test_the_order_of_heads_depends_on_the_kept_channels() -> None:
    from halflap.compress.ranking import nested_ranking

    scores = torch.tensor([[[5.0, 0.0, 0.0], [4.0, 4.0, 4.0]]])
    assert nested_ranking(scores, 1, 1)[0].tolist() == [[0]] and nested_ranking(scores, 1, 3)[0].tolist() == [[1]]


# ---- what cannot be ranked


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_block_and_axis_that_are_not_finite_are_named(value: float, make: Make, text: Batch) -> None:
    model = make("nemotron_h")
    with torch.no_grad():
        model.blocks[1].mixer.up_proj.weight[2] = value
    for metric, read in (("activation", "activations"), ("taylor", "activations"), ("weight_norm", "weights")):
        with pytest.raises(HalflapError, match=rf"{read} of the neurons of block 1 \(-\) are NaN or infinite"):
            collect(model, [text, text], metric)


def test_what_the_last_block_breaks_is_named(make: Make, text: Batch) -> None:
    model = make("llama")
    with torch.no_grad():
        model.blocks[3].mixer.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(HalflapError, match="block 3"):
        collect(model, [text])


def test_axes_that_are_all_zero_are_warned_of(make: Make, text: Batch) -> None:
    model = make("hymba")
    with torch.no_grad():
        model.blocks[1].mixer.gate_proj.weight.zero_()
    with pytest.warns(UserWarning, match=r"activations of the neurons of block 1 \(-\) are all 0"):
        found = collect(model, [text])
    assert not found.widths["blocks.1.neuron"].any()


def test_files_of_older_versions_are_read(tmp_path: Any, make: Make, text: Batch) -> None:
    import json

    import safetensors.torch

    found = collect(make("llama"), [text], teacher="t")
    tensors = {f"width/{name}": value for name, value in found.widths.items()}
    header = {"format": "halflap-importance-1", "metric": "activation", "teacher": "t", "calibration": "", "tokens": 41}
    path = tmp_path / "importance.safetensors"
    for change, works in (({}, True), ({"format": "halflap-importance-9"}, False), ({"order": [1]}, False)):
        path.write_bytes(safetensors.torch.save(tensors, {"halflap": json.dumps({**header, **change})}))
        if works:
            old = Importance.load(path)
            assert old.removed == () and old.depth_metric == "" and old.scoring == {} and old.tokens == 41
        else:
            with pytest.raises(HalflapError, match="not an importance file of this version"):
                Importance.load(path)
