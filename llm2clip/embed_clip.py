"""Features of a CLIP model, or of a frozen vision tower, into the same kind of store as the LLM's embeddings.

Images are addressed by the content of their files (data.image_address), captions by their text. Both jobs go on where
they stopped; under `torchrun` each rank embeds its share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llm2clip.data.image_address import image_address, view_rng
from llm2clip.data.images import ImageTransform, decode_image, normalize_pixels
from llm2clip.data.loader import BadSamples
from llm2clip.data.sources import Source, open_source
from llm2clip.data.store import EmbeddingStore, StoreWriter, repair_store
from llm2clip.data.store_format import INDEX_NAME
from llm2clip.data.workers import batches_of
from llm2clip.embed import embed, end_if_asked, take_over_rank_stores
from llm2clip.errors import BadSampleError, ConfigError
from llm2clip.models.clip_teacher import ClipTeacher
from llm2clip.models.fingerprint import tensors_digest
from llm2clip.models.vision import VisionTower, build_vision_tower
from llm2clip.progress import Progress
from llm2clip.settings import EmbedImagesSettings, EmbedSettings, EmbedTextsSettings
from llm2clip.training.precision import autocast_of
from llm2clip.training.signals import stop_requested
from llm2clip.training.world import World, resolve_device, start_world


def embed_texts(settings: EmbedTextsSettings) -> EmbeddingStore:
    """Every caption of the data through a teacher's own text tower, into the store `settings.out`.

    Raises:
        ConfigError: no model, no output directory or no source is given.
        UserError: as `embed.embed`.
    """
    if not settings.model:
        raise ConfigError("model is empty; give the directory of a CLIP or SigLIP model")
    teacher = ClipTeacher(settings.model).to(resolve_device(settings.device))
    job = EmbedSettings(
        data=settings.data,
        out=settings.out,
        dtype=settings.dtype,
        shard_rows=settings.shard_rows,
        commit_rows=settings.commit_rows,
        device=settings.device,
        threads=settings.threads,
    )
    return embed(job, _TextEncoder(teacher, settings.batch_size))


def embed_images(settings: EmbedImagesSettings) -> EmbeddingStore:
    """Every image of `settings.data.train`, or views of it, through a model, into the store `settings.out`.

    Raises:
        ConfigError: no output directory or no source is given.
        DataError: too many samples cannot be used.
        StoreError: the store was begun with another model or other settings.
        SystemExit: as `embed.embed`.
    """
    if not settings.out:
        raise ConfigError(
            "out is empty; give the directory of the store, for example out=runs/teacher-images"
        )
    if not settings.data.train:
        raise ConfigError("data.train is empty; name the sources whose images to embed")
    with start_world(settings.device, settings.threads) as world:
        encoder = _image_encoder(settings, world.device)
        root = Path(settings.out)
        if world.is_main:
            if (root / INDEX_NAME).exists():
                repair_store(root, checksums=False)
            with _writer(root, settings, encoder) as writer:
                take_over_rank_stores(writer)
                writer.flush()
        world.barrier()
        source = open_source(settings.data.train, limit=settings.data.limit)
        images = _Images(source, encoder.transform, settings.views, EmbeddingStore.open(root), world)
        own = root if world.is_main else root / f"rank-{world.rank:03d}"
        with _writer(own, settings, encoder) as writer:
            with stop_requested() as stopping:
                _embed_share(writer, images, encoder, settings, world, stopping)
                writer.flush()
                end_if_asked(world, stopping())
            if world.is_main:
                take_over_rank_stores(writer)
                writer.finish()
        world.barrier()
    return EmbeddingStore.open(root)


@dataclass(frozen=True)
class _TextEncoder:
    """A teacher's text tower as `embed` takes it; captions are their own tokens."""

    teacher: ClipTeacher
    batch_size: int
    truncated: int = 0

    @property
    def dim(self) -> int:
        return self.teacher.dim

    def tokenize(self, texts: Sequence[str]) -> Sequence[str]:
        return texts

    def encode_tokens(
        self, tokens: Sequence[str], *, token_budget: int | None = None, progress: Progress | None = None
    ) -> Tensor:
        parts: list[Tensor] = []
        for start in range(0, len(tokens), self.batch_size):
            texts = tokens[start : start + self.batch_size]
            parts.append(self.teacher.texts(texts).cpu())
            if progress is not None:
                progress.update(len(texts))
        return torch.cat(parts)

    def fingerprint(self) -> dict[str, Any]:
        return self.teacher.fingerprint("texts")


