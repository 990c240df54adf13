"""What can be known to be wrong with a CLIP stage before its first step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm2clip.data.image_address import image_address
from llm2clip.data.sample import Sample
from llm2clip.data.sources import Source
from llm2clip.data.store import EmbeddingStore
from llm2clip.data.store_format import fingerprint_difference
from llm2clip.errors import BadSampleError, CheckpointError, ConfigError, DataError, StoreError
from llm2clip.files import read_json, write_json
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.vision import VisionTower
from llm2clip.settings import CaptionSettings, TrainSettings
from llm2clip.training import checkpoint
from llm2clip.training.clip_reader import Reader, role_texts
from llm2clip.training.teachers import Teachers
from llm2clip.training.world import World


def require_captions(
    source: Source, captions: CaptionSettings, store: EmbeddingStore | None, probe: int = 64
) -> None:
    """Check a spread of samples, so that a store of other data fails now and not in the middle of an epoch.

    Raises:
        StoreError: a caption is not in the store.
        DataError: none of the samples has a caption; the fields that were found are named.
    """
    texts: list[str] = []
    found: set[str] = set()
    for sample in _spread(source, probe, images=False):
        found.update(sample.captions)
        texts += [text for role in captions.chances for text in role_texts(sample, captions.all_roles[role])]
    if not texts:
        wanted = ", ".join(dict.fromkeys(n for role in captions.chances for n in captions.all_roles[role]))
        raise DataError(
            f"{source.name}: no caption in {wanted}; the caption fields found are: "
            f"{', '.join(sorted(found)) or 'none'}. Set data.captions.short and data.captions.long."
        )
    if store is not None:
        store.rows(texts)


def require_stored_images(source: Source, reader: Reader, vision: VisionTower, probe: int = 16) -> None:
    """Check that the stores of image features hold a spread of the images, made as the reader cuts them.

    Raises:
        StoreError: an image is missing; the first ten keys are named. Or views were cut in another way.
        ConfigError: the stored tower features have another width than the tower.
    """
    stores = [store for store in (reader.features, reader.teacher_image) if store is not None]
    if not stores:
        return
    if reader.features is not None and reader.features.dim != vision.dim:
        raise ConfigError(
            f"features: {reader.features.path} has features of width {reader.features.dim}, the vision tower's have "
            f"{vision.dim}; make the store with this tower (`llm2clip embed images`)"
        )
    samples = [sample for sample in _spread(source, probe, images=True) if sample.image is not None]
    for store in stores:
        made = store.fingerprint.get("views", 0)
        if made != reader.views:
            raise StoreError(
                f"{store.path} was made with views={made}, but teacher.views is {reader.views}; set it to {made}"
            )
        fit = store.fingerprint.get("preprocessing", {}).get("fit")
        if reader.views and fit != vision.preprocessing.fit:
            raise StoreError(
                f"the views in {store.path} were cut with fit={fit}, this tower's images with "
                f"{vision.preprocessing.fit}; make them again with fit={vision.preprocessing.fit}"
            )
        view = 0 if reader.views else None
        rows = store.find([image_address(sample.image or b"", view) for sample in samples])
        lacking = [sample.key for sample, row in zip(samples, rows.tolist(), strict=True) if row < 0]
        if lacking:
            raise StoreError(
                f"{store.path} has no features of {len(lacking)} of {len(samples)} images of {source.name} that were "
                f"looked up: {', '.join(lacking[:10])}. Run `llm2clip embed images` on this data."
            )


def require_teachers(settings: TrainSettings, teachers: Teachers, embed_dim: int) -> None:
    """Check that features which are compared directly have as many dimensions.

    Raises:
        ConfigError: they have not.
    """
    for side, dim in (("image", teachers.image_dim), ("text", teachers.text_dim)):
        weights = getattr(settings.loss.distill, side)
        direct = [name for name in ("mse", "cosine") if weights.get(name)]
        if direct and dim != embed_dim:
            raise ConfigError(
                f"loss.distill.{side}: {' and '.join(direct)} compare features directly, but the teacher's have {dim} "
                f"dimensions and model.embed_dim is {embed_dim}; set it to {dim}, or use structure"
            )


def require_same_encoder(out: Path, fingerprint: dict[str, Any], world: World) -> None:
    """Refuse to go on with embeddings of another encoder than the run began with; their width may be the same.

    Raises:
        StoreError: naming what differs.
    """
    record = out / "text_encoder.json"
    if checkpoint.latest(out) is not None and record.exists():
        if different := fingerprint_difference(fingerprint, read_json(record, CheckpointError)):
            raise StoreError(
                f"the embeddings were made by another encoder than those that the run in {out} began with:\n  "
                + "\n  ".join(different)
                + "\nGo on with that encoder, or choose another run.out."
            )
    elif world.is_main:
        write_json(record, fingerprint)


def require_fixed_text_side(settings: TrainSettings, llm_dim: int) -> None:
    """Refuse the cosine loss where both sides are trained: all features would become one.

    Raises:
        ConfigError: the adapter is trained.
    """
    if settings.loss.kind == "cosine" and "adapter" not in settings.optim.freeze:
        raise ConfigError(
            "loss.kind cosine: without negatives the text side must stay fixed, or all features become one; set "
            f"optim.freeze=[adapter], and model.adapter_depth=0 with model.embed_dim={llm_dim} to aim at the LLM's own "
            "embeddings"
        )


@torch.no_grad()
def begin_with_embeddings(model: LLM2CLIP) -> None:
    """Let an adapter without blocks and with as many dimensions as the LLM begin as the identity behind its norm."""
    last = model.text_adapter.adaptor[-1]
    assert isinstance(last, nn.Linear)
    if len(model.text_adapter.adaptor) == 2 and last.in_features == last.out_features:
        torch.nn.init.eye_(last.weight)
        torch.nn.init.zeros_(last.bias)


def _spread(source: Source, probe: int, *, images: bool) -> Iterator[Sample]:
    """Usable samples at equal distances."""
    for index in range(0, len(source), max(1, len(source) // probe)):
        try:
            yield source[index] if images else source.captions_of(index)
        except BadSampleError:
            continue
