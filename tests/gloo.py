"""Runs a function on several gloo processes of this machine; its asserts fail the test that called."""

from __future__ import annotations

import datetime
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _worker(rank: int, world: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    function(rank, world, *args)
    dist.barrier()
    # at once: now and then gloo's own threads abort a process that takes its group down, after all is tested
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_on_ranks(world: int, function: Callable[..., None], *args: Any) -> None:
    """Calls function(rank, world, *args) on `world` processes and raises what any of them raises."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (world, port, function, args), nprocs=world)
