"""Which rank this process is, on which device: plain `python` or `torchrun`, the same code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from llm2clip.errors import ConfigError
from llm2clip.training.gloo_workers import wait_for_workers
from llm2clip.training.kept_memory import kept_memory


@dataclass(frozen=True)
class World:
    """This process among all ranks.

    Attributes:
        rank: index of this process, 0 for a single one.
        size: number of processes W.
        device: where this rank computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and shows progress."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.max(0)

    def max(self, value: int) -> int:
        """The largest `value` of all ranks, on every rank."""
        if self.size == 1:
            return value
        largest = torch.tensor(value)  # on the CPU, where asking for it does not wait for the GPU
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest.item())

    def sum(self, value: int) -> int:
        """The sum of `value` over all ranks, on every rank."""
        if self.size == 1:
            return value
        total = torch.tensor(value)
        dist.all_reduce(total)
        return int(total.item())

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all ranks, on every rank."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:1` to a device that exists here.

    Raises:
        ConfigError: a CUDA device is asked for and none is usable, or the name is no device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, but torch sees no CUDA GPU; use device=cpu")
    return device


@contextmanager
def start_world(device: str = "auto", threads: int = 0, timeout: float = 1800.0) -> Iterator[World]:
    """Join the process group that `torchrun` describes, or be a world of one; leave it at the end.

    Args:
        device: as in `resolve_device`.
        threads: CPU threads; 0 leaves torch's choice.
        timeout: seconds after which a rank that waits for another in a collective gives up.

    A rank that fails keeps the group until its process ends, which ends the others instead of letting them wait.
    """
    target = resolve_device(device)
    if threads > 0:
        torch.set_num_threads(threads)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    with kept_memory(target):
        if size == 1:
            yield World(0, 1, target)
        else:
            with _group(target, size, timeout) as world:
                yield world


@contextmanager
def _group(target: torch.device, size: int, timeout: float) -> Iterator[World]:
    """One rank of several, as `start_world`."""
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if target.type == "cuda":
        target = torch.device("cuda", local_rank)
        torch.cuda.set_device(target)
    backend = "cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    leave = False
    try:
        yield World(rank, size, target)
        leave = True
    except SystemExit:  # every rank was asked to stop
        leave = True
        raise
    finally:
        wait_for_workers()
        # not after an error: others may be inside a collective that this rank never joins. Leaving NCCL's group would
        # wait for them, and the end of this process is what tells them
        if leave:
            dist.destroy_process_group()
