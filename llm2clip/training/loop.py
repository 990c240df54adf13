"""The training loop of both stages, one page. What differs between the stages is the task."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llm2clip import progress as display
from llm2clip.data.loader import Position
from llm2clip.errors import ConfigError, TrainingError, UserError
from llm2clip.files import write_json, write_text
from llm2clip.settings import OptimSettings, RunSettings
from llm2clip.training import checkpoint, directory, gradient_cache, optim
from llm2clip.training.faster_precision import faster_precision
from llm2clip.training.metrics import MetricsLog
from llm2clip.training.world import World


class Task(Protocol):
    """What a stage brings to the loop.

    Attributes:
        title: name shown beside the progress.
        settings: the resolved settings, saved with the run.
        module: maps a chunk to named outputs (gradient_cache.backward); moved to the device by the task.
        samples: training samples of one epoch.
        token_budget: tokens of a chunk; 0: `run.micro_batch` cuts the batch by samples.
    """

    title: str
    token_budget: int
    settings: Any
    module: nn.Module
    samples: int

    def groups(self) -> Mapping[str, optim.NamedParameters]:
        """Parameter groups by name, in a fixed order."""
        ...

    def batches(self, epoch: int, batch: int) -> Iterator[tuple[Position, Sequence[Any]]]:
        """Endless `(position after the batch, samples of this rank)` from a position on."""
        ...

    def chunks(self, samples: Sequence[Any], size: int) -> Sequence[Any]:
        """The samples as inputs of `module`: at most `size` each (0: one chunk), or by `token_budget`."""
        ...

    def loss(self, outputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (0-dim) over the batch of all ranks, and 0-dim metrics."""
        ...

    def after_step(self) -> None:
        """Called after each optimizer step (clamping the logit scale)."""
        ...

    def names(self, samples: Sequence[Any]) -> list[str]:
        """Keys of the samples, for error messages."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Metrics on held-out data; empty when there is none."""
        ...

    def export(self, path: Path) -> None:
        """Write the result for users; called once, on the main rank, at the end."""
        ...


def train(task: Task, run: RunSettings, settings: OptimSettings, world: World) -> Path:
    """Train `task` and return the directory of its result, `run.out/result`.

    The run resumes from the newest checkpoint in `run.out`, at the exact sample; a finished one is left alone.
    Randomness is seeded anew from (seed, step, rank) at each step, so a resumed run equals an uninterrupted one.

    Raises:
        ConfigError: `run.out` missing, or no full batch in the data.
        CheckpointError: the newest checkpoint is damaged or of another model.
        TrainingError: the loss or a gradient is not finite; nothing is written over the last good checkpoint.
        SystemExit: 143 after SIGTERM, 130 after SIGINT; the step was finished and a checkpoint written.
    """
    if (result := directory.finished(task.settings, run)) is not None:
        return result
    total = _total_steps(task, run)
    out = Path(run.out)
    world.barrier()  # before the main rank writes what the others have just looked at
    if world.is_main:
        directory.prepare(task.settings, run)
    module: nn.Module = task.module
    optimizer = optim.build_optimizer(task.groups(), settings)
    at = checkpoint.Progress()
    if newest := checkpoint.latest(out):
        at = checkpoint.load(newest, task.module, optimizer)
    if world.size > 1:
        ids = [world.device.index] if world.device.type == "cuda" else None
        # no buffer is exchanged: ranks may differ in the number of forwards of a gradient cache
        module = nn.parallel.DistributedDataParallel(task.module, device_ids=ids, broadcast_buffers=False)

    autocast = _autocast(run.precision, task.module, world.device)
    # a rank that lost samples may be left with one chunk where the others have several
    cut = task.token_budget > 0 or 0 < run.micro_batch < math.ceil(run.batch_size / world.size)
    always_cache = world.size > 1 and cut
    log = MetricsLog(out, at.step, tensorboard=run.tensorboard, enabled=world.is_main)
    bar = display.Progress(total, task.title, "steps", initial=at.step, enabled=world.is_main)
    window = _Window()
    with _stop_requested() as stopping, bar:
        batches = task.batches(at.epoch, at.batch) if at.step < total else iter(())
        while at.step < total:
            position, samples = window.fetch(batches, world)
            rate = optim.set_learning_rate(optimizer, at.step, total, settings)
            torch.manual_seed(_step_seed(run.seed, at.step, world.rank))
            optimizer.zero_grad(set_to_none=True)
            module.train()
            chunks = task.chunks(samples, run.micro_batch)
            loss, metrics = gradient_cache.backward(
                module, chunks, task.loss, world.device, autocast, always_cache=always_cache
            )
            norm = optim.clip_gradients(optimizer, settings.grad_clip)
            _require_finite(loss, norm, task.names(samples), at.step, out)
            optimizer.step()
            task.after_step()

            at = window.advance(at, position, len(samples) * world.size)
            bar.update(1, note=f"loss {loss.item():.4f}")
            stop = world.max(stopping())
            if at.step % run.log_every == 0 or at.step == total:
                values = {"loss": loss, **metrics, "grad_norm": norm}
                log.write(
                    at.step, {k: float(v) for k, v in values.items()} | {"lr": rate} | window.rates(world)
                )
            if run.eval_every and at.step % run.eval_every == 0 and at.step < total:
                log.write(at.step, task.evaluate())
            if stop or at.step == total or at.step % run.save_every == 0:
                if world.is_main:
                    checkpoint.save(out, task.module, optimizer, at, run.keep_checkpoints)
                world.barrier()
            if stop:
                raise SystemExit(128 + stop)

    module.eval()
    final = task.evaluate()
    if world.is_main:
        log.write(at.step, final)
        task.export(out / directory.RESULT)
        summary = {"steps": at.step, "seconds": at.seconds, "samples": at.samples, **final}
        write_json(out / "summary.json", summary)
        write_text(out / directory.RESULT / directory.DONE, "complete\n")
    world.barrier()
    log.close()
    return out / directory.RESULT


