"""The held-out items that every table is computed on, and their features."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from llm2clip.data.images import decode_image
from llm2clip.data.sample import Sample, caption_role
from llm2clip.data.sources import Source, open_source
from llm2clip.errors import BadSampleError, ConfigError, DataError
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.progress import Progress
from llm2clip.settings import CaptionSettings, DataSettings

Role = Literal["short", "long"]
ROLES: tuple[Role, ...] = ("short", "long")
_BAD_SHARE_FROM = 50


@dataclass(frozen=True)
class Item:
    """One held-out image or entity.

    Attributes:
        index: position in the source.
        key: name of the sample.
        group: what it shows.
        texts: role (`short`, `long`) -> caption, where there is one.
        translations: language -> caption.
        original: caption in the data's own language that the translations say again.
        meta: licence, attribution and what else the sample carries.
    """

    index: int
    key: str
    group: str
    texts: dict[Role, str]
    translations: dict[str, str] = field(default_factory=dict)
    original: dict[str, str] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Gallery:
    """Held-out items, one per group.

    Attributes:
        source: where the items' images come from.
        items: first come, at most `EvaluateSettings.gallery`.
        bad: samples that could not be read, with the reason.
    """

    source: Source
    items: list[Item]
    bad: list[str]

    def with_texts(self, *roles: Role) -> list[Item]:
        """Items that have a caption in each of `roles`."""
        return [item for item in self.items if all(role in item.texts for role in roles)]

    def languages(self) -> list[str]:
        """Languages in which at least one item has a translation, in the order of the settings."""
        return list(dict.fromkeys(language for item in self.items for language in item.translations))

    def without(self, items: Sequence[Item], reasons: Sequence[str]) -> Gallery:
        """The gallery less some items, with the reasons noted."""
        gone = {item.index for item in items}
        kept = [item for item in self.items if item.index not in gone]
        return Gallery(self.source, kept, [*self.bad, *reasons])


def open_gallery(data: DataSettings, limit: int) -> Gallery:
    """Choose the held-out items: the first of each group that has a caption, at most `limit`.

    Raises:
        ConfigError: `data.val` is empty.
        DataError: too many samples cannot be read, or fewer than two items are left.
    """
    if not data.val:
        raise ConfigError("data.val is empty; evaluation needs held-out sources")
    if limit < 2:
        raise ConfigError(f"gallery: expected at least 2 items to retrieve from, got {limit}")
    source = open_source(data.val, limit=data.limit)
    items: list[Item] = []
    bad: list[str] = []
    groups: set[str] = set()
    for index in range(len(source)):
        if len(items) == limit:
            break
        try:
            item = _item(index, source.captions_of(index), data.captions)
        except BadSampleError as problem:
            bad.append(str(problem))
            if index + 1 >= _BAD_SHARE_FROM and len(bad) > data.max_bad_share * (index + 1):
                raise DataError(
                    f"{len(bad)} of the first {index + 1} held-out samples cannot be read, more than "
                    f"data.max_bad_share = {data.max_bad_share}. The first:\n  " + "\n  ".join(bad[:10])
                ) from None
            continue
        if item.group not in groups and item.texts:
            groups.add(item.group)
            items.append(item)
    if len(items) < 2:
        raise DataError(
            f"{', '.join(data.val)}: {len(items)} held-out items with a caption, expected at least 2 "
            "to retrieve from. Check data.captions.short and data.captions.long, and that the groups differ."
        )
    for reason in bad[:10]:
        print(f"skipped {reason}", file=sys.stderr)
    return Gallery(source, items, bad)


def _item(index: int, sample: Sample, captions: CaptionSettings) -> Item:
    texts: dict[Role, str] = {}
    for role, fields in (("short", captions.short), ("long", captions.long)):
        if text := caption_role(sample, fields):
            texts[role] = text  # type: ignore[index]
    translations, original = {}, {}
    for language, name in captions.translations.items():
        if text := caption_role(sample, (name,)):
            translations[language] = text
            # "es.caption" says "caption" again: the field of the same last name, else the first caption
            roles = (*captions.short, *captions.long)
            own = caption_role(sample, sorted(roles, key=lambda role: role != name.rsplit(".", 1)[-1]))
            if own:
                original[language] = own
    return Item(index, sample.key, sample.group, texts, translations, original, dict(sample.meta))


@torch.no_grad()
def image_features(
    model: LLM2CLIP, gallery: Gallery, *, batch_size: int, show: bool = True
) -> tuple[Gallery, Tensor]:
    """Features of every item's image; items whose image cannot be used leave the gallery.

    Returns:
        (the gallery of the items with an image, their features (items, D) fp32 on the CPU, unit norm).

    Raises:
        DataError: fewer than two images can be used.
    """
    transform = model.vision_model.preprocessing.transform()
    device = next(model.parameters()).device
    features: list[Tensor] = []
    dropped: list[Item] = []
    reasons: list[str] = []
    pixels: list[Tensor] = []

    def flush() -> None:
        if pixels:
            out = model.get_image_features(torch.stack(pixels).to(device)).float()
            features.append(torch.nn.functional.normalize(out, dim=-1).cpu())
            pixels.clear()

    model.eval()
    with Progress(len(gallery.items), "image features", "images", enabled=show) as progress:
        for item in progress.track(gallery.items):
            try:
                pixels.append(transform(item_image(gallery.source, item)))
            except BadSampleError as problem:
                dropped.append(item)
                reasons.append(str(problem))
                if show:
                    print(f"skipped {problem}", file=sys.stderr)
                continue
            if len(pixels) == batch_size:
                flush()
        flush()
    if len(gallery.items) - len(dropped) < 2:
        raise DataError(
            f"{len(dropped)} of {len(gallery.items)} held-out images cannot be used:\n  "
            + "\n  ".join(reasons[:10])
        )
    return gallery.without(dropped, reasons), torch.cat(features)


def item_image(source: Source, item: Item) -> Any:
    """The decoded image (PIL, RGB) of an item; BadSampleError when there is none or it is damaged."""
    data = source[item.index].image
    if data is None:
        raise BadSampleError(item.key, "it has no image")
    return decode_image(data, key=item.key)


@torch.no_grad()
def text_features(model: LLM2CLIP, embeddings: Tensor, *, batch_size: int = 4096) -> Tensor:
    """LLM embeddings (n, llm_dim) through the adapter: (n, D) fp32 on the CPU, unit norm."""
    device = next(model.parameters()).device
    model.eval()
    parts = [model.get_text_features(part.to(device)).float().cpu() for part in embeddings.split(batch_size)]
    return torch.nn.functional.normalize(torch.cat(parts), dim=-1)
