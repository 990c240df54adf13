"""What processes that load data do about signals: they leave them to the process that trains.

`scancel`, service managers and Ctrl-C signal every process of a job. The main one finishes its step and writes a
checkpoint, for which it may still need a batch, so its workers must live on until it ends them.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

_STOPPING = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}


def batches_of(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's batches, from workers that only this process's SIGTERM, or its death, ends."""
    loader.worker_init_fn = _outlive_signals
    # a signal to the group that comes while workers start waits for them to be ready, here and there
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlive_signals(worker: int) -> None:
    # a handler does not learn who sent the signal; who waits for it does
    threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()
    # after the thread, which inherits what is blocked: it alone may take SIGTERM
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGUSR1})


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
