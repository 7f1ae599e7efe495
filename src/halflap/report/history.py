"""How a student came to be and whether it is what it claims: lineage, certificate, recipe, environment, inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from halflap.report.artifacts import Fact, Node, RunFiles, Source

VERBS = {
    "pretrain": "trained from text",
    "import": "imported",
    "sort": "sorted",
    "prune": "pruned",
    "distill": "distilled",
    "compress": "compressed",
    "export": "exported",
}


@dataclass(frozen=True)
class Step:
    """One step of a lineage: what was done, the digests it read, its numbers."""

    verb: str
    title: str
    inputs: tuple[tuple[str, Fact], ...]
    numbers: tuple[tuple[str, Fact], ...]


def read_lineage(runs: Sequence[RunFiles]) -> list[Step]:
    """The steps of the first checkpoint that records any, the oldest first."""
    for run in runs:
        node = run.document("checkpoint/lineage.json", "pruned/lineage.json", "lineage.json")
        steps = (node.get("steps") or node) if node is not None else None
        if steps is not None and isinstance(steps.value, list) and steps.value:
            return [_step(step) for _, step in steps.items()]
    return []


def _step(node: Node) -> Step:
    verb = node.text("verb") or node.text("step") or "step"
    inputs: list[tuple[str, Fact]] = []
    numbers: list[tuple[str, Fact]] = []
    for key, child in node.items():
        if key == "inputs":
            inputs += [(name, fact) for name, _ in child.items() if (fact := child.fact(name)) is not None]
        elif key not in ("verb", "step") and (fact := node.fact(key)) is not None:
            (inputs if _is_digest(fact.value) else numbers).append((key.replace("_", " "), fact))
    return Step(verb, VERBS.get(verb, verb), tuple(inputs), tuple(numbers))


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"(sha256:)?[0-9a-f]{32,}", value) is not None


@dataclass(frozen=True)
class CertificateAxis:
    """One axis that was checked."""

    name: str
    passed: Fact | None
    error: Fact | None
    detail: str


@dataclass(frozen=True)
class Certificate:
    """Whether the pruned student equals its masked teacher; errors and scale are in logits.

    `error` is that of wide arithmetic, where storage rounds nothing; `stored_error` that of the stored weights.
    """

    passed: Fact
    error: Fact | None
    arithmetic: str
    stored_error: Fact | None
    stored: str
    scale: Fact | None
    axes: tuple[CertificateAxis, ...]


def read_certificate(runs: Sequence[RunFiles]) -> Certificate | None:
    """The certificate of the first run that has one; the one of `pruned/` before any other."""
    for run in runs:
        node = run.document("pruned/certificate.json", "checkpoint/certificate.json", "certificate.json")
        passed = node.fact("passed") if node is not None else None
        if node is None or passed is None:
            continue
        axes = tuple(_axis(key, child) for key, child in (node.get("axes") or Node(node.path, [])).items())
        return Certificate(
            passed,
            node.number("exact_max_abs_error", "max_abs_error"),
            node.text("arithmetic") or "",
            node.number("max_abs_error"),
            node.text("stored") or "",
            node.number("logit_scale"),
            axes,
        )
    return None


def _axis(key: str, node: Node) -> CertificateAxis:
    if not isinstance(node.value, dict):
        return CertificateAxis(str(node.value), None, None, "")
    name = node.text("axis") or key
    kept, total = node.text("kept"), node.text("total")
    detail = f"{kept} of {total}" if kept and total else ""
    return CertificateAxis(name, node.fact("passed"), node.number("max_abs_error"), detail)


@dataclass(frozen=True)
class Setting:
    """One run's recipe, environment and inputs, for the folded part at the end."""

    name: str
    recipe: str | None
    recipe_file: Fact
    environment: tuple[tuple[str, Fact, str], ...]
    inputs: tuple[tuple[str, str, Fact], ...]


def read_settings(runs: Sequence[RunFiles]) -> list[Setting]:
    """Of every run that has any of the three."""
    found = []
    for run in runs:
        environment = run.document("environment.json")
        inputs = run.document("inputs.json")
        if run.recipe is None and environment is None and inputs is None:
            continue
        recipe = Node(run.path / "recipe.yaml", "recipe.yaml").fact()
        assert recipe is not None
        rows = tuple(_leaves(environment)) if environment is not None else ()
        found.append(Setting(run.name, run.recipe, recipe, rows, tuple(_inputs(inputs)) if inputs is not None else ()))
    return found


OWN_NAMES = ("versions", "machine")
"""Groups of environment.json whose members are clear without the group's name."""


def _leaves(node: Node, prefix: str = "") -> list[tuple[str, Fact, str]]:
    """Name, value and format of everything in a document, one after another."""
    rows: list[tuple[str, Fact, str]] = []
    for key, child in node.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(child.value, dict):
            rows += _leaves(child, "" if name in OWN_NAMES else f"{name} ")
            continue
        text = " ".join(map(str, child.value)) if isinstance(child.value, list) else child.value
        kind = "size" if key.endswith("_bytes") and isinstance(text, int) else "plain"
        if text != "":
            rows.append((name, Fact(text, (Source(child.path, child.pointer),)), kind))
    return rows


def _inputs(node: Node) -> list[tuple[str, str, Fact]]:
    """Field, path and digest of everything read; of what is no file only the path."""
    rows = []
    for name, entries in node.items():
        for _, entry in entries.items():
            digest = entry.fact("sha256") or entry.fact("digest") or entry.fact("path")
            if digest is not None:
                rows.append((name, entry.text("path") or "", digest))
    return rows
