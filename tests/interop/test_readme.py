"""The README's code for transformers, TRL and PEFT runs as it is printed, on an equal-width and an unequal student."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import halflap

pytest.importorskip("trl", reason="trl is not installed: pip install -e '.[interop]'")
pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[interop]'")
datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install -e '.[interop]'")
README = Path(__file__).resolve().parents[2] / "README.md"
FEWER = 'SFTConfig("runs/tuned", max_steps=2, report_to="none", use_cpu=True, bf16=False)'


@pytest.mark.parametrize("kind", ["stock", "unequal"])
@pytest.mark.parametrize("name", ["nemotron-h-tiny", "hymba-tiny"])
def test_the_code_of_the_readme(
    name: str, kind: str, make_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(make_checkpoint(name, unequal=kind == "unequal"), tmp_path / "runs/half/checkpoint")
    monkeypatch.chdir(tmp_path)
    section = README.read_text(encoding="utf-8").partition("## Use with transformers")[2].partition("\n## ")[0]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    assert 'SFTConfig("runs/tuned")' in code
    data = datasets.Dataset.from_dict({"text": ["The joint takes two pieces.", "A state remembers."] * 4})
    names: dict[str, Any] = {"data": data}
    exec(code.replace('SFTConfig("runs/tuned")', FEWER), names)
    merged = halflap.load("runs/merged")
    assert merged.config.blocks == halflap.load("runs/half/checkpoint").config.blocks
    with torch.no_grad():
        there = names["trainer"].model.base_model.model.eval()(torch.tensor([[5, 9, 31]])).logits
        torch.testing.assert_close(merged(torch.tensor([[5, 9, 31]])), there, rtol=1e-4, atol=1e-4)
    assert halflap.generate("runs/merged", ["The "], max_new_tokens=4)[0].tokens
