"""A batch of the CLIP stage: images and their captions, what was looked up for them, in parts and on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm2clip.models.clip_text import ClipTokens
from llm2clip.models.tokens import Tokens


@dataclass(frozen=True)
class ImageTexts:
    """B images with C captions, those of one image next to each other.

    Attributes:
        keys: sample keys, for messages.
        groups: (B,) int64, what the images show.
        counts: captions of each image, B numbers.
        texts: C captions.
        embeddings: (C, D_llm) fp32 of the captions.
        images: the images in order, in tensors (b, 3, S, S) uint8 as they were read; empty where they are not decoded.
            Never joined for good: a large batch would be in memory twice.
        features: (B, F) fp32, stored features of a frozen tower.
        teacher_image: (B, E) fp32 of a teacher.
        teacher_text: (C, E) fp32 of a teacher.
        teacher_tower: (B, F) fp32 of the tower that the run began with.
        owners: (C,) int64, the image of each caption in the batch that was split.
        meeting: whether images of one group may meet in the batch, here or on another rank.
        tokens: C captions for an LLM that is part of the model; None: they come as embeddings.
        clip_tokens: C captions for CLIP's own text tower.
    """

    keys: list[str]
    groups: Tensor
    counts: list[int]
    texts: list[str]
    embeddings: Tensor | None = None
    images: tuple[Tensor, ...] = ()
    features: Tensor | None = None
    teacher_image: Tensor | None = None
    teacher_text: Tensor | None = None
    teacher_tower: Tensor | None = None
    owners: Tensor | None = None
    meeting: bool = True
    tokens: list[Tokens] | None = None
    clip_tokens: ClipTokens | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def pixels(self) -> Tensor | None:
        """(B, 3, S, S) uint8, joined anew each time where they lie in several tensors; None without images."""
        if not self.images:
            return None
        return self.images[0] if len(self.images) == 1 else torch.cat(self.images)

    def __getitem__(self, rows: slice) -> ImageTexts:
        """Consecutive images with their captions."""
        start, stop, _ = rows.indices(len(self))
        edges = [0, *accumulate(self.counts)]
        captions = slice(edges[start], edges[max(start, stop)])
        return replace(
            self,
            keys=self.keys[start:stop],
            groups=self.groups[start:stop],
            counts=self.counts[start:stop],
            texts=self.texts[captions],
            embeddings=_rows(self.embeddings, captions),
            images=_image_rows(self.images, start, stop),
            features=_rows(self.features, slice(start, stop)),
            teacher_image=_rows(self.teacher_image, slice(start, stop)),
            teacher_text=_rows(self.teacher_text, captions),
            teacher_tower=_rows(self.teacher_tower, slice(start, stop)),
            owners=_rows(self.owners, captions),
        )

    def whole(self) -> ImageTexts:
        """Itself: a batch in one piece."""
        return self

    def one_per_group(self) -> ImageTexts:
        """Without images of what an earlier one shows already."""
        if not has_repeats(self.groups):
            return self
        _, first = np.unique(self.groups.numpy(), return_index=True)
        return join([self[int(i) : int(i) + 1] for i in sorted(first)])

    def split(self, size: int) -> list[ImageTexts]:
        """Parts of at most `size` images; 0: all in one. Each knows the owners of its captions in the whole."""
        return Pieces([self]).split(size)

    def to(self, device: torch.device) -> ImageTexts:
        """The same on `device`; from pinned memory without waiting for the copies."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> ImageTexts:
        """The same in page-locked memory."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> ImageTexts:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {
            n: function(value) for n, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **changed, images=tuple(map(function, self.images)))


@dataclass(frozen=True)
class Pieces:
    """A batch as the loader's pieces: each goes to the device by itself, and its images are never copied."""

    parts: Sequence[ImageTexts]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, rows: slice) -> ImageTexts:
        """Consecutive images with their captions: views where they are of one piece."""
        start, stop, _ = rows.indices(len(self))
        found: list[ImageTexts] = []
        for first, part in zip(self._edges(), self.parts, strict=False):
            if start < first + len(part) and first < stop:
                found.append(part[max(0, start - first) : stop - first])
        return join(found or [self.parts[0][:0]])

    @property
    def keys(self) -> list[str]:
        """Sample keys."""
        return [key for part in self.parts for key in part.keys]

    @property
    def groups(self) -> Tensor:
        """(B,) int64, what the images show."""
        return torch.cat([part.groups for part in self.parts])

    def whole(self) -> ImageTexts:
        """The pieces as one, where they are."""
        return join(self.parts)

    def to(self, device: torch.device) -> Pieces:
        """The pieces on `device`; from pinned memory without waiting for the copies."""
        return Pieces([part.to(device) for part in self.parts])

    def split(self, size: int) -> list[ImageTexts]:
        """As `ImageTexts.split`."""
        owned = [
            replace(part, owners=_owners(part, first))
            for first, part in zip(self._edges(), self.parts, strict=False)
        ]
        step = size or len(self)
        return [Pieces(owned)[start : start + step] for start in range(0, len(self), step)]

    def _edges(self) -> list[int]:
        """Index of each piece's first image, and the number of images."""
        return [0, *accumulate(len(part) for part in self.parts)]


def batch_of(parts: Sequence[ImageTexts]) -> ImageTexts | Pieces:
    """One batch of a loader's pieces."""
    return parts[0] if len(parts) == 1 else Pieces(parts)


def has_repeats(groups: Tensor) -> bool:
    """Whether a group (B,) on the CPU appears twice."""
    return len(np.unique(groups.numpy())) < len(groups)


def join(parts: Sequence[ImageTexts]) -> ImageTexts:
    """One batch of several, in order; all have the same tensors."""
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {}
    for field in fields(ImageTexts):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], Tensor):
            joined[field.name] = torch.cat(values)
        elif isinstance(values[0], (list, tuple)):
            joined[field.name] = type(values[0])(item for value in values for item in value)
    return ImageTexts(**joined)


def _rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _image_rows(images: tuple[Tensor, ...], start: int, stop: int) -> tuple[Tensor, ...]:
    """Views of consecutive rows of tensors that follow each other; of none, an empty one."""
    found, first = [], 0
    for tensor in images:
        if start < first + len(tensor) and first < stop:
            found.append(tensor[max(0, start - first) : stop - first])
        first += len(tensor)
    return tuple(found) if found or not images else (images[0][:0],)


def _owners(part: ImageTexts, first: int) -> Tensor:
    counts = torch.tensor(part.counts)
    images = torch.arange(first, first + len(part))
    return images.repeat_interleave(counts, output_size=len(part.texts)).to(part.groups.device)
