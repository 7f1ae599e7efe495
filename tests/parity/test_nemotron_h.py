"""Nemotron-H against transformers' own class: the same files, the same logits, in one pass and through a cache.

transformers clamps the time step from below at `time_step_min` when it runs over many tokens and not when it runs over
one; the comparisons use weights whose time steps stay above it, and two tests are about the clamp itself.
"""

from __future__ import annotations

import json
import math

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from halflap.checkpoints.checkpoint import Checkpoint, load_model, save_model, write_checkpoint  # noqa: E402
from halflap.models.cache import Cache  # noqa: E402
from halflap.models.config import Mamba2Config  # noqa: E402

TOY = {  # the acceptance model of the specification
    "vocab_size": 64,
    "hidden_size": 48,
    "layers_block_type": [{"M": "mamba", "*": "attention", "-": "mlp"}[symbol] for symbol in "M-M*-M-"],
    "mamba_num_heads": 16,
    "mamba_head_dim": 6,
    "ssm_state_size": 8,
    "n_groups": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 40,
    "chunk_size": 16,
}


def reference(seed: int = 0, dt_bias: float | None = None, **changes):
    """transformers' model with random weights of a size that makes every part matter."""
    config = transformers.NemotronHConfig(**(TOY | changes))
    torch.manual_seed(seed)
    model = transformers.NemotronHForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                parameter.uniform_(-3.5, -1.0) if dt_bias is None else parameter.fill_(dt_bias)
            elif name.endswith("A_log"):
                parameter.uniform_(0.0, 2.0)
            elif name.endswith((".D", "norm.weight", "norm_f.weight")):
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 0.08)
    return model


def ours(model, directory, dtype: str = "float32"):
    model.save_pretrained(directory)
    return load_model(directory, dtype)


def tokens_of(batch: int, time: int, vocab: int = 64) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, time), generator=torch.Generator().manual_seed(1))


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@torch.no_grad()
def test_logits_in_float64_agree_to_rounding(tmp_path):
    """The reference's norms and scan compute in float32 whatever the weights are, hence 2e-6 and not 1e-12."""
    model = reference()
    mine = ours(model, tmp_path, "float64")
    tokens = tokens_of(2, 37)
    expected = model.double()(tokens).logits
    assert expected.abs().max() > 0.3
    assert gap(mine(tokens), expected) <= 2e-6


@torch.no_grad()
@pytest.mark.parametrize("time", [1, 2, 3, 15, 16, 17, 50])
@pytest.mark.parametrize("chunk", [1, 4, 16, 64, 999])
def test_any_length_and_any_chunk_size(tmp_path, time, chunk):
    model = reference(chunk_size=chunk)
    tokens = tokens_of(2, time)
    assert gap(ours(model, tmp_path)(tokens), model(tokens).logits) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(20,), (7, 13), (1, 18, 1), (2, 1, 1, 16)])
def test_prefill_and_decode_equal_the_full_pass_and_the_reference(tmp_path, pieces):
    model = reference()
    mine = ours(model, tmp_path)
    tokens = tokens_of(2, sum(pieces) + 6)
    full = model(tokens).logits
    cache = Cache.create(mine.config, 2)
    theirs = None
    start = 0
    for size in (*pieces, *[1] * 6):
        step = tokens[:, start : start + size]
        logits = mine(step, cache=cache)
        assert gap(logits, full[:, start : start + size]) <= 1e-5
        if len(pieces) == 1:  # the reference continues a cache by one token at a time
            output = model(step, past_key_values=theirs, use_cache=True)
            theirs = output.past_key_values
            assert gap(logits, output.logits) <= 1e-5
        start += size


@torch.no_grad()
def test_prefill_and_decode_in_float64_agree_with_the_full_pass(tmp_path):
    mine = ours(reference(), tmp_path, "float64")
    tokens = tokens_of(1, 30)
    cache = Cache.create(mine.config, 1, dtype=torch.float64)
    steps = [mine(tokens[:, :11], cache=cache), mine(tokens[:, 11:20], cache=cache)]
    steps += [mine(tokens[:, i : i + 1], cache=cache) for i in range(20, 30)]
    assert gap(torch.cat(steps, 1), mine(tokens)) <= 1e-12


@torch.no_grad()
def test_padded_batches_equal_unpadded_rows(tmp_path):
    """The reference pads on the left, we pad on the right; neither may touch the logits of real tokens."""
    model = reference()
    mine = ours(model, tmp_path)
    lengths = [19, 7, 12]
    rows = [tokens_of(1, n)[0] for n in lengths]
    right = torch.stack([torch.nn.functional.pad(row, (0, 19 - len(row)), value=5) for row in rows])
    left = torch.stack([torch.nn.functional.pad(row, (19 - len(row), 0), value=5) for row in rows])
    mask = torch.stack([torch.arange(19) >= 19 - n for n in lengths]).long()
    theirs = model(left, attention_mask=mask).logits
    padded = mine(right, cache=Cache.create(mine.config, 3), lengths=torch.tensor(lengths))
    for i, (n, row) in enumerate(zip(lengths, rows)):
        alone = mine(row[None])[0]
        assert gap(padded[i, :n], alone) <= 2e-6
        assert gap(theirs[i, -n:], alone) <= 1e-5


