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
from llm2clip.config import dump_yaml
from llm2clip.data.loader import Position
from llm2clip.errors import CheckpointError, ConfigError, TrainingError
from llm2clip.files import write_json, write_text
from llm2clip.settings import OptimSettings, RunSettings
from llm2clip.training import checkpoint, gradient_cache, optim
from llm2clip.training.metrics import MetricsLog
from llm2clip.training.world import World


class Task(Protocol):
    """What a stage brings to the loop.

    Attributes:
        title: name shown beside the progress.
        settings: the resolved settings, saved with the run.
        module: maps a chunk to named outputs (gradient_cache.backward); moved to the device by the task.
        batches_per_epoch: global batches of one epoch.
    """

    title: str
    settings: Any
    module: nn.Module
    batches_per_epoch: int

    def groups(self) -> Mapping[str, optim.NamedParameters]:
        """Parameter groups by name, in a fixed order."""
        ...

    def batches(self, epoch: int, batch: int) -> Iterator[tuple[Position, Sequence[Any]]]:
        """Endless `(position after the batch, samples of this rank)` from a position on."""
        ...

    def chunks(self, samples: Sequence[Any], size: int) -> Sequence[Any]:
        """The samples as inputs of `module`, at most `size` samples each (0: one chunk)."""
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

    The run resumes from the newest checkpoint in `run.out`, at the exact sample. Randomness is seeded anew from
    (seed, step, rank) at each step, so a resumed run equals an uninterrupted one.

    Raises:
        ConfigError: `run.out` missing, or no full batch in the data.
        TrainingError: the loss or a gradient is not finite; nothing is written over the last good checkpoint.
    """
    out = _prepare(task, run, world)
    module: nn.Module = task.module
    optimizer = optim.build_optimizer(task.groups(), settings)
    at = checkpoint.Progress()
    if newest := checkpoint.latest(out):
        if not run.resume:
            raise ConfigError(
                f"run.out: {out} holds a run already and run.resume is false; choose another directory"
            )
        at = checkpoint.load(newest, task.module, optimizer)
    if world.size > 1:
        ids = [world.device.index] if world.device.type == "cuda" else None
        module = nn.parallel.DistributedDataParallel(task.module, device_ids=ids)

    total = run.steps if run.steps is not None else math.ceil(run.epochs * task.batches_per_epoch)
    autocast = _autocast(run.precision, world.device)
    log = MetricsLog(out, at.step, tensorboard=run.tensorboard, enabled=world.is_main)
    bar = display.Progress(total, task.title, "steps", initial=at.step, enabled=world.is_main)
    window = _Window()
    with _stop_requested() as stopping, bar:
        batches = task.batches(at.epoch, at.batch) if at.step < total else iter(())
        while at.step < total:
            position, samples = window.fetch(batches)
            rate = optim.set_learning_rate(optimizer, at.step, total, settings)
            torch.manual_seed(_step_seed(run.seed, at.step, world.rank))
            optimizer.zero_grad(set_to_none=True)
            module.train()
            chunks = task.chunks(samples, run.micro_batch)
            loss, metrics = gradient_cache.backward(module, chunks, task.loss, world.device, autocast)
            norm = optim.clip_gradients(optimizer, settings.grad_clip)
            _require_finite(loss, norm, task.names(samples), at.step, newest=checkpoint.latest(out))
            optimizer.step()
            task.after_step()

            at = window.advance(at, position, len(samples) * world.size)
            bar.update(1, note=f"loss {loss.item():.4f}")
            stop = world.any(stopping())
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
                raise SystemExit(128 + signal.SIGTERM)

    module.eval()
    result = out / "result"
    if not (result / "DONE").exists():
        final = task.evaluate()
        if world.is_main:
            if final:
                log.write(at.step, final)
            task.export(result)
            write_json(
                out / "summary.json",
                {"steps": at.step, "seconds": at.seconds, "samples": at.samples, **final},
            )
            write_text(result / "DONE", "complete\n")
        world.barrier()
    log.close()
    return result


def is_finished(out: Path) -> bool:
    """True when the run in `out` ended and its result was written."""
    return (out / "result" / "DONE").exists()


class _Window:
    """Rates between two logged lines."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._waited, self._samples = 0.0, 0

    def fetch(self, batches: Iterator[tuple[Position, Sequence[Any]]]) -> tuple[Position, Sequence[Any]]:
        begin = time.perf_counter()
        item = next(batches)
        self._waited += time.perf_counter() - begin
        return item

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


def _prepare(task: Task, run: RunSettings, world: World) -> Path:
    if not run.out:
        raise ConfigError("run.out: expected the directory of this run, for example run.out=runs/first")
    if task.batches_per_epoch < 1:
        raise ConfigError(
            f"run.batch_size {run.batch_size} is larger than the training data; lower it or add data"
        )
    out = Path(run.out)
    if world.is_main:
        write_text(out / "config.yaml", dump_yaml(task.settings))
    world.barrier()
    return out


def _autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    if precision == "fp32" or (precision == "auto" and not _multiplies_bf16(device)):
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_amx_tile_supported())


def _step_seed(seed: int, step: int, rank: int) -> int:
    # distinct for every (step, rank) of a run; torch takes 64 bits
    return (seed * 1_000_003 + step * 8191 + rank) % (1 << 63)


def _require_finite(loss: Tensor, norm: Tensor, names: list[str], step: int, *, newest: Path | None) -> None:
    # one transfer for both, before the optimizer could spread the damage
    if torch.isfinite(torch.stack([loss.float(), norm.float().to(loss.device)])).all().item():
        return
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    kept = f"the last good checkpoint is {newest}" if newest else "no checkpoint was written yet"
    raise TrainingError(
        f"step {step + 1}: loss {loss.item()} with gradient norm {norm.item()} is not finite. The optimizer step was "
        f"not taken; {kept}. Batch: {shown}. Look at these samples, lower optim.lr, or use run.precision=fp32."
    )


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """A function that tells whether SIGTERM or SIGINT came; the second signal ends the process at once."""
    received: list[int] = []

    def remember(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    try:
        previous = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: signals are somebody else's
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def load_latest(out: Path, module: nn.Module) -> int:
    """Load the newest checkpoint's tensors of a run into `module`; returns its step.

    Raises:
        CheckpointError: the run has no checkpoint.
    """
    newest = checkpoint.latest(out)
    if newest is None:
        raise CheckpointError(f"{out} has no checkpoint yet")
    checkpoint.load_trainable(newest, module)
    return int(newest.name.split("_")[1].split(".")[0])
