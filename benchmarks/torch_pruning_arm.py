"""Torch-Pruning's cut of a Llama to a budget, for peers.py: its pruner on transformers' own class, as its LLM example.

Settings are those of that example (release 1.6.1): `BasePruner` with its dependency graph, in one step, local ranking
so that all layers keep one shape, importance of the whole group by mean, whole query heads evenly within each key/value
head, channels of a head left alone, and widths that are multiples of 4. Hidden size and MLPs lose the same share, which
is the smallest whose model is within the budget. The ways to use it that `TRIES` lists are all tried: the example's
magnitudes, or first-order Taylor scores of the loss on the calibration text; query heads cut in the same share, as in
the example, or left whole, since the least step takes a third of them. Its tracer does not follow grouped keys and
values through fused attention, and does not end on rotated halves; so attention is the plain one, and the rotation,
which stays within a head, is passed by while it traces.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import nn

from halflap.amounts import parse_amount
from halflap.checkpoints.checkpoint import load_model
from halflap.commands import corpora, scoring, students
from halflap.commands.sections import Text
from halflap.commands.students import Teacher, open_teacher
from halflap.data.batch import Batch
from halflap.data.tokenizer import Tokenizer
from halflap.files import write_json
from halflap.models.count import count_non_embedding_parameters
from halflap.recipe import Common
from smollm2_parts import CALIBRATION, CHOOSING, FIT

TRIES = ("magnitude", "magnitude-whole-heads", "taylor", "taylor-whole-heads")
INSTALL = (
    "torch_pruning cannot be imported; install it with `pip install --no-deps torch-pruning==1.6.1` (or with "
    "--target DIR and PYTHONPATH=DIR), or leave torch_pruning out of --arms"
)
EXAMPLE = torch.arange(1, 6)[None]  # what the tracer reads; any tokens do
SAME = 1e-4
"""Largest difference of logits between the pruned module and what is read back: the same sums in another order."""


def library() -> Any:
    try:
        import torch_pruning
    except ImportError:
        raise SystemExit(INSTALL) from None
    return torch_pruning


def cut(directory: Path, train: list[str], place: Path, name: str, share: float) -> dict[str, Any]:
    """Write place/pruned/checkpoint by one of `TRIES`; its ratio, sizes and loss on the text that candidates are
    chosen on."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    metric, whole_heads = name.split("-")[0], name.endswith("whole-heads")
    teacher = open_teacher(directory, Common(), train)
    calibration, choosing = batches_of(teacher, train, place)
    model: Any = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    budget = share * count_non_embedding_parameters(teacher.config)
    ratio = least_ratio(model.config, budget, whole_heads)
    if metric == "taylor":
        add_gradients(model.to(teacher.device), calibration)
        model.to("cpu")
    model.set_attn_implementation("eager")
    shrink(model, ratio, whole_heads, metric)
    write(model, teacher.tokenizer, place / "pruned" / "checkpoint")
    student = load_model(place / "pruned" / "checkpoint").to(teacher.device)
    loss = students.next_token_loss(student, [batch.to(teacher.device) for batch in choosing], teacher)
    return {"ratio": ratio, **sizes_of(model), **loss}


def batches_of(teacher: Teacher, train: list[str], place: Path) -> tuple[list[Batch], list[Batch]]:
    """The rows that `score` and `search` read of the same text, in the settings of the other arms."""
    text = Text(data=tuple(train), weights=(1.0,) * len(train))
    opened = corpora.open_corpora(text, teacher.tokenizer, place / "corpus")
    rows = corpora.training_loader(opened, text, int(FIT["sequence_length"]), 4, teacher.seed)
    calibration, choosing = (int(parse_amount(amount).value) for amount in (CALIBRATION, CHOOSING))
    return scoring.calibration(rows, calibration), students.choosing(rows, choosing)