@settings(max_examples=12)
@given(
    pattern=st.text("M*-", min_size=1, max_size=5),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    channels=st.integers(1, 5),
    state=st.integers(1, 6),
    kv=st.integers(1, 3),
    queries=st.integers(1, 3),
    width=st.integers(1, 5),
    hidden=st.integers(4, 20),
    kernel=st.integers(2, 4),
    conv_bias=st.booleans(),
    activation=st.sampled_from(["relu2", "silu"]),
)
@torch.no_grad()
def test_any_shape(
    tmp_path_factory, pattern, groups, per_group, channels, state, kv, queries, width, hidden, kernel, conv_bias,
    activation,
):  # fmt: skip
    """No alternation of blocks, no hidden == heads * head_dim, no inner size that is a multiple of the hidden size."""
    model = reference(
        hidden_size=hidden,
        layers_block_type=[{"M": "mamba", "*": "attention", "-": "mlp"}[symbol] for symbol in pattern],
        mamba_num_heads=groups * per_group,
        mamba_head_dim=channels,
        n_groups=groups,
        ssm_state_size=state,
        num_attention_heads=kv * queries,
        num_key_value_heads=kv,
        head_dim=width,
        conv_kernel=kernel,
        use_conv_bias=conv_bias,
        mlp_hidden_act=activation,
    )
    tokens = tokens_of(2, 21)
    expected = model(tokens, use_cache=False).logits  # its cache wants an attention block
    assert gap(ours(model, tmp_path_factory.mktemp("any"))(tokens), expected) <= 1e-5


# ---- files


def on_disk(directory) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(directory / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_names_and_bits_survive_the_round_trip_in_both_dialects(tmp_path, dtype):
    model = reference().to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "native")
    original = json.loads((tmp_path / "native" / "config.json").read_text())
    layers = original.pop("layers_block_type")
    original["hybrid_override_pattern"] = "".join(
        {"linear": "M", "full": "*", "mlp": "-"}[n.split("_")[0]] for n in layers
    )
    for new, old in [
        ("n_groups", "mamba_n_groups"),
        ("conv_kernel", "mamba_d_conv"),
        ("chunk_size", "mamba_chunk_size"),
        ("use_conv_bias", "mamba_conv_bias"),
        ("head_dim", "attention_head_dim"),
        ("time_step_limit", "mamba_dt_limit"),
    ]:
        original[old] = original.pop(new)
    tensors = on_disk(tmp_path / "native")
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "config.json").write_text(json.dumps(original))
    renamed = {name.replace("model.", "backbone.", 1): t for name, t in tensors.items()}
    safetensors.torch.save_file(renamed, tmp_path / "original" / "model.safetensors")

    written = []
    for dialect in ("native", "original"):
        checkpoint = Checkpoint.open(tmp_path / dialect)
        out = tmp_path / f"{dialect}-out"
        again = write_checkpoint(out, checkpoint.config, checkpoint.tensors(), dtype=checkpoint.dtypes)
        assert again.config == checkpoint.config and again.digest == checkpoint.digest
        written.append(on_disk(out))
    canonical = {name.replace("model.", "backbone.", 1): t for name, t in tensors.items()}
    for found in written:
        assert found.keys() == canonical.keys()
        assert all(t.dtype == canonical[n].dtype and torch.equal(t, canonical[n]) for n, t in found.items())


@torch.no_grad()
def test_what_we_write_is_loaded_by_the_stock_class(tmp_path):
    mine = ours(reference(), tmp_path / "in")
    save_model(mine, tmp_path / "out")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model) is transformers.NemotronHForCausalLM
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.bos_token_id == 1 and model.config.eos_token_id == 2
    tokens = tokens_of(2, 33)
    assert gap(model(tokens).logits, mine(tokens)) <= 1e-5
    greedy = model.generate(tokens[:, :9], max_new_tokens=8, do_sample=False, eos_token_id=None)
    want = tokens[:, :9]
    for _ in range(8):
        want = torch.cat([want, mine(want)[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy, want)


@torch.no_grad()
def test_tiny_time_steps_agree_in_both_passes_of_the_stock_class_when_we_wrote_the_files(tmp_path):
    """softplus(-9) is 1.2e-4, below the stock default of time_step_min; ours never binds."""
    mine = ours(reference(dt_bias=-9.0), tmp_path / "in")
    save_model(mine, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = tokens_of(2, 40)
    full = mine(tokens)
    assert gap(model(tokens).logits, full) <= 1e-5
    theirs, cache = model(tokens[:, :30], use_cache=True).past_key_values, Cache.create(mine.config, 2)
    mine(tokens[:, :30], cache=cache)
    for i in range(30, 40):
        step = tokens[:, i : i + 1]
        expected = model(step, past_key_values=theirs, use_cache=True).logits
        assert gap(expected, full[:, i : i + 1]) <= 1e-5
        assert gap(mine(step, cache=cache), full[:, i : i + 1]) <= 1e-5


@torch.no_grad()
def test_the_stock_prefill_clamp_is_what_a_time_step_limit_gives(tmp_path):
    """Released configs carry time_step_min 0.001: the stock prefill clamps there, we do not unless told to."""
    model = reference(dt_bias=-9.0)
    model.save_pretrained(tmp_path)
    tokens = tokens_of(2, 40)
    expected = model(tokens).logits
    plain = load_model(tmp_path)
    assert isinstance(plain.config.blocks[0], Mamba2Config)
    assert plain.config.blocks[0].time_step_limit == (0.0, math.inf)
    assert gap(plain(tokens), expected) > 1e-5
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | {"time_step_limit": [0.001, math.inf]}))
    assert gap(load_model(tmp_path)(tokens), expected) <= 1e-5


@torch.no_grad()
def test_positions_do_not_exist(tmp_path):
    model = reference()
    tokens = tokens_of(1, 12)
    shifted = model(tokens, position_ids=torch.arange(1000, 1012)[None]).logits
    assert gap(ours(model, tmp_path)(tokens), shifted) <= 1e-5
