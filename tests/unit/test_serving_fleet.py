"""`serve --replicas` and `serve --engine vllm` from the command line, with a stand-in for vLLM."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install -e '.[serve]'")

Cli = Callable[..., Any]
FAKE = """#!{python}
import argparse, json, os, socketserver, sys, time
from http.server import BaseHTTPRequestHandler
parser = argparse.ArgumentParser(prog="vllm")
parser.add_argument("verb", choices=["serve"])
parser.add_argument("directory")
for flag in ("uds", "served-model-name", "max-model-len", "max-num-seqs", "dtype", "tensor-parallel-size",
             "pipeline-parallel-size", "uvicorn-log-level", "chat-template", "tool-call-parser", "fail", "sleep"):
    parser.add_argument("--" + flag)
parser.add_argument("--no-enable-prefix-caching", action="store_true")
given = parser.parse_args()
if given.sleep:
    time.sleep(float(given.sleep))
if given.fail:
    print("loading ...")
    sys.exit("ValueError: " + given.fail)

class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

class Handler(BaseHTTPRequestHandler):
    def address_string(self):
        return ""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply(b'vllm:num_requests_running{{model_name="m"}} 0.0' if self.path == "/metrics" else b"")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body.get("prompt") == "die":
            os._exit(7)
        self.reply(json.dumps({{"pid": os.getpid(), "asked": body, "dtype": given.dtype}}).encode())

    def reply(self, content):
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

print("INFO ready", flush=True)
Server(given.uds, Handler).serve_forever()
"""


def write(directory: Path) -> Path:
    from halflap.checkpoints.checkpoint import save_model
    from halflap.data.tokenizer import train_tokenizer
    from halflap.models.model import HybridModel, initialize
    from halflap.models.presets import preset

    tokenizer = train_tokenizer(["the cat sat on the mat"] * 4, 280, progress=False)
    config = dataclasses.replace(
        preset("nemotron-h-tiny"), vocab_size=tokenizer.vocab_size, max_position_embeddings=128, eos_token_id=2
    )
    model = HybridModel(config)
    initialize(model, seed=0)
    save_model(model, directory)
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models") / "little")


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = tmp_path_factory.mktemp("bin") / "vllm"
    script.write_text(FAKE.format(python=sys.executable))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def post(url: str, path: str, **body: Any) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json", "Authorization": "Bearer k"}
    request = urllib.request.Request(f"{url}/v1/{path}", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_vllm_behind_the_front(halflap: Cli, directory: Path, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM reaches the main thread, which serves; another asks, ends vLLM, asks again and then sends it."""
    from halflap.inference.front import replica
    from halflap.inference.server import run as server

    monkeypatch.setattr(replica, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(replica, "STARTING", 0.05)
    seen: list[Any] = []
    plain = server.listen

    def listen(host: str, port: int) -> Any:
        listener = plain(host, port)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        threading.Thread(target=ask, args=(url,), daemon=True).start()
        return listener

    def until(url: str) -> None:
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"{url}/health"):
                    return
            except OSError:
                time.sleep(0.05)

    def ask(url: str) -> None:
        try:
            until(url)
            seen.append(post(url, "chat/completions", messages=[{"role": "user", "content": "hi"}]))
            seen.append(post(url, "completions", prompt="die"))
            time.sleep(0.05)
            until(url)
            seen.append(post(url, "completions", prompt="hi"))
            with urllib.request.urlopen(f"{url}/metrics") as reply:
                seen.append(reply.read().decode())
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("halflap.commands.serve.listen", listen)
    words = ("--engine", "vllm", "--vllm-command", fake, "--port", "0", "--api-key", "k", "--device", "cpu", "--json")
    result = halflap("serve", directory, *words)
    assert result.json == {**result.json, "model": "little", "replicas": 1, "requests": 3}
    (first, chat), (died, error), (last, text), metrics = seen
    assert first == last == 200 and died == 503 and error["error"]["code"] == "replica_lost"
    assert chat["asked"]["stop"] == ["\n\nUser:", "\n\nSystem:"] and "stop" not in text["asked"]
    assert chat["dtype"] == "float32" and chat["pid"] != text["pid"]
    assert 'vllm:num_requests_running{model_name="m",replica="0"}' in metrics
    assert "vLLM 0: INFO ready" in result.err and "vLLM 0 ended with status 7; it is started again" in result.err


def test_what_vllm_said_last(halflap: Cli, directory: Path, fake: Path) -> None:
    words = ("serve", directory, "--engine", "vllm", "--vllm-command", fake, "--port", "0")
    result = halflap(*words, "--engine-args", "--fail 'no such quantization'")
    assert result.status == 1 and result.err.endswith("loading ...\n    ValueError: no such quantization\n")
    assert "vLLM 0 ended with status 1 before it could answer; the last it said:" in result.err
    result = halflap(*words, "--engine-args=--unknown 3")
    assert result.status == 1 and "unrecognized arguments: --unknown 3" in result.err


def test_told_to_stop_while_it_starts(halflap: Cli, directory: Path, fake: Path) -> None:
    words = ("serve", directory, "--engine", "vllm", "--vllm-command", fake, "--port", "0", "--engine-args=--sleep 60")
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert halflap(*words).status == 130


