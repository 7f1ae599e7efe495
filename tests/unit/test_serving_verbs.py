"""`chat` and `serve` from the command line: conversations, their commands, and what is refused before loading."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import halflap as api
from halflap.data.tokenizer import train_tokenizer
from halflap.errors import HalflapError

Cli = Callable[..., Any]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import dataclasses

    from halflap.checkpoints.checkpoint import save_model
    from halflap.models.model import HybridModel, initialize
    from halflap.models.presets import preset

    tokenizer = train_tokenizer(["the cat sat on the mat"] * 4, 280, progress=False).with_chat_template(TEMPLATE)
    model = HybridModel(dataclasses.replace(preset("nemotron-h-tiny"), vocab_size=tokenizer.vocab_size))
    initialize(model, seed=0)
    directory = tmp_path_factory.mktemp("models") / "little"
    save_model(model, directory)
    tokenizer.save(directory)
    return directory


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))


def test_chat_keeps_the_conversation(
    halflap: Cli, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "talk.json"
    words = ("chat", directory, "--max-new-tokens", "6", "--prefix-cache", "off", "--seed", "1", "--json")
    typed(
        monkeypatch, "the cat", "", "/system be brief", "sat on", "the mat", f"/save {saved}", "/help", "/save", "/quit"
    )
    result = halflap(*words)
    roles = [message["role"] for message in result.json["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"] and result.json["turns"] == 3
    assert json.loads(saved.read_text())["messages"] == result.json["messages"]
    assert "/reset forgets" in result.err and "/save needs a file" in result.err
    assert result.json["messages"][2]["content"] in result.err
    typed(monkeypatch, "the cat", "/reset", "sat")
    assert [message["role"] for message in halflap(*words).json["messages"]] == ["user", "assistant"]


def test_prompts_are_turns_and_the_last_reply_is_the_result(
    halflap: Cli, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--max-new-tokens", "5", "--temperature", "0", "--json")
    typed(monkeypatch, "the cat", "sat on")
    spoken = halflap("chat", directory, *words).json
    typed(monkeypatch, "not read")
    given = halflap("chat", directory, "--prompt", "the cat", "sat on", *words).json
    assert given == spoken and given["turns"] == 2
    assert given["messages"][-1]["content"] == given["text"].strip()
    assert 0 < len(given["tokens"]) <= 5 and given["finish_reason"] in ("length", "stop")
    called = api.chat(str(directory), prompt="the cat", max_new_tokens=5, temperature=0)
    assert called["messages"] == given["messages"][:2] and called["text"]


def test_a_kept_conversation_can_be_held_again(
    halflap: Cli, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("chat", directory, "--max-new-tokens", "2", "--json", "--out", tmp_path / "talk")
    for line in ("the cat", "sat on"):
        typed(monkeypatch, line)
        assert halflap(*words).json["messages"][0]["content"] == line


def test_ctrl_c_ends_the_reply_and_not_the_conversation(
    halflap: Cli, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halflap.inference.stream import Stream

    plain, interrupted = Stream.__iter__, []

    def once(stream: Stream) -> Any:
        for number, piece in enumerate(plain(stream)):
            if number == 2 and not interrupted:
                interrupted.append(stream)
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(Stream, "__iter__", once)
    typed(monkeypatch, "the cat", "sat")
    result = halflap("chat", directory, "--max-new-tokens", "50", "--json")
    assert interrupted[0].cancelled and "(stopped)" in result.err
    assert [message["role"] for message in result.json["messages"]] == ["user", "assistant"] * 2


@pytest.mark.parametrize("guesser", ["lookup", "itself"])
def test_guessing_leaves_text_as_it_is(
    halflap: Cli, directory: Path, monkeypatch: pytest.MonkeyPatch, guesser: str
) -> None:
    words = ("chat", directory, "--max-new-tokens", "24", "--temperature", "0", "--json")
    typed(monkeypatch, "the cat sat on the mat")
    plain = halflap(*words).json
    typed(monkeypatch, "the cat sat on the mat")
    guessed = halflap(*words, "--speculate", directory if guesser == "itself" else guesser)
    assert guessed.json == plain


def test_a_conversation_that_is_too_long_is_said(
    halflap: Cli, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, "the cat sat on the mat " * 20, "the")
    result = halflap("chat", directory, "--max-context", "60", "--max-new-tokens", "4", "--json")
    assert "/reset it" in result.err and result.json["turns"] == 1


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--prefix-cache", "much"), 2, "prefix_cache"),
        (("--speculate", "sideways"), 2, "allowed are off, lookup"),
        (("--api-key", " "), 2, "api_key is empty"),
        (("--port", "99999999"), 1, "choose another port"),
        (("--prefix-cache", "900TiB"), 1, "the prefix cache"),
        (("--cache-memory", "12"), 2, "bytes with their unit"),
        (("--prot", "1"), 2, "--port"),
        (("--queue", "-5"), 2, "at least 0"),
        (("--allow-origin", "https://a.example/"), 2, "as browsers send it, such as https://app.example"),
        (("--max-time", "0s"), 2, "max_time is 0.0; it must be above 0: correct --max-time"),
    ],
)
def test_mistakes_are_one_sentence(
    halflap: Cli, directory: Path, words: tuple[str, ...], status: int, said: str
) -> None:
    result = (
        halflap("serve", directory, "--port", "0", *words)
        if "--port" not in words
        else halflap("serve", directory, *words)
    )
    assert result.status == status and said in result.err and result.err.count("\n") == 1


def test_a_context_beyond_the_positions_is_refused(halflap: Cli, directory: Path, tmp_path: Path) -> None:
    """Else every reply without a length of its own would be asked for more than the model can do."""
    import dataclasses

    from halflap.checkpoints.checkpoint import save_model
    from halflap.models.model import HybridModel
    from halflap.models.presets import preset

    save_model(HybridModel(dataclasses.replace(preset("llama-tiny"), vocab_size=280)), tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    result = halflap("serve", tmp_path / "llama", "--port", "0", "--max-context", "1000000")
    assert result.status == 1 and "--max-context needs 1000000 positions" in result.err


def test_the_context_is_what_the_cache_memory_holds(
    halflap: Cli, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every reply without a length of its own would be refused."""
    pattern = (
        r"takes [\d,]+ bytes of cache and --cache-memory is 65,536, so a prompt and its reply may have [\d,]+ tokens"
    )
    typed(monkeypatch, "the cat")
    words = ("chat", directory, "--cache-memory", "64KiB", "--max-new-tokens", "9999")
    result = halflap(*words, "--json")
    assert result.json["turns"] == 1 and re.search(pattern, result.err), result.err
    asked = halflap(*words, "--max-context", "100000")
    assert asked.status == 1 and "give more memory, or a --max-context of at most" in asked.err
    assert "at most 0" in halflap("chat", directory, "--cache-memory", "1KiB").err


