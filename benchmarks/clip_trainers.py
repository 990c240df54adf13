"""The trainers that `bench_clip_step` compares: ours, a loop written by hand, and open_clip's own."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2clip.data.images import normalize_pixels
from llm2clip.models.efficientnet import EfficientNetLite0
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.vision import VisionTower
from llm2clip.settings import OptimSettings, TrainSettings
from llm2clip.training import optim
from llm2clip.training.clip_batch import ImageTexts, Pieces
from llm2clip.training.clip_task import ClipTask
from llm2clip.training.kept_memory import kept_memory
from llm2clip.training.precision import autocast_of
from llm2clip.training.schedule import set_learning_rate
from llm2clip.training.state import TrainState, as_numbers
from llm2clip.training.world import World, resolve_device


def world() -> World:
    """This process alone, on the GPU where there is one."""
    return World(0, 1, resolve_device("auto"))


class Ours:
    """The step of this trainer, as `training.loop` takes it."""

    def __init__(self, settings: TrainSettings) -> None:
        # as `llm2clip train` does, for as long as this object is there
        self._memory = ExitStack()
        self._memory.enter_context(kept_memory(world().device))
        self.task = ClipTask(settings, world())
        self.settings = settings
        self.state = TrainState(self.task, settings.run, settings.optim, world())

    def step(self, number: int, batch: ImageTexts | Pieces) -> float:
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


class TimmTower(nn.Module):
    """open_clip's own tower of the network: its timm adapter, with the weights of `ours` and its fixed statistics."""

    def __init__(self, ours: VisionTower) -> None:
        super().__init__()
        from open_clip.timm_model import TimmModel

        trunk = ours.model
        assert isinstance(trunk, EfficientNetLite0)
        self.tower = TimmModel("tf_efficientnet_lite0", trunk.dim, trunk.image_size, proj="none")
        # both have their layers in the order of the forward, under other names
        values = trunk.network.state_dict().values()
        self.tower.load_state_dict(dict(zip(self.tower.state_dict(), values, strict=True)))
        self.mean, self.std = ours.mean, ours.std

    def train(self, mode: bool = True) -> TimmTower:
        """Training mode, except for batch normalisation, as in ours."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> features (B, 1280)."""
        features: Tensor = self.tower(images)
        return features


def written(settings: TrainSettings, *, timm: bool = False) -> tuple[Written, torch.optim.Optimizer]:
    """The towers with the weights that ours begin with, and AdamW as open_clip builds it.

    `timm` takes open_clip's tower.
    """
    task = ClipTask(settings, world())
    if timm:
        ours: Any = task.model.vision_model
        task.model.vision_model = TimmTower(ours).to(world().device)  # type: ignore[assignment]
    groups: dict[str, Any] = dict(task.groups())
    options = [
        {key: group[key] for key in ("params", "weight_decay", "lr_scale")}
        for group in optim.build_optimizer(groups, settings.optim).param_groups
    ]
    chosen: OptimSettings = settings.optim
    adamw = torch.optim.AdamW(options, lr=chosen.lr, betas=chosen.betas, eps=chosen.eps)
    return Written(task.model), adamw


def as_floats(batch: ImageTexts | Pieces, settings: TrainSettings, vision: Any) -> tuple[Tensor, Tensor]:
    """Normalised images and embeddings, as other trainers' loaders give them."""
    batch = batch.whole() if isinstance(batch, Pieces) else batch
    pixels, embeddings = batch.pixels, batch.embeddings
    assert pixels is not None and embeddings is not None
    return normalize_pixels(pixels, vision.mean, vision.std), embeddings


class Plain:
    """The loop one writes by hand; a batch that is cut is accumulated as in open_clip: all features, then each part."""

    def __init__(self, settings: TrainSettings) -> None:
        self.model, self.optimizer = written(settings)
        self.settings = settings
        self.loss, self.name = open_clip_loss()
        self.autocast = autocast_of(settings.run.precision, world().device, self.model)

    def step(self, number: int, batch: ImageTexts | Pieces) -> float:
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

    name, timm = "open_clip", False

    def __init__(self, settings: TrainSettings) -> None:
        from open_clip.loss import ClipLoss
        from open_clip_train.train import train_one_epoch

        self.model, self.optimizer = written(settings, timm=self.timm)
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

    def step(self, number: int, batch: ImageTexts | Pieces) -> float:
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


class OpenClipTimm(OpenClipTrain):
    """The same trainer with open_clip's tower in place of ours."""

    timm = True


MAKERS: dict[str, Callable[[TrainSettings], Any]] = {
    "ours": Ours, "plain": Plain, "open_clip_train": OpenClipTrain, "open_clip_timm": OpenClipTimm
}  # fmt: skip
NEEDS = {"open_clip_train": ("open_clip_train.train",), "open_clip_timm": ("open_clip_train.train", "timm")}
