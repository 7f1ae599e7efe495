"""Ctrl-C and SIGTERM as a request that the loop answers at a safe place; a second Ctrl-C stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from halflap.progress import is_quiet


class Interrupts:
    """While open in the main thread, SIGINT and SIGTERM set `requested` instead of raising."""

    def __init__(self) -> None:
        self.requested = False
        self.signal = signal.SIGINT
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested, self.signal = True, signal.Signals(number)
        if not is_quiet():
            print("\nstopping: saving the training state (again to stop at once)", file=sys.stderr, flush=True)

    def reason(self) -> BaseException:
        """What to raise after saving: KeyboardInterrupt, or the exit status of a terminated process."""
        return SystemExit(128 + signal.SIGTERM) if self.signal == signal.SIGTERM else KeyboardInterrupt()
