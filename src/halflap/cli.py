"""The command line and the verbs from Python: one table of verbs, exit statuses, errors in one sentence.

Exit status 0 done, 1 failed, 2 the command line or recipe is wrong, 130 interrupted. Standard output carries the
result alone. Nothing here imports torch; a verb's module is loaded when the verb is used.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from halflap.errors import CheckFailed, HalflapError, RecipeError

if TYPE_CHECKING:
    from halflap.binding import Call

# Modules of ours are imported inside functions, so that Ctrl-C ends in a sentence while they load, too.


class Verb(NamedTuple):
    """Its recipe and the function that follows it, both as module:name in commands/, and what it leaves on disk."""

    recipe_place: str
    function: str
    keeps: bool = True
    """Whether there is a run directory when --out is not given."""
    artifact: str = ""
    """--out may name a file like this one instead of a directory."""
    anew: bool = False
    """Whether the same command does its work once more, where others find their finished run."""

    @property
    def recipe(self) -> type:
        module, _, name = self.recipe_place.partition(":")
        return getattr(import_module(f"halflap.commands.{module}"), name)


VERBS: dict[str, Verb] = {
    "inspect": Verb("config:InspectRecipe", "checkpoint:inspect", keeps=False),
    "import": Verb("config:ImportRecipe", "checkpoint:import_"),
    "export": Verb("config:ExportRecipe", "export:export"),
    "tokenizer": Verb("config:TokenizerRecipe", "pretrain:tokenizer"),
    "corpus": Verb("config:CorpusRecipe", "pretrain:corpus"),
    "pretrain": Verb("config:PretrainRecipe", "pretrain:pretrain"),
    "score": Verb("config_compress:ScoreRecipe", "compress:score", artifact="importance.safetensors"),
    "search": Verb("config_compress:SearchRecipe", "compress:search", artifact="search.json"),
    "prune": Verb("config_compress:PruneRecipe", "compress:prune"),
    "verify": Verb("config_compress:VerifyRecipe", "compress:verify", keeps=False),
    "distill": Verb("config_compress:DistillRecipe", "compress:distill"),
    "compress": Verb("config_compress:CompressRecipe", "compress:compress"),
    "evaluate": Verb("config:EvaluateRecipe", "evaluate:evaluate", keeps=False),
    "analyze": Verb("config:AnalyzeRecipe", "analyze:analyze"),
    "bench": Verb("config:BenchRecipe", "evaluate:bench", keeps=False),
    "generate": Verb("config:GenerateRecipe", "generate:generate", keeps=False),
    "chat": Verb("config:ChatRecipe", "chat:chat", keeps=False, anew=True),
    "serve": Verb("config:ServeRecipe", "serve:serve", keeps=False, anew=True),
    "report": Verb("config:ReportRecipe", "report:report", keeps=False, artifact="report.html"),
    "study": Verb("config:StudyRecipe", "study:study"),
    "doctor": Verb("config:DoctorRecipe", "doctor:doctor", keeps=False),
}
EXTRAS = {
    **{"transformers": "hf", "lm_eval": "eval", "gguf": "gguf", "pyarrow": "data", "zstandard": "data"},
    **dict.fromkeys(("starlette", "uvicorn", "pydantic", "prometheus_client", "httpx2"), "serve"),
}
"""Packages that only some verbs need, and the extra that brings each."""

OF_A_MODEL = (
    "*config.json",
    "model*.safetensors*",
    "tokenizer*",
    "special_tokens_map.json",
    "halflap.json",
    "lineage.json",
)
"""Files of a checkpoint that no result replaces."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    trace = "--traceback" in words
    try:
        with _terminating():
            return _main(words)
    except KeyboardInterrupt as stop:
        kept = f"; {stop.args[0]} keeps what was done, and the same command goes on from there" if stop.args else ""
        say(f"interrupted{kept}")
        return 130
    except BrokenPipeError:  # the reader of our output has gone: `halflap inspect ... | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except HalflapError as error:
        if trace:
            traceback.print_exc()
        say(str(error))
        return 2 if isinstance(error, RecipeError) else 1
    except Exception as error:
        if trace:
            traceback.print_exc()
        say(unexpected(error))
        return 1


