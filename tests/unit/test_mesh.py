"""Ranks: true for one process, and two gloo processes train like one."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from halflap.data.batch import Batch
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.model import HybridModel, initialize
from halflap.models.patterns import parse_pattern
from halflap.parallel import fanout, mesh
from halflap.train import resume
from halflap.train.config import Fit
from halflap.train.fit import fit
from halflap.train.objectives.language import NextToken

ROWS, LENGTH, VOCAB = 4, 8, 31
BLOCKS = {"M": Mamba2Config(4, 4, 2, 4, chunk_size=8), "*": AttentionConfig(2, 1, 4), "-": MLPConfig(16)}
CONFIG = ModelConfig("nemotron_h", VOCAB, 8, parse_pattern("M-*", BLOCKS))


def batches(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    weights = (torch.rand(ROWS, LENGTH, generator=generator) > 0.3).float()
    return Batch(tokens, (tokens + 1) % VOCAB, weights)


def train(
    share: int, shares: int, directory: Path | None
) -> tuple[dict[str, torch.Tensor], dict[str, float], list[float]]:
    model = HybridModel(CONFIG).double()
    initialize(model, 0)
    rows, per_rank = [], ROWS // shares
    mine = lambda step: batches(step).rows(share * per_rank, (share + 1) * per_rank)
    settings = Fit(batch_size=per_rank, sequence_length=LENGTH, eps=1e-3, save_every=2)
    held_out = [batches(100).rows(share * per_rank, (share + 1) * per_rank)]
    numbers = fit(
        model, NextToken(), mine, settings, tokens=100, directory=directory, log=rows.append, held_out=held_out,
        progress=False,
    )  # fmt: skip
    return dict(model.named_parameters()), numbers, [row["loss"] for row in rows if "lr" in row]


def worker(port: int, directory: Path, rank: int) -> int:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
    mesh.start()
    assert (mesh.rank(), mesh.world_size()) == (rank, 2)
    weights, numbers, losses = train(rank, 2, directory / "states")
    torch.save(({n: p.detach() for n, p in weights.items()}, numbers, losses), directory / f"{rank}.pt")
    mesh.barrier()
    mesh.stop()
    return rank


def test_one_process_is_a_mesh() -> None:
    mesh.start()
    assert (mesh.rank(), mesh.world_size(), mesh.is_main()) == (0, 1, True)
    assert mesh.all_reduce_sum(torch.tensor([2.0])).tolist() == [2.0]
    assert mesh.gather_bytes(b"x") == [b"x"]
    mesh.barrier()
    mesh.stop()


def test_two_ranks_train_like_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert fanout.map(functools.partial(worker, port, tmp_path), range(2), processes=2) == [0, 1]
    alone, numbers, losses = train(0, 1, None)
    for rank in range(2):
        weights, of_rank, logged = torch.load(tmp_path / f"{rank}.pt")
        assert of_rank["tokens"] == numbers["tokens"] and of_rank["steps"] == numbers["steps"]
        assert of_rank["held_out_loss"] == pytest.approx(numbers["held_out_loss"], rel=1e-12)
        for name, value in alone.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-10, atol=1e-12)
        assert logged == (pytest.approx(losses, rel=1e-12) if rank == 0 else [])
    assert resume.states(tmp_path / "states")


def test_fanout_keeps_order_and_raises() -> None:
    assert fanout.map(abs, [-3, 2, -1]) == [3, 2, 1]
    assert fanout.map(abs, []) == []
    with pytest.raises(ValueError, match="invalid literal"):
        fanout.map(int, ["1", "x"], processes=2)


WORK = """
import signal, time
from pathlib import Path
from halflap.parallel import fanout

def work(name):
    Path(name).touch()
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        Path(name + "-saved").touch()
        if STUBBORN:
            time.sleep(600)
        raise

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import work as own
    fanout.map(own.work, ["a", "b", "c"], processes=2)
"""


@pytest.mark.parametrize("stubborn", [False, True])
def test_an_interrupt_of_one_process_ends_its_workers(tmp_path: Path, stubborn: bool) -> None:
    script = WORK.replace("STUBBORN", str(stubborn))
    (tmp_path / "work.py").write_text(script)
    parent = subprocess.Popen([sys.executable, "work.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)

    def wait_for(*names: str) -> None:
        until = time.monotonic() + 60
        while not all((tmp_path / name).exists() for name in names):
            assert time.monotonic() < until and parent.poll() is None
            time.sleep(0.05)

    wait_for("a", "b")
    workers = psutil.Process(parent.pid).children(recursive=True)
    parent.send_signal(signal.SIGINT)
    if stubborn:
        wait_for("a-saved", "b-saved")
        parent.send_signal(signal.SIGINT)
    _, said = parent.communicate(timeout=60)
    assert "KeyboardInterrupt" in said and parent.returncode != 0
    assert {file.name for file in tmp_path.glob("*-saved")} == {"a-saved", "b-saved"}
    assert not (tmp_path / "c").exists()  # it waited for a worker
    assert not psutil.wait_procs(workers, timeout=30)[1]
