"""Our task files for lm-evaluation-harness, and the folder of data they read. No torch, no harness.

`tasks/*.yaml` are ordinary task files whose data paths are relative to the data folder: `HALFLAP_DATA`, else
`../shared/data` beside the working directory or the project.
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from halflap.errors import HalflapError

DATA_VARIABLE = "HALFLAP_DATA"


def local_tasks() -> dict[str, dict[str, Any]]:
    """Our task files by task name, as the harness's configs, their data paths still relative."""
    import yaml

    folder = resources.files("halflap.evaluate") / "tasks"
    configs = [yaml.safe_load(file.read_text("utf-8")) for file in folder.iterdir() if file.name.endswith(".yaml")]
    return {config["task"]: config for config in sorted(configs, key=lambda config: config["task"])}


def data_folder() -> Path | None:
    """The folder that local tasks read, or None where there is none."""
    if given := os.environ.get(DATA_VARIABLE):
        return Path(given)
    beside = (Path.cwd(), Path(__file__).resolve().parents[3])
    return next((f for base in beside if (f := base.parent / "shared" / "data").is_dir()), None)


def resolve_task(config: dict[str, Any]) -> dict[str, Any]:
    """The config with absolute data paths; raises HalflapError when a file is missing."""
    resolved, folder = copy.deepcopy(config), data_folder()
    files = resolved["dataset_kwargs"]["data_files"]
    for split, name in files.items():
        path = None if folder is None else folder / name
        if path is None or not path.is_file():
            raise HalflapError(
                f"task {config['task']} reads {name}, which is not in "
                f"{folder or 'any folder that was looked at'}; set {DATA_VARIABLE} to the folder that holds it"
            )
        files[split] = str(path.resolve())
    return resolved


def unknown_task(name: str, allowed: Sequence[str]) -> HalflapError:
    """The error for a task that does not exist, with the nearest that do."""
    near = difflib.get_close_matches(name, allowed, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"local ones are {', '.join(local_tasks())}"
    return HalflapError(f"task {name!r} is not known; {hint}")
