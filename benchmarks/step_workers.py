"""Trainers in processes of their own, which take a step when they are told to: no setting of one reaches another."""

from __future__ import annotations

import itertools
import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from benchmarks import harness
from llm2clip.settings import TrainSettings
from llm2clip.training.clip_task import ClipTask
from llm2clip.training.world import World, resolve_device

# seconds that a step may take, and the start with its imports
_LIMIT = 1800.0


class StepWorker:
    """One trainer, waiting in its process for its next step.

    The process has read all its batches before its first step, so that nothing runs while others step.

    Args:
        maker: makes the trainer of the settings; picklable.
        settings: of the CLIP stage.
        steps: how many it will take.

    Raises:
        RuntimeError: what went wrong in the process, from any call.
    """

    def __init__(self, maker: Callable[[TrainSettings], Any], settings: TrainSettings, steps: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, maker, settings, steps, torch.get_num_threads()), daemon=True
        )
        self._process.start()
        theirs.close()
        self.title = str(self._answer())

    def step(self, number: int) -> tuple[float, float]:
        """Loss and seconds of its step `number`."""
        self._pipe.send(number)
        loss, seconds = self._answer()
        return float(loss), float(seconds)

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()

    def __enter__(self) -> StepWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self) -> Any:
        if not self._pipe.poll(_LIMIT):
            raise RuntimeError(f"a trainer gave no answer within {_LIMIT:.0f} s")
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError("the process of a trainer died; is there enough memory?") from None
        if isinstance(answer, RuntimeError):
            raise answer
        return answer


def _serve(
    pipe: Connection, maker: Callable[[TrainSettings], Any], settings: TrainSettings, steps: int, threads: int
) -> None:
    """Answers with the title of the trainer's loss, then with loss and seconds of each step it is asked for."""
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        trainer = maker(settings)
        stream = ClipTask(settings, World(0, 1, resolve_device("auto"))).batches(0, 0)
        batches = [batch for _, batch in itertools.islice(stream, steps)]
        del stream
        pipe.send(getattr(trainer, "name", "own"))
        while True:
            number = pipe.recv()
            losses: list[float] = []
            run = {"step": lambda: losses.append(trainer.step(number, batches[number]))}  # noqa: B023
            ((seconds,),) = harness.interleave(run, rounds=1, warmup=0, clock="wall").values()
            pipe.send((losses[0], seconds))
    except EOFError:  # the other end is closed: done
        pass
    except Exception:
        pipe.send(RuntimeError(f"a trainer failed:\n{traceback.format_exc()}"))
