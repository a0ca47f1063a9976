"""How a process of a distributed test begins and ends."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def enter(rank: int, path: str) -> None:
    """Becomes one of two ranks that meet in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)


def leave() -> None:
    """Ends the process once both ranks are here, without freeing anything: DistributedDataParallel
    frees its process group with Python's lock held and waits for a thread of it, which may be
    waiting for that lock (seen with torch 2.13)."""
    dist.barrier()
    os._exit(0)
