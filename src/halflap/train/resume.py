"""The state of an interrupted fit on disk: weights, optimiser, counters and random states, bit for bit.

The directory holds one folder a state, `step-00000120/` with `model.safetensors`, `optimizer.safetensors` and
`state.json`. They are written into a hidden folder that is renamed when complete, so a kill at any moment leaves the
former states whole; the last two are kept. Only the main rank writes; with several ranks each has the same weights.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from halflap.errors import HalflapError
from halflap.files import sync
from halflap.parallel import mesh

KEPT = 2
FORMAT = 1


def save(
    directory: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    counters: Mapping[str, Any],
) -> Path:
    """Write the state after `step` steps and drop all but the last two. Raises HalflapError on a full disk."""
    random_states = mesh.gather_bytes(random_state())
    final = directory / f"step-{step:08d}"
    if mesh.is_main() and not final.exists():
        state = {
            "format": FORMAT,
            "step": step,
            "random": [state.hex() for state in random_states],
            "counters": dict(counters),
        }
        try:
            _write(final, state, parameters, optimizer)
        except (OSError, SafetensorError) as error:
            raise HalflapError(
                f"the training state of step {step} could not be written to {final} ({error}); the states before it "
                "are whole: make room there and start the same command again to go on from the last one"
            ) from error
        for old in states(directory)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    mesh.barrier()
    return final


def _write(
    final: Path, state: dict[str, Any], parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = final.with_name(f".{final.name}.tmp")
    temporary.mkdir()
    try:
        save_file({name: p.detach().contiguous() for name, p in parameters.items()}, temporary / "model.safetensors")
        moments = {
            f"{name}/{key}": value.contiguous()
            for name, parameter in parameters.items()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        save_file(moments, temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        temporary.rename(final)
        sync(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def states(directory: Path) -> list[Path]:
    """Complete states, oldest first."""
    return sorted(path for path in directory.glob("step-*") if path.is_dir())


def restore(
    directory: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any]] | None:
    """Load the newest readable state in place; return its step and counters, or None when there is none.

    A state that cannot be read (a disk fault) is passed over with a warning. Raises HalflapError when the states
    are of another model or none can be read.
    """
    found = states(directory)
    for path in reversed(found):
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            weights = load_file(path / "model.safetensors")
            moments = load_file(path / "optimizer.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            warnings.warn(
                f"the training state {path} cannot be read ({error}); going back to the one before", stacklevel=2
            )
            continue
        _check(path, weights, parameters)
        for unreadable in found[found.index(path) + 1 :] if mesh.is_main() else ():
            shutil.rmtree(unreadable, ignore_errors=True)  # or the step's new state would find its name taken
        _load(weights, moments, parameters, optimizer)
        set_random_state(bytes.fromhex(state["random"][min(mesh.rank(), len(state["random"]) - 1)]))
        return state["step"], state["counters"]
    if found:
        raise HalflapError(
            f"none of the {len(found)} training states in {directory} can be read; remove that folder to "
            "start the training again"
        )
    return None


def _check(path: Path, weights: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for name in sorted(weights.keys() | parameters.keys()):
        stored = tuple(weights[name].shape) if name in weights else "absent"
        wanted = tuple(parameters[name].shape) if name in parameters else "absent"
        if stored != wanted:
            raise HalflapError(
                f"the training state {path} is of another model: {name} is {stored} there and {wanted} here; "
                "give another --out, or --overwrite to start again"
            )


def _load(
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for full_name, value in moments.items():
        name, key = full_name.rsplit("/", 1)
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device)


def random_state() -> bytes:
    """The state of this process's torch generators (CPU, then the current GPU if one is in use)."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if used else [])
    return b"".join(len(s).to_bytes(4, "little") + s.numpy().tobytes() for s in states)


def set_random_state(data: bytes) -> None:
    setters = [torch.set_rng_state, *([torch.cuda.set_rng_state] if torch.cuda.is_available() else [])]
    for setter in setters:
        if not data:
            return
        size = int.from_bytes(data[:4], "little")
        setter(torch.frombuffer(bytearray(data[4 : 4 + size]), dtype=torch.uint8))
        data = data[4 + size :]
