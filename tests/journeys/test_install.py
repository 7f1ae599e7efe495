"""What `pip install .` puts down runs by itself: its kernels are built from what it brought, or it says why not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from halflap.ops.native import build

pytest.importorskip(
    "setuptools", minversion="77", reason="no setuptools that builds the package: pip install -U setuptools"
)

ROOT = Path(__file__).resolve().parents[2]
DECODE = """
import halflap
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import preset
from halflap.ops.native import build

model = HybridModel(preset("nemotron-h-tiny"))
initialize(model, 0)
print(halflap.generate(model, [[1, 2, 3]], max_new_tokens=4, ignore_eos=True)[0].tokens)
print(halflap.__file__)
print(build.load().path)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a wheel of this tree was installed."""
    folder = tmp_path_factory.mktemp("install")
    tree = folder / "tree"
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, tree]
    subprocess.run([str(word) for word in wheel], check=True, capture_output=True, text=True)
    install = [*pip, "install", "--no-deps", "--no-index", "--target", folder / "site", *folder.glob("*.whl")]
    subprocess.run([str(word) for word in install], check=True, capture_output=True, text=True)
    return folder / "site"


def run(site: Path, place: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), **more}
    return subprocess.run(
        [sys.executable, "-c", DECODE], cwd=place, env=environment, check=True, capture_output=True, text=True
    )


def test_an_installed_package_builds_its_kernels_or_says_that_it_has_none(site: Path, tmp_path: Path) -> None:
    here = build.load()
    if here.library is None:
        pytest.skip(f"no kernels: {here.reason}")
    tokens, package, kernels = run(site, tmp_path).stdout.splitlines()
    assert Path(package).is_relative_to(site) and kernels == str(here.path)  # named by the sources: they are all there
    without = run(site, tmp_path, CXX="no-such-compiler", HALFLAP_CACHE=str(tmp_path / "cache"))
    assert without.stdout.splitlines() == [tokens, package, "None"]
    assert "running on plain PyTorch" in without.stderr and "no C++ compiler found" in without.stderr
