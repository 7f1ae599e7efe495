"""Ranks and reductions; every function is true for one process without a process group.

`start()` joins the group that torchrun describes in the environment (gloo on a CPU, nccl on a GPU). Callers never
ask whether there is a group.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

# One reduction a bucket: few enough to hide the latency of many small parameters, small enough to need no second copy.
BUCKET_ELEMENTS = 1 << 24


def start() -> None:
    """Join torchrun's group if there is one and it has not been joined; otherwise do nothing."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def stop() -> None:
    """Leave the group, if any."""
    if _grouped():
        dist.destroy_process_group()


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if _grouped() else 0


def world_size() -> int:
    return dist.get_world_size() if _grouped() else 1


def is_main() -> bool:
    """Whether this process writes files and shows progress."""
    return rank() == 0


def barrier() -> None:
    if _grouped():
        dist.barrier()


def wire(device: torch.device) -> torch.device:
    """Where a small tensor must lie to travel between ranks: on the GPU for nccl; alone, nothing leaves the CPU."""
    return device if world_size() > 1 else torch.device("cpu")


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place and returned; between ranks it must lie where `wire` says."""
    if _grouped():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_sum_many(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over ranks in place, in flat buckets of one dtype."""
    if not _grouped():
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same in by_dtype.values():
        bucket: list[Tensor] = []
        for index, tensor in enumerate(same):
            bucket.append(tensor)
            if index + 1 == len(same) or sum(t.numel() for t in bucket) >= BUCKET_ELEMENTS:
                flat = torch.cat([t.reshape(-1) for t in bucket])
                dist.all_reduce(flat)
                for part, piece in zip(bucket, flat.split([t.numel() for t in bucket])):
                    part.copy_(piece.view_as(part))
                bucket = []


def gather_bytes(data: bytes) -> list[bytes]:
    """Every rank's bytes, in the order of ranks, on every rank."""
    if not _grouped():
        return [data]
    gathered: list[bytes] = [b""] * world_size()
    dist.all_gather_object(gathered, data)
    return gathered
