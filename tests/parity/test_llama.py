"""Llama against transformers' own class: the same files, the same logits, in one pass and through a cache."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from halflap.checkpoints.checkpoint import Checkpoint, load_model, save_model, write_checkpoint  # noqa: E402
from halflap.models.cache import Cache  # noqa: E402

TOY = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "narrow heads": {"head_dim": 4},
    "wide heads": {"head_dim": 14},
    "one key/value head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    "llama 3.1": {"rope_parameters": LLAMA3},
    "squared relu": {"hidden_act": "relu2"},
}


def reference(**changes):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(TOY | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0, 0.2) if "norm" in name else parameter.normal_(0.0, 0.15)
    return model


def ours(model, directory, dtype: str = "float32"):
    model.save_pretrained(directory)
    return load_model(directory, dtype)


def tokens_of(batch: int, time: int, vocab: int = 64) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, time), generator=torch.Generator().manual_seed(1))


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value where that is above 1."""
    return ((a - b).abs().max() / max(1.0, b.abs().max())).item()


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_in_one_pass_and_through_a_cache(tmp_path, variant):
    model = reference(**VARIANTS[variant])
    mine = ours(model, tmp_path)
    tokens = tokens_of(2, 40)
    full = model(tokens).logits
    assert full.abs().max() > 0.3
    assert gap(mine(tokens), full) <= 1e-5
    cache, theirs, start = Cache.create(mine.config, 2), None, 0
    for size in (17, 9, *[1] * 14):
        step = tokens[:, start : start + size]
        output = model(step, past_key_values=theirs, use_cache=True)
        theirs = output.past_key_values
        logits = mine(step, cache=cache)
        assert gap(logits, output.logits) <= 1e-5
        assert gap(logits, full[:, start : start + size]) <= 1e-5
        start += size


@torch.no_grad()
def test_logits_in_float64(tmp_path):
    """The reference's norms and rotary tables compute in float32, hence not closer."""
    model = reference()
    mine = ours(model, tmp_path, "float64")
    tokens = tokens_of(2, 40)
    assert gap(mine(tokens), model.double()(tokens).logits) <= 5e-6


@torch.no_grad()
def test_padded_batches_equal_unpadded_rows(tmp_path):
    model = reference()
    mine = ours(model, tmp_path)
    lengths = [19, 7, 12]
    rows = [tokens_of(1, n)[0] for n in lengths]
    right = torch.stack([torch.nn.functional.pad(row, (0, 19 - len(row)), value=5) for row in rows])
    padded = mine(right, cache=Cache.create(mine.config, 3), lengths=torch.tensor(lengths))
    for i, (n, row) in enumerate(zip(lengths, rows)):
        assert gap(padded[i, :n], model(row[None]).logits[0]) <= 1e-5


@settings(max_examples=12)
@given(
    layers=st.integers(1, 3),
    kv=st.integers(1, 3),
    queries=st.integers(1, 3),
    half=st.integers(1, 5),
    multiple=st.integers(1, 3),
    mlp=st.integers(1, 20),
    tied=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-6]),
)
@torch.no_grad()
def test_any_shape(tmp_path_factory, layers, kv, queries, half, multiple, mlp, tied, eps):
    model = reference(
        hidden_size=kv * queries * multiple,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=kv * queries,
        num_key_value_heads=kv,
        head_dim=2 * half,
        tie_word_embeddings=tied,
        rms_norm_eps=eps,
    )
    tokens = tokens_of(2, 21)
    expected = model(tokens).logits
    assert gap(ours(model, tmp_path_factory.mktemp("any"))(tokens), expected) <= 1e-5


def on_disk(directory) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(directory / "model.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_names_and_bits_survive_the_round_trip(tmp_path, variant, dtype):
    reference(**VARIANTS[variant]).to(getattr(torch, dtype)).save_pretrained(tmp_path / "in")
    checkpoint = Checkpoint.open(tmp_path / "in")
    again = write_checkpoint(tmp_path / "out", checkpoint.config, checkpoint.tensors(), dtype=checkpoint.dtypes)
    assert again.config == checkpoint.config and again.digest == checkpoint.digest
    one, two = on_disk(tmp_path / "in"), on_disk(tmp_path / "out")
    assert one.keys() == two.keys() and all(t.dtype == two[n].dtype and torch.equal(t, two[n]) for n, t in one.items())


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_we_write_is_loaded_by_the_stock_class(tmp_path, variant):
    mine = ours(reference(**VARIANTS[variant]), tmp_path / "in")
    save_model(mine, tmp_path / "out")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model) is transformers.LlamaForCausalLM
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = tokens_of(2, 40)
    assert gap(model(tokens).logits, mine(tokens)) <= 1e-5


@torch.no_grad()
def test_the_older_spelling_of_the_rotary_embedding_means_the_same(tmp_path):
    model = reference(rope_parameters=LLAMA3)
    expected = ours(model, tmp_path)(tokens_of(1, 40))
    data = json.loads((tmp_path / "config.json").read_text())
    settings = data.pop("rope_parameters")
    data |= {"rope_theta": settings.pop("rope_theta"), "rope_scaling": settings}
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert torch.equal(load_model(tmp_path)(tokens_of(1, 40)), expected)
