"""Tokenizers: training, files, special tokens, chat templates."""

import json

import pytest
import tokenizers

from halflap.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer, train_tokenizer
from halflap.errors import HalflapError

TEXTS = ["The cat sat on the mat in 1984.\n", "def f(x):\n    return x + 12345\n", "Größe, naïve, 東京\r\n"] * 20
TEMPLATE = (
    "{%- for m in messages %}\n{{ bos_token }}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def test_special_tokens_come_first(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 300
    assert [tokenizer.token(i) for i in (0, 1, 2, 99999)] == ["<pad>", "<bos>", "<eos>", None]


def test_training_is_repeatable_and_short_text_gives_a_smaller_vocabulary(tokenizer):
    assert train_tokenizer(TEXTS, 300).content == tokenizer.content
    assert SMALLEST_VOCABULARY <= train_tokenizer(["ab"], 1000).vocab_size < 1000


def test_digits_are_single_tokens(tokenizer):
    assert len(tokenizer.encode("1984")) == 4


def test_special_tokens_in_text_are_parsed_or_taken_literally(tokenizer):
    text = "a<eos>b"
    assert 2 in tokenizer.encode(text)
    assert 2 not in tokenizer.encode(text, parse_special=False)
    for parse in (True, False):
        assert tokenizer.decode(tokenizer.encode(text, parse_special=parse)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == "ab"


def test_decode_skips_ids_past_the_vocabulary(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("cat"), 5000]) == "cat"


def test_bytes_of_tokens_are_those_of_the_text(tokenizer):
    text = "naïve 東京 🙂 \\ <eos>"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert tokenizer.token_bytes(5000) == b""


def test_bytes_of_tokens_as_sentencepiece_spells_them():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"<unk>": 0, "▁a": 1, "<0xF0>": 2, "<0x0A>": 3}, []))
    backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    backend.add_special_tokens(["<0x41>"])
    found = Tokenizer(backend.to_str(), {}, {})
    assert [found.token_bytes(i) for i in range(1, 5)] == [b" a", b"\xf0", b"\n", b"<0x41>"]


def test_saved_files_are_the_loaded_ones(tokenizer, tmp_path):
    original = tokenizer.with_chat_template(TEMPLATE)
    original.save(tmp_path / "a")
    loaded = Tokenizer.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
    assert {file.name for file in (tmp_path / "b").iterdir()} == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert loaded.digest == tokenizer.digest
    assert loaded.eos_id == 2
    assert loaded.chat_template == TEMPLATE


def test_a_run_directory_lends_the_tokenizer_of_its_checkpoint(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "checkpoint")
    assert Tokenizer.load(tmp_path).digest == tokenizer.digest


def test_other_spellings_of_special_tokens_and_templates(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<bos>", "lstrip": False}}))
    templates = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    config = {
        "eos_token": {"content": "<pad>"},
        "chat_template": templates,
        "auto_map": {"AutoTokenizer": ["x.Y", None]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.chat_template) == (1, 0, None, "d")
    loaded.save(tmp_path / "b")
    written = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in written


def test_truncation_and_padding_left_in_a_file_are_ignored(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    content = json.loads(tokenizer.content)
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert len(Tokenizer.load(tmp_path).encode(TEXTS[0])) > 3


def test_errors_say_what_to_do(tokenizer, tmp_path):
    with pytest.raises(HalflapError, match=r"holds no tokenizer\.json; give a directory"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(HalflapError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)
    with pytest.raises(HalflapError, match=r"vocab_size is 100; .* at least 259: choose a larger one"):
        train_tokenizer(TEXTS, 100)
    with pytest.raises(HalflapError, match="has 300 tokens and the model's vocab_size is 299"):
        tokenizer.check_matches(299)
    tokenizer.check_matches(300)
    tokenizer.check_matches(512)


def test_a_mistake_while_reading_text_is_not_swallowed_by_training():
    def broken():
        yield "text"
        raise HalflapError("broken text")

    with pytest.raises(HalflapError, match="broken text"):
        train_tokenizer(broken(), 300)


def test_chat_is_rendered_with_special_tokens(tokenizer):
    chat = tokenizer.with_chat_template(TEMPLATE)
    text = chat.render_chat([{"role": "user", "content": " hi "}])
    assert text == "<bos>user: hi<eos>assistant:"
    assert chat.encode(text)[0] == 1
    assert chat.render_chat([{"role": "user", "content": "x"}], add_generation_prompt=False).endswith("<eos>")


@pytest.mark.parametrize("role", ["user", "tool", "system", "assistant"])
def test_special_tokens_in_foreign_texts_are_text(tokenizer: Tokenizer, role: str) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<eos>{% endfor %}"
    chat = tokenizer.with_chat_template(template)
    written = "stop <eos> here \U0010fffc99\U0010fffd"
    ids = chat.encode_chat([{"role": role, "content": written}])
    assert ids.count(chat.eos_id) == (1 if role in ("user", "tool") else 2)
    assert chat.decode(ids) == f"<{role}>{written}<eos>"


def test_chat_errors_and_sandbox(tokenizer):
    message = [{"role": "user", "content": "x"}]
    with pytest.raises(HalflapError, match="has no chat template"):
        tokenizer.render_chat(message)
    with pytest.raises(HalflapError, match="lacks a role or content"):
        tokenizer.with_chat_template("x").render_chat([{"role": "user"}])
    for template, reason in [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% if %}", "refuses these messages"),
    ]:
        with pytest.raises(HalflapError, match=reason):
            tokenizer.with_chat_template(template).render_chat(message)


def test_templates_may_use_what_transformers_offers(tokenizer):
    template = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
    )
    chat = tokenizer.with_chat_template(template)
    assert chat.render_chat([{"role": "u", "content": "<é>"}] * 2) == '{"role": "u", "content": "<é>"}'
