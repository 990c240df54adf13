"""One step of the CLIP stage: this trainer, against the same recipe in a plain loop and in open_clip's own trainer.

python -m benchmarks.bench_clip_step --batch 64 --steps 6

`ours` is the step of `training.loop`. `plain` is the loop one writes by hand: torch's modules, open_clip's loss where
it is installed (else its definition), AdamW, clipping. `open_clip_train` is `train_one_epoch` of the package of that
name, with `--accum-freq` where the batch is cut. Both are given our tower; `open_clip_timm` is the same trainer with
the tower that open_clip has for this network, timm's. All start from the same weights and see the same batches, each
in a process of its own, one at a time; their losses must agree. `--memory` measures peak memory over batch sizes at one
size of forward pass, `--overhead` the share of time that the real loop, with its data, spends outside of forward,
backward and optimizer.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import clip_recipe, clip_trainers, harness
from benchmarks.clip_trainers import world
from benchmarks.step_workers import StepWorker
from llm2clip.settings import TrainSettings
from llm2clip.training.clip_task import ClipTask
from llm2clip.training.kept_memory import kept_memory
from llm2clip.training.loop import train
from llm2clip.training.metrics import read_metrics
from llm2clip.training.state import TrainState

LOSS_LIMIT = {"fp32": 1e-3, "bf16": 5e-2}


def make(name: str, settings: TrainSettings) -> Any:
    """A trainer that begins with the weights of all others."""
    torch.manual_seed(0)
    return clip_trainers.MAKERS[name](settings)


def memory_setup(name: str, settings: TrainSettings, size: int) -> Callable[[], float]:
    """What `harness.peak_mib` measures: a step of `size` images, after one that makes the optimizer's states."""
    run = replace(settings.run, batch_size=size)
    trainer = make(name, replace(settings, run=run))
    batches = ClipTask(replace(settings, run=run), world()).batches(0, 0)
    _, batch = next(batches)
    trainer.step(0, batch[: settings.run.micro_batch or size])
    return lambda: trainer.step(1, batch)


def overhead(settings: TrainSettings, folder: Path, rounds: int) -> dict[str, float]:
    """The real loop, with its data: time of a step, share of it that is not computing, and what its log says."""
    computed = 0.0
    marks: list[float] = []
    backward, update = TrainState.backward, TrainState.update

    def timed(method: Callable[..., Any], last: bool) -> Callable[..., Any]:
        def call(self: TrainState, *inputs: Any) -> Any:
            nonlocal computed
            begin = time.perf_counter()
            try:
                return method(self, *inputs)
            finally:
                end = time.perf_counter()
                if marks:
                    computed += end - begin
                if last:  # from the end of the first step on
                    marks.append(end)

        return call

    TrainState.backward, TrainState.update = timed(backward, False), timed(update, True)  # type: ignore[method-assign]
    try:
        run = replace(settings.run, out=str(folder), steps=rounds + 1, log_every=min(10, rounds))
        with kept_memory(world().device):  # as `llm2clip train` does
            train(ClipTask(replace(settings, run=run), world()), run, settings.optim, world())
    finally:
        TrainState.backward, TrainState.update = backward, update  # type: ignore[method-assign]
    whole = marks[-1] - marks[0]
    logged = read_metrics(folder / "metrics.jsonl")[-1]
    shown = ("data_wait", "tflops", "mfu", "peak_memory_mib")
    log = {key: float(logged[key]) for key in shown if key in logged}
    return {"step_ms": 1e3 * whole / rounds, "outside_percent": 100 * (1 - computed / whole), **log}


