"""What a loader's worker does for the CLIP stage: draw captions, decode and cut the image, look up stored features."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm2clip.data.image_address import image_address, view_rng
from llm2clip.data.images import ImageTransform, decode_image
from llm2clip.data.sample import Sample
from llm2clip.data.store import EmbeddingStore
from llm2clip.errors import BadSampleError, StoreError
from llm2clip.settings import CaptionSettings
from llm2clip.training.clip_batch import ImageTexts


@dataclass(frozen=True, slots=True)
class ImageText:
    """One training sample: an image and the captions drawn for it this time.

    Attributes:
        key: sample key, for messages.
        group: what is shown, as a number (`group_id`).
        texts: captions, looked up in the embedding store.
        pixels: (3, S, S) uint8; None where images are not decoded.
        address: the image's or the view's address in stores of image features; "" where none is read.
    """

    key: str
    group: int
    texts: tuple[str, ...]
    pixels: Tensor | None = None
    address: str = ""


@dataclass(frozen=True)
class Reader:
    """What a loader's worker does with samples of the CLIP stage.

    Attributes:
        captions: which captions are drawn.
        transform: cuts images to size; None: images are not decoded.
        views: stored views of an image to draw from; 0: a fresh crop each time.
        store: LLM embeddings of the captions; None: captions are embedded elsewhere.
        features: stored features of the frozen tower.
        teacher_image, teacher_text: stored features of a teacher.
    """

    captions: CaptionSettings
    transform: ImageTransform | None = None
    views: int = 0
    store: EmbeddingStore | None = None
    features: EmbeddingStore | None = None
    teacher_image: EmbeddingStore | None = None
    teacher_text: EmbeddingStore | None = None

    @property
    def reads_images(self) -> bool:
        """Whether the image's bytes are needed at all."""
        return self.transform is not None or self._addressed

    @property
    def _addressed(self) -> bool:
        return self.features is not None or self.teacher_image is not None

    def __call__(self, sample: Sample, rng: np.random.Generator) -> ImageText:
        """Draw captions and cut the image.

        Raises:
            BadSampleError: no caption that may be drawn, or no image that can be used.
        """
        texts = draw_captions(sample, self.captions, rng)
        pixels, address = None, ""
        if self.reads_images:
            if sample.image is None:
                raise BadSampleError(sample.key, "it has no image")
            if self._addressed:
                address = image_address(sample.image, int(rng.integers(self.views)) if self.views else None)
            if self.transform is not None:
                image = decode_image(sample.image, key=sample.key, min_side=self.transform.min_side)
                pixels = self.transform.pixels(image, view_rng(address) if self.views else rng)
        return ImageText(sample.key, group_id(sample.group), texts, pixels, address)

    def collate(self, items: Sequence[ImageText]) -> ImageTexts:
        """Samples to a batch, with what the stores hold of them.

        Raises:
            StoreError: a store lacks a caption or an image.
        """
        texts = [text for item in items for text in item.texts]
        pixels = [item.pixels for item in items if item.pixels is not None]
        return ImageTexts(
            keys=[item.key for item in items],
            groups=torch.tensor([item.group for item in items]),
            counts=[len(item.texts) for item in items],
            texts=texts,
            embeddings=self.store.get(texts) if self.store is not None else None,
            images=(torch.stack(pixels),) if pixels else (),
            features=_stored_images(self.features, items),
            teacher_image=_stored_images(self.teacher_image, items),
            teacher_text=self.teacher_text.get(texts) if self.teacher_text is not None else None,
        )


def group_id(group: str) -> int:
    """A group's name as a number of 63 bits, the same in every process."""
    return (
        int.from_bytes(hashlib.blake2b(group.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
        >> 1
    )


def draw_captions(sample: Sample, captions: CaptionSettings, rng: np.random.Generator) -> tuple[str, ...]:
    """Up to `captions.per_image` different captions: a role with its probability, then one of its texts.

    Raises:
        BadSampleError: no role that may be drawn has text.
    """
    chances = captions.chances
    left = {
        role: list(dict.fromkeys(texts))
        for role, names in captions.all_roles.items()
        if role in chances and (texts := role_texts(sample, names))
    }
    if not left:
        wanted = ", ".join(dict.fromkeys(name for role in chances for name in captions.all_roles[role]))
        raise BadSampleError(
            sample.key, f"no caption in {wanted}; it has {', '.join(sample.captions) or 'none'}"
        )
    drawn: list[str] = []
    while left and len(drawn) < captions.per_image:
        role = _draw({role: chances[role] for role in left}, rng)
        open_texts = left[role]
        text = open_texts.pop(int(rng.integers(len(open_texts))) if len(open_texts) > 1 else 0)
        if text not in drawn:  # two roles may have the same text
            drawn.append(text)
        if not open_texts:
            del left[role]
    return tuple(drawn)


def role_texts(sample: Sample, names: Sequence[str]) -> tuple[str, ...]:
    """All texts of the first of these fields that has any."""
    return next((texts for name in names if (texts := sample.captions.get(name))), ())


def _draw(chances: dict[str, float], rng: np.random.Generator) -> str:
    point = float(rng.random()) * sum(chances.values())
    for role, chance in chances.items():
        point -= chance
        if point < 0:
            return role
    return list(chances)[-1]


def _stored_images(store: EmbeddingStore | None, items: Sequence[ImageText]) -> Tensor | None:
    if store is None:
        return None
    rows = store.find([item.address for item in items])
    lacking = [item.key for item, row in zip(items, rows.tolist(), strict=True) if row < 0]
    if lacking:
        raise StoreError(
            f"the store {store.path} has no features of {len(lacking)} of {len(items)} images, for example of "
            f"{', '.join(lacking[:10])}. Run `llm2clip embed images` on this data, with as many views."
        )
    return store.read(rows)
