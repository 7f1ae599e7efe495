"""Pieces of text to OpenAI's objects: choices of a whole reply, or chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from halflap.inference.detokenize import REPLACEMENT
from halflap.inference.requests import Piece, Token, TopToken, Usage
from halflap.inference.server.asked import Asked
from halflap.inference.server.tools import ToolCall, ToolParser

READABLE = set(range(0x20, 0x7F)) - {ord("\\")}  # bytes that stand as they are among escaped ones


class Replies(Protocol):
    """How one kind of request is answered; `add` takes the next piece of a choice and gives the chunks it makes."""

    def add(self, choice: int, piece: Piece) -> list[dict[str, Any]]: ...

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]: ...

    def whole(self, usage: dict[str, Any]) -> dict[str, Any]: ...


class _Reply:
    """What the objects of one reply share. `spell` gives the bytes of a token, which its text lacks of a part of a
    character."""

    kind, prefix, chunk_kind = "", "", ""

    def __init__(self, asked: Asked, model: str, spell: Callable[[int], bytes]) -> None:
        self.asked, self._spell = asked, spell
        self._about = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.count = asked.n * len(asked.requests)
        self._written = [0] * self.count  # tokens

    def add(self, choice: int, piece: Piece) -> list[dict[str, Any]]:
        self._written[choice] += len(piece.tokens)
        return self._added(choice, piece)

    def _added(self, choice: int, piece: Piece) -> list[dict[str, Any]]:
        raise NotImplementedError

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        found = {**self._about, "object": self.chunk_kind, "choices": choices}
        if self.asked.running_usage and choices:
            usage = self._so_far(choices[0]["index"])
        return found | {"usage": usage} if self.asked.include_usage else found

    def _so_far(self, choice: int) -> dict[str, Any]:
        prompt, new = len(self.asked.requests[choice // self.asked.n].prompt), self._written[choice]
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def _object(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._about, "object": self.kind, "choices": choices, "usage": usage}


class CompletionReply(_Reply):
    """`text_completion`."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, asked: Asked, model: str, spell: Callable[[int], bytes]) -> None:
        super().__init__(asked, model, spell)
        self._choices = [{"text": [], "index": i, "logprobs": None, "finish_reason": None} for i in range(self.count)]
        self._begun: set[int] = set()

    def _added(self, choice: int, piece: Piece) -> list[dict[str, Any]]:
        text, tokens, prompt = piece.text, piece.tokens, ()
        if choice not in self._begun:
            self._begun.add(choice)
            if self.asked.echo:
                text = self.asked.echo[choice // self.asked.n] + text
                prompt = piece.prompt or ()
        probabilities = self._log_probs(choice, prompt, tokens) if self.asked.logprobs else None
        reason = None if piece.finish_reason is None else _reason(piece)
        if not self.asked.stream:
            self._keep(self._choices[choice], text, probabilities, reason)
            return []
        if not text and reason is None and not prompt and not tokens:
            return []
        change = {"text": text, "index": choice, "logprobs": probabilities, "finish_reason": reason}
        return [self.chunk([change])]

    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self._object([choice | {"text": "".join(choice["text"])} for choice in self._choices], usage)

    def _keep(
        self, whole: dict[str, Any], text: str, probabilities: dict[str, list[Any]] | None, reason: str | None
    ) -> None:
        whole["text"].append(text)
        whole["finish_reason"] = reason or whole["finish_reason"]
        if whole["logprobs"] is None:
            whole["logprobs"] = probabilities
        elif probabilities is not None:
            for name, values in whole["logprobs"].items():  # in place: a reply has as many pieces as tokens
                values += probabilities[name]

    def _log_probs(self, choice: int, prompt: Sequence[Token], reply: Sequence[Token]) -> dict[str, list[Any]]:
        """Lists over tokens; an offset counts the characters of the choice's text before a token."""
        asked, request = self.asked, choice // self.asked.n
        begin = len(asked.echo[request]) if asked.echo else 0
        offsets = [*asked.echo_offsets[request]] if prompt else []
        offsets += [begin + token.offset for token in reply]
        tokens = [*prompt, *reply]
        return {
            "tokens": [self._name(token) for token in tokens],
            "token_logprobs": [token.log_prob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _name(self, token: Token | TopToken) -> str:
        """Its text, or `bytes:\\xf0\\x9f` where that is a part of a character, as OpenAI writes it."""
        if REPLACEMENT not in token.text:
            return token.text
        letters = (chr(byte) if byte in READABLE else f"\\x{byte:02x}" for byte in self._spell(token.id))
        return f"bytes:{''.join(letters)}"

    def _top(self, token: Token) -> dict[str, float] | None:
        """The likeliest tokens and the chosen one, by name; of others that read the same the likelier one counts."""
        if token.log_prob is None:
            return None
        found: dict[str, float] = {}
        for other in token.top:  # the likelier before
            found.setdefault(self._name(other), other.log_prob)
        return found | {self._name(token): token.log_prob}


class ChatReply(_Reply):
    """`chat.completion` and `chat.completion.chunk`."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, asked: Asked, model: str, spell: Callable[[int], bytes]) -> None:
        super().__init__(asked, model, spell)
        form = asked.tool_format
        self._parsers = (
            None
            if form is None
            else [ToolParser(form, asked.tool_names, most=asked.most_calls) for _ in range(self.count)]
        )
        self._text: list[list[str]] = [[] for _ in range(self.count)]  # of a stream its beginning alone
        self._calls: list[list[ToolCall]] = [[] for _ in range(self.count)]
        self._content: list[list[dict[str, Any]]] = [[] for _ in range(self.count)]
        self._reasons: list[str | None] = [None] * self.count
        self._begun: set[int] = set()
        self._started: set[int] = set()  # choices of which some text has come

    def _added(self, choice: int, piece: Piece) -> list[dict[str, Any]]:
        parts = self._parts(choice, piece)
        content = [self._chat_token(token) for token in piece.tokens] if self.asked.logprobs else None
        deltas = [self._delta(choice, part) for part in parts]
        if content is not None:
            if not self.asked.stream:
                self._content[choice] += content
            deltas = deltas or ([{"content": ""}] if content else [])
        chunks = []
        if choice not in self._begun:  # not before there is a token, as clients take this chunk's time for its
            self._begun.add(choice)
            chunks.append(self.chunk([_change(choice, {"role": "assistant", "content": "", "refusal": None})]))
        for delta in deltas:
            change = _change(choice, delta)
            if content is not None:
                change["logprobs"], content = {"content": content, "refusal": None}, []
            chunks.append(self.chunk([change]))
        if piece.finish_reason is not None:
            reason = "tool_calls" if self._calls[choice] and piece.finish_reason == "stop" else _reason(piece)
            self._reasons[choice] = reason
            chunks.append(self.chunk([_change(choice, {}, reason)]))
        return chunks

    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self._object([self._choice(i) for i in range(self.count)], usage)

    def _parts(self, choice: int, piece: Piece) -> list[str | ToolCall]:
        text = piece.text
        if self.asked.trimmed and choice not in self._started:
            text = text.lstrip()
            if text:
                self._started.add(choice)
        if self._parsers is None:
            return [text] if text else []
        parts = list(self._parsers[choice].push(text))
        return parts + list(self._parsers[choice].finish()) if piece.finish_reason is not None else parts

    def _delta(self, choice: int, part: str | ToolCall) -> dict[str, Any]:
        if isinstance(part, str):
            if not (self.asked.stream and self._text[choice]):
                self._text[choice].append(part)
            return {"content": part}
        self._calls[choice].append(part)
        return {"tool_calls": [{"index": len(self._calls[choice]) - 1, **_call(part)}]}

    def _chat_token(self, token: Token) -> dict[str, Any]:
        return {**self._scored(token), "top_logprobs": [self._scored(other) for other in token.top]}

    def _scored(self, token: Token | TopToken) -> dict[str, Any]:
        spelt = self._spell(token.id) if REPLACEMENT in token.text else token.text.encode()
        return {"token": token.text, "logprob": token.log_prob, "bytes": list(spelt)}

    def _choice(self, index: int) -> dict[str, Any]:
        calls = [_call(call) for call in self._calls[index]]
        text = "".join(self._text[index])
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text.strip() or None, "tool_calls": calls}
        found = {"index": index, "message": message, "logprobs": None, "finish_reason": self._reasons[index]}
        if self.asked.logprobs:
            found["logprobs"] = {"content": self._content[index], "refusal": None}
        return found


def _change(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _reason(piece: Piece) -> str:
    """OpenAI's clients know no "cancelled" or "error"; an error has been told before it comes to this."""
    return piece.finish_reason if piece.finish_reason in ("stop", "length") else "stop"


def usage_object(usages: Sequence[Usage]) -> dict[str, Any]:
    """OpenAI's usage of all the engine's requests together."""
    prompt = sum(usage.prompt_tokens for usage in usages)
    new = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
    }
