"""README.md of a checkpoint: what it is, how large, how it came to be, under which licence, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halflap import __version__
from halflap.checkpoints import gguf_metadata
from halflap.checkpoints.config import family_of, not_stock_because
from halflap.models.config import ModelConfig
from halflap.models.count import count_non_embedding_parameters, count_parameters
from halflap.models.quantization import Quantization

CARD = "README.md"


def license_of(directory: str | Path) -> str | None:
    """The licence that the card of a checkpoint or run directory names; None without a card, or where it is unknown."""
    for card in (Path(directory) / CARD, Path(directory) / "checkpoint" / CARD):
        if card.is_file():
            start, _, rest = card.read_text("utf-8").partition("---\n")
            head = rest.partition("\n---")[0] if not start else ""
            found = re.search(r"^license:[ \t]*['\"]?([^'\"\n]+?)['\"]?[ \t]*$", head, re.MULTILINE)
            return None if found is None or found[1] == "unknown" else found[1]
    return None


def more_of(directory: str | Path) -> str:
    """What a card of ours holds beside its table, its lineage and how to load it; empty where there is no such card."""
    card = Path(directory) / CARD
    text = card.read_text("utf-8") if card.is_file() else ""
    found = re.search(r"^\| opens in \|[^\n]*\n\n(.*?)^## How it came to be$", text, re.MULTILINE | re.DOTALL)
    return found[1] if found and "\nWritten by halflap " in text else ""


def model_card(
    directory: Path,
    config: ModelConfig,
    lineage: Sequence[Mapping[str, Any]],
    license: str | None,
    more: str = "",
    quantization: Quantization | None = None,
) -> str:
    """The text of the card of what lies, or will lie, in `directory`.

    more: Markdown between the table and the lineage, as for a student what was cut.
    """
    name, place = _names(directory.resolve())
    family = family_of(config)
    reason = not_stock_because(config, quantization)
    stock = (
        f"stock transformers (`{family.architecture}`{', with compressed-tensors' if quantization else ''}) and halflap"
    )
    own = f"halflap{'' if quantization else ', and transformers by `import halflap.hf`'}: {reason}"
    packed = f"| weights | {quantization.said()} |\n" if quantization else ""
    steps = "\n".join(f"{i}. {_step(step)}" for i, step in enumerate(lineage, 1)) or "Not recorded."
    return f"""---
library_name: transformers
license: {license or "unknown"}
tags: [halflap, {family.name}]
---

# {name}

| | |
|---|---|
| family | {family.name} |
| pattern | `{config.pattern()}` |
| parameters | {count_parameters(config):,} |
| without embeddings | {count_non_embedding_parameters(config):,} |
| hidden size | {config.hidden_size} |
| vocabulary | {config.vocab_size} |
{packed}| opens in | {stock if reason is None else own} |

{more}## How it came to be

{steps}

## How to load it

{_loading(place, config, stock=reason is None, packed=quantization is not None)}

Written by halflap {__version__}; `lineage.json` has the digests.
"""


def _names(directory: Path) -> tuple[str, str]:
    """What a user calls a checkpoint, and how to get there: those of a run go by the run's name."""
    if directory.name not in ("checkpoint", "pruned"):
        return directory.name, directory.name
    place = f"{directory.parent.name}/{directory.name}"
    return directory.parent.name if directory.name == "checkpoint" else place, place


def _loading(place: str, config: ModelConfig, *, stock: bool, packed: bool = False) -> str:
    """Code for halflap and transformers, and the way to llama.cpp or what bars it."""
    if packed and not stock:
        return f"""```python
import halflap
model = halflap.load("{place}")
```"""
    ours = "" if stock else "import halflap.hf\n"
    bar = gguf_metadata.cannot_write(config)
    plain = " --quantize off" if packed else ""
    llama_cpp = (
        f"llama.cpp: `halflap export {place} --format gguf{plain} --out gguf`, then `llama-cli -m gguf/model.gguf`."
        if bar is None
        else f"llama.cpp does not run it as it is: {bar}."
    )
    return f"""```python
import halflap
model = halflap.load("{place}")

{ours}from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
```

{llama_cpp}"""


def _step(step: Mapping[str, Any]) -> str:
    numbers = ", ".join(
        f"{key} {value}" for key, value in step.items() if isinstance(value, (int, float, str)) and key != "verb"
    )
    return f"{step.get('verb', 'step')}{': ' + numbers if numbers else ''}"
