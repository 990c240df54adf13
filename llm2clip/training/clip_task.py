"""The CLIP stage: a vision tower and a small text adapter learn one space, with the LLM's stored embeddings.

The LLM is frozen and absent: captions enter as the embeddings that `llm2clip embed` stored (LLM2CLIP, arXiv
2411.04997, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.data.images import ImageTransform, normalize_pixels
from llm2clip.data.loader import Position
from llm2clip.data.sources import Source, open_source
from llm2clip.data.store import EmbeddingStore
from llm2clip.errors import ConfigError
from llm2clip.models.groups import group_of
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.settings import ModelSettings, TrainSettings
from llm2clip.training import clip_checks, clip_data
from llm2clip.training.batches import rank_batches
from llm2clip.training.clip_data import ImageTexts, Reader
from llm2clip.training.clip_loss import ClipLoss
from llm2clip.training.optim import NamedParameters
from llm2clip.training.teachers import Teachers
from llm2clip.training.world import World
from llm2clip_kernels import l2_normalize

# what a batch carries for the loss that no tower changes
_CONSTANTS = ("teacher_image", "teacher_text", "teacher_tower")


class TwoTowers(nn.Module):
    """`ImageTexts` -> the outputs that `ClipLoss` names, as far as the settings need them.

    Args:
        model: the towers.
        settings: of the stage.
    """

    def __init__(self, model: LLM2CLIP, settings: TrainSettings) -> None:
        super().__init__()
        self.model = model
        loss, distill = settings.loss, settings.loss.distill
        pairs = loss.kind != "none" or distill.similarity > 0
        self.image = pairs or any(distill.image.values())
        self.text = pairs or any(distill.text.values())
        self.tower = any(distill.tower.values())
        self._several = settings.data.captions.per_image > 1
        self._scaled = loss.kind in ("softmax", "sigmoid") or distill.similarity > 0
        unused = {
            "vision": bool(settings.features) or not (self.image or self.tower),
            "lora": bool(settings.features) or not (self.image or self.tower),
            "projection": not self.image,
            "adapter": not self.text,
            "logit_scale": not self._scaled,
            "logit_bias": not self._scaled,
        }
        for name, parameter in model.named_parameters():
            if unused.get(group_of(name)):
                parameter.requires_grad_(False)

    def forward(self, batch: ImageTexts) -> dict[str, Tensor]:
        model, outputs = self.model, dict[str, Tensor]()
        if self.image or self.tower:
            features = self._tower_features(batch)
            if self.image:
                outputs["image"] = _unit(model.visual_projection(features))
            if self.tower:
                outputs["tower"] = _unit(features)
        if self.text:
            assert batch.embeddings is not None
            outputs["text"] = _unit(model.get_text_features(batch.embeddings))
        if self._scaled:
            outputs["scale"] = model.logit_scale.clamp(max=model.settings.logit_scale_max).exp()
            if model.logit_bias is not None:
                # not the parameter itself: an output may be changed in place
                outputs["bias"] = model.logit_bias.clone()
        if batch.meeting:
            outputs["groups"] = batch.groups
        if self._several and batch.owners is not None:
            outputs["owners"] = batch.owners
        return outputs | {name: t for name in _CONSTANTS if (t := getattr(batch, name)) is not None}

    def _tower_features(self, batch: ImageTexts) -> Tensor:
        if batch.features is not None:
            return batch.features
        assert batch.pixels is not None
        vision = self.model.vision_model
        return vision(normalize_pixels(batch.pixels, vision.mean, vision.std))


class ClipTask:
    """Task of `llm2clip train` (see `training.task.Task`)."""

    title = "training CLIP"
    token_budget = 0
    additive, sharded = False, False

    def __init__(self, settings: TrainSettings, world: World) -> None:
        if not settings.data.train:
            raise ConfigError("data.train: expected at least one source of images and captions")
        if not settings.store:
            raise ConfigError("store: expected the embedding store that `llm2clip embed` made")
        self.settings, data = settings, settings.data
        self._world = world
        self._store = EmbeddingStore.open(settings.store)
        self._source: Source = open_source(data.train, weights=data.weights, limit=data.limit)
        clip_checks.require_stored_captions(self._source, data.captions, self._store)
        clip_checks.require_same_encoder(Path(settings.run.out), self._store, world)
        clip_checks.require_fixed_text_side(settings, self._store.dim)
        torch.manual_seed(settings.run.seed)  # the adapter's initial values
        model = LLM2CLIP(model_settings(settings), self._store.dim, self._store.fingerprint)
        if settings.loss.kind == "cosine":
            clip_checks.begin_with_embeddings(model)
        module = TwoTowers(model, settings).to(world.device)
        self.module: nn.Module = module
        self.samples = len(self._source)
        vision = model.vision_model
        transform = ImageTransform(vision.image_size, vision.mean, vision.std, train=True)
        self._teachers = Teachers(settings, vision, world.device)
        decoded = not settings.features and (module.image or module.tower)
        self._reader = Reader(
            captions=data.captions,
            transform=transform if decoded else None,
            views=settings.teacher.views,
            store=self._store if module.text else None,
            features=EmbeddingStore.open(settings.features) if settings.features else None,
            teacher_image=self._teachers.image_store,
            teacher_text=self._teachers.text_store,
        )
        clip_checks.require_teachers(settings, self._teachers)
        clip_checks.require_stored_images(self._source, self._reader, vision)
        group = torch.distributed.group.WORLD if world.size > 1 else None
        self._loss = ClipLoss(settings.loss, several=data.captions.per_image > 1, group=group)

    @property
    def model(self) -> LLM2CLIP:
        """The model that is trained."""
        model: Any = self.module.model
        assert isinstance(model, LLM2CLIP)
        return model

    def groups(self) -> Mapping[str, NamedParameters]:
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.model.named_parameters():
            groups.setdefault(group_of(name), []).append((name, parameter))
        return groups

    def batches(self, epoch: int, batch: int) -> Iterator[tuple[Position, Any]]:
        return rank_batches(
            self._source, self._reader, self.settings.data, self.settings.run, self._world, (epoch, batch),
            collate=self._reader.collate, join=clip_data.join, text_only=not self._reader.reads_images,
        )  # fmt: skip

    def chunks(self, samples: Sequence[Any], size: int) -> Sequence[ImageTexts]:
        assert isinstance(samples, ImageTexts)
        batch = samples.one_per_group() if self._loss.duplicates == "drop" else samples
        # ids that all differ cost the loss something and change nothing; other ranks' are not known here
        batch = replace(batch, meeting=self._world.size > 1 or batch.repeats)
        return [self._teachers.add_to(part) for part in batch.to(self._world.device).split(size)]

    def loss(self, outputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self._loss(outputs)

    def after_step(self) -> None:
        self.model.clamp_logit_scale()

    def names(self, samples: Sequence[Any]) -> list[str]:
        assert isinstance(samples, ImageTexts)
        return samples.keys

    def evaluate(self) -> dict[str, float]:
        """Retrieval on `data.val` with the model as it is, when there is any."""
        if not self.settings.data.val or not self._world.is_main:
            return {}
        from llm2clip.evaluation.retrieval import quick_retrieval

        self.model.eval()
        return quick_retrieval(self.model, self.settings.data, self._store)

    def export(self, path: Path) -> None:
        """Write the model as `LLM2CLIP.from_pretrained` reads it."""
        self.model.save_pretrained(path)


def model_settings(settings: TrainSettings) -> ModelSettings:
    """The model's settings with the loss's own first scale and bias where they are left open.

    SigLIP (arXiv 2303.15343, section 3.2): scale 10 and bias -10, which make up for the many negatives.
    """
    model = settings.model
    if settings.loss.kind != "sigmoid":
        return model
    scale, bias = model.logit_scale_init, model.logit_bias_init
    return replace(
        model,
        logit_scale_init=math.log(10.0) if scale is None else scale,
        logit_bias_init=-10.0 if bias is None else bias,
    )


def _unit(features: Tensor) -> Tensor:
    # the loss stays fp32 where autocast rounds the towers
    return l2_normalize(features, dtype=torch.promote_types(features.dtype, torch.float32))
