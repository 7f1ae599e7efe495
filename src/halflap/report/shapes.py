"""Teacher and student block by block: what each block was, what is left of it, counted from the configs alone."""

from __future__ import annotations

from dataclasses import dataclass

from halflap.errors import HalflapError
from halflap.models.config import (
    AttentionConfig,
    BlockConfig,
    LinearConfig,
    Mamba1Config,
    Mamba2Config,
    MLPConfig,
    ModelConfig,
)
from halflap.models.count import count_block_parameters, count_parameters
from halflap.report import units
from halflap.report.artifacts import Fact, Node, RunFiles, Source

KINDS = {
    "mamba2": "Mamba-2",
    "mamba1": "Mamba-1",
    "attention": "attention",
    "hybrid": "attention and SSM",
    "mlp": "MLP",
    "linear": "linear map",
}


@dataclass(frozen=True)
class BlockView:
    """One block of the teacher; `after` is None when it was dropped, `share` the part of its parameters kept."""

    index: int
    kind: str
    symbol: str
    before: str
    after: str | None
    parameters_before: int
    parameters_after: int
    compared: bool

    @property
    def share(self) -> float:
        return self.parameters_after / self.parameters_before

    @property
    def title(self) -> str:
        head = f"Block {self.index}, {KINDS.get(self.kind, self.kind)}: {self.before}"
        if not self.compared:
            return f"{head}; {units.count(self.parameters_before)} parameters"
        if self.after is None:
            return f"{head}; dropped ({units.count(self.parameters_before)} parameters)"
        sizes = f"{units.count(self.parameters_before)} to {units.count(self.parameters_after)} parameters"
        return f"{head}; now {self.after}; {sizes}, {units.percent(self.share)} kept"


@dataclass(frozen=True)
class Shapes:
    """Teacher's and student's config with the file they stand in; `student` is None when nothing was cut."""

    source: Node
    teacher: ModelConfig
    student: ModelConfig | None
    blocks: tuple[BlockView, ...]
    parameters_before: Fact
    parameters_after: Fact | None

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in KINDS if any(block.kind == kind for block in self.blocks)]

    @property
    def dropped(self) -> list[int]:
        return [block.index for block in self.blocks if block.compared and block.after is None]


def read_shapes(runs: list[RunFiles], problems: list[str]) -> Shapes | None:
    """From the first pruning plan; without one, the first checkpoint's own shape."""
    for run in runs:
        plan = run.document("pruned/pruning_plan.json", "checkpoint/pruning_plan.json", "pruning_plan.json")
        if plan is not None and (found := _from_plan(plan, problems)) is not None:
            return found
    for run in runs:
        own = run.document("checkpoint/halflap.json", "pruned/halflap.json", "halflap.json")
        node = own.get("config") if own is not None else None
        config = _config(node, problems)
        if node is not None and config is not None:
            counted = Fact(count_parameters(config), (Source(node.path, node.pointer),))
            return Shapes(node, config, None, tuple(block_views(config, None, ())), counted, None)
    return None


def _from_plan(plan: Node, problems: list[str]) -> Shapes | None:
    before, after = plan.get("teacher_config"), plan.get("student")
    teacher, student = _config(before, problems), _config(after, problems)
    if before is None or teacher is None or after is None or student is None:
        return None
    kept = plan.get("keep_blocks")
    blocks = tuple(kept.value) if kept is not None else tuple(range(len(student.blocks)))
    facts = [
        Fact(count_parameters(c), (Source(plan.path, node.pointer),))
        for c, node in ((teacher, before), (student, after))
    ]
    return Shapes(plan, teacher, student, tuple(block_views(teacher, student, blocks)), *facts)


def _config(node: Node | None, problems: list[str]) -> ModelConfig | None:
    if node is None:
        return None
    try:
        return ModelConfig.from_json(node.value)
    except (HalflapError, TypeError, AttributeError) as error:
        problems.append(f"{node.path.name} {node.pointer}: {error}")
        return None


