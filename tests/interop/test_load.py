"""A public load generator, GuideLLM, against `halflap serve`: it meets no error and counts what the server counts.

It pins much of what it stands on, so it lives in an environment of its own: `make test-load` makes one and names its
command in HALFLAP_GUIDELLM.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

STREAMS, SECONDS = 8, 8
PROMPT, OUTPUT = 64, 24


def test_guidellm(make_checkpoint: Any, serving: Any, tmp_path: Path) -> None:
    command = os.environ.get("HALFLAP_GUIDELLM") or shutil.which("guidellm")
    if command is None:
        pytest.skip("guidellm is not installed: `make test-load` installs it into an environment of its own")
    directory = make_checkpoint("nemotron-h-tiny", unequal=True)
    report = tmp_path / "report.json"
    with serving(directory, "--max-context", "512") as url:
        words = [
            command, "run", "--disable-progress",
            "--backend", f"kind=openai_http,target={url}",
            "--profile", f"kind=concurrent,streams={STREAMS}",
            "--constraint", f"kind=max_duration,seconds={SECONDS}",
            "--tokenizer", f"kind=hf_auto,model={directory}",
            "--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}",
            "--output", f"kind=json,path={report}",
        ]  # fmt: skip
        ended = subprocess.run(words, capture_output=True, text=True, timeout=180)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        metrics = urllib.request.urlopen(f"{url}/metrics").read().decode()
    benchmark = json.loads(report.read_text("utf-8"))["benchmarks"][0]
    requests = benchmark["requests"]
    assert len(requests["successful"]) > STREAMS and not requests["errored"]
    assert {request["output_tokens"] for request in requests["successful"]} == {OUTPUT}  # ends early or late nowhere
    assert "\nhalflap_requests_active 0.0\n" in metrics  # those it hung up on at the end left nothing behind