def _main(words: list[str]) -> int:
    from halflap.binding import bind
    from halflap.progress import set_quiet
    from halflap.recipe import SECRETS, settings_of, to_yaml, without_secrets

    warnings.showwarning = _warn
    call = bind({verb: row.recipe for verb, row in VERBS.items()}, words)
    if call is None:
        return 0
    for remark in call.remarks:
        say(remark)
    common = call.recipe.common
    set_quiet(common.quiet)
    if call.control.show:
        settings = settings_of(call.recipe)
        for name in SECRETS:
            if settings.get(name):
                say(f"{name} is a secret and left out here; give it again beside --config")
        settings = without_secrets(settings)
        print(json.dumps(settings) if common.json else to_yaml(call.verb, settings), end="\n" if common.json else "")
        return 0
    try:
        with contextlib.redirect_stdout(sys.stderr):  # whatever a library prints is no result
            result = (
                import_module("halflap.commands.cost").estimate(call.verb, call.recipe)
                if call.control.dry_run
                else execute(call)
            )
    except CheckFailed as failed:
        if common.json:
            print(json.dumps(failed.result, ensure_ascii=False))
        raise
    if common.json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        import_module("halflap.commands.show").show("dry_run" if call.control.dry_run else call.verb, result)
    return 0


def execute(call: Call) -> dict[str, Any]:
    """Follow a recipe and return what `--json` prints."""
    from halflap.commands.resolve import check_inputs
    from halflap.recipe import inputs_of, settings_of
    from halflap.run import Run, open_run

    verb, recipe, row = call.verb, call.recipe, VERBS[call.verb]
    check_inputs(recipe)
    function = _resolve(row.function)
    settings = settings_of(recipe)
    out = recipe.common.out
    file = Path(out) if out and row.artifact and Path(out).suffix == Path(row.artifact).suffix else None
    if not row.keeps and (out is None or file is not None):
        return Run(verb).finish(function(recipe, Run(verb)))
    if file is not None:
        _refuse_overwriting(file, inputs_of(recipe))
        settings["out"] = None
    with open_run(verb, settings, inputs_of(recipe), overwrite=recipe.common.overwrite, anew=row.anew) as run:
        page = run.path / "report.html"
        if run.result is not None:
            say(f"this run is finished: {run.path} holds its result (--overwrite starts it again)")
        else:
            if run.resumed:
                say(f"going on with the interrupted run in {run.path}")
            page.unlink(missing_ok=True)  # of what was here before
            try:
                run.finish(function(recipe, run))
            except KeyboardInterrupt:
                raise KeyboardInterrupt(run.path) from None
            if not out:
                say(f"the run is kept in {run.path}")
        result = run.result or {}
        if "report" not in result and not page.exists():
            import_module("halflap.report.page").build([run.path], page)
        if file is None:
            return result
        _publish(run.path / row.artifact, file)
        return {**result, "path": str(file)}


def _refuse_overwriting(file: Path, inputs: Mapping[str, Sequence[str]]) -> None:
    """Raise HalflapError where --out FILE would replace an input, or weights and settings of one."""
    from halflap.errors import HalflapError

    target = file.resolve()
    for name, values in inputs.items():
        for value in values:
            source = Path(value).resolve()
            part = source in target.parents and target.exists() and any(target.match(own) for own in OF_A_MODEL)
            if target == source or part:
                raise HalflapError(
                    f"out is {str(file)!r}, which is or belongs to the input {name} ({value!r}) and would be replaced; "
                    "give another file with --out"
                )


def _resolve(function: str) -> Callable[..., dict[str, Any]]:
    module, name = function.split(":")
    return getattr(import_module(f"halflap.commands.{module}"), name)


def _publish(artifact: Path, file: Path) -> None:
    """What --out FILE asked for: a copy of the run's artifact."""
    from halflap.files import atomic_write

    with artifact.open("rb") as source, atomic_write(file) as target:
        shutil.copyfileobj(source, target)


def say(sentence: str) -> None:
    """A remark or an error, on standard error."""
    from halflap.progress import tell

    tell(f"halflap: {sentence}")


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"warning: {' '.join(str(message).split())}")


def unexpected(error: Exception) -> str:
    """One sentence for an error that no code of ours foresaw."""
    if isinstance(error, ModuleNotFoundError) and (package := (error.name or "").partition(".")[0]) in EXTRAS:
        return (
            f"the package {package!r} is needed here and is not installed; `pip install 'halflap[{EXTRAS[package]}]'`"
        )
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "t allocate memory" in str(error):
        return "the memory does not suffice; take a smaller batch, shorter rows, or a machine with more"
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        mend = "free some space: " if full else "see to it that the file can be read or written: "
        return f"{error.strerror or error}{where}; {mend}what was written before is whole, and the same command goes on"
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"unexpected {type(error).__name__}: {first}; --traceback shows where, please report it"


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """A polite kill saves what Ctrl-C saves."""

    def stop(_signal: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
