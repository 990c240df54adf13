"""The CLIP stage: a vision tower and a small text adapter learn one space, with the LLM's stored embeddings.

The LLM is frozen and absent: captions enter as the embeddings that `llm2clip embed` stored (LLM2CLIP, arXiv
2411.04997, section 3.3).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.data.loader import Position
from llm2clip.data.sources import Source, open_source
from llm2clip.data.store import EmbeddingStore
from llm2clip.errors import ConfigError
from llm2clip.models.groups import group_of
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.settings import ModelSettings, TrainSettings
from llm2clip.training import clip_batch, clip_checks
from llm2clip.training.batches import rank_batches
from llm2clip.training.caption_source import CaptionSource
from llm2clip.training.clip_batch import ImageTexts, Pieces
from llm2clip.training.clip_loss import ClipLoss
from llm2clip.training.clip_reader import Reader
from llm2clip.training.optim import NamedParameters
from llm2clip.training.teachers import Teachers
from llm2clip.training.towers import TwoTowers
from llm2clip.training.world import World

log = logging.getLogger("llm2clip.training")


class ClipTask:
    """Task of `llm2clip train` (see `training.task.Task`)."""

    title = "training CLIP"
    token_budget = 0
    additive, sharded = False, False

    def __init__(self, settings: TrainSettings, world: World) -> None:
        if not settings.data.train:
            raise ConfigError("data.train: expected at least one source of images and captions")
        self.settings, data = settings, settings.data
        self._world = world
        self._captions = CaptionSource(settings, world.device)
        self._source: Source = open_source(data.train, weights=data.weights, limit=data.limit)
        clip_checks.require_captions(self._source, data.captions, self._captions.store)
        fingerprint = self._captions.fingerprint()
        clip_checks.require_same_encoder(Path(settings.run.out), fingerprint, world)
        clip_checks.require_fixed_text_side(settings, self._captions.dim)
        torch.manual_seed(settings.run.seed)  # the adapter's initial values
        model = LLM2CLIP.from_settings(model_settings(settings), self._captions.dim, fingerprint)
        if settings.loss.kind == "cosine" and settings.model.init is None:
            clip_checks.begin_with_embeddings(model)
        self._captions.attach_to(model)
        module = TwoTowers(model, settings).to(world.device)
        self.module: nn.Module = module
        self.samples = len(self._source)
        vision = model.vision_model
        transform = vision.preprocessing.transform(train=True)
        self._teachers = Teachers(settings, vision, world.device)
        decoded = not settings.features and (module.image or module.tower)
        self._reader = Reader(
            captions=data.captions,
            transform=transform if decoded else None,
            views=settings.teacher.views,
            store=self._captions.store if module.text else None,
            features=EmbeddingStore.open(settings.features) if settings.features else None,
            teacher_image=self._teachers.image_store,
            teacher_text=self._teachers.text_store,
        )
        clip_checks.require_teachers(settings, self._teachers, model.settings.embed_dim)
        clip_checks.require_stored_images(self._source, self._reader, vision)
        group = torch.distributed.group.WORLD if world.size > 1 else None
        self._loss = ClipLoss(
            settings.loss,
            several=data.captions.per_image > 1,
            texts=model.settings.clip_text.use == "three_losses",
            group=group,
        )

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
            collate=self._reader.collate, join=clip_batch.batch_of, text_only=not self._reader.reads_images,
        )  # fmt: skip

    def chunks(self, samples: Sequence[Any], size: int) -> Sequence[ImageTexts]:
        assert isinstance(samples, (ImageTexts, Pieces))
        batch = samples.whole().one_per_group() if self._loss.duplicates == "drop" else samples
        # ids that all differ cost the loss something and change nothing; other ranks' are not known here
        meeting = self._world.size > 1 or clip_batch.has_repeats(batch.groups)
        parts = batch.to(self._world.device).split(size)
        return [self._with_models(replace(part, meeting=meeting)) for part in parts]

    def _with_models(self, part: ImageTexts) -> ImageTexts:
        """A chunk with what no loader's worker can give it: tokens, and features of models that run along."""
        tower = self.model.clip_text
        return replace(
            self._teachers.add_to(part),
            tokens=self._captions.tokens(part.texts),
            clip_tokens=None if tower is None else tower.tokenize(part.texts).to(self._world.device),
        )

    def loss(self, outputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self._loss(outputs)

    def after_step(self) -> None:
        self.model.clamp_logit_scale()

    def names(self, samples: Sequence[Any]) -> list[str]:
        assert isinstance(samples, (ImageTexts, Pieces))
        return samples.keys

    def evaluate(self) -> dict[str, float]:
        """Retrieval on `data.val` with the model as it is, when there is any."""
        if not self.settings.data.val or not self._world.is_main:
            return {}
        if self.model.text_fusion is not None:
            log.warning("held-out retrieval of a model that joins two text towers: `llm2clip evaluate`")
            return {}
        from llm2clip.evaluation.retrieval import quick_retrieval

        self.model.eval()
        return quick_retrieval(self.model, self.settings.data, self._captions)

    def export(self, path: Path) -> None:
        """Write the model as `LLM2CLIP.from_pretrained` reads it."""
        from llm2clip.export.card import run_card

        self.model.save_pretrained(path, run_card(Path(self.settings.run.out)))


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
