"""The stream of one request: filled by the engine's thread, read by any other, or by an event loop.

Pieces wait in memory until they are read, at most one a new token, so a slow reader holds up nobody. No torch.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from halflap.errors import HalflapError
from halflap.inference.requests import Piece, Request, Usage


class Stream:
    """Iterate for pieces, once, with `for` or `async for`; ends when every choice has a finish_reason.

    `usage` is set from the end on (`at_end` hears of it), `error` (a sentence) if the engine failed, in which case the
    last pieces say "error". `cancel()` may come from any thread and more than once.
    """

    def __init__(self, request: Request, wake: Callable[[], None] = lambda: None) -> None:
        self.request = request
        self.usage: Usage | None = None
        self.error: str | None = None
        self.cancelled = False
        self._wake = wake  # tells the engine that something changed
        self._pieces: deque[Piece] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._at_end: list[Callable[[Usage], None]] = []
        self._listener: Callable[[], None] | None = None

    # ---- for the reader

    def cancel(self) -> None:
        """Ask the engine to stop; unfinished choices end with "cancelled" and their slots are free again."""
        self.cancelled = True
        self._wake()

    def at_end(self, hear: Callable[[Usage], None]) -> None:
        """Call `hear` with the usage when the request ends, cancelled or not: from the engine's thread, or at once."""
        with self._changed:
            if self.usage is None:
                self._at_end.append(hear)
                return
        hear(self.usage)

    def __iter__(self) -> Iterator[Piece]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pieces or self._ended)
                if not self._pieces:
                    return
                piece = self._pieces.popleft()
            yield piece

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """The same on an event loop; leaving early (the reader is cancelled) cancels the request."""
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(news.set)

        with self._changed:
            self._listener = tell
        try:
            while True:
                news.clear()
                while (piece := self._next()) is not None:
                    yield piece
                if self.ended:
                    return
                await news.wait()
        finally:
            if not self.ended:
                self.cancel()

    @property
    def ended(self) -> bool:
        """Whether everything has come and has been read."""
        with self._changed:
            return self._ended and not self._pieces

    def result(self) -> list[Piece]:
        """Wait for the end; one piece a choice with everything in it. Raises HalflapError if the engine failed."""
        parts: dict[int, list[Piece]] = {}
        for piece in self:
            parts.setdefault(piece.choice, []).append(piece)
        if self.error is not None:
            raise HalflapError(self.error)
        return [joined(parts[choice]) for choice in sorted(parts)]

    def _next(self) -> Piece | None:
        with self._changed:
            return self._pieces.popleft() if self._pieces else None

    # ---- for the engine

    def put(self, piece: Piece) -> None:
        with self._changed:
            self._pieces.append(piece)
            self._tell()

    def end(self, usage: Usage, error: str | None = None) -> None:
        with self._changed:
            self.usage, self.error = usage, error
        for hear in self._at_end:  # before its reader, who may look at what they counted
            hear(usage)
        with self._changed:
            self._ended = True
            self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        if self._listener is not None:
            self._listener()


def joined(pieces: list[Piece]) -> Piece:
    """All pieces of one choice as one."""
    return Piece(
        pieces[0].choice,
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.tokens),
        pieces[-1].finish_reason,
        pieces[0].prompt,
    )
