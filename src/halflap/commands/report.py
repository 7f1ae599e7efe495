"""`report`: one self-contained HTML page from run directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halflap.commands.config import ReportRecipe
from halflap.errors import RecipeError
from halflap.report.page import build
from halflap.run import Run


def report(recipe: ReportRecipe, run: Run) -> dict[str, Any]:
    """Write the page to `--out` (a file, or `report.html` in a directory), by default into the first run."""
    if not recipe.runs:
        raise RecipeError("no run was given; name one or more run directories: halflap report RUN... --out FILE")
    runs = [Path(name) for name in recipe.runs]
    if run.directory is not None:
        out = run.path / "report.html"
    else:
        out = Path(recipe.common.out) if recipe.common.out else runs[0] / "report.html"
    return {"path": str(build(runs, out))}
