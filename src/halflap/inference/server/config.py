"""What a server allows: names, keys and limits. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from halflap.errors import HalflapError


@dataclass(frozen=True)
class ServerSettings:
    """Limits of a server.

    name: the model's id. max_context: tokens of a prompt and its reply. choices: replies at once, running and waiting
    together; more are told to come again. body_bytes, seconds: of one request. grace: seconds that running requests get
    when the server is told to stop. keys: one of them must come with a request; none: anybody may ask. origins: of web
    pages that may ask beside the server's own, as browsers send them (scheme, host and port); "*" is all.
    """

    name: str
    max_context: int
    choices: int = 80
    body_bytes: int = 8 << 20
    seconds: float = 600.0
    grace: float = 30.0
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_context", "choices", "body_bytes", "seconds"):
            if not getattr(self, name) > 0:
                raise HalflapError(
                    f"{name} of the server is {getattr(self, name)}; it must be above 0: raise the limit"
                )