def compare(options: argparse.Namespace, settings: TrainSettings) -> list[dict[str, Any]]:
    """Interleaved steps of every trainer on the same batches; ends the program where losses differ."""
    names = [name for name in options.providers if _usable(name, options.tower)]
    losses: dict[str, list[float]] = {name: [] for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(StepWorker(clip_trainers.MAKERS[name], settings, options.steps + 1))
            for name in names
        }
        for number in range(options.steps + 1):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                loss, seconds = workers[name].step(number)
                losses[name].append(loss)
                if number > 0:  # the first step warms up
                    times[name].append(seconds)
            print(
                f"step {number}:", {name: f"{values[-1]:.5f}" for name, values in losses.items()}, flush=True
            )
    wrong = {
        name: values
        for name, values in losses.items()
        if any(
            abs(a - b) > LOSS_LIMIT[options.dtype] * abs(b)
            for a, b in zip(values, losses["plain"], strict=True)
        )
    }
    if wrong:
        sys.exit(f"losses differ from those of plain {losses['plain']}: {wrong}")
    rows = []
    for name, worker in workers.items():
        row: dict[str, Any] = {"provider": name, "loss": worker.title}
        row |= {key: round(value, 1) for key, value in harness.summarize(times[name]).items()}
        row["images_per_s"] = round(options.batch * len(times[name]) / sum(times[name]), 1)
        row["speedup_over_plain"] = round(harness.ratio_to(times["plain"], times[name]), 3)
        row["losses"] = " ".join(f"{value:.5f}" for value in losses[name])
        rows.append(row)
    return rows


def _usable(name: str, tower: str) -> bool:
    """Whether the packages of a trainer are here, and it has such a tower."""
    if name == "open_clip_timm" and tower != "efficientnet-lite0":
        return False
    needs = clip_trainers.NEEDS.get(name, ())
    reason = harness.Provider(name, lambda: lambda: None, needs=needs).unavailable("cpu")
    if reason:
        print(f"{name} is left out: {reason}", flush=True)
    return not reason


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    clip_recipe.add_options(parser)
    parser.add_argument(
        "--providers", nargs="+", default=list(clip_trainers.MAKERS), choices=clip_trainers.MAKERS
    )
    parser.add_argument(
        "--memory", type=int, nargs="*", default=[], help="batch sizes whose peak memory is measured"
    )
    parser.add_argument(
        "--overhead", type=int, default=0, help="steps of the real loop whose overhead is measured"
    )
    parser.add_argument(
        "--loop-only", action="store_true", help="--overhead alone, for batches too large to compare"
    )
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    if options.loop_only and not options.overhead:
        parser.error("--loop-only needs --overhead, the number of steps")
    if "plain" not in options.providers:
        parser.error("--providers must name plain, to which the others are compared")
    count = max(options.batch * (options.steps + 1), *options.memory, options.batch)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths, source = clip_recipe.shards(folder / "data", options.data, count)
        clip_recipe.random_store(folder / "store", paths, options.llm_dim, count)
        settings = clip_recipe.settings(options, folder, paths, count)
        common = {
            key: getattr(options, key) for key in ("batch", "micro_batch", "tower", "image_size", "dtype")
        }
        common |= {"workers": options.workers, "llm_dim": options.llm_dim, "data": source}
        rows: list[dict[str, Any]]
        rows = [{"provider": "ours"}] if options.loop_only else compare(options, settings)
        rows = [{**row, **common} for row in rows]
        for row in rows:
            if options.memory:
                peaks = {
                    size: harness.peak_mib(memory_setup, row["provider"], copy.deepcopy(settings), size)
                    for size in options.memory
                }
                row["peak_mib"] = " ".join(f"{size}:{peak:.0f}" for size, peak in peaks.items())
                row["memory_growth"] = round(peaks[options.memory[-1]] / peaks[options.memory[0]], 3)
            if options.overhead and row["provider"] == "ours":
                found = overhead(settings, folder / "overhead", options.overhead)
                row |= {f"loop_{key}": round(value, 3) for key, value in found.items()}
            print(row, flush=True)
        if not options.no_save:
            suite = "clip_loop" if options.loop_only else "clip_step"
            print(harness.save(f"{suite}_{options.tower}_{options.dtype}", rows))


if __name__ == "__main__":
    main()
