"""Who runs this job: the process group a launcher prepared, or a group of one."""

from __future__ import annotations

import datetime
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from ..data.errors import UserError
from .config import TrainerConfig
from .rendezvous import agent_store

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class World:
    """This process among all of a job's."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes what the job writes once."""
        return self.rank == 0


@contextmanager
def join(config: TrainerConfig) -> Iterator[World]:
    """Join the process group that the environment describes (torchrun sets it), and leave it at the end."""
    device = _device(config.device)
    # Metrics and objects travel over gloo also when tensors travel over NCCL.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=config.timeout_seconds)
    if "RANK" in os.environ:
        _check_environment()
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if (store := agent_store(rank, world_size, timeout)) is not None:
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)
    finally:
        dist.destroy_process_group()


def _check_environment() -> None:
    """Refuse what a launcher would not have set, before torch fails on it."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not os.environ.get(name, "").isdigit():
            raise UserError(
                f"environment variable {name}={os.environ.get(name)!r}, but RANK is set and calls for a number there; "
                "launch with torchrun or `ultrarec launch`, or unset RANK to train in one process"
            )
    if "MASTER_ADDR" not in os.environ:
        raise UserError(
            "environment variable MASTER_ADDR is missing, but RANK is set; launch with torchrun, or unset RANK"
        )


def _device(name: str) -> torch.device:
    needed, found = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if name == "cuda" and found < needed:
        raise UserError(
            f"trainer.device='cuda', but torch finds {found} CUDA device(s) for {needed} process(es) of this machine; "
            "launch fewer, use 'auto' or 'cpu', or run `ultrarec doctor`"
        )
    if name == "cpu" or found < needed:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def seed_rank(seed: int, *, rank: int, step: int = 0) -> None:
    """Begin a rank's random numbers, which no other rank has, nor this one from another step on."""
    if step == 0:
        torch.manual_seed(seed * 65_537 + rank + 1)
    else:
        # Hashed, since the CPU's generator takes the low 32 bits alone.
        torch.manual_seed(zlib.crc32(f"{seed}/{rank}/{step}".encode()))


def sum_over_ranks(values: Tensor) -> Tensor:
    """The elementwise sum over all ranks, float64, on the CPU."""
    total = values.detach().to("cpu", torch.float64)
    dist.all_reduce(total)
    return total


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of every rank, in rank order, on the CPU of every rank; ranks may differ in their number of rows."""
    rows = rows.detach().cpu().contiguous()
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([rows.size(0)]))
    longest = int(max(counts))
    # gloo's all_gather wants equal shapes.
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: rows.size(0)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def gather_objects(value: Any) -> list[Any]:
    """One picklable value from every rank, in rank order, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(world: World, compute: Callable[[], Value]) -> Value:
    """What rank 0 computes, on every rank; a UserError of rank 0 is raised on every rank."""
    box: list[Any] = [None, None]
    if world.is_main:
        try:
            box = [compute(), None]
        except UserError as error:
            box = [None, error]
    dist.broadcast_object_list(box, src=0)
    value, fault = box
    if fault is not None:
        raise fault
    return value
