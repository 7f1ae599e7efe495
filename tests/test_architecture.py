"""The import ladder of docs/architecture.md, read from the source with `ast`."""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src"
LADDER = {
    **{"ops": 0, "models": 1, "checkpoints": 2, "data": 2, "parallel": 2, "train": 3, "inference": 3, "huggingface": 3},
    **{"compress": 4, "evaluate": 4, "commands": 5, "cli": 6, "python": 6, "hf": 6, "__main__": 6},
}
BESIDE = {"errors", "files", "progress", "amounts", "processes"}  # anyone may read these
RECIPES = {"recipe", "binding", "run", "inputs", "environment", "report"}  # for commands and cli, no torch
PURE = {
    "models.layout",
    "models.count",
    "models.patterns",
    "models.presets",
    "models.quantization",
    "models.sharing",
    "compress.axes",
    "compress.cost_model",
    "compress.cost_table",
    "compress.costs",
    "compress.grid",
    "compress.kinds",
    "compress.space",
    "compress.plan",
    "compress.library",
    "compress.programme",
}
OWNERS = {  # who may import what, beyond the ladder
    "torch.distributed": ("parallel.", "train.resume"),
    "transformers": ("hf", "huggingface."),
    "huggingface_hub": ("huggingface.",),
    "lm_eval": ("evaluate.lm_eval",),
    "gguf": ("checkpoints.gguf_",),
    "ray": ("parallel.fanout",),
    "httpx2": ("inference.front.",),
    "yaml": ("recipe", "evaluate."),
    "cyclopts": ("recipe", "binding", "commands.config", "commands.config_compress", "commands.sections"),
    "triton": ("ops.triton_",),
    "mamba_ssm": ("ops.external",),
}
FILES = sorted((SOURCE / "halflap").rglob("*.py"))
NAMES = {file: ".".join(file.relative_to(SOURCE).with_suffix("").parts[1:]) for file in FILES}
MODULES = {name: file for file, name in NAMES.items() if not name.endswith("__init__")}


def is_pure(name: str) -> bool:
    head, _, tail = name.partition(".")
    return head in BESIDE | RECIPES or tail in ("config", "config_compress", "sections") or name in PURE


@cache
def imports(file: Path, whole: bool = True) -> set[str]:
    """Dotted names imported; without `whole`, those at the top of the module only, `if TYPE_CHECKING:` left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree) if whole else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: a relative import; write the whole name"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if name.removeprefix("halflap.") in MODULES} or {node.module}
    return found


def ours(names: set[str]) -> set[str]:
    return {name.removeprefix("halflap.") for name in names if name.startswith("halflap.")}


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down_the_ladder(name: str) -> None:
    folder, level = name.partition(".")[0], LADDER.get(name.partition(".")[0])
    for other in ours(imports(MODULES[name])):
        target = other.partition(".")[0]
        if target == folder or target in BESIDE or (is_pure(other) and target in LADDER):
            continue
        if level is None:
            assert target in RECIPES and folder in RECIPES, f"{name} stands beside the ladder and imports {other}"
        elif target in RECIPES:
            assert level >= 5, f"{name} imports {other}, which is for commands and cli"
        else:
            assert LADDER[target] < level or level == 6, f"{name} imports {other}, which is not below it"


@pytest.mark.parametrize("name", MODULES)
def test_packages_stay_with_their_owners(name: str) -> None:
    for imported in imports(MODULES[name]):
        for package, owners in OWNERS.items():
            if imported == package or imported.startswith(f"{package}."):
                assert name.startswith(owners), f"{name} imports {package}, which belongs to {', '.join(owners)}"


def reachable(name: str) -> set[str]:
    """Everything that importing a module loads, before any function of it runs."""
    seen: set[str] = set()
    waiting = {f"halflap.{name}"}
    while waiting:
        current = waiting.pop()
        seen.add(current)
        if file := MODULES.get(current.removeprefix("halflap.")):
            waiting |= imports(file, whole=False) - seen
    return seen


@pytest.mark.parametrize("name", [name for name in MODULES if is_pure(name) or name in ("cli", "python")])
def test_torch_is_not_loaded_by_pure_modules(name: str) -> None:
    assert not {other for other in reachable(name) if other.partition(".")[0] == "torch"}


def test_there_are_no_cycles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in ours(imports(MODULES[name], whole=False)) & set(MODULES):
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("file", FILES, ids=NAMES.get)
def test_files_are_short_and_folders_only_describe_themselves(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    body = ast.parse(text).body
    assert text.count("\n") < 400, f"{file.name} is long: does it still answer one question?"
    assert ast.get_docstring(ast.parse(text)), f"{file.name} does not say what it is"
    if file.name == "__init__.py" and file.parent.name != "halflap":
        assert len(body) == 1, f"{file} holds more than its docstring"


def test_every_import_is_declared() -> None:
    project = (SOURCE.parent / "pyproject.toml").read_text(encoding="utf-8").lower()
    renamed = {"yaml": "pyyaml", "lm_eval": "lm-eval", "attr": "cyclopts"}
    outside = {name.partition(".")[0] for file in FILES for name in imports(file)} - {"halflap"}
    for package in outside - set(sys.stdlib_module_names):
        assert f'"{renamed.get(package, package)}>=' in project, f"{package} is imported and not in pyproject.toml"