@pytest.mark.parametrize("word", ["off", "lookup"])
def test_what_speculate_may_say_is_no_folder(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    from halflap.commands.engines import plan_engine
    from halflap.commands.sections import Decoding
    from halflap.recipe import Common

    (tmp_path / word).mkdir()
    monkeypatch.chdir(tmp_path)
    plan_engine(directory.resolve(), Decoding(speculate=word), Common())


def test_a_context_that_cache_memory_shortens_is_what_must_fit(directory: Path, tmp_path: Path) -> None:
    from halflap.amounts import parse_amount
    from halflap.commands.engines import plan_engine
    from halflap.commands.sections import Decoding
    from halflap.recipe import Common

    shutil.copytree(directory, tmp_path / "long")
    file = tmp_path / "long" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 1 << 40}))
    (tmp_path / "long" / "halflap.json").unlink(missing_ok=True)
    plan = plan_engine(tmp_path / "long", Decoding(cache_memory=parse_amount("64MiB", "bytes", share=False)), Common())
    assert plan.max_context < 1 << 30 and plan.remark
    with pytest.raises(HalflapError, match=r"a reply of .* tokens \(--max-context and --cache-memory bound it\)"):
        plan_engine(tmp_path / "long", Decoding(), Common())


def test_replies_may_hold_most_of_what_is_free(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a limit, sixteen long replies begin at once on a machine that holds one, and the system ends it."""
    from halflap.amounts import parse_amount
    from halflap.commands import device, engines
    from halflap.commands.sections import Decoding
    from halflap.models.quantization import weight_bytes
    from halflap.recipe import Common

    free = 1 << 28
    monkeypatch.setattr(device, "free_memory", lambda _: free)
    decoding = Decoding(prefix_cache="1MiB", max_context=400)
    opened = engines.open_engine(directory, decoding, Common(device="cpu"))
    opened.engine.close()
    budget = opened.engine._scheduler.budget
    weights = weight_bytes(opened.config, None, 4)
    assert budget.bytes == opened.memory and 0.8 < opened.memory / (free - weights - (1 << 20)) < 0.9
    plan = engines.plan_engine(directory, decoding, Common(device="cpu"), replicas=4)
    assert 0.8 < plan.memory / (free / 4 - weights - (1 << 20)) < 0.9
    given = parse_amount("64MiB", "bytes", share=False)
    decoding = Decoding(cache_memory=given, prefix_cache="off")
    assert engines.plan_engine(directory, decoding, Common(device="cpu")).memory == 64 << 20


def test_how_states_are_kept_is_the_flags_or_the_configs(directory: Path, tmp_path: Path) -> None:
    from halflap.commands.engines import plan_engine
    from halflap.commands.sections import Decoding
    from halflap.recipe import Common

    shutil.copytree(directory, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    common = Common(device="cpu")
    assert plan_engine(tmp_path / "model", Decoding(prefix_cache="off"), common).ssm_dtype == "float32"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mamba_ssm_cache_dtype": "bfloat16"}))
    plan = plan_engine(tmp_path / "model", Decoding(prefix_cache="off"), common)
    assert plan.ssm_dtype == "bfloat16" and plan.remark is None
    asked = Decoding(prefix_cache="off", ssm_dtype="float32")
    assert plan_engine(tmp_path / "model", asked, common).ssm_dtype == "float32"


def test_limits_of_control_groups_count(tmp_path: Path) -> None:
    from halflap.processes import left_in_groups

    def group(place: Path, **files: object) -> None:
        place.mkdir(parents=True)
        for name, content in files.items():
            (place / name.replace("__", ".")).write_text(f"{content}\n")

    stat = "anon 5\ninactive_file 30\nactive_file 10"
    group(tmp_path / "new" / "pod", memory__max=1000, memory__current=700)
    group(tmp_path / "new" / "pod" / "app", memory__max="max", memory__current=650)
    group(tmp_path / "new" / "pod" / "app" / "worker", memory__max=500, memory__current=400, memory__stat=stat)
    old = {"memory__limit_in_bytes": 90, "memory__usage_in_bytes": 100}
    group(tmp_path / "old" / "memory", **old, memory__stat="total_inactive_file 30\ntotal_active_file 0")
    (tmp_path / "2").write_text("0::/pod/app/worker\n")
    (tmp_path / "1").write_text("5:cpuset:/a\n4:cpu,memory:/the/host/only/knows\n0::/\n")
    assert list(left_in_groups(tmp_path / "2", tmp_path / "new")) == [140, 300]
    assert list(left_in_groups(tmp_path / "1", tmp_path / "old")) == [20]
    assert list(left_in_groups(tmp_path / "absent", tmp_path / "old")) == []


def test_a_line_that_is_no_text_leaves_the_conversation(
    halflap: Cli, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, "a\udcff", "the cat")
    result = halflap("chat", directory, "--max-new-tokens", "3", "--json")
    assert "is not valid UTF-8: correct it" in result.err and result.json["turns"] == 1


def test_a_model_that_does_not_fit_is_refused_with_numbers() -> None:
    import torch

    from halflap.commands.device import check_memory
    from halflap.models.presets import preset

    with pytest.raises(
        HalflapError, match=r"the weights take \d+\.\d GiB as float32, a reply 2.0 GiB, and \d+\.\d GiB"
    ):
        check_memory(preset("nemotron-4-340b"), "float32", torch.device("cpu"), {"a reply": 2 << 30})


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_what_does_not_fit_is_said_before_it_is_loaded(
    halflap: Cli, directory: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr("halflap.commands.device.free_memory", lambda _: 1 << 10)
    for module in ("generate", "engines"):
        monkeypatch.setattr(f"halflap.commands.{module}.load_model", lambda *_: pytest.fail("loaded"))
    result = halflap(verb, directory, *(("--prompt", "the cat") if verb == "generate" else ()))
    assert result.status == 1 and "the weights take 0.0 GiB as float32" in result.err and "free; take" in result.err


def test_serve_listens_and_stops_when_told(halflap: Cli, directory: Path) -> None:
    """SIGTERM reaches the main thread, which serves; another asks and then sends it."""
    pytest.importorskip("uvicorn")
    from halflap.inference.server import run as server

    answers: list[Any] = []
    plain = server.listen

    def listen(host: str, port: int) -> Any:
        listener = plain(host, port)
        threading.Thread(target=ask, args=(listener.getsockname()[1],), daemon=True).start()
        return listener

    def ask(port: int) -> None:
        url = f"http://127.0.0.1:{port}/v1/models"
        for _ in range(200):
            try:
                with urllib.request.urlopen(
                    urllib.request.Request(url, headers={"Authorization": "Bearer k"})
                ) as reply:
                    answers.append(json.load(reply))
                    break
            except OSError:
                time.sleep(0.05)
        os.kill(os.getpid(), 15)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("halflap.commands.serve.listen", listen)
        result = halflap(
            "serve", directory, "--port", "0", "--api-key", "k", "--served-model-name", "us/little", "--json"
        )
    assert answers[0]["data"][0]["id"] == "us/little" == result.json["model"]
    assert "us/little is at http://127.0.0.1:" in result.err
