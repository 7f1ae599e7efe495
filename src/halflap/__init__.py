"""halflap: train, compress, evaluate and run hybrid attention and state-space language models.

    model = halflap.load("DIR")                 a module; model(tokens (B, T)) -> logits (B, T, V) float32
    halflap.save(model, "DIR")
    halflap.tokenizer("DIR")
    halflap.generate(model, ["prompt", [1, 17, 4]], max_new_tokens=32)[0].text
    halflap.compress("DIR", data=["text.jsonl"], params="50%", out="runs/half")   any verb of the command line

A verb takes the names of its flags as keywords, returns what `--json` prints and raises `HalflapError`. Importing
halflap loads none of it: names are resolved on first use (PEP 562).

ops           inner loops, plain functions on tensors      train       the one training loop and its objectives
models        what the network is                          inference   generation
checkpoints   Hugging Face directories in and out          compress    importance, search, plans
data          text to batches                              evaluate    held-out text, tasks, speed
parallel      ranks and many jobs                          commands    a file is a journey
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halflap.errors import HalflapError as HalflapError
    from halflap.python import generate as generate
    from halflap.python import load as load
    from halflap.python import save as save
    from halflap.python import tokenizer as tokenizer

__version__ = "0.1.0"

_NAMES = {
    "HalflapError": "halflap.errors",
    "load": "halflap.python",
    "save": "halflap.python",
    "tokenizer": "halflap.python",
    "generate": "halflap.python",
}
_VERBS = (
    *("inspect", "import_", "export", "corpus", "pretrain", "score", "search", "prune", "verify", "distill"),
    *("compress", "evaluate", "analyze", "bench", "report", "study", "doctor", "chat", "serve"),
)
__all__ = ["__version__", *_NAMES, *_VERBS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    if name in _VERBS:
        return import_module("halflap.python").verb(name.rstrip("_"))
    raise AttributeError(f"module 'halflap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _Folder(ModuleType):
    """`halflap.compress` and others are a verb and a folder: once imported, the folder answers calls as the verb."""

    def __call__(self, *positional: Any, **fields: Any) -> Any:
        return import_module("halflap.python").verb(self.__name__.rpartition(".")[2])(*positional, **fields)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _VERBS and isinstance(value, ModuleType):
            value.__class__ = _Folder
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
