"""The recipe of docs/make-it-smaller.md as printed: half the size, packed, served, answered by openai's client."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="openai is not installed: pip install -e '.[interop]'")
DOCS = Path(__file__).resolve().parents[2] / "docs"
FEWER = (
    *("--calibration-tokens", "512", "--score-tokens", "256", "--eval-tokens", "400", "--shortlist", "2"),
    *("--fit.sequence-length", "32", "--fit.batch-size", "4"),
)


def printed(language: str) -> str:
    text = (DOCS / "make-it-smaller.md").read_text(encoding="utf-8")
    section = text.partition("## Half the size, packed, served")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)[0]


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("name", ["nemotron-h-tiny", "hymba-tiny"])
def test_a_half_size_student_is_packed_served_and_answers(
    name: str,
    bits: str,
    make_checkpoint: Any,
    serving: Any,
    halflap: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from halflap.inference.generate import generate
    from halflap.models.count import count_parameters
    from halflap.python import load

    monkeypatch.chdir(tmp_path)
    (tmp_path / "DIR").symlink_to(make_checkpoint(name, unequal=False))
    words = ["joint", "state", "word", "piece", "half", "attention", "fox", "dog", "remembers", "looks"]
    for file, count in (("TEXT.jsonl", 120), ("HELD_OUT.jsonl", 10)):
        texts = [" ".join(words[(i * j + j) % len(words)] for j in range(20 + i % 30)) for i in range(count)]
        (tmp_path / file).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    commands = [shlex.split(line, comments=True) for line in printed("bash").replace("int8", bits).splitlines()]
    assert [words[1] for words in commands] == ["compress", "export", "evaluate", "serve"]
    for _, verb, *rest in commands[:-1]:
        more = FEWER if verb == "compress" else ()
        outcome = halflap(verb, *("2k" if word == "100M" else word for word in rest), *more, "--quiet")
        assert outcome.status == 0, outcome.err
    served = Path(commands[-1][2])
    model = load(served)
    assert count_parameters(model.config) <= 0.5 * count_parameters(load("DIR").config)
    capsys.readouterr()
    with serving(served) as url:
        code = printed("python").replace("int8", bits)
        exec(code.replace("http://127.0.0.1:8000", url).replace("64", "8"), names := {})
        assert capsys.readouterr().out.strip() and names["reply"].usage.completion_tokens > 0
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        body = {"model": served.name, "max_tokens": 12, "temperature": 0}
        found = client.completions.create(prompt="Attention looks", **body, extra_body={"ignore_eos": True})
    wanted = generate(model, ["Attention looks"], max_new_tokens=12, ignore_eos=True)
    assert found.choices[0].text == wanted[0].text
