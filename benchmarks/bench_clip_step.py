"""One step of the CLIP stage: this trainer, against the same recipe in a plain loop and in open_clip's own trainer.

python -m benchmarks.bench_clip_step --batch 64 --steps 6

`ours` is the step of `training.loop`. `plain` is the loop one writes by hand: torch's modules, open_clip's loss where
it is installed (else its definition), AdamW, clipping. `open_clip_train` is `train_one_epoch` of the package of that
name, with `--accum-freq` where the batch is cut. All start from the same weights and see the same batches; their losses
must agree. `--memory` measures peak memory over batch sizes at one size of forward pass, `--overhead` the share of time
that the real loop, with its data, spends outside of forward, backward and optimizer.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import clip_recipe, harness
from llm2clip.data.images import normalize_pixels
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.settings import OptimSettings, TrainSettings
from llm2clip.training import optim
from llm2clip.training.clip_data import ImageTexts
from llm2clip.training.clip_task import ClipTask
from llm2clip.training.loop import train
from llm2clip.training.precision import autocast_of
from llm2clip.training.schedule import set_learning_rate
from llm2clip.training.state import TrainState, as_numbers
from llm2clip.training.world import World, resolve_device

LOSS_LIMIT = {"fp32": 1e-3, "bf16": 5e-2}


def world() -> World:
    """This process alone, on the GPU where there is one."""
    return World(0, 1, resolve_device("auto"))


class Ours:
    """The step of this trainer, as `training.loop` takes it."""

    def __init__(self, settings: TrainSettings) -> None:
        self.task = ClipTask(settings, world())
        self.settings = settings
        self.state = TrainState(self.task, settings.run, settings.optim, world())

    def step(self, number: int, batch: ImageTexts) -> float:
        """One step on a batch; returns its loss."""
        run, state = self.settings.run, self.state
        set_learning_rate(state.optimizer, number, 10**6, self.settings.optim)
        state.module.train()
        loss, metrics, norm = state.backward(self.task.chunks(batch, run.micro_batch))
        values = as_numbers({"loss": loss, **metrics, "grad_norm": norm})
        state.update(values["loss"], values["grad_norm"], batch)
        return values["loss"]


class Written(nn.Module):
    """The same towers in torch's own modules: `model(images, embeddings)` -> open_clip's names."""

    def __init__(self, model: LLM2CLIP) -> None:
        super().__init__()
        self.model = model
        self.logit_scale = model.logit_scale  # where open_clip's trainer clamps it

    def forward(self, images: Tensor, embeddings: Tensor) -> dict[str, Tensor]:
        model = self.model
        image = model.visual_projection(model.vision_model(images))
        text = F.normalize(embeddings, dim=-1)
        *blocks, norm, head = model.text_adapter.adaptor
        for block in blocks:
            text = block.forward_plain(text)  # type: ignore[operator]
        return {
            "image_features": F.normalize(image.float(), dim=-1),
            "text_features": F.normalize(head(norm(text)).float(), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


class _Loss(nn.Module):
    """What open_clip's `ClipLoss` computes, where the package is missing."""

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, output_dict: bool = False
    ) -> Any:
        logits = logit_scale * image_features @ text_features.T
        target = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return {"contrastive_loss": loss} if output_dict else loss


def open_clip_loss() -> tuple[nn.Module, str]:
    """open_clip's loss, or its definition; and which."""
    try:
        from open_clip.loss import ClipLoss
    except ImportError:
        return _Loss(), "definition"
    return ClipLoss(), "open_clip"


def written(settings: TrainSettings) -> tuple[Written, torch.optim.Optimizer]:
    """The towers with the weights that ours begin with, and AdamW as open_clip builds it."""
    task = ClipTask(settings, world())
    groups: dict[str, Any] = dict(task.groups())
    options = [
        {key: group[key] for key in ("params", "weight_decay", "lr_scale")}
        for group in optim.build_optimizer(groups, settings.optim).param_groups
    ]
    chosen: OptimSettings = settings.optim
    adamw = torch.optim.AdamW(options, lr=chosen.lr, betas=chosen.betas, eps=chosen.eps)
    return Written(task.model), adamw


