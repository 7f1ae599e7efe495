"""Conversations and texts to token ids, and back to the bytes of single tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from halflap.data import chat
from halflap.data.chat import Guard, Message
from halflap.data.sandbox import TemplateWorker
from halflap.errors import HalflapError
from halflap.inference.detokenize import offsets
from halflap.inference.generate import encode_prompts
from halflap.inference.server.errors import ApiError
from halflap.inference.server.tools import INSTRUCTIONS, WHOLE, ToolFormat, format_of

if TYPE_CHECKING:
    from halflap.data.tokenizer import Tokenizer
    from halflap.models.config import ModelConfig


class Prompts:
    """A model's way from text to token ids. Blocks for milliseconds: call it from a worker thread."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        self.has_template = tokenizer.chat_template is not None
        self.tokenizer = tokenizer if self.has_template else tokenizer.with_chat_template(chat.PLAIN)
        self.stop = () if self.has_template else chat.PLAIN_STOP
        self.tool_format: ToolFormat = format_of(self.tokenizer.chat_template or "")
        if self._vanishes(self.tool_format.opening):  # what is left of a call is its JSON
            self.tool_format = WHOLE
        self._config = config
        self._worker = TemplateWorker()

    def close(self) -> None:
        self._worker.close()

    def text(self, prompt: str | Sequence[int], most: int | None = None) -> tuple[int, ...]:
        """Ids of a text as the model was trained to begin one; ids are checked. Raises HalflapError.

        most: tokens that there is room for. Raises ApiError for a text that cannot be so few, before it is encoded;
        one that has more after all is given back.
        """
        if isinstance(prompt, str):
            self._require_room(prompt, most)
        return tuple(encode_prompts([prompt], self._config, self.tokenizer)[0])

    def continuation(
        self, context: str | Sequence[int], continuation: str | Sequence[int], most: int | None = None
    ) -> tuple[tuple[int, ...], int]:
        """Ids of a context and what follows it, and how many of the first are the context's: at least one.

        Two texts are encoded together, and the continuation's are the tokens from the first one on that the context
        alone does not have. Raises HalflapError when no token is left for it, and for `most` as `text` does.
        """
        if isinstance(context, str) and isinstance(continuation, str):
            whole, alone = self.text(context + continuation, most), self.text(context, most)
            shared = next((i for i, (a, b) in enumerate(zip(whole, alone)) if a != b), min(len(whole), len(alone)))
        else:
            alone, more = self.text(context, most), self._ids(continuation, most)
            whole, shared = alone + more, len(alone)
        if shared == 0:  # start where a document starts
            start = self.text("")
            whole, shared = start + whole, len(start)
        if shared >= len(whole):
            raise HalflapError("a continuation has no token of its own; give it at least one character")
        return whole, shared

    def conversation(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), most: int | None = None
    ) -> tuple[int, ...]:
        """Ids of a conversation up to where the assistant's reply begins.

        Raises HalflapError, and for `most` as `text` does.
        """

        def render(*given: Any, **named: Any) -> str:
            text = self._worker.render(*given, **named)
            self._require_room(Guard.SIGN.sub("", text), most)
            return text

        plain = [dict(message) for message in messages]
        variables: dict[str, Any] = {}
        if tools:
            if "tools" in (self.tokenizer.chat_template or ""):
                variables["tools"] = list(tools)
            else:
                listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
                plain = _instructed(plain, INSTRUCTIONS.format(tools=listed))
        ids = self.tokenizer.encode_chat(plain, render=render, **variables)
        return tuple(encode_prompts([ids], self._config, self.tokenizer)[0])

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def offsets(self, ids: Sequence[int], text: str) -> list[int]:
        """Where in a prompt's text each of its tokens begins."""
        return offsets(self.tokenizer, ids, text)

    def _vanishes(self, mark: str) -> bool:
        """Whether a text is a special token, which replies come without."""
        return not self.tokenizer.decode(self.tokenizer.encode(mark), skip_special_tokens=True)

    def _ids(self, text: str | Sequence[int], most: int | None) -> tuple[int, ...]:
        if not isinstance(text, str):
            return self.text(text)
        self._require_room(text, most)
        return tuple(self.tokenizer.encode(text))

    def _require_room(self, text: str, most: int | None) -> None:
        longest = self.tokenizer.longest_token
        if most is None or longest is None or (size := len(text.encode(errors="replace"))) <= most * longest:
            return
        least = -(-size // longest)
        message = f"the prompt has {least} tokens or more; the context has {most}: shorten the prompt"
        raise ApiError(400, message, code="context_length_exceeded")


def _instructed(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The conversation with `text` at the end of its system message."""
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
