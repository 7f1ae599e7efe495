"""Chat templates: messages to the text a model was trained on.

Templates come with checkpoints and are other people's code, so they run in jinja2's sandbox. The environment is the
one of Hugging Face's `apply_chat_template` (trimmed blocks, loop controls, `raise_exception`, `strftime_now`, a
`tojson` that escapes nothing, and `{% generation %}` blocks, which only mark the assistant's text). The sandbox
keeps a template from reading what it was not given; `data/sandbox.py` bounds its time and memory, too.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from halflap.errors import HalflapError

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]
MOST_CHARACTERS = 32_000_000  # of a rendered conversation: more than any model reads

PLAIN = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For models that come without a template; a reply ends where its writer would go on as the user."""
PLAIN_STOP = ("\n\nUser:", "\n\nSystem:")


def render(template: str, messages: Sequence[Message], **variables: object) -> str:
    """The text of a conversation under a jinja2 chat template.

    `variables` are what the template may ask for: `add_generation_prompt`, `bos_token`, `tools`, ...
    Raises HalflapError when the template is broken or refuses the messages.
    """
    for message in messages:
        if "role" not in message or "content" not in message:
            raise HalflapError(f"chat message {dict(message)!r} lacks a role or content; each message needs both")
    parts, length = [], 0
    try:
        for part in _compiled(template).generate(messages=list(messages), **variables):
            parts.append(part)
            length += len(part)
            if length > MOST_CHARACTERS:
                raise ValueError(f"it writes more than {MOST_CHARACTERS} characters")
    except Exception as error:  # a template is a program of somebody else's: it may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise HalflapError(
            f"the chat template refuses these messages: {reason}; change the messages or the template"
        ) from error
    return "".join(parts)


@dataclass(frozen=True)
class Guard:
    """Keeps what users and tools write from passing for the marks of turns, which are special tokens.

    Special tokens in their texts travel through the template as two characters of private use around a number. System
    messages are the operator's and the assistant's texts the model's own, in which templates look for marks.
    """

    special: tuple[str, ...]

    FROM: ClassVar[frozenset[str]] = frozenset({"user", "tool", "function"})
    SIGN: ClassVar[re.Pattern[str]] = re.compile("\U0010fffc([0-9]+)\U0010fffd")

    def hide(self, messages: Sequence[Message]) -> list[Message]:
        """The same messages with special tokens in the texts of users and tools hidden."""
        if not self.special:
            return list(messages)
        longest_first = sorted(self.special, key=len, reverse=True)
        found = re.compile("|".join(map(re.escape, longest_first)))

        def hidden(match: re.Match[str]) -> str:
            return f"\U0010fffc{self.special.index(match[0])}\U0010fffd"

        def guarded(message: Message) -> Message:
            foreign = message.get("role") in self.FROM and isinstance(message.get("content"), str)
            return {**message, "content": found.sub(hidden, message["content"])} if foreign else message

        return [guarded(message) for message in messages]

    def pieces(self, text: str) -> list[tuple[str, bool]]:
        """A rendered text in pieces; True where special tokens are to be read as plain text."""
        pieces, place = [], 0
        for sign in self.SIGN.finditer(text):
            if int(sign[1]) < len(self.special):
                pieces += [(text[place : sign.start()], False), (self.special[int(sign[1])], True)]
                place = sign.end()
        pieces.append((text[place:], False))
        return [piece for piece in pieces if piece[0]]


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
