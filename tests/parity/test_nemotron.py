"""Nemotron-4 against transformers' own class: the same files, the same logits, padded, cached, greedy."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from halflap.checkpoints.checkpoint import Checkpoint, load_model, save_model, write_checkpoint  # noqa: E402
from halflap.inference.generate import generate  # noqa: E402
from halflap.models.cache import Cache  # noqa: E402

TOY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "partial_rotary_factor": 0.5,
}
VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 12},
    "narrow heads": {"head_dim": 4},
    "heads that do not divide the hidden size": {"num_attention_heads": 6, "head_dim": 8},
    "own key/value heads": {"num_key_value_heads": 4},
    "one key/value head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "a quarter turns": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.25}
    },
    "all turn": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
    "llama 3.1": {"rope_parameters": LLAMA3},
    "another eps": {"norm_eps": 0.03},
}


def reference(**changes):
    torch.manual_seed(0)
    model = transformers.NemotronForCausalLM(transformers.NemotronConfig(**(TOY | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.3 if "norm" in name else 0.15)
    return model


def ours(model, directory, dtype: str = "float32"):
    model.save_pretrained(directory)
    return load_model(directory, dtype)


def tokens_of(batch: int, time: int, vocab: int = 64) -> torch.Tensor:
    return torch.randint(1, vocab, (batch, time), generator=torch.Generator().manual_seed(1))


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference."""
    return (a - b).abs().max().item()


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


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, attention mask and positions as transformers wants unequal rows."""
    longest = max(map(len, rows))
    tokens = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
    return tokens, mask, (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["plain", "wide heads"])
def test_right_padded_rows_equal_left_padded_ones(tmp_path, variant):
    """Prefill and five decoded tokens of rows of unequal length."""
    model = reference(**VARIANTS[variant])
    mine = ours(model, tmp_path)
    lengths = [19, 7, 12]
    rows = [tokens_of(3, 24)[i, : n + 5] for i, n in enumerate(lengths)]
    tokens, mask, positions = left_padded([row[:n] for row, n in zip(rows, lengths)])
    theirs = model(tokens, attention_mask=mask, position_ids=positions, use_cache=True)
    right = torch.stack([torch.nn.functional.pad(row[:n], (0, 19 - n), value=5) for row, n in zip(rows, lengths)])
    cache = Cache.create(mine.config, 3)
    logits = mine(right, cache=cache, lengths=torch.tensor(lengths))
    for i, n in enumerate(lengths):
        assert gap(logits[i, :n], theirs.logits[i, 19 - n :]) <= 1e-5
    for step in range(5):
        following = torch.stack([row[n + step : n + step + 1] for row, n in zip(rows, lengths)])
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        position = torch.tensor(lengths)[:, None] + step
        theirs = model(
            following,
            attention_mask=mask,
            position_ids=position,
            past_key_values=theirs.past_key_values,
            use_cache=True,
        )
        assert gap(mine(following, cache=cache), theirs.logits) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("variant", ["plain", "heads that do not divide the hidden size"])
def test_greedy_text_with_and_without_a_cache_and_with_left_padding(tmp_path, variant):
    model = reference(**VARIANTS[variant])
    mine = ours(model, tmp_path)
    rows = [tokens_of(3, 20)[i, :n] for i, n in enumerate((5, 20, 11))]
    found = [out.tokens for out in generate(mine, [row.tolist() for row in rows], 32, ignore_eos=True)]
    for row, mine_now in zip(rows, found):
        whole = row
        for _ in range(32):  # ours without a cache
            whole = torch.cat([whole, mine(whole[None])[0, -1:].argmax(-1)])
        assert whole[len(row) :].tolist() == mine_now
        for cached in (True, False):
            text = model.generate(row[None], max_new_tokens=32, do_sample=False, use_cache=cached)
            assert text[0, len(row) :].tolist() == mine_now
    tokens, mask, _ = left_padded(rows)
    batch = model.generate(tokens, attention_mask=mask, max_new_tokens=32, do_sample=False)
    assert batch[:, 20:].tolist() == found


@settings(max_examples=12)
@given(
    layers=st.integers(1, 3),
    kv=st.integers(1, 3),
    queries=st.integers(1, 3),
    quarter=st.integers(1, 3),
    hidden=st.integers(5, 24),
    mlp=st.integers(1, 20),
    tied=st.booleans(),
    biases=st.booleans(),
)
@torch.no_grad()
def test_any_shape(tmp_path_factory, layers, kv, queries, quarter, hidden, mlp, tied, biases):
    model = reference(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=kv * queries,
        num_key_value_heads=kv,
        head_dim=4 * quarter,
        tie_word_embeddings=tied,
        attention_bias=biases,
        mlp_bias=biases,
    )
    tokens = tokens_of(2, 21)
    expected = model(tokens).logits
    assert gap(ours(model, tmp_path_factory.mktemp("any"))(tokens), expected) <= 1e-5


def on_disk(directory) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(directory / "model.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_names_and_bits_survive_the_round_trip(tmp_path, variant, dtype):
    """Stored norm weights are the distance from one in both formats, so they are copied."""
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
    assert type(model) is transformers.NemotronForCausalLM
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = tokens_of(2, 40)
    assert gap(model(tokens).logits, mine(tokens)) <= 1e-5


def test_embeddings_are_apart_unless_the_config_ties_them(tmp_path):
    for tied in (False, True):
        mine = ours(reference(tie_word_embeddings=tied), tmp_path / str(tied))
        save_model(mine, tmp_path / f"{tied} again")
        again = load_model(tmp_path / f"{tied} again")
        assert (again.head_weight.data_ptr() == again.embedding.weight.data_ptr()) is tied
        assert ("lm_head.weight" in on_disk(tmp_path / f"{tied} again")) is not tied


@torch.no_grad()
def test_older_files_mean_the_same(tmp_path):
    """Rotary settings at the top level, kv_channels, layer_norm_eps, no num_key_value_heads."""
    rope = {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.25}
    model = reference(num_key_value_heads=4, head_dim=16, norm_eps=0.03, rope_parameters=rope)
    config = ours(model, tmp_path).config
    data = json.loads((tmp_path / "config.json").read_text())
    assert data.pop("rope_parameters") == rope and data.pop("norm_eps") == config.norm_eps == 0.03
    for name in ("head_dim", "num_key_value_heads"):
        del data[name]
    dialects = [
        {"head_dim": 16, "norm_eps": 0.03, "rope_parameters": rope},
        {"kv_channels": 16, "layer_norm_eps": 0.03, "rope_theta": 300.0, "partial_rotary_factor": 0.25},
        {
            "head_dim": None,
            "kv_channels": 16,
            "num_key_value_heads": None,
            "rope_scaling": None,
            "layer_norm_eps": 0.03,
            "rope_theta": 300.0,
            "rotary_percent": 0.25,
        },
    ]
    for dialect in dialects:
        (tmp_path / "config.json").write_text(json.dumps(data | dialect))
        assert Checkpoint.open(tmp_path).config == config