def test_dry_runs_show_the_command(halflap: Cli, directory: Path) -> None:
    words = ("serve", directory, "--engine", "vllm", "--dry-run", "--json")
    command = halflap(*words, "--vllm-command", "/opt/vllm", "--max-context", "64").json["command"]
    assert f"/opt/vllm serve {directory} --uds" in command and "--max-model-len 64" in command
    ray = halflap(*words, "--ray", "head:6379", "--tensor-parallel", "2", "--replicas", "3", "--engine-args", "--x y")
    assert ray.json["memory_bytes"] == 3 * halflap(*words).json["memory_bytes"]
    command = ray.json["command"]
    assert "RAY_ADDRESS=head:6379" in command and "--distributed-executor-backend ray" in command
    assert command.rstrip().endswith("--x y") and "--tensor-parallel-size 2" in command


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--tensor-parallel", "2"), 2, "add --engine vllm"),
        (("--engine", "vllm", "--speculate", "lookup"), 2, "which is halflap's"),
        (("--engine", "vllm", "--engine-args", "'"), 2, "close its quotes"),
        (("--engine", "vllm", "--engine-args", "--port 3"), 1, "the front's to choose"),
        (("--engine", "vllm", "--vllm-command", "/no/vllm"), 1, "'/no/vllm' cannot be run; install it"),
        (("--engine", "vllm", "--tensor-parallel", "7"), 1, "cannot be divided by --tensor-parallel 7"),
        (("--replicas", "1000000"), 1, "1000000 times over, for 1000000 replicas, and"),
        (("--replicas", "0"), 2, "at least 1"),
        (("--uds", "/no/such/folder/socket"), 1, "choose another path"),
    ],
)
def test_mistakes_are_one_sentence(
    halflap: Cli, directory: Path, words: tuple[str, ...], status: int, said: str
) -> None:
    result = halflap("serve", directory, "--port", "0", "--device", "cpu", *words)
    assert result.status == status and said in result.err and result.err.count("\n") == 1


def test_sockets_that_were_left_behind_are_replaced(tmp_path: Path) -> None:
    from halflap.errors import HalflapError
    from halflap.inference.server.run import address_of, listen_unix

    path = tmp_path / "s"
    listen_unix(str(path)).close()
    assert path.is_socket()
    with listen_unix(str(path)) as listener:
        listener.listen()
        assert address_of(listener) == f"unix:{path}"
        with pytest.raises(HalflapError, match="choose another path"):
            listen_unix(str(path))
    path.unlink()
    path.write_text("somebody's")
    with pytest.raises(HalflapError, match="choose another path"):
        listen_unix(str(path))
    assert path.read_text() == "somebody's"


def test_replicas_of_our_own(directory: Path, tmp_path: Path) -> None:
    """Two processes serve; one is killed while the other answers; the polite end leaves nobody behind."""
    words = ["--replicas", "2", "--port", "0", "--api-key", "k", "--prefix-cache", "1MiB", "--grace", "5s"]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "TMPDIR": "/tmp"}
    process = subprocess.Popen(
        [sys.executable, "-m", "halflap", "serve", str(directory), *words],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stderr is not None
    url, text = "", ""
    try:
        for line in process.stderr:
            text += line
            if found := re.search(r"little is at (http://127\.0\.0\.1:\d+)", line):
                url = found[1]
                break
        assert url, text
        talk = [{"role": "user", "content": "the cat"}]
        body = {"messages": talk, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        first = post(url, "chat/completions", **body)
        assert first[0] == 200 and first[1]["usage"]["completion_tokens"] == 4
        second = post(url, "chat/completions", **body)  # the same replica, whose cache has the prompt
        assert second[1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        folder = re.search(r"unix:(\S+)/0\.sock", text)
        assert folder and stat.S_IMODE(Path(folder[1]).stat().st_mode) == 0o700
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if children.exists():
            before = [int(number) for number in children.read_text().split()]
            os.kill(before[0], signal.SIGKILL)
            while post(url, "completions", prompt="gone?", max_tokens=1)[0] != 200:
                pass  # one request may have been on its way there
            for number in range(4):
                assert post(url, "completions", prompt=f"{number}", max_tokens=1)[0] == 200
    finally:
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=30)[1]
    assert process.returncode == 0, rest
    assert folder and not Path(folder[1]).exists()


def test_replicas_share_what_memory_is_free(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would else count all of it as its own when it starts."""
    from halflap.amounts import parse_amount
    from halflap.commands import device
    from halflap.commands.config import ServeRecipe
    from halflap.commands.fleet import fleet
    from halflap.commands.sections import Decoding, Listening
    from halflap.recipe import Common

    monkeypatch.setattr(device, "free_memory", lambda _: 1 << 28)
    decoding, listening = Decoding(prefix_cache="1MiB", max_context=200), Listening(replicas=3)
    recipe = ServeRecipe(model=str(directory), decoding=decoding, listening=listening, common=Common(device="cpu"))
    built: list[bool] = []
    monkeypatch.setattr("halflap.ops.select.native_is_on", lambda: built.append(True))
    fleet(recipe, tmp_path)
    assert built == [True]  # before any replica is there to build the kernels, too
    told = [re.search(r"cache_memory: '?(\w+)", (tmp_path / f"{i}.yaml").read_text()) for i in range(3)]
    sizes = [parse_amount(found[1], "bytes", share=False).value for found in told if found]
    assert len(sizes) == 3 and 0.7 * (1 << 28) < sum(sizes) < 1 << 28
