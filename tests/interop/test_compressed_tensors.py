"""transformers with compressed-tensors computes with our packed weights what halflap computes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from halflap.checkpoints.checkpoint import load_model, write_checkpoint
from halflap.checkpoints.config import family_of
from halflap.models.model import HybridModel, initialize
from halflap.models.quantization import Quantization
from halflap.models.quantized import pack_tensors

pytest.importorskip("compressed_tensors")
FORMS = {
    "int4": Quantization(4, 32, keep=("embedding",)),
    "int4 but the head": Quantization(4, 32, keep=("embedding", "head")),
    "int8": Quantization(8, keep=("embedding",)),
    "fp8": Quantization.asked("fp8", keep=("embedding",)),
    "fp8 but the head": Quantization.asked("fp8", keep=("embedding", "head")),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_packed_weights(tiny_config: object, form: str, tied: bool, tmp_path: Path) -> None:
    import transformers  # halflap.hf, which other tests import, would open the directory itself

    config = dataclasses.replace(tiny_config, tie_word_embeddings=tied)  # type: ignore[type-var]
    if family_of(config).cannot_write(config):  # type: ignore[arg-type]
        pytest.skip("the stock class ties no embeddings")
    model = HybridModel(config)  # type: ignore[arg-type]
    initialize(model, seed=0)
    plain = ((name, tensor.detach()) for name, tensor in model.state_dict().items())
    quantization = FORMS[form]
    write_checkpoint(
        tmp_path,
        model.config,
        pack_tensors(plain, model.config, quantization),
        dtype="float32",
        quantization=quantization,
    )
    stock = getattr(transformers, family_of(model.config).architecture)
    theirs = stock.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.arange(24)[None]
    with torch.inference_mode():
        ours, other = load_model(tmp_path)(tokens), theirs(tokens).logits
    assert float((ours - other).abs().max()) < 1e-5 * max(1, float(ours.abs().max()))  # float32 in another order
