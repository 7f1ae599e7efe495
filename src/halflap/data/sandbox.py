"""Chat templates in a process of their own, with bounds on time and memory.

jinja2's sandbox keeps a template from reading what it should not; only the system can stop one that loops for ever or
asks for all memory. The process lives on between conversations, costs a fraction of a millisecond each, and is ended
and started anew when a template goes too far. Both ends speak JSON, one object a line.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Sequence

from halflap.data import chat
from halflap.errors import HalflapError
from halflap.processes import python_command

SECONDS = 5.0
MEMORY = 1 << 30  # bytes of address space, the interpreter's own included


class TemplateWorker:
    """`render` as chat.render does, from any thread, one conversation at a time; `close()` ends the process.

    A template that takes more than `seconds` or `memory` bytes is refused like one that raises.
    """

    def __init__(self, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        self._seconds, self._memory = seconds, memory
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def render(self, template: str, messages: Sequence[chat.Message], **variables: object) -> str:
        """The text of a conversation; everything given must be plain JSON values. Raises HalflapError."""
        try:
            question = json.dumps({"template": template, "messages": list(messages), "variables": variables})
        except RecursionError:
            raise HalflapError("the conversation is nested too deep (in the arguments of a call); flatten it") from None
        with self._lock:
            answer = self._ask(question)
        if answer is None:
            raise HalflapError(
                f"the chat template was stopped after {self._seconds:g} seconds or {self._memory / 2**20:.0f} MiB of "
                "memory; change the messages or the template"
            )
        found = json.loads(answer)
        if "error" in found:
            raise HalflapError(found["error"])
        return found["text"]

    def close(self) -> None:
        with self._lock:
            self._end()

    def _ask(self, question: str) -> str | None:
        """The line that comes back, or None when the process had to be ended."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        alarm = threading.Timer(self._seconds, process.kill)
        try:
            process.stdin.write(question + "\n")
            process.stdin.flush()
            answer = process.stdout.readline(1) or ""  # the clock starts when it has begun to work
            alarm.start()
            answer = process.stdout.readline()
        except OSError:  # it died while it was written to
            answer = ""
        finally:
            alarm.cancel()
        if not answer.endswith("\n"):
            self._end()
            return None
        return answer

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            command = [*python_command(), "-m", "halflap.data.sandbox", str(self._memory)]
            pipe = subprocess.PIPE
            # A session of its own: Ctrl-C on the terminal is not meant for it.
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, text=True, encoding="utf-8", start_new_session=True
            )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what was not written went down with the process
                pipe.close()


def work(memory: int) -> None:
    """Answer questions on standard input until it ends."""
    _limit_memory(memory)
    for line in sys.stdin:
        print(end=">", flush=True)
        question = json.loads(line)
        try:
            answer = {"text": chat.render(question["template"], question["messages"], **question["variables"])}
        except HalflapError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


def _limit_memory(size: int) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limit: there the clock alone watches
        return
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


if __name__ == "__main__":
    work(int(sys.argv[1]))