def as_floats(batch: ImageTexts, settings: TrainSettings, vision: Any) -> tuple[Tensor, Tensor]:
    """Normalised images and embeddings, as other trainers' loaders give them."""
    assert batch.pixels is not None and batch.embeddings is not None
    return normalize_pixels(batch.pixels, vision.mean, vision.std), batch.embeddings


class Plain:
    """The loop one writes by hand; a batch that is cut is accumulated as in open_clip: all features, then each part."""

    def __init__(self, settings: TrainSettings) -> None:
        self.model, self.optimizer = written(settings)
        self.settings = settings
        self.loss, self.name = open_clip_loss()
        self.autocast = autocast_of(settings.run.precision, world().device)

    def step(self, number: int, batch: ImageTexts) -> float:
        """One step on a batch; returns its loss."""
        images, texts = as_floats(batch, self.settings, self.model.model.vision_model)
        device, size = world().device, self.settings.run.micro_batch or len(batch)
        parts = list(zip(images.to(device).split(size), texts.to(device).split(size), strict=True))
        set_learning_rate(self.optimizer, number, 10**6, self.settings.optim)
        self.model.train()
        self.optimizer.zero_grad()
        if len(parts) == 1:
            with self.autocast():
                outputs = self.model(*parts[0])
            loss = self.loss(**outputs)
            loss.backward()
        else:
            loss = self._accumulated(parts)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.optim.grad_clip)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, 4.6051702)
        return loss.item()

    def _accumulated(self, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        with torch.no_grad(), self.autocast():
            kept = [self.model(*part) for part in parts]
        for number, part in enumerate(parts):
            with self.autocast():
                outputs = self.model(*part)
            features = {}
            for name in ("image_features", "text_features"):
                rows = [k[name] for k in kept]
                rows[number] = outputs[name]
                features[name] = torch.cat(rows)
            loss = self.loss(**features, logit_scale=outputs["logit_scale"])
            loss.backward()
        return loss


class OpenClipTrain:
    """open_clip's own trainer, one "epoch" of one step at a time."""

    name = "open_clip"

    def __init__(self, settings: TrainSettings) -> None:
        from open_clip.loss import ClipLoss
        from open_clip_train.train import train_one_epoch

        self.model, self.optimizer = written(settings)
        self.settings, self._train = settings, train_one_epoch
        self.losses: list[float] = []
        recorded = self.losses

        class Recorded(ClipLoss):  # type: ignore[misc, valid-type]
            """Keeps the last loss of a step, as the trainer only logs it."""

            def forward(self, *inputs: Any, **named: Any) -> Any:
                found = super().forward(*inputs, **named)
                recorded.append((sum(found.values()) if isinstance(found, dict) else found).item())
                return found

        self.loss = Recorded()
        run = settings.run
        self.args = types.SimpleNamespace(
            device=str(world().device), precision="amp_bf16" if run.precision == "bf16" else "fp32", distill=False,
            accum_freq=1, skip_scheduler=False,
            horovod=False, grad_clip_norm=settings.optim.grad_clip, rank=0, local_rank=0, world_size=1,
            log_every_n_steps=10**9, batch_size=run.micro_batch or run.batch_size, wandb=False, log_local=False,
        )  # fmt: skip

    def step(self, number: int, batch: ImageTexts) -> float:
        """One step on a batch; returns its loss."""
        images, texts = as_floats(batch, self.settings, self.model.model.vision_model)
        parts = list(zip(images.split(self.args.batch_size), texts.split(self.args.batch_size), strict=True))

        self.args.accum_freq = len(parts)

        class Batches(list):  # type: ignore[type-arg]
            """A loader as open_clip's trainer takes it."""

            num_batches, num_samples = len(parts), len(batch)

        data = types.SimpleNamespace(dataloader=Batches(parts), set_epoch=lambda epoch: None)
        self._train(
            self.model, {"train": data}, self.loss, number, self.optimizer, None,
            lambda step: set_learning_rate(self.optimizer, number, 10**6, self.settings.optim), None, self.args,
        )  # fmt: skip
        return self.losses[-1]


MAKERS: dict[str, Callable[[TrainSettings], Any]] = {
    "ours": Ours, "plain": Plain, "open_clip_train": OpenClipTrain
}  # fmt: skip


def make(name: str, settings: TrainSettings) -> Any:
    """A trainer that begins with the weights of all others."""
    torch.manual_seed(0)
    return MAKERS[name](settings)


def memory_setup(name: str, settings: TrainSettings, size: int) -> Callable[[], float]:
    """What `harness.peak_mib` measures: a step of `size` images, after one that makes the optimizer's states."""
    run = replace(settings.run, batch_size=size)
    trainer = make(name, replace(settings, run=run))
    batches = ClipTask(replace(settings, run=run), world()).batches(0, 0)
    _, batch = next(batches)
    trainer.step(0, batch[: settings.run.micro_batch or size])
    return lambda: trainer.step(1, batch)


def overhead(settings: TrainSettings, folder: Path, rounds: int) -> dict[str, float]:
    """Shares of the time of the real loop, with its data: waiting for data, and everything but computing."""
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
        run = replace(settings.run, out=str(folder), steps=rounds + 1, log_every=10)
        train(ClipTask(replace(settings, run=run), world()), run, settings.optim, world())
    finally:
        TrainState.backward, TrainState.update = backward, update  # type: ignore[method-assign]
    whole = marks[-1] - marks[0]
    return {"step_ms": 1e3 * whole / rounds, "outside_percent": 100 * (1 - computed / whole)}


def compare(options: argparse.Namespace, settings: TrainSettings) -> list[dict[str, Any]]:
    """Interleaved steps of every trainer on the same batches; ends the program where losses differ."""
    names = [
        name for name in options.providers if name != "open_clip_train" or _importable("open_clip_train")
    ]
    trainers = {name: make(name, settings) for name in names}
    batches = ClipTask(settings, world()).batches(0, 0)
    losses: dict[str, list[float]] = {name: [] for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.steps + 1):
        _, batch = next(batches)
        run = {
            name: functools.partial(_record, losses[name], trainer, number, batch)
            for name, trainer in trainers.items()
        }
        for name, seconds in harness.interleave(run, rounds=1, warmup=0, clock="wall").items():
            if number > 0:  # the first step warms up
                times[name] += seconds
        print(f"step {number}:", {name: f"{values[-1]:.5f}" for name, values in losses.items()}, flush=True)
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
    for name, trainer in trainers.items():
        row: dict[str, Any] = {"provider": name, "loss": getattr(trainer, "name", "own")}
        row |= {key: round(value, 1) for key, value in harness.summarize(times[name]).items()}
        row["images_per_s"] = round(options.batch * len(times[name]) / sum(times[name]), 1)
        row["speedup_over_plain"] = round(harness.ratio_to(times["plain"], times[name]), 3)
        row["losses"] = " ".join(f"{value:.5f}" for value in losses[name])
        rows.append(row)
    return rows


def _record(losses: list[float], trainer: Any, number: int, batch: ImageTexts) -> None:
    losses.append(trainer.step(number, batch))


def _importable(module: str) -> bool:
    reason = harness.Provider(module, lambda: lambda: None, needs=(f"{module}.train",)).unavailable("cpu")
    if reason:
        print(f"{module} is left out: {reason}", flush=True)
    return not reason


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    clip_recipe.add_options(parser)
    parser.add_argument("--providers", nargs="+", default=list(MAKERS), choices=MAKERS)
    parser.add_argument(
        "--memory", type=int, nargs="*", default=[], help="batch sizes whose peak memory is measured"
    )
    parser.add_argument(
        "--overhead", type=int, default=0, help="steps of the real loop whose overhead is measured"
    )
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(arguments)
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
        rows = [{**row, **common} for row in compare(options, settings)]
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
                row |= {f"loop_{key}": round(value, 2) for key, value in found.items()}
            print(row, flush=True)
        if not options.no_save:
            print(harness.save(f"clip_step_{options.dtype}", rows))


if __name__ == "__main__":
    main()
