"""PruningPlan: exactly which indices of a teacher a student keeps, as a JSON file.

Kept indices are written per axis of the teacher's layout; an axis that is not written is kept whole. An axis with a
parent (heads of a group, queries of a key/value head, states of a group) is a table with a row for each *kept* index
of the parent, all rows equally long: a plan that moves a head to another group or leaves groups unequal cannot be
written down. Order is kept, so a plan may also reorder. Blocks and parameters carry the teacher's numbers.
The student's config and the factors of its parameters are derived, and must agree when a plan is read. No torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halflap.compress.axes import axes_of, block_of, droppable_units, short_name
from halflap.compress.correction import Dropped, Scales, correct_norms
from halflap.compress.kinds import Change, axis_name, block_counts, changed_block, owner, resize_block
from halflap.errors import HalflapError
from halflap.files import write_json
from halflap.models.config import ModelConfig
from halflap.models.layout import Axis, layout
from halflap.models.sharing import keep_blocks as left_blocks

PLAN = "pruning_plan.json"  # beside a student
FORMAT = "halflap-pruning-plan-1"

Row = tuple[int, ...]
Kept = Row | tuple[Row, ...]
"""Kept indices of an axis: a row, or for an axis with a parent a row for each kept index of the parent."""


@dataclass(frozen=True)
class PruningPlan:
    """A student of one teacher; making an illegal one raises HalflapError.

    teacher          digest of the teacher's checkpoint
    teacher_config   its shape, to which blocks, axes and parameters refer
    keep_blocks      kept blocks, ascending; None keeps all
    keep             kept indices by axis name
    norm_correction  none, masked or calibrated
    dropped          share of energy that each cut norm loses, for `calibrated` only
    importance       digest of the importance that chose the indices
    changes          what else becomes of kept blocks, by their index
    student          (derived) the student's config
    scales           (derived) factors of the student's parameters, by the teacher's names
    """

    teacher: str
    teacher_config: ModelConfig
    keep_blocks: Row = None  # type: ignore[assignment]
    keep: Mapping[str, Kept] = field(default_factory=dict)
    norm_correction: str = "masked"
    dropped: Dropped = field(default_factory=dict)
    importance: str | None = None
    changes: Mapping[int, Change] = field(default_factory=dict)
    student: ModelConfig = field(init=False)
    scales: Scales = field(init=False)

    def __post_init__(self) -> None:
        config = self.teacher_config
        blocks = tuple(range(len(config.blocks))) if self.keep_blocks is None else tuple(self.keep_blocks)
        keep = {name: _tuples(table) for name, table in self.keep.items()}
        _check_blocks(config, blocks)
        _check_keep(config, blocks, keep)
        _check_changes(config, blocks, keep, self.changes)
        keep = _without_whole_axes(config, keep)
        changes = {index: change for index, change in sorted(self.changes.items()) if change != Change()}
        shape = _shape(config, blocks, keep, changes)
        student, scales = correct_norms(config, shape, blocks, self.norm_correction, self.dropped)
        derived = {"keep_blocks": blocks, "keep": keep, "changes": changes, "student": student, "scales": scales}
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @property
    def digest(self) -> str:
        """Names the plan's content: 64 hexadecimal digits."""
        text = json.dumps(self.to_json(), sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def check_teacher(self, digest: str, config: ModelConfig) -> None:
        """Raise HalflapError unless `digest` and `config` are those of the teacher this plan was made for."""
        if digest != self.teacher:
            raise HalflapError(
                f"the pruning plan was made for teacher {self.teacher[:12]} and this checkpoint is {digest[:12]}; its "
                "indices mean nothing here: give the teacher of the plan, or make a plan for this checkpoint"
            )
        if found := _first_difference(self.teacher_config.to_json(), config.to_json()):
            name, planned, here = found
            raise HalflapError(
                f"the pruning plan says of its teacher that {name} is {planned}, and this checkpoint's is {here}, so "
                "the plan was changed after it was made and its student would be of another model: make it again"
            )

    def student_name(self, name: str) -> str | None:
        """The student's name of a teacher's axis or parameter; None when its block is dropped."""
        if (index := block_of(name)) is None:
            return name
        if index not in self.keep_blocks:
            return None
        return f"blocks.{self.keep_blocks.index(index)}.{name.split('.', 2)[2]}"

    def teacher_name(self, name: str) -> str:
        """The teacher's name of an axis or parameter of the student; what a linear block is made of comes last."""
        if (index := block_of(name)) is None:
            return name
        index, rest = self.keep_blocks[index], name.split(".", 2)[2]
        return f"blocks.{index}.{self._last_map(index, rest)}"

    def teacher_names(self, names: Iterable[str]) -> list[str]:
        """The teacher's parameters that these of the student are made of: of a linear block's map, all of the mixer."""
        found: list[str] = []
        for name in names:
            index, own = block_of(name), self.teacher_name(name)
            mixer = own.split("mixer.")[0] + "mixer."
            if index is not None and "mixer." in own and self.changes.get(self.keep_blocks[index], Change()).linear:
                found += [other for other in layout(self.teacher_config) if other.startswith(mixer)]
            else:
                found.append(own)
        return list(dict.fromkeys(found))

    def kept_heads(self, index: int) -> tuple[int, int]:
        """How many key/value heads of an attention block are kept, and how many query heads of each."""
        block, axes = self.teacher_config.blocks[index], axes_of(self.teacher_config)
        kv, query = (kept_count(axes[axis_name(block, index, axis)], self.keep) for axis in ("kv", "query"))
        return kv, query

    def factors(self, index: int, name: str) -> tuple[float, ...]:
        """Factors of a parameter of the student by its name inside the teacher's block `index`.

        What a linear block is made of bears them in its last map; earlier ones have none.
        """
        return self.scales.get(f"blocks.{index}.{self._last_map(index, name)}", (1.0,))

    def _last_map(self, index: int, name: str) -> str:
        """For the one map of a block that becomes linear, the last of those it is the product of; else the name."""
        if not self.changes.get(index, Change()).linear:
            return name
        last = "o_proj" if self.teacher_config.blocks[index].attention else "down_proj"
        return name.replace("mixer.out_proj", f"mixer.{last}")

    def to_json(self) -> dict[str, Any]:
        changes = {str(index): dataclasses.asdict(change) for index, change in self.changes.items()}
        return {
            "format": FORMAT,
            "teacher": self.teacher,
            "importance": self.importance,
            "norm_correction": self.norm_correction,
            "keep_blocks": list(self.keep_blocks),
            "keep": {name: _lists(table) for name, table in self.keep.items()},
            **({"changes": changes} if changes else {}),
            "dropped": _lists_of(self.dropped),
            "scales": _lists_of(self.scales),
            "teacher_config": self.teacher_config.to_json(),
            "student": self.student.to_json(),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> PruningPlan:
        """Raises HalflapError when the student or the factors are not those that follow from the kept indices."""
        if data.get("format") != FORMAT:
            raise HalflapError(
                f"this is not a pruning plan that can be read here (format {data.get('format')!r}, expected "
                f"{FORMAT!r}); give the pruning_plan.json of a student"
            )
        try:
            if not isinstance(data["teacher"], str):
                raise TypeError(f"teacher is {data['teacher']!r}")
            plan = PruningPlan(
                teacher=data["teacher"],
                teacher_config=ModelConfig.from_json(data["teacher_config"]),
                keep_blocks=tuple(data["keep_blocks"]),
                keep=data["keep"],
                norm_correction=data["norm_correction"],
                dropped={name: tuple(shares) for name, shares in data["dropped"].items()},
                importance=data["importance"],
                changes={int(index): Change(**change) for index, change in data.get("changes", {}).items()},
            )
            agrees = plan.student == ModelConfig.from_json(data["student"]) and _lists_of(plan.scales) == data["scales"]
        except HalflapError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise HalflapError(f"the pruning plan is incomplete or damaged ({error!r}); make it again") from error
        if not agrees:
            raise HalflapError(
                f"the pruning plan does not describe its student: its kept indices give a {plan.student.pattern()} of "
                f"width {plan.student.hidden_size}, and it says otherwise, or other norms; make it again"
            )
        return plan

    def save(self, path: str | Path) -> None:
        write_json(path, self.to_json())

    @staticmethod
    def load(path: str | Path) -> PruningPlan:
        """The plan in a pruning_plan.json, or of the best candidate in a search.json."""
        try:
            data = json.loads(plan_file(path).read_text("utf-8"))
        except FileNotFoundError:
            raise HalflapError(
                f"pruning plan {str(path)!r} does not exist; give the path of a pruning_plan.json"
            ) from None
        except ValueError as error:
            raise HalflapError(f"{str(path)!r} is not JSON ({error}); give a pruning_plan.json") from error
        if not isinstance(data, Mapping):
            raise HalflapError(f"{str(path)!r} holds {type(data).__name__}, not a plan; give a pruning_plan.json")
        if isinstance(data.get("sweep"), Mapping):
            found = ", ".join(row["path"] for row in data["sweep"]["values"])
            raise HalflapError(f"{str(path)!r} holds the best of several budgets; give one of them: {found}")
        if "candidates" in data and data.get("plan") is None:
            raise HalflapError(f"the search in {str(path)!r} is not finished; give its command again, which goes on")
        return PruningPlan.from_json(data["plan"] if isinstance(data.get("plan"), Mapping) else data)


def _first_difference(plan: Any, teacher: Any, name: str = "") -> tuple[str, str, str] | None:
    """Where JSON values differ, as in `blocks[2].activation`, and what each says there; None where they are equal."""
    if plan == teacher:
        return None
    if isinstance(plan, Mapping) and isinstance(teacher, Mapping):
        inside = [(f"{name}.{key}".lstrip("."), key) for key in {**plan, **teacher}]
        found = (_first_difference(plan.get(key), teacher.get(key), place) for place, key in inside)
    elif isinstance(plan, list) and isinstance(teacher, list) and len(plan) == len(teacher):
        pairs = enumerate(zip(plan, teacher, strict=True))
        found = (_first_difference(*pair, f"{name}[{index}]") for index, pair in pairs)
    elif isinstance(plan, list) and isinstance(teacher, list):
        return f"the number of {name}", str(len(plan)), str(len(teacher))
    else:
        return name, repr(plan), repr(teacher)
    return next((one for one in found if one is not None), None)


def plan_file(path: str | Path) -> Path:
    """The file itself, or of a directory the search or plan in it."""
    path = Path(path)
    inside = [path / place for place in ("search.json", PLAN, f"pruned/{PLAN}", f"checkpoint/{PLAN}")]
    return next((file for file in inside if file.exists()), path / PLAN) if path.is_dir() else path


def kept_indices(axis: Axis, keep: Mapping[str, Kept], parents: int = 1) -> Any:
    """The row of an axis, or its table with a row for each of `parents`; all indices when it is not written."""
    whole = tuple(range(axis.size))
    return keep.get(axis.name, whole if axis.parent is None else (whole,) * parents)


def kept_count(axis: Axis, keep: Mapping[str, Kept]) -> int:
    """How many indices of an axis are kept (per index of its parent)."""
    table: Any = keep.get(axis.name)
    if table is None:
        return axis.size
    return len(table) if axis.parent is None else len(table[0])


def _shape(
    config: ModelConfig, keep_blocks: Row, keep: Mapping[str, Kept], changes: Mapping[int, Change]
) -> ModelConfig:
    """The teacher's config with the student's blocks and widths."""
    axes = axes_of(config)

    def count(name: str) -> int:
        return kept_count(axes[name], keep)

    blocks = []
    for index, left in zip(keep_blocks, left_blocks(config.blocks, keep_blocks), strict=True):
        own = config.blocks[index]
        resized = resize_block(left, {a: count(axis_name(own, index, a)) for a in block_counts(own)})
        blocks.append(changed_block(resized, changes.get(index, Change())))
    return dataclasses.replace(config, hidden_size=count("hidden"), blocks=tuple(blocks))


def _without_whole_axes(config: ModelConfig, keep: Mapping[str, Kept]) -> dict[str, Kept]:
    """Leave out axes that are kept whole and in order, so that equal cuts are equal plans."""
    axes = axes_of(config)
    return {name: table for name, table in keep.items() if table != kept_indices(axes[name], {}, len(table))}


# ---- validation


def _check_blocks(config: ModelConfig, keep_blocks: Row) -> None:
    allowed = range(len(config.blocks))
    if not keep_blocks or list(keep_blocks) != sorted(set(keep_blocks)) or not set(keep_blocks) <= set(allowed):
        raise HalflapError(
            f"a pruning plan keeps blocks {list(keep_blocks)}; they must be different, ascending and among 0 to "
            f"{allowed[-1]}: correct keep_blocks"
        )
    for unit in droppable_units(config):
        if 0 < len(set(unit) & set(keep_blocks)) < len(unit):
            raise HalflapError(
                f"a pruning plan keeps a part of blocks {', '.join(map(str, unit))}, which are one layer of a "
                f"{config.family} model; keep all of them or none"
            )


def _check_keep(config: ModelConfig, keep_blocks: Row, keep: Mapping[str, Kept]) -> None:
    axes = axes_of(config)
    for name, table in keep.items():
        axis = axes.get(name)
        if axis is None:
            raise HalflapError(
                f"a pruning plan names axis {name!r}, which this teacher does not have or which is never cut; "
                f"its axes end in {', '.join(sorted({short_name(other) for other in axes}))}: correct keep"
            )
        if block_of(name) not in (None, *keep_blocks):
            raise HalflapError(
                f"a pruning plan cuts axis {name!r} of a block that it drops; leave the axis out of keep"
            )
        rows: Any = table if axis.parent else (table,)
        parents = kept_count(axes[axis.parent], keep) if axis.parent else 1
        lengths = [len(row) if isinstance(row, tuple) else 0 for row in rows]
        if len(rows) != parents or len(set(lengths)) != 1 or not lengths[0]:
            raise HalflapError(
                f"axis {name!r} of a pruning plan has rows of {lengths} indices; it must have {parents} equally long "
                f"and not empty, one for each kept index of {axis.parent or 'the model'}: correct keep"
            )
        for row in rows:
            _check_row(name, axis.size, row)


def _check_changes(
    config: ModelConfig, keep_blocks: Row, keep: Mapping[str, Kept], changes: Mapping[int, Change]
) -> None:
    shared, axes = sharing_blocks(config), axes_of(config)
    for index, change in changes.items():
        if index not in keep_blocks:
            raise HalflapError(f"a pruning plan changes block {index}, which it drops or which is none; leave it out")
        heads = axes.get(axis_name(config.blocks[index], index, "kv"))
        count = 0 if heads is None else kept_count(heads, keep)
        change.check(config.blocks[index], index, index in shared, count)


def sharing_blocks(config: ModelConfig) -> set[int]:
    """Blocks whose keys and values are read by others, and those that read them."""
    pairs = [(index, owner(block, index)) for index, block in enumerate(config.blocks)]
    return {index for pair in pairs if pair[0] != pair[1] for index in pair}


def _check_row(name: str, size: int, row: tuple[Any, ...]) -> None:
    wrong = [index for index in row if type(index) is not int or not 0 <= index < size]
    if wrong or len(set(row)) != len(row):
        what = f"index {wrong[0]!r}" if wrong else "an index twice"
        raise HalflapError(f"axis {name!r} of a pruning plan keeps {what}; allowed are 0 to {size - 1}, each once")


# ---- JSON


def _lists(table: Kept) -> list[Any]:
    return [list(row) if isinstance(row, tuple) else row for row in table]


def _lists_of(factors: Mapping[str, tuple[float, ...]]) -> dict[str, list[float]]:
    return {name: list(values) for name, values in factors.items()}


def _tuples(table: Sequence[Any]) -> Kept:
    return tuple(tuple(row) if isinstance(row, list | tuple) else row for row in table)