def add_gradients(model: Any, batches: list[Batch]) -> None:
    """Of the mean loss on the text, with which Taylor scores are made."""
    count = sum(float(batch.weights.sum()) for batch in batches)
    for batch in batches:
        batch = batch.to(model.device)
        logits = model(batch.tokens, use_cache=False).logits
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        ((losses * batch.weights.flatten()).sum() / count).backward()


def shrink(model: Any, ratio: float, whole_heads: bool, metric: str) -> None:
    """Prune in place, and set what transformers' modules remember of their shape."""
    from transformers.models.llama import modeling_llama

    pruning, config = library(), model.config
    heads: dict[nn.Module, int] = {}
    for layer in model.model.layers:
        heads[layer.self_attn.q_proj] = config.num_attention_heads
        heads[layer.self_attn.k_proj] = heads[layer.self_attn.v_proj] = config.num_key_value_heads
    importance = {
        "magnitude": lambda: pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        "taylor": lambda: pruning.importance.GroupTaylorImportance(group_reduction="mean"),
    }[metric]()
    unrotated = mock.patch.object(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *_: (q, k))
    with warnings.catch_warnings(), unrotated:
        warnings.simplefilter("ignore")  # that it found the norms' weights
        pruner = pruning.pruner.BasePruner(
            model, example_inputs=EXAMPLE, importance=importance, global_pruning=False, pruning_ratio=ratio,
            output_transform=lambda found: found.logits, ignored_layers=[model.lm_head], round_to=4, num_heads=heads,
            prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=0.0 if whole_heads else ratio,
            in_channel_groups={}, out_channel_groups={},
        )  # fmt: skip
    for group in pruner.step(interactive=True):
        group.prune()
    model.zero_grad(set_to_none=True)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features


def sizes_of(model: Any) -> dict[str, int]:
    """By the names of its config. Raises RuntimeError when layers differ, which local ranking does not make."""
    channels = model.config.head_dim
    found = {
        (
            layer.mlp.gate_proj.in_features,
            layer.mlp.gate_proj.out_features,
            layer.self_attn.q_proj.out_features // channels,
            layer.self_attn.k_proj.out_features // channels,
        )
        for layer in model.model.layers
    }
    if len(found) > 1:
        raise RuntimeError(f"layers of the pruned model differ: {sorted(found)}")
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, found.pop(), strict=True))


def least_ratio(config: Any, budget: float, whole_heads: bool) -> float:
    """The smallest ratio at which a model has at most `budget` parameters beside its embeddings.

    Shapes depend on the ratio alone, so a model of one layer and random weights shows them.
    """
    import transformers

    def parameters(ratio: float) -> int:
        small = copy.deepcopy(config)
        small.num_hidden_layers, small.vocab_size, small.pad_token_id = 1, 8, None
        model: Any = transformers.LlamaForCausalLM(small).eval()
        model.set_attn_implementation("eager")
        shrink(model, ratio, whole_heads, "magnitude")
        layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
        return config.num_hidden_layers * layer + model.model.norm.weight.numel()

    low, high = 0.0, 0.95
    while high - low > 2e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if parameters(middle) <= budget else (middle, high)
    return high


@torch.no_grad()
def write(model: Any, tokenizer: Tokenizer, directory: Path) -> None:
    """In the layout of the stock class, which refuses hidden sizes that its heads do not divide, though the layout can
    say them. Raises RuntimeError when what is read back differs from the pruned module."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings and not torch.equal(
        tensors.pop("lm_head.weight"), tensors["model.embed_tokens.weight"]
    ):
        raise RuntimeError("pruning has cut the head and the embedding, which are one matrix, differently")
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    write_json(directory / "config.json", {**model.config.to_dict(), **sizes_of(model), "dtype": "float32"})
    tokenizer.save(directory)
    pruned, read = model(EXAMPLE, use_cache=False).logits, load_model(directory)(EXAMPLE)
    difference = float((read - pruned).abs().max() / pruned.abs().max())
    if not difference < SAME:
        raise RuntimeError(f"read back, the pruned model's logits differ by {difference:.2g} of the largest")
