"""Replies match what was asked for, whatever the model would rather say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

pytest.importorskip("llguidance", reason="llguidance is not installed")

from halflap.data.tokenizer import Tokenizer
from halflap.errors import HalflapError
from halflap.inference.engine import Engine
from halflap.inference.grammar import Grammars
from halflap.inference.requests import EngineSettings, Grammar, Request, SamplingParams
from halflap.models.model import HybridModel

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["猫", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("family", ["nemotron_h", "llama"])
def test_replies_match(family: str, make: Callable[..., HybridModel], tokenizer: Tokenizer) -> None:
    prompt = tuple(tokenizer.encode("the cat"))
    with Engine(make(family), tokenizer, EngineSettings(speculate="lookup", max_batch=3)) as engine:
        schema = Grammar("json_schema", json.dumps(SCHEMA))
        regex = Grammar("regex", r"[a-c]{2,4}-\d{3}( ja| nein)")
        lark = Grammar(
            "lark", 'start: "<call>" %json {"type": "array", "items": {"type": "boolean"}, "maxItems": 3} "</call>"'
        )
        streams = [
            engine.submit(Request(prompt, 120, SamplingParams(1.0, seed=9), grammar=grammar, n=3))
            for grammar in (schema, regex, lark)
        ]
        objects, words, calls = ([piece.text for piece in stream.result()] for stream in streams)
        for text in objects:
            value = json.loads(text)
            assert set(value) == {"name", "age", "kind"} and value["kind"] in ("猫", "dog")
        assert all(re.fullmatch(regex.text, text) for text in words) and len(set(words)) > 1
        assert all(re.fullmatch(r"<call>\[.*\]</call>", text, re.DOTALL) for text in calls)


def test_rules_may_be_gbnf_and_are_compiled_once(
    make: Callable[..., HybridModel], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    whole = Grammars._new_matcher
    monkeypatch.setattr(Grammars, "_new_matcher", lambda *given: (compiled.append(given[1]), whole(*given))[1])
    rules = Grammar("lark", 'root ::= "the " animal+\nanimal ::= "cat" | "dog"')
    with Engine(make("llama"), tokenizer) as engine:
        streams = [engine.submit(Request((5,), 60, SamplingParams(1.0, seed=i), grammar=rules)) for i in range(3)]
        texts = [stream.result()[0].text for stream in streams]
    assert all(re.match("the (cat|dog)", text) for text in texts) and len(set(texts)) > 1
    assert compiled == [rules]


def test_unreadable_grammars_are_refused(make: Callable[..., HybridModel], tokenizer: Tokenizer) -> None:
    with Engine(make("llama"), tokenizer) as engine:
        for kind, text in (
            ("json_schema", '{"type": "nonsense"}'),
            ("json_schema", "{not json"),
            ("json_schema", "3"),
            ("regex", "(unclosed"),
            ("lark", "start: undefined_rule"),
            ("lark", "root ::= undefined"),
        ):
            with pytest.raises(HalflapError, match="grammar"):
                engine.submit(Request((5,), 4, grammar=Grammar(kind, text)))  # type: ignore[arg-type]
    with Engine(make("llama")) as engine, pytest.raises(HalflapError, match="tokenizer with an end token"):
        engine.submit(Request((5,), 4, grammar=Grammar("regex", "a")))
