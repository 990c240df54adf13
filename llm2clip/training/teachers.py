"""Teachers of the CLIP stage: stored features, a CLIP model that runs along, the tower that the run began with."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from llm2clip.data.images import normalize_pixels
from llm2clip.data.store import EmbeddingStore
from llm2clip.models.clip_teacher import ClipTeacher
from llm2clip.models.vision import VisionTower
from llm2clip.settings import TrainSettings
from llm2clip.training.clip_batch import ImageTexts
from llm2clip.training.precision import autocast_of
from llm2clip_kernels import l2_normalize


class Teachers:
    """What the settings name as teachers, and the features that they add to a batch.

    Args:
        settings: of the stage.
        vision: the student's tower before its first step.
        device: where models run.

    Attributes:
        image_store, text_store: stored features, which the loader reads; None without.
        model: the CLIP model that runs along; None without.
    """

    def __init__(self, settings: TrainSettings, vision: VisionTower, device: torch.device) -> None:
        teacher, distill = settings.teacher, settings.loss.distill
        self.image_store = EmbeddingStore.open(teacher.images) if teacher.images else None
        self.text_store = EmbeddingStore.open(teacher.texts) if teacher.texts else None
        self.model = ClipTeacher(teacher.model).to(device) if teacher.model else None
        self._images = distill.similarity > 0 or any(distill.image.values())
        self._texts = distill.similarity > 0 or any(distill.text.values())
        self._start: VisionTower | None = None
        if teacher.start:
            self._start = copy.deepcopy(vision).requires_grad_(False).eval()
        self._autocast = autocast_of(settings.run.precision, device)

    @property
    def image_dim(self) -> int | None:
        """Dimension of the teacher's image features; None without any."""
        return self.model.dim if self.model else self.image_store.dim if self.image_store else None

    @property
    def text_dim(self) -> int | None:
        """Dimension of the teacher's caption features; None without any."""
        return self.model.dim if self.model else self.text_store.dim if self.text_store else None

    def add_to(self, batch: ImageTexts) -> ImageTexts:
        """The batch with the features of the models that run along; stored ones get unit norm."""
        image, text, tower = batch.teacher_image, batch.teacher_text, None
        running = self._start is not None or (self.model is not None and self._images)
        pixels = batch.pixels if running else None
        with torch.no_grad(), self._autocast():
            if self.model is not None and self._images and pixels is not None:
                image = self.model.images(pixels)
            if self.model is not None and self._texts:
                text = self.model.texts(batch.texts)
            if self._start is not None and pixels is not None:
                tower = self._start(normalize_pixels(pixels, self._start.mean, self._start.std))
            return replace(
                batch,
                teacher_image=None if image is None else l2_normalize(image.float()),
                teacher_text=None if text is None else l2_normalize(text.float()),
                teacher_tower=None if tower is None else l2_normalize(tower.float()),
            )
