"""`chat`: a conversation on the terminal. A line is a turn; the reply is shown while it is written."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halflap.commands.config import ChatRecipe
from halflap.commands.engines import Opened, open_engine
from halflap.data.chat import Message
from halflap.errors import HalflapError
from halflap.files import write_json
from halflap.inference.requests import Request, SamplingParams
from halflap.inference.server.prompts import Prompts
from halflap.run import Run

HELP = "/reset forgets the conversation, /system TEXT sets what comes before it, /save FILE writes it, /quit ends"


def chat(recipe: ChatRecipe, run: Run) -> dict[str, Any]:
    """Talk until the prompts or else the input end; returns `text`, `tokens` and `finish_reason` of the last reply, all
    `messages`, and the number of `turns` answered."""
    opened = open_engine(recipe.model, recipe.decoding, recipe.common)
    prompts = Prompts(opened.tokenizer, opened.config)
    output = sys.stdout if recipe.common.json or sys.__stdout__ is None else sys.__stdout__

    def write(text: str) -> None:
        print(text, end="", file=output, flush=True)

    try:
        talk = Conversation(recipe, opened, prompts, write)
        if opened.remark:
            write(f"({opened.remark})\n")
        if not prompts.has_template:
            write("(no chat template: turns are written as plain text of User and Assistant)\n")
        if recipe.prompt:
            for prompt in recipe.prompt:
                talk.answer(prompt)
        else:
            if sys.stdin is not None and sys.stdin.isatty():
                write(f"({HELP}; Ctrl-C ends a reply)\n")
            talk.run()
    finally:
        prompts.close()
        opened.engine.close()
    result = {**talk.last_reply, "turns": talk.turns, "messages": talk.messages}
    return result if recipe.common.json else result | {"shown": True}


class Conversation:
    """The messages so far, and what a line does to them."""

    def __init__(self, recipe: ChatRecipe, opened: Opened, prompts: Prompts, write: Callable[[str], None]) -> None:
        self._recipe, self._opened, self._prompts, self._write = recipe, opened, prompts, write
        self._system = recipe.system
        self._said: list[Message] = []
        self.turns = 0
        self.last_reply: dict[str, Any] = {"text": "", "tokens": [], "finish_reason": None}

    @property
    def messages(self) -> list[Message]:
        system = [{"role": "system", "content": self._system}] if self._system else []
        return system + self._said

    def run(self) -> None:
        """Read lines until they end, `/quit`, or Ctrl-C at the prompt."""
        interactive = sys.stdin is not None and sys.stdin.isatty()
        while True:
            try:
                if interactive:
                    self._write("\n> ")
                line = sys.stdin.readline() if sys.stdin is not None else ""
            except KeyboardInterrupt:
                return
            if not line or line.strip() == "/quit":
                return
            if line.strip():
                try:
                    self._take(line.strip())
                except HalflapError as error:  # a conversation goes on after a mistake
                    self._write(f"({error})\n")

    def _take(self, line: str) -> None:
        if not line.startswith("/"):
            self.answer(line)
            return
        command, _, rest = line.partition(" ")
        if command == "/reset":
            self._said = []
            self._write("(forgotten)\n")
        elif command == "/system":
            self._system, self._said = rest.strip() or None, []
            self._write("(set; the conversation begins anew)\n")
        elif command == "/save":
            if not rest.strip():
                raise HalflapError("/save needs a file: /save talk.json")
            write_json(Path(rest.strip()), {"messages": self.messages})
            self._write(f"(saved to {rest.strip()})\n")
        else:
            self._write(f"({HELP})\n")

    def answer(self, text: str) -> None:
        """Ask the engine; what an interrupted reply has said stays said."""
        turn: list[Message] = [*self._said, {"role": "user", "content": text}]
        system = self.messages[: len(self.messages) - len(self._said)]
        ids = self._prompts.conversation([*system, *turn])
        room = self._opened.max_context - len(ids)
        if room < 1:
            raise HalflapError(
                f"the conversation has {len(ids)} tokens and the context {self._opened.max_context}; /reset it"
            )
        sampling = SamplingParams(
            **dataclasses.asdict(self._recipe.sampling), seed=self._recipe.common.seed + self.turns
        )
        limit = min(room, self._recipe.max_new_tokens)
        stream = self._opened.engine.submit(Request(ids, limit, sampling, self._prompts.stop))
        reply, tokens, reason = "", list[int](), None
        try:
            for piece in stream:
                reply += piece.text
                tokens += [token.id for token in piece.tokens]
                reason = piece.finish_reason or reason
                self._write(piece.text)
        except KeyboardInterrupt:
            stream.cancel()
            reason = "cancelled"
            self._write(" (stopped)")
        self._write("\n")
        if stream.error is not None:
            raise HalflapError(stream.error)
        self._said = [*turn, {"role": "assistant", "content": reply.strip()}]
        self.last_reply = {"text": reply, "tokens": tokens, "finish_reason": reason}
        self.turns += 1
