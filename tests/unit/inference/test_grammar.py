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
from halflap.inference.generate import generate
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


@pytest.mark.parametrize("family", ["nemotron_h", "llama"])
def test_generate_writes_what_matches(family: str, make: Callable[..., HybridModel], tokenizer: Tokenizer) -> None:
    model, prompts, words = make(family), ["the cat", "a", [5, 9, 3]], r"[a-c]{2,4}-\d{3}( ja| nein)"
    fields = {"temperature": 1.0, "seed": 3, "tokenizer": tokenizer}
    written = [generate(model, prompts, 120, json_schema=form, **fields) for form in (SCHEMA, json.dumps(SCHEMA))]
    assert written[0] == written[1] and {reply.finish_reason for reply in written[0]} == {"stop"}
    assert all(set(json.loads(reply.text)) == {"name", "age", "kind"} for reply in written[0])
    matching = generate(model, prompts, 120, regex=words, **fields)
    assert all(re.fullmatch(words, reply.text) for reply in matching) and len({reply.text for reply in matching}) > 1
    alone = generate(model, prompts[:1], 120, regex=words, **fields)
    assert alone == matching[:1]


def test_generate_refuses_what_it_cannot_match(make: Callable[..., HybridModel], tokenizer: Tokenizer) -> None:
    with pytest.raises(HalflapError, match="keep one"):
        generate(make("llama"), ["a"], 4, tokenizer=tokenizer, json_schema=SCHEMA, regex="a")
    for wrong in ("{not json", "3", [3]):
        with pytest.raises(HalflapError, match="json_schema grammar"):
            generate(make("llama"), ["a"], 4, tokenizer=tokenizer, json_schema=wrong)  # type: ignore[arg-type]
    with pytest.raises(HalflapError, match="needs a tokenizer"):
        generate(make("llama"), [[5]], 4, regex="a")


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