@dataclass(frozen=True)
class _ImageEncoder:
    """uint8 pixels to features, how they are cut, and what both are."""

    model: ClipTeacher | VisionTower
    transform: ImageTransform
    fingerprint: dict[str, Any]
    autocast: Any

    @property
    def dim(self) -> int:
        return self.model.dim

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        context: AbstractContextManager[Any] = self.autocast()
        with context:
            if isinstance(self.model, ClipTeacher):
                return self.model.images(pixels).float()
            return self.model(normalize_pixels(pixels, self.model.mean, self.model.std)).float()


def _image_encoder(settings: EmbedImagesSettings, device: torch.device) -> _ImageEncoder:
    model: ClipTeacher | VisionTower
    if settings.model:
        model = ClipTeacher(settings.model).to(device)
        found = model.fingerprint("images")
    else:
        model = build_vision_tower(settings.vision).eval().to(device)
        found = {"features": "vision tower", "weights": tensors_digest(model.state_dict().items())}
    preprocessing = model.preprocessing
    if settings.views:
        # the student's crops: it cuts in the same way, with the same random numbers
        preprocessing = replace(preprocessing, fit=settings.fit)
    transform = preprocessing.transform(train=settings.views > 0)
    found |= {"preprocessing": preprocessing.to_config(), "views": settings.views}
    return _ImageEncoder(model, transform, found, autocast_of(settings.precision, device))


def _writer(path: Path, settings: EmbedImagesSettings, encoder: _ImageEncoder) -> StoreWriter:
    return StoreWriter(
        path,
        dim=encoder.dim,
        dtype=settings.dtype,
        fingerprint=encoder.fingerprint,
        shard_rows=settings.shard_rows,
        commit_rows=settings.commit_rows,
    )


@dataclass(frozen=True)
class _Cut:
    """Addresses and pixels (n, 3, S, S) of one image's views that are to be embedded; or its key and what is wrong."""

    addresses: list[str]
    pixels: Tensor | None = None
    problem: tuple[str, str] | None = None


@dataclass(frozen=True)
class _Cuts:
    """The same of `count` images, with one tensor: each that a worker sends holds a file descriptor."""

    count: int
    addresses: list[str]
    pixels: Tensor | None
    problems: list[tuple[str, str]]


def _collate(cuts: list[_Cut]) -> _Cuts:
    pixels = [cut.pixels for cut in cuts if cut.pixels is not None]
    return _Cuts(
        len(cuts),
        [address for cut in cuts for address in cut.addresses],
        torch.cat(pixels) if pixels else None,
        [cut.problem for cut in cuts if cut.problem is not None],
    )


class _Images(Dataset[_Cut]):
    """Every W-th image of a source, cut to size unless the store has it."""

    def __init__(
        self, source: Source, transform: ImageTransform, views: int, known: EmbeddingStore, world: World
    ) -> None:
        self.source, self._transform, self._views, self._known = source, transform, views, known
        self._indices = range(world.rank, len(source), world.size)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, number: int) -> _Cut:
        try:
            sample = self.source[self._indices[number]]
            if sample.image is None:
                raise BadSampleError(sample.key, "it has no image")
            numbers = range(self._views) if self._views else [None]
            addresses = [image_address(sample.image, view) for view in numbers]
            new = [
                a for a, row in zip(addresses, self._known.find(addresses).tolist(), strict=True) if row < 0
            ]
            if not new:
                return _Cut([])
            image = decode_image(sample.image, key=sample.key, min_side=self._transform.min_side)
            cut = [self._transform.pixels(image, view_rng(address)) for address in new]
            return _Cut(new, torch.stack(cut))
        except BadSampleError as problem:
            return _Cut([], problem=(problem.key, problem.reason))


def _embed_share(
    writer: StoreWriter,
    images: _Images,
    encoder: _ImageEncoder,
    settings: EmbedImagesSettings,
    world: World,
    stopping: Callable[[], int],
) -> None:
    batches: Iterator[_Cuts] = batches_of(
        DataLoader(
            images,
            batch_size=settings.batch_size,
            num_workers=settings.data.workers or 0,
            collate_fn=_collate,
        )
    )
    bad = BadSamples()
    with Progress(len(images), "embedding", "images", enabled=world.is_main) as shown:
        for cuts in batches:
            bad.seen += cuts.count
            for key, reason in cuts.problems:
                bad.add(key, reason)
            bad.check(images.source.name, settings.data.max_bad_share)
            if cuts.pixels is not None:
                parts = cuts.pixels.split(settings.batch_size)
                features = torch.cat([encoder(part.to(world.device)) for part in parts])
                writer.add(cuts.addresses, features)
            shown.update(cuts.count)
            if stopping():
                return
