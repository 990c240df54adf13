"""A rank that fails tells the others why, through a note in the run directory, so that they stop with its reason.

A collective only says that a connection was closed, and NCCL's not even that: it waits. So each rank also watches for
notes and ends itself when another's appears while it hangs.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from llm2clip.errors import TrainingError, UserError
from llm2clip.files import write_text
from llm2clip.training.world import World

NOTES = "failures"
# how long a note may take to appear after the collective broke, and a rank to end by itself after one appeared
_PATIENCE = 5.0
_GRACE = 20.0
_NO_WORD = "another rank is gone without a word (killed, out of memory?) or did not answer within run.timeout"
_LEFT = "ended-rank-"
# torch's classes for broken collectives, and the words of gloo's plain RuntimeError
_BROKEN = ("gloo", "Connection closed", "Connection reset", "Broken pipe", "timed out", "Timed out", "NCCL")


class OtherRankError(TrainingError):
    """Another rank failed; this one ends because of it."""


@contextmanager
def shared(out: str, world: World) -> Iterator[None]:
    """Run the work of one rank; an error in it reaches the other ranks, and theirs ends this one.

    Args:
        out: run directory, which all ranks see.
        world: this rank.

    Raises:
        OtherRankError: another rank failed; with its reason, where it left one.
    """
    if world.size == 1 or not out:
        yield
        return
    notes = Path(out) / NOTES
    if world.is_main and notes.is_dir():
        for note in notes.iterdir():  # of an earlier attempt
            note.unlink()
    world.barrier()
    done = threading.Event()
    threading.Thread(target=_watch, args=(notes, world.rank, done), daemon=True).start()
    try:
        yield
    except Exception as error:
        if not _is_consequence(error):
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            write_text(notes / f"rank-{world.rank}.txt", reason + "\n")
            raise
        reason = _wait_for_note(notes, world.rank)
        if not reason:  # one that hangs learns from this that nobody waits for it any more
            reason = _NO_WORD
            write_text(notes / f"{_LEFT}{world.rank}.txt", reason + "\n")
        raise OtherRankError(
            f"{reason}. This rank ends too; the newest checkpoint is complete, and the same command goes on from it"
        ) from (None if isinstance(error, OtherRankError) else error)
    finally:
        done.set()


def _is_consequence(error: Exception) -> bool:
    """Whether an error says no more than that another rank is gone."""
    if isinstance(error, (OtherRankError, dist.DistError)):
        return True
    plain = isinstance(error, RuntimeError) and not isinstance(error, UserError)
    return plain and any(word in str(error) for word in _BROKEN)


def _notes(folder: Path, rank: int) -> list[str]:
    """`rank N failed: reason` of every other rank that left a note."""
    found = sorted(folder.glob("rank-*.txt")) if folder.is_dir() else []
    return [
        f"rank {note.stem[5:]} failed: {note.read_text(encoding='utf-8').strip().rstrip('.')}"
        for note in found
        if note.stem != f"rank-{rank}"
    ]


def _wait_for_note(folder: Path, rank: int) -> str:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        if found := _notes(folder, rank):
            return "; ".join(found)
        time.sleep(0.1)
    return ""


def _watch(folder: Path, rank: int, done: threading.Event) -> None:
    while not done.wait(2.0):
        reason = "; ".join(_notes(folder, rank))
        if not reason and folder.is_dir() and list(folder.glob(f"{_LEFT}*.txt")):
            reason = "the other ranks have ended, since one did not answer within run.timeout"
        if reason and not done.wait(_GRACE):
            print(f"error: {reason}. This rank hangs and ends too", file=sys.stderr, flush=True)
            os._exit(2)
