"""A run is a directory: its recipe, what it read, its metrics and artifacts, and `status.json` written last.

The same recipe on the same inputs finds its finished run or goes on with an interrupted one; another recipe is
refused by the field that differs. One process at a time works in a directory: `.lock` holds its process id under an
advisory lock, which the system drops when the process ends, so that no lock outlives a crash. No torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from halflap import environment
from halflap.errors import HalflapError
from halflap.files import atomic_write, write_json
from halflap.inputs import Inputs, checkpoint_of, content_of_inputs, digest_inputs, is_checkpoint
from halflap.recipe import content_of, digest_of, from_tree, plain_text, read_yaml, to_yaml, without_secrets

RECIPE, INPUTS, STATUS, METRICS, LOCK = "recipe.yaml", "inputs.json", "status.json", "metrics.jsonl", ".lock"
ENVIRONMENT = "environment.json"
BEGUN = {RECIPE, INPUTS, ENVIRONMENT}
"""What is there before a verb has done anything; a run that failed so early does not hold its directory."""


class Run:
    """A directory being worked in, or (`directory=None`) a verb that keeps nothing.

    `result` is what the finished run returned, or None while there is work to do; `resumed` says that an earlier
    process was interrupted here.
    """

    def __init__(self, verb: str, directory: Path | None = None, lock: IO[str] | None = None) -> None:
        self.verb, self.directory = verb, directory
        self.result: dict[str, Any] | None = None
        self.resumed = False
        self._lock = lock
        self._metrics: IO[str] | None = None
        self._begun: set[tuple[Any, ...]] = set()
        self._started = time.time()

    @property
    def path(self) -> Path:
        """The run's directory. Raises HalflapError for a verb that keeps nothing."""
        if self.directory is None:
            raise HalflapError(f"{self.verb} keeps no run directory here; give one with --out DIR")
        return self.directory

    @property
    def checkpoint_dir(self) -> Path:
        return self.path / "checkpoint"

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl; after a resume, steps that are done again replace their earlier rows."""
        if self.directory is None:
            return
        self._forget_repeated(row)
        if self._metrics is None:
            self._metrics = (self.path / METRICS).open("a", encoding="utf-8")
        self._metrics.write(_line(row))
        self._metrics.flush()

    def save_json(self, name: str, value: object) -> None:
        """Write an artifact of the run, whole or not at all."""
        write_json(self.path / name, jsonable(value))

    def finish(self, result: Mapping[str, Any] | None = None, **numbers: Any) -> dict[str, Any]:
        """Write status.json, after which the run counts as done, and return the result as it was written."""
        finished = jsonable({**(self.result or {}), **(result or {}), **numbers})
        self.result = finished
        if self.directory is not None:
            self._close_metrics()
            self.save_json(ENVIRONMENT, environment.describe())
            status = {
                "state": "finished",
                "verb": self.verb,
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.time() - self._started, 3),
                "resumed": self.resumed,
                "result": finished,
            }
            self.save_json(STATUS, status)
        return finished

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close_metrics()
        if self._lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def _forget_repeated(self, row: Mapping[str, Any]) -> None:
        """The first row of a series after a resume tells where it goes on; its later rows were lost work.

        It says so by the last step that was kept (`resumed_at`), or by being the first that is done again.
        """
        series, kept_until = _series(row), row.get("resumed_at", row.get("step", 0) - 1)
        if not self.resumed or not {"step", "resumed_at"} & row.keys() or series in self._begun:
            return
        self._begun.add(series)
        self._close_metrics()
        rows = read_metrics(self.path)
        kept = [old for old in rows if _series(old) != series or old.get("step", -1) <= kept_until]
        with atomic_write(self.path / METRICS, "w") as file:
            file.writelines(_line(old) for old in kept)


def open_run(
    verb: str,
    settings: Mapping[str, Any],
    named_inputs: Mapping[str, list[str]],
    *,
    overwrite: bool = False,
    anew: bool = False,
) -> Run:
    """The run of these settings on these inputs: new, to be gone on with (`resumed`), or finished (`result`).

    `anew`: what was done here before is never the result; the same recipe is followed once more.

    `settings` is a recipe's flat mapping (recipe.settings_of); its `out` names the directory, runs/VERB-DIGEST when
    None. Raises HalflapError when the directory belongs to something else or another process works in it.
    """
    inputs = digest_inputs(named_inputs)
    digest = digest_of(verb, settings, content_of_inputs(inputs))
    directory = Path(settings.get("out") or Path("runs") / f"{verb}-{digest}")
    _refuse_inputs_inside(directory, named_inputs)
    _refuse_foreign(directory)
    run = Run(verb, directory, _lock(directory))
    for unfinished in directory.rglob(".*.tmp"):
        if unfinished.is_file():  # of a killed process: nobody else works here
            unfinished.unlink(missing_ok=True)
    try:
        if overwrite:
            _empty(directory)
        elif _has_work(directory):
            _refuse_other(directory, verb, settings, inputs)
            if anew:
                (directory / STATUS).unlink(missing_ok=True)
            run.result = finished_result(directory)
            run.resumed = run.result is None and not anew
        if run.result is None:
            _begin(run, settings, inputs)
    except BaseException:
        run.__exit__(None, None, None)
        raise
    return run


def finished_result(directory: Path) -> dict[str, Any] | None:
    """What a finished run returned, or None when it has not finished. Raises HalflapError on a damaged status."""
    try:
        status = json.loads((directory / STATUS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise HalflapError(f"{directory / STATUS} is not JSON; delete it to go on with the run") from None
    return status["result"] if status.get("state") == "finished" else None


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line cut by a kill is left out."""
    try:
        lines = (directory / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def jsonable(value: Any) -> Any:
    """Mappings, lists, numbers and text; what JSON lacks (NaN, infinity) becomes null, other objects their text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return jsonable(value.item()) if hasattr(value, "item") else str(value)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(jsonable(row), ensure_ascii=False) + "\n"


def _series(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Rows of one curve share their text values (phase, arm)."""
    return tuple(sorted((key, value) for key, value in row.items() if isinstance(value, str)))


def _begin(run: Run, settings: Mapping[str, Any], inputs: Inputs) -> None:
    directory = run.path
    if run.resumed and (directory / METRICS).exists():
        rows = read_metrics(directory)
        with atomic_write(directory / METRICS, "w") as file:
            file.writelines(_line(row) for row in rows)
    run.save_json(INPUTS, inputs)
    run.save_json(ENVIRONMENT, environment.describe())
    with atomic_write(directory / RECIPE, "w") as file:
        file.write(to_yaml(run.verb, without_secrets(settings)))
    (directory / METRICS).touch()


def _has_work(directory: Path) -> bool:
    return any(
        entry.name not in BEGUN and not entry.name.startswith(".") and (entry.name != METRICS or entry.stat().st_size)
        for entry in directory.iterdir()
    )


def _refuse_inputs_inside(directory: Path, named: Mapping[str, list[str]]) -> None:
    target = directory.resolve()
    for name, values in named.items():
        for value in values:
            source = Path(value).resolve()
            if source.exists() and (source == target or target in source.parents):
                raise HalflapError(
                    f"out is {str(directory)!r}, which holds the input {name} ({value!r}); give another directory "
                    "with --out so that the input stays as it is"
                )
            if source in target.parents and not is_checkpoint(checkpoint_of(source)):
                raise HalflapError(
                    f"out is {str(directory)!r}, which lies in the input {name} ({value!r}) and would be read as part "
                    "of it the next time; give a directory outside with --out"
                )


def _refuse_foreign(directory: Path) -> None:
    if directory.is_file() or any(parent.is_file() for parent in directory.parents):
        raise HalflapError(f"out is {str(directory)!r}, which is or lies below a file; give a directory with --out")
    if directory.is_dir() and not (directory / RECIPE).exists():
        others = [entry.name for entry in directory.iterdir() if not entry.name.startswith(".")]
        if set(others) - BEGUN:  # those are there when a run was killed before its recipe was written
            raise HalflapError(
                f"out is {str(directory)!r}, which holds {sorted(others)[0]!r} and is not a run directory; give a new "
                "or empty directory with --out"
            )


def _refuse_other(directory: Path, verb: str, settings: Mapping[str, Any], inputs: Inputs) -> None:
    """Another recipe or changed inputs in the same directory, by the name of what differs."""
    advice = "give another --out, or --overwrite to start again"
    stored = from_tree(read_yaml(directory / RECIPE))
    if (other := stored.pop("verb", verb)) != verb:
        raise HalflapError(f"{str(directory)!r} holds a run of {other}, not of {verb}; {advice}")
    stored, current = content_of(stored), content_of(settings)
    try:
        read_before = content_of_inputs(json.loads((directory / INPUTS).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise HalflapError(f"{directory / INPUTS} cannot be read; {advice}") from None
    read_now = content_of_inputs(inputs)
    for name, entries in inputs.items():
        if read_before.get(name) == read_now[name] and all("sha256" in entry for entry in entries):
            stored[name] = current[name]  # the same content is the same input wherever it lies now
    absent = object()
    for name in [*current, *(set(stored) - set(current))]:
        before, now = stored.get(name, absent), current.get(name, absent)
        unused_and_newer = before is absent and now is None
        if before != now and not unused_and_newer:
            was, is_now = ("not set" if value is absent else plain_text(value) for value in (before, now))
            raise HalflapError(
                f"{str(directory)!r} holds another run: {name} is {was} there and {is_now} here; {advice}"
            )
    for name, content in read_now.items():
        if read_before.get(name) != content:
            paths = ", ".join(str(entry["path"]) for entry in inputs[name])
            raise HalflapError(
                f"{str(directory)!r} holds another run: the content of {name} ({paths}) has changed since; {advice}"
            )


def _lock(directory: Path) -> IO[str]:
    """The directory's lock, held until it is closed. Raises HalflapError when another process holds it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HalflapError(
            f"out is {str(directory)!r}, which cannot be made ({error.strerror}); give another directory with --out"
        ) from None
    path = directory / LOCK
    while True:
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise HalflapError(
                f"out is {str(directory)!r}, where nothing can be written ({error.strerror}); give another directory "
                "with --out"
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise HalflapError(
                f"process {holder} is working in {str(directory)!r}; wait until it ends, or give another --out"
            ) from None
        try:
            same = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except FileNotFoundError:
            same = False
        if same:  # else its last holder deleted the file between our open and our lock
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            return file
        file.close()


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.name == LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
