"""Every token is scored once, with the context it should have, whatever the batch; bytes and intervals add up."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.data.corpus import build_corpus, open_corpus
from halflap.data.tokenizer import Tokenizer, train_tokenizer
from halflap.errors import HalflapError
from halflap.evaluate.documents import Document, byte_lengths, corpus_documents, tokenise
from halflap.evaluate.held_out import default_context, evaluate_text, windows
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig, RopeConfig
from halflap.models.model import HybridModel, initialize

TEXTS = [
    "The house stands on a hill, and the hill above the sea.",
    "Ünïcödé 日本語 🙂 is text too.\n\n  So are   spaces. " * 3,
    "x",
    "The sea is cold. The sea is deep. The sea is grey. " * 6,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 2, 300, progress=False)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> HybridModel:
    mamba = Mamba2Config(num_heads=4, head_dim=8, num_groups=2, state_size=8, chunk_size=8)
    attention = AttentionConfig(4, 2, 8, rope=RopeConfig())
    config = ModelConfig("nemotron_h", 300, 32, (mamba, MLPConfig(48), attention), max_position_embeddings=64)
    model = HybridModel(config).double().eval()
    initialize(model, 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(8)
    return model


def plain(*lengths: int, first: int = 1) -> list[Document]:
    generator = np.random.default_rng(0)
    return [Document(generator.integers(0, 300, n), np.ones(n), first) for n in lengths]


def slow_loss(model: HybridModel, ids: np.ndarray, target: int, reads_from: int) -> float:
    """-log p of one token given the tokens [reads_from, target)."""
    with torch.inference_mode():
        logits = model(torch.as_tensor(ids[reads_from:target])[None])[0, -1]
    return float(-logits.log_softmax(-1)[ids[target]])


@settings(max_examples=200)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    context=st.integers(1, 12),
    data=st.data(),
    first=st.integers(1, 3),
    limit=st.none() | st.integers(1, 50),
)
def test_windows_score_every_token_once(
    lengths: list[int], context: int, data: st.DataObject, first: int, limit: int | None
) -> None:
    stride = data.draw(st.integers(1, context))
    documents = plain(*lengths, first=first)
    found = windows(documents, context, stride, limit)
    scored = [(w.document, i) for w in found for i in range(w.end + 1 - w.scored, w.end + 1)]
    every = [(d, i) for d, n in enumerate(lengths) for i in range(first, n)]
    assert scored == every[:limit]
    for window in found:
        assert 0 < window.end - window.start <= context and window.start % stride == 0
        left_out = window.end + 1 - window.scored - 1 - window.start  # tokens read before the first scored one's reader
        assert left_out >= 0
        if window.start > 0 and first <= context - stride:  # no token is scored with less context than promised
            assert left_out + 1 > context - stride


@pytest.mark.parametrize(("context", "stride"), [(64, 64), (16, 16), (16, 5), (16, 1)])
def test_each_token_has_its_context(model: HybridModel, context: int, stride: int) -> None:
    documents = plain(37, 9)
    expected = 0.0
    for document in documents:
        ids, scored_to, start = document.tokens, 0, 0
        while scored_to < len(ids) - 1:
            end = min(start + context, len(ids) - 1)
            expected += sum(slow_loss(model, ids, target, start) for target in range(scored_to + 1, end + 1))
            scored_to, start = end, start + stride
    result = evaluate_text(model, documents, context=context, stride=stride)
    assert result.tokens == 36 + 8
    assert result.loss == pytest.approx(expected / 44, abs=1e-10)
    assert result.perplexity == pytest.approx(math.exp(expected / 44))


def test_batch_size_and_order_do_not_matter(model: HybridModel) -> None:
    documents = plain(37, 2, 9, 22, 5, 30)
    results = [evaluate_text(model, documents, context=8, stride=4, batch_size=size) for size in (1, 3, 50)]
    backwards = evaluate_text(model, documents[::-1], context=8, stride=4)
    for result in (*results[1:], backwards):
        assert result.loss == pytest.approx(results[0].loss, abs=1e-12)
        assert result.tokens == results[0].tokens
    assert results[1].intervals["loss"] == pytest.approx(results[0].intervals["loss"], abs=1e-12)


def test_bytes_of_tokens(tokenizer: Tokenizer, model: HybridModel) -> None:
    lengths = byte_lengths(tokenizer)
    for text in TEXTS:
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    documents = tokenise(TEXTS, tokenizer)
    result = evaluate_text(model, documents)
    firsts = [len(tokenizer.decode(tokenizer.encode(text)[:1]).encode()) for text in TEXTS]
    scored = [text for text in TEXTS if len(tokenizer.encode(text)) > 1]
    assert result.bytes == sum(len(text.encode()) for text in scored) - sum(
        first for first, text in zip(firsts, TEXTS) if text in scored
    )
    assert result.bits_per_byte == pytest.approx(result.loss * result.tokens / math.log(2) / result.bytes)
    assert result.documents == 3


def test_special_tokens_in_a_text_are_text(tokenizer: Tokenizer) -> None:
    document = tokenise(["an <eos> token"], tokenizer)[0]
    assert tokenizer.eos_id not in document.tokens and document.token_bytes.sum() == 14


def test_shards_score_as_their_text(tokenizer: Tokenizer, model: HybridModel, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for add_bos in (False, True):
        build_corpus([file], tokenizer, tmp_path / f"shards{add_bos}", add_bos=add_bos)
        corpus = open_corpus(tmp_path / f"shards{add_bos}")
        from_shards = evaluate_text(model, corpus_documents(corpus, tokenizer), context=16)
        assert from_shards == evaluate_text(model, tokenise(TEXTS, tokenizer), context=16)


def test_a_limit_on_tokens(tokenizer: Tokenizer, model: HybridModel) -> None:
    documents = tokenise(TEXTS * 50, tokenizer, limit=100)
    assert sum(document.scored for document in documents) >= 100 and len(documents) <= 64
    assert evaluate_text(model, documents, tokens=100).tokens == 100


def test_intervals_hold_the_loss_and_shrink(model: HybridModel) -> None:
    few = evaluate_text(model, plain(*[9] * 25), seed=1)
    many = evaluate_text(model, plain(*[9] * 400), seed=1)
    for result in (few, many):
        assert result.resampled == "documents"
        for name, (low, high) in result.intervals.items():
            assert low < getattr(result, name) < high
    widths = [r.intervals["loss"][1] - r.intervals["loss"][0] for r in (few, many)]
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.5)  # 16 times the documents
    assert few == evaluate_text(model, plain(*[9] * 25), seed=1)
    assert evaluate_text(model, plain(40), context=8).resampled == "windows"
    assert evaluate_text(model, plain(5)).intervals == {}


def test_intervals_cover(model: HybridModel) -> None:
    """About 95 % of intervals of samples hold the loss of the whole."""
    documents = plain(*[9] * 600)
    whole = evaluate_text(model, documents).loss
    inside = 0
    for start in range(0, 600, 30):
        low, high = evaluate_text(model, documents[start : start + 30]).intervals["loss"]
        inside += low <= whole <= high
    assert inside >= 17


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 8, "stride": 9}, "stride 9 is larger than the context 8"),
        ({"context": 0}, "context is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"context": 65}, r"a window takes 65 positions.* has 64"),
    ],
)
def test_wrong_sizes_say_what_is_allowed(model: HybridModel, options: dict, message: str) -> None:
    with pytest.raises(HalflapError, match=message):
        evaluate_text(model, plain(20), **options)


def test_nothing_to_score(model: HybridModel) -> None:
    with pytest.raises(HalflapError, match="1 documents hold no token to score"):
        evaluate_text(model, plain(1))
    assert default_context(model.config) == 64


def test_broken_weights_are_named(model: HybridModel) -> None:
    broken = HybridModel(model.config)
    initialize(broken, 0)
    with torch.no_grad():
        broken.norm.weight[0] = torch.nan
    with pytest.raises(HalflapError, match="not a number"):
        evaluate_text(broken, plain(20))
