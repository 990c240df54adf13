"""All that a training step changes, in one object: weights, optimizer, their average, the scale of the loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip.errors import TrainingError
from llm2clip.settings import OptimSettings, RunSettings
from llm2clip.training import checkpoint, flops, gradient_cache, optim, parallel, precision, sharding
from llm2clip.training.ema import WeightAverage
from llm2clip.training.task import Task
from llm2clip.training.world import World

# samples that are run once more, at the start, to count their FLOPs
_COUNTED = 8


class TrainState:
    """The state of a run on this rank, from the newest checkpoint on.

    Args:
        task: its module is spread over the ranks.
        run, settings: of the run and its optimizer.
        world: this rank.

    Attributes:
        at: where the run stands; the loop moves it on.
        optimizer: over the task's groups.
        autocast: context of every forward.

    Raises:
        ConfigError, CheckpointError: as `optim.build_optimizer` and `checkpoint.load`.
    """

    def __init__(self, task: Task, run: RunSettings, settings: OptimSettings, world: World) -> None:
        self._task, self._run, self._settings, self._world = task, run, settings, world
        self._out = Path(run.out)
        optim.freeze(task.groups(), settings.freeze)
        self._sharded = run.parallel == "fsdp" and world.size > 1 and not task.sharded
        # what the main rank evaluates and exports with: a sharded module needs all ranks in every forward
        self._plain = copy.deepcopy(task.module).cpu() if self._sharded and world.is_main else None
        self.module = task.module if task.sharded else parallel.spread(task.module, world, run.parallel)
        self.optimizer = optim.build_optimizer(task.groups(), settings)
        self.autocast = precision.autocast_of(run.precision, world.device, self.module)
        self._scaler = precision.scaler_of(run.precision, world.device)
        self._average = WeightAverage(task.module, settings.ema) if settings.ema else None
        # a rank that lost samples may be left with one chunk where the others have several
        cut = task.token_budget > 0 or 0 < run.micro_batch < math.ceil(run.batch_size / world.size)
        self._always_cache = world.size > 1 and cut
        self.at = checkpoint.Progress()
        if newest := checkpoint.latest(self._out):
            self.at = checkpoint.load(
                newest, task.module, self.optimizer, average=self._average, scaler=self._scaler
            )

    def count_flops(self, samples: Sequence[Any]) -> float:
        """FLOPs of one sample (flops.flops_per_sample), from the first few; 0 where they are not to be counted."""
        if self._run.peak_tflops == 0 or self._task.sharded:
            return 0.0  # ranks of a sharded task may cut these few samples into different numbers of forwards
        # one chunk: ranks of a sharded module must make equally many
        chunks = self._task.chunks(samples[:_COUNTED], self._run.micro_batch)[:1]
        return flops.flops_per_sample(self._task.module, chunks, self._world.device, self.autocast)

    def backward(self, chunks: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Gradients of one batch over all ranks, clipped; the loss, its metrics, and the norm before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        method = gradient_cache.accumulate if self._task.additive else gradient_cache.backward
        sharded = self._sharded or self._task.sharded
        loss, metrics = method(
            self.module,
            chunks,
            self._task.loss,
            self._world.device,
            self.autocast,
            always_cache=self._always_cache,
            passes=self._world.max(len(chunks)) if sharded and self._always_cache else 0,
            scaler=self._scaler,
        )
        if self._task.additive:
            loss = self._world.mean(loss)
        if self._task.sharded:
            sharding.average_gradients(self.optimizer, self._world)
        parallel.average_scalars(self.module, self._world)
        parallel.unscale(self.module, self.optimizer, self._scaler)
        return loss, metrics, optim.clip_gradients(self.optimizer, self._settings.grad_clip)

    def update(self, loss: float, norm: float, samples: Sequence[Any]) -> None:
        """Take the optimizer's step; where fp16 overflowed, leave it out and scale the loss less from then on.

        Raises:
            TrainingError: loss or gradients are not finite; nothing was changed.
        """
        finite = math.isfinite(loss) and math.isfinite(norm)
        overflowed = self._scaler.is_enabled() and math.isfinite(loss)
        if not finite and not (overflowed and self._scaler.get_scale() > precision.SMALLEST_SCALE):
            raise self._not_finite(loss, norm, self._task.names(samples))
        if finite:
            self._scaler.step(self.optimizer)
            self._task.after_step()
            if self._average is not None:
                self._average.update(self.at.step + 1)
        scale = self._scaler.get_scale()
        self._scaler.update()
        if not finite and self._scaler.get_scale() >= scale:  # the scaler has not seen what overflowed
            self._scaler.update(scale * self._scaler.get_backoff_factor())

    def extra_metrics(self) -> dict[str, float]:
        """The scale of an fp16 loss, where there is one."""
        return {"loss_scale": float(self._scaler.get_scale())} if self._scaler.is_enabled() else {}

    def save(self) -> None:
        """Write a checkpoint; all ranks return once it is complete."""
        checkpoint.save(
            self._out,
            self._task.module,
            self.optimizer,
            self.at,
            self._run.keep_checkpoints,
            average=self._average,
            scaler=self._scaler,
            write=self._world.is_main,
        )
        self._world.barrier()

    @contextmanager
    def as_exported(self) -> Iterator[None]:
        """Inside the block the task's module has the weights that the run is judged by, whole on the main rank.

        All ranks enter together.
        """
        averaged = self._average is not None and self._settings.ema_export
        with self._average.applied() if averaged and self._average else nullcontext(), self._whole():
            yield

    @contextmanager
    def _whole(self) -> Iterator[None]:
        if not self._sharded:
            yield
            return
        own = self._task.module
        parallel.copy_whole(own, self._plain)
        if self._plain is not None:
            self._task.module = self._plain.to(self._world.device)
        try:
            yield
        finally:
            self._task.module = own
            if self._plain is not None:
                self._plain.cpu()

    def _not_finite(self, loss: float, norm: float, names: list[str]) -> TrainingError:
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        newest = checkpoint.latest(self._out)
        kept = f"the last good checkpoint is {newest}" if newest else "no checkpoint was written yet"
        return TrainingError(
            f"step {self.at.step + 1}: loss {loss} with gradient norm {norm} is not finite. The optimizer step was "
            f"not taken; {kept}. Batch: {shown}. Look at these samples, lower optim.lr, or use run.precision=fp32."
        )


def as_numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    """0-dim tensors as numbers, with one transfer from the device."""
    stacked = torch.stack([value.detach().float() for value in values.values()])
    return dict(zip(values, stacked.tolist(), strict=True))
