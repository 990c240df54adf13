"""The training loop of both stages, one page. What differs between the stages is the task."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from llm2clip import progress as display
from llm2clip.errors import ConfigError
from llm2clip.files import write_json, write_text
from llm2clip.settings import OptimSettings, RunSettings
from llm2clip.training import directory
from llm2clip.training.flops import peak_tflops
from llm2clip.training.meter import Meter
from llm2clip.training.metrics import MetricsLog
from llm2clip.training.schedule import set_learning_rate
from llm2clip.training.signals import exit_status, stop_requested
from llm2clip.training.state import TrainState, as_numbers
from llm2clip.training.task import Task
from llm2clip.training.trackers import open_trackers
from llm2clip.training.world import World


def train(task: Task, run: RunSettings, settings: OptimSettings, world: World) -> Path:
    """Train `task` and return the directory of its result, `run.out/result`.

    The run resumes from the newest checkpoint in `run.out`, at the exact sample; a finished one is left alone.
    Randomness is seeded anew from (seed, step, rank) at each step, so a resumed run equals an uninterrupted one.

    Raises:
        ConfigError: `run.out` missing, or no full batch in the data.
        CheckpointError: the newest checkpoint is damaged or of another model.
        TrainingError: the loss or a gradient is not finite; nothing is written over the last good checkpoint.
        SystemExit: 143 after SIGTERM, 130 after SIGINT, 0 after SIGUSR1; the step was finished and a checkpoint
            written.
    """
    if (result := directory.finished(task.settings, run)) is not None:
        return result
    total = _total_steps(task, run)
    out = Path(run.out)
    world.barrier()  # before the main rank writes what the others have just looked at
    if world.is_main:
        directory.prepare(task.settings, run)
    state = TrainState(task, run, settings, world)
    trackers = open_trackers(run, task.settings, state.at.step) if world.is_main else []
    log = MetricsLog(out, state.at.step, trackers=trackers, enabled=world.is_main)
    bar = display.Progress(total, task.title, "steps", initial=state.at.step, enabled=world.is_main)
    meter = Meter(world, peak_tflops(world.device) if run.peak_tflops is None else run.peak_tflops)
    with stop_requested() as stopping, bar:
        batches = task.batches(state.at.epoch, state.at.batch) if state.at.step < total else iter(())
        while state.at.step < total:
            position, samples = meter.fetch(batches)
            if meter.flops_per_sample is None:
                meter.flops_per_sample = state.count_flops(samples)
            rate = set_learning_rate(state.optimizer, state.at.step, total, settings)
            torch.manual_seed(step_seed(run.seed, state.at.step, world.rank))
            state.module.train()
            loss, metrics, norm = state.backward(task.chunks(samples, run.micro_batch))
            values = as_numbers({"loss": loss, **metrics, "grad_norm": norm})
            state.update(values["loss"], values["grad_norm"], samples)

            state.at = meter.advance(state.at, position, len(samples) * world.size)
            bar.update(1, note=f"loss {values['loss']:.4f}")
            stop, step = world.max(stopping()), state.at.step
            if step % run.log_every == 0 or step == total:
                log.write(step, values | {"lr": rate} | state.extra_metrics() | meter.rates())
            with meter.paused():
                if run.eval_every and step % run.eval_every == 0 and step < total and not stop:
                    with state.as_exported():
                        log.write(step, task.evaluate())
                if stop or step == total or step % run.save_every == 0:
                    state.save()
            if stop:
                log.close()
                raise SystemExit(exit_status(stop))

    with state.as_exported():
        task.module.eval()
        final = task.evaluate()
        if world.is_main:
            log.write(state.at.step, final)
            task.export(out / directory.RESULT)
    if world.is_main:
        at = state.at
        write_json(
            out / "summary.json", {"steps": at.step, "seconds": at.seconds, "samples": at.samples, **final}
        )
        write_text(out / directory.RESULT / directory.DONE, "complete\n")
    world.barrier()
    log.close()
    return out / directory.RESULT


def _total_steps(task: Task, run: RunSettings) -> int:
    per_epoch = task.samples // run.batch_size
    if per_epoch < 1:
        raise ConfigError(
            f"run.batch_size: one batch of {run.batch_size} needs more than the {task.samples} training samples "
            "there are; lower it or add data"
        )
    return run.steps if run.steps is not None else math.ceil(run.epochs * per_epoch)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of the random numbers of one step on one rank; distinct for every (step, rank) of a run."""
    return (seed * 1_000_003 + step * 8191 + rank) % (1 << 63)  # torch takes 64 bits
