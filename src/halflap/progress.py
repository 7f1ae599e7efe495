"""Progress of long work: a bar with the time left on a terminal, else a line on standard error now and then.

Standard output is never written to. `set_quiet(True)` (the command line's `--quiet`) silences everything here;
ranks other than 0 of a distributed run call it too. `rich` is imported only when a bar is really shown.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0
_quiet = False
_bars: list[Any] = []  # the rich display, once for each Progress that shows in it: a terminal has room for one


def set_quiet(value: bool) -> None:
    """Silence (or restore) all progress of this process."""
    global _quiet
    _quiet = value


def is_quiet() -> bool:
    return _quiet


def say(line: str) -> None:
    """A line on standard error that is no measure of progress but is to be known; silenced with it."""
    if not _quiet:
        tell(line)


def tell(line: str, stream: TextIO | None = None) -> None:
    """Print a line, on standard error by default; where its reader has gone (`| head`) work goes on in silence."""
    wanted = sys.stderr if stream is None else stream
    try:
        print(line, file=wanted, flush=True)
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), wanted.fileno())


class Progress:
    """How far one piece of work is; use as `with Progress("train", total=steps) as progress: progress.advance()`.

    `total` is in `unit`s and may be None when unknown. `note(loss="2.31")` shows a few values beside the count.
    """

    def __init__(
        self,
        what: str,
        total: float | None = None,
        *,
        unit: str = "",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, 0.0
        self._stream = stream or sys.stderr
        self._clock = clock
        self._notes: dict[str, str] = {}
        self._bar: Any = None
        self._task: Any = None
        self._started = self._last_line = clock()
        self._initial = 0.0
        self._printed = False

    def __enter__(self) -> Progress:
        self._started = self._last_line = self._clock()
        if not _quiet and self._stream.isatty():
            self._bar = _open_bar(self._stream)
            self._task = self._bar.add_task(self.what, total=self.total, state="")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._draw()
            _close_bar(self._bar, self._task)
        elif self._printed and not _quiet and kind is None:
            self._print(f"{self.what}: {self._amount()} done in {duration(self._clock() - self._started)}")

    def start_at(self, done: float) -> None:
        """Count `done` as finished earlier (a resumed run), so that it does not enter the speed."""
        self._initial = self.done = done

    def advance(self, amount: float = 1) -> None:
        """Add `amount` finished units."""
        self.done += amount
        if _quiet:
            return
        if self._bar is not None:
            self._draw()
        elif self._clock() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = self._clock()
            self._print(f"{self.what}: {', '.join(self._parts())}")

    def note(self, **values: object) -> None:
        """Show these values beside the count from the next update on."""
        self._notes |= {name: str(value) for name, value in values.items()}

    def seconds_left(self) -> float | None:
        """Estimated from the mean speed so far; None while nothing is known."""
        finished = self.done - self._initial
        if not self.total or finished <= 0:
            return None
        return max(0.0, (self.total - self.done) * (self._clock() - self._started) / finished)

    def _amount(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return f"{short(self.done)}{unit}" if self.total is None else f"{short(self.done)}/{short(self.total)}{unit}"

    def _parts(self) -> list[str]:
        left = self.seconds_left()
        parts = [self._amount(), *(f"{name} {value}" for name, value in self._notes.items())]
        return parts if left is None else [*parts, f"{duration(left)} left"]

    def _draw(self) -> None:
        self._bar.update(self._task, completed=self.done, state=", ".join(self._parts()))

    def _print(self, line: str) -> None:
        self._printed = True
        tell(line, self._stream)


def track(
    iterable: Iterable[T], what: str, total: float | None = None, *, unit: str = "", passed: int = 0
) -> Iterator[T]:
    """Yield the items of `iterable`, showing how many are done; `total` defaults to its length if it has one.

    The first `passed` items were finished earlier: they count as done, and not in the time that is left.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Progress(what, total, unit=unit) as progress:
        progress.start_at(passed)
        for place, item in enumerate(iterable):
            yield item
            if place >= passed:
                progress.advance()


def duration(seconds: float) -> str:
    """Seconds as people say them: `42s`, `3m05s`, `2h07m`."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def short(amount: float) -> str:
    """A count in three or four digits: `950`, `12.3K`, `4.3B`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "K")):
        if amount >= size:
            return f"{amount / min(size, 1e3 if letter == 'K' else size):.3g}{letter}"
    return f"{amount:g}"


def _open_bar(stream: TextIO) -> Any:
    bar = _bars[-1] if _bars else _rich_bar(stream)
    _bars.append(bar)
    bar.start()
    return bar


def _close_bar(bar: Any, task: Any) -> None:
    _bars.pop()
    if _bars:
        bar.remove_task(task)  # an inner piece of work goes when it is done
    else:
        bar.stop()


def _rich_bar(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        console=Console(file=stream),
    )