def block_views(teacher: ModelConfig, student: ModelConfig | None, keep_blocks: tuple[int, ...]) -> list[BlockView]:
    """The teacher's blocks with what the student has of each; `keep_blocks` names the teacher's blocks that stayed."""
    counts = count_block_parameters(teacher)
    left = count_block_parameters(student) if student is not None else []
    place = {index: position for position, index in enumerate(keep_blocks)}
    views = []
    for index, block in enumerate(teacher.blocks):
        at = place.get(index) if student is not None else None
        after = describe(student.blocks[at]) if student is not None and at is not None else None
        remaining = left[at] if at is not None else 0
        compared = student is not None
        views.append(
            BlockView(index, block.kind, block.symbol, describe(block), after, counts[index], remaining, compared)
        )
    return views


def describe(block: BlockConfig) -> str:
    """A block's sizes in a few words."""
    if isinstance(block, MLPConfig):
        return f"{block.intermediate_size:,} neurons"
    if isinstance(block, LinearConfig):
        return "one linear map"
    parts = [] if block.attention is None else [_describe_attention(block.attention)]
    if isinstance(block.ssm, Mamba1Config):
        parts.append(f"{block.ssm.inner_size:,} channels, state {block.ssm.state_size}")
    if isinstance(block.ssm, Mamba2Config):
        ssm = block.ssm
        groups = f" in {ssm.num_groups} groups" if ssm.num_groups > 1 else ""
        parts.append(f"{ssm.num_heads} heads{groups} × {ssm.head_dim} channels, state {ssm.state_size}")
    return " + ".join(parts)


def _describe_attention(block: AttentionConfig) -> str:
    heads = f"{block.num_attention_heads} query, {block.num_key_value_heads} key/value heads × {block.head_dim}"
    parts = [
        f" (values {block.value_dim})" if block.value_dim != block.head_dim else "",
        f", window {block.window:,}" if block.window is not None else "",
        ", keys and values of another block" if block.key_value_source is not None else "",
    ]
    return heads + "".join(parts)


def size_rows(teacher: ModelConfig, student: ModelConfig | None) -> list[tuple[str, str, str]]:
    """Name, before and after of every size that either has, as ranges where blocks differ."""
    before = _sizes(teacher)
    after = _sizes(student) if student is not None else {}
    return [
        (name, _range(before.get(name, [])), _range(after.get(name, [])) if student is not None else "")
        for name in before | after
    ]


def _sizes(config: ModelConfig) -> dict[str, list[int]]:
    sizes: dict[str, list[int]] = {"blocks": [len(config.blocks)], "hidden size": [config.hidden_size]}
    for block in config.blocks:
        for name, value in _block_sizes(block):
            sizes.setdefault(name, []).append(value)
    if linear := sum(isinstance(block, LinearConfig) for block in config.blocks):
        sizes["linear blocks"] = [linear]
    return sizes


def _block_sizes(block: BlockConfig) -> list[tuple[str, int]]:
    if isinstance(block, MLPConfig):
        return [("MLP neurons", block.intermediate_size)]
    sizes = []
    if isinstance(block.ssm, Mamba2Config):
        sizes += [("Mamba heads", block.ssm.num_heads), ("Mamba head channels", block.ssm.head_dim)]
    if isinstance(block.ssm, Mamba1Config):
        sizes += [("Mamba channels", block.ssm.inner_size)]
    if block.ssm is not None:
        sizes += [("Mamba state size", block.ssm.state_size)]
    if block.attention is not None:
        sizes += [
            ("query heads", block.attention.num_attention_heads),
            ("key/value heads", block.attention.num_key_value_heads),
        ]
        if block.attention.window is not None:
            sizes += [("window", block.attention.window)]
    return sizes


def _range(values: list[int]) -> str:
    if not values:
        return "none"
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