class _Window:
    """Rates between two logged lines."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._waited, self._samples = 0.0, 0

    def fetch(
        self, batches: Iterator[tuple[Position, Sequence[Any]]], world: World
    ) -> tuple[Position, Sequence[Any]]:
        begin = time.perf_counter()
        while True:
            failure: UserError | None = None
            try:
                position, samples = next(batches)
            except UserError as error:
                failure, samples = error, ()
            # every rank needs samples for the loss; all skip a batch of which one rank can use none
            worst = world.max(2 if failure else 0 if samples else 1)
            if worst == 0:
                self._waited += time.perf_counter() - begin
                return position, samples
            if worst == 2:
                raise failure or TrainingError("another rank cannot go on (see its error); this one ends too")

    def advance(self, at: checkpoint.Progress, position: Position, samples: int) -> checkpoint.Progress:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._samples += samples
        return checkpoint.Progress(
            at.step + 1, position.epoch, position.batch, at.samples + samples, at.seconds + seconds
        )

    def rates(self, world: World) -> dict[str, float]:
        elapsed = time.perf_counter() - self._start
        values = {"samples_per_second": self._samples / elapsed, "data_wait": self._waited / elapsed}
        if world.device.type == "cuda":
            values["peak_memory_mib"] = torch.cuda.max_memory_allocated(world.device) / 2**20
        self._start, self._waited, self._samples = time.perf_counter(), 0.0, 0
        return values


def _total_steps(task: Task, run: RunSettings) -> int:
    per_epoch = task.samples // run.batch_size
    if per_epoch < 1:
        raise ConfigError(
            f"run.batch_size: one batch of {run.batch_size} needs more than the {task.samples} training samples "
            "there are; lower it or add data"
        )
    return run.steps if run.steps is not None else math.ceil(run.epochs * per_epoch)


def _autocast(
    precision: str, module: nn.Module, device: torch.device
) -> Callable[[], AbstractContextManager[Any]]:
    if precision == "auto":
        precision = faster_precision(module, device)
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


def _step_seed(seed: int, step: int, rank: int) -> int:
    # distinct for every (step, rank) of a run; torch takes 64 bits
    return (seed * 1_000_003 + step * 8191 + rank) % (1 << 63)


def _require_finite(loss: Tensor, norm: Tensor, names: list[str], step: int, out: Path) -> None:
    # one transfer for both, before the optimizer could spread the damage
    if torch.isfinite(torch.stack([loss.float(), norm.float().to(loss.device)])).all().item():
        return
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    newest = checkpoint.latest(out)
    kept = f"the last good checkpoint is {newest}" if newest else "no checkpoint was written yet"
    raise TrainingError(
        f"step {step + 1}: loss {loss.item()} with gradient norm {norm.item()} is not finite. The optimizer step was "
        f"not taken; {kept}. Batch: {shown}. Look at these samples, lower optim.lr, or use run.precision=fp32."
    )


@contextmanager
def _stop_requested() -> Iterator[Callable[[], int]]:
    """A function that gives the number of a SIGTERM or SIGINT that came, else 0; the second one ends at once."""
    received: list[int] = []

    def remember(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    try:
        previous = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: signals are somebody else's
        yield lambda: 0
        return
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
