"""A saved tokenizer is the same one to transformers."""

import pytest

from halflap.data.tokenizer import Tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = ["The quick brown fox jumps over 13 lazy dogs.\n", "def f(x):\n    return x ** 2\r\n", "Größe é 東京 👩‍🚀"]
TEMPLATE = (
    "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be <short>."}, {"role": "user", "content": "Hi é"}]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS * 9, 300).with_chat_template(TEMPLATE).save(folder)
    return Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", [*TEXTS, "", "  two  spaces ", "<bos>a<eos> b", "\r\n\r\n\t1234"])
def test_ids_and_text_are_the_same(pair, text):
    ours, theirs = pair
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.encode(text, parse_special=False) == theirs(text, split_special_tokens=True)["input_ids"]
    ids = ours.encode(text)
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


def test_special_tokens_and_sizes_are_the_same(pair):
    ours, theirs = pair
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)


def test_chat_is_rendered_the_same(pair):
    ours, theirs = pair
    for prompt in (True, False):
        expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
        assert ours.render_chat(MESSAGES, add_generation_prompt=prompt) == expected


def test_what_transformers_saves_is_read_here(pair, tmp_path):
    ours, theirs = pair
    theirs.save_pretrained(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(TEXTS[0]) == ours.encode(TEXTS[0])
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (1, 2, 0)
    assert loaded.chat_template == TEMPLATE
