"""How fast a run is: samples a second, the share of time spent waiting for data, FLOPs used, memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

import torch

from llm2clip.data.loader import Position
from llm2clip.errors import TrainingError, UserError
from llm2clip.training.checkpoint import Progress
from llm2clip.training.failures import OtherRankError
from llm2clip.training.world import World

# batches in a row; a rank that can use no sample at all would let the others wait for ever
_MOST_SKIPPED = 100

Samples = TypeVar("Samples", bound=Sized)


class Meter:
    """Rates between two logged lines, over training alone.

    Args:
        world: this rank.
        peak_tflops: what the device computes at best; 0 when unknown.

    Attributes:
        flops_per_sample: forward and backward of one sample; 0 when unknown, None before they are counted.
    """

    def __init__(self, world: World, peak_tflops: float = 0.0) -> None:
        self.flops_per_sample: float | None = None
        self._world, self._peak = world, peak_tflops
        self._last = time.perf_counter()
        self._elapsed = self._waited = 0.0
        self._samples = 0

    def fetch(self, batches: Iterator[tuple[Position, Samples]]) -> tuple[Position, Samples]:
        """The next batch of which every rank has samples.

        Raises:
            UserError: this rank's data cannot be used or has ended, or too many batches in a row were left out.
            OtherRankError: another rank's cannot.
        """
        begin = time.perf_counter()
        for _ in range(_MOST_SKIPPED):
            failure: UserError | None = None
            try:
                position, samples = next(batches)
            except UserError as error:
                failure = error
            except StopIteration:
                failure = TrainingError("the data of this rank ended before the run did")
            # every rank needs samples for the loss; all skip a batch of which one rank can use none
            worst = self._world.max(2 if failure else 0 if len(samples) else 1)
            if worst == 0:
                self._waited += time.perf_counter() - begin
                return position, samples
            if worst == 2:
                raise failure or OtherRankError("another rank cannot go on")
        raise TrainingError(
            f"{_MOST_SKIPPED} batches in a row were left out, since a rank could use none of its samples; "
            "`llm2clip data check` names what is wrong with them"
        )

    def advance(self, at: Progress, position: Position, samples: int) -> Progress:
        """Count a step with `samples` over all ranks; where the run stands after it."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._elapsed += seconds
        self._samples += samples
        return Progress(
            at.step + 1, position.epoch, position.batch, at.samples + samples, at.seconds + seconds
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in the block (evaluation, saving) is no training time."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._last += time.perf_counter() - begin

    def rates(self) -> dict[str, float]:
        """The rates since the last call.

        `samples_per_second` over all ranks; `data_wait`, a share of the time; `peak_memory_mib` of this rank, of the
        GPU or of the process; `tflops` of one device, without recomputation, and `mfu`, its share of the peak.
        """
        elapsed = max(self._elapsed, 1e-9)
        values = {"samples_per_second": self._samples / elapsed, "data_wait": self._waited / elapsed}
        if self._world.device.type == "cuda":
            values["peak_memory_mib"] = torch.cuda.max_memory_allocated(self._world.device) / 2**20
        else:
            values["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        if self.flops_per_sample:
            per_device = values["samples_per_second"] / self._world.size
            values["tflops"] = self.flops_per_sample * per_device / 1e12
            if self._peak:
                values["mfu"] = values["tflops"] / self._peak
        self._elapsed = self._waited = 0.0
        self._samples = 0
        return values
