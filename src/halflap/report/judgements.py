"""Who was judged and how well: the rows of the table of arms, and what the headline may say about them.

Rows come from `arms.json`; without one, from `scores.json` or the result in `status.json`, where the teacher, the
student as cut and the student as distilled stand under their roles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from halflap.report import units
from halflap.report.artifacts import Fact, Node, RunFiles, derive

ROLES: dict[str, tuple[str, ...]] = {
    "teacher": ("teacher",),
    "pruned": ("pruned", "pruned_only", "cut"),
    "student": ("student", "distilled", "pruned_distilled"),
}
NAMES = {"teacher": "teacher", "pruned": "pruned only", "student": "pruned + distilled", "control": "control"}


@dataclass(frozen=True)
class Judged:
    """One arm with every number as a fact; losses in nats a token, `trained` in tokens, `seconds` of its training."""

    role: str
    name: str
    description: str = ""
    loss: Fact | None = None
    interval: tuple[Fact, Fact] | None = None
    bits: Fact | None = None
    perplexity: Fact | None = None
    parameters: Fact | None = None
    trained: Fact | None = None
    seconds: Fact | None = None
    tokens: Fact | None = None
    losses: tuple[float, ...] = ()

    @property
    def bounds(self) -> tuple[float, float] | None:
        return None if self.interval is None else (float(self.interval[0]), float(self.interval[1]))


@dataclass(frozen=True)
class Judgements:
    """The arms in order, and how their intervals came about."""

    arms: tuple[Judged, ...] = ()
    judged_on: str = ""
    interval: str = ""
    seeds: tuple[int, ...] = ()

    def of(self, role: str) -> Judged | None:
        return next((arm for arm in self.arms if arm.role == role and arm.loss is not None), None)


def read_judgements(runs: Sequence[RunFiles]) -> Judgements:
    """From the first run that has an arms table, else the first with scores by role, else each run's own scores."""
    for run in runs:
        if (node := run.document("arms.json")) is not None and node.get("arms") is not None:
            return _from_arms(node)
    for run in runs:
        for node in (run.document("scores.json"), _result(run)):
            if node is not None and (arms := _from_roles(node)):
                return Judgements(arms, interval=_how(node))
    arms = tuple(_judged(node, "model", run.name) for run in runs if (node := run.document("scores.json")) is not None)
    return Judgements(tuple(arm for arm in arms if arm.loss is not None))


def _result(run: RunFiles) -> Node | None:
    status = run.document("status.json")
    return status.get("result") if status is not None else None


def _from_arms(node: Node) -> Judgements:
    arms = []
    for _, row in node.get("arms").items():  # type: ignore[union-attr]
        role = row.text("role") or "control"
        arms.append(_judged(row, role if role in ROLES else "control", row.text("name") or role))
    seeds = node.get("seeds")
    numbers = tuple(seeds.value) if seeds is not None and isinstance(seeds.value, list) else ()
    return Judgements(tuple(arms), node.text("judged_on") or "", node.text("interval") or "", numbers)


def _from_roles(node: Node) -> tuple[Judged, ...]:
    arms = []
    for role, keys in ROLES.items():
        found = next((child for key in keys if (child := node.get(key)) is not None), None)
        if found is not None and isinstance(found.value, dict):
            arms.append(_judged(found, role, found.text("name") or NAMES[role]))
    if not any(arm.loss is not None for arm in arms):
        return ()
    known = {key for keys in ROLES.values() for key in keys}
    controls = node.get("controls") or node
    for key, child in controls.items():
        if key not in known and isinstance(child.value, dict) and child.number("loss") is not None:
            arms.append(_judged(child, "control", key.replace("_", " ")))
    return tuple(arm for arm in arms if arm.loss is not None)


def _judged(node: Node, role: str, name: str) -> Judged:
    text = node.get("text") or node.get("held_out") or node
    losses, as_cut = node.get("losses"), node.number("loss_as_cut")
    described = [node.text("description"), f"{units.loss(float(as_cut))} as cut" if as_cut is not None else None]
    return Judged(
        role,
        name,
        "; ".join(part for part in described if part),
        text.number("loss", "held_out_loss"),
        text.interval("loss_ci", "loss_interval", "held_out_loss_interval"),
        text.number("bits_per_byte", "held_out_bits_per_byte"),
        text.number("perplexity", "held_out_perplexity"),
        node.number("parameters"),
        node.number("tokens_trained"),
        node.number("seconds"),
        text.number("tokens", "held_out_tokens"),
        tuple(float(x) for x in losses.value) if losses is not None and isinstance(losses.value, list) else (),
    )


def _how(node: Node) -> str:
    for _, child in node.items():
        if (units := child.text("resampled")) is not None:
            return f"95 % bootstrap over {units}"
    return "95 % confidence interval"


def with_parameters(judgements: Judgements, before: Fact | None, after: Fact | None) -> Judgements:
    """The arms whose size no file tells, with the teacher's (`before`) or the student's (`after`) counted one."""
    counted = {"teacher": before, "pruned": after, "student": after}
    arms = tuple(
        arm if arm.parameters is not None else replace(arm, parameters=counted.get(arm.role)) for arm in judgements.arms
    )
    return replace(judgements, arms=arms)


@dataclass(frozen=True)
class Verdict:
    """What may honestly be said of the student: facts that the page puts into sentences."""

    difference: Fact | None = None
    apart: bool | None = None
    closed: Fact | None = None
    beaten: tuple[Judged, ...] = ()
    tied: tuple[Judged, ...] = ()
    better: tuple[Judged, ...] = ()


def verdict(judgements: Judgements) -> Verdict:
    """Difference to the teacher, share of the gap that distillation closed, and the controls beaten, tied, better."""
    teacher, pruned, student = (judgements.of(role) for role in ("teacher", "pruned", "student"))
    if student is None or student.loss is None:
        return Verdict()
    difference = closed = apart = None
    if teacher is not None and teacher.loss is not None:
        difference = derive(float(student.loss) - float(teacher.loss), student.loss, teacher.loss)
        apart = _apart(student, teacher)
        if pruned is not None and pruned.loss is not None and float(pruned.loss) > float(teacher.loss):
            gap, left = float(pruned.loss) - float(teacher.loss), float(student.loss) - float(teacher.loss)
            closed = derive(1 - left / gap, student.loss, pruned.loss, teacher.loss)
    groups: dict[str, list[Judged]] = {"beaten": [], "tied": [], "better": []}
    for arm in judgements.arms:
        if arm.role == "control" and arm.loss is not None:
            groups[_against(student, arm)].append(arm)
    return Verdict(difference, apart, closed, *(tuple(group) for group in groups.values()))


def _apart(one: Judged, other: Judged) -> bool | None:
    """Whether two intervals do not overlap; None when one is missing."""
    a, b = one.bounds, other.bounds
    return None if a is None or b is None else a[1] < b[0] or b[1] < a[0]


def _against(student: Judged, control: Judged) -> str:
    if _apart(student, control) is False:
        return "tied"
    assert student.loss is not None and control.loss is not None
    return "beaten" if float(student.loss) < float(control.loss) else "better"
