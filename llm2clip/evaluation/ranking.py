"""Where the right answers stand, both ways, for features on disk: no matrix, and the work shared by all ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm2clip.evaluation.datasets.base import CaptionSet
from llm2clip.evaluation.features import Rows
from llm2clip.evaluation.ranks import TIE_TOLERANCE, Ranks, group_ids, ranks_of
from llm2clip.training.world import World
from llm2clip_kernels import similarity_rank_stream
from llm2clip_kernels.similarity_rank import RankCounts

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pairing:
    """Which captions and images of a data set are ranked, and which belong together.

    Attributes:
        image_rows: (I,) rows of the images that have such a caption and can be used.
        text_rows: (T,) captions of these images.
        image_groups: (I,) or more, and
        text_groups: (T,): equal ids belong together, an id below 0 to nothing.
        text_images: (T,) row of each caption's image: captions of one image are no independent queries.
    """

    image_rows: Ints
    text_rows: Ints
    image_groups: Ints
    text_groups: Ints
    text_images: Ints


def pair_up(captions: CaptionSet, usable: npt.NDArray[np.bool_], *, equal_match: bool) -> Pairing:
    """The gallery of one kind of captions.

    Args:
        captions: the captions and their images.
        usable: (images,) which images have features.
        equal_match: captions with equal text are each other's right answers, and so are their images.
    """
    text_rows = np.flatnonzero(usable[captions.image])
    owner = captions.image[text_rows]
    image_rows, place = np.unique(owner, return_inverse=True)
    text_groups = place.astype(np.int64)
    image_groups = np.arange(len(image_rows))
    if equal_match:
        text_groups = group_ids(place.tolist(), [captions.texts[row] for row in text_rows.tolist()])
        image_groups = np.empty(len(image_rows), np.int64)
        image_groups[place] = text_groups  # all captions of an image are in one group
    return Pairing(image_rows, text_rows, image_groups, text_groups, owner)


def with_strangers(pairing: Pairing, count: int) -> Pairing:
    """The same with `count` more images in the gallery, which belong to no caption."""
    groups = np.concatenate([pairing.image_groups, np.full(count, -1)])
    return replace(pairing, image_groups=groups)


@dataclass(frozen=True)
class Directions:
    """Ranks of both directions."""

    text_to_image: Ranks
    image_to_text: Ranks


def rank_directions(texts: Rows, images: Rows, pairing: Pairing, world: World) -> Directions:
    """Rank every caption's image and every image's captions by cosine similarity, exactly.

    Args:
        texts: features of the captions of `pairing`.
        images: features of its images; those that belong to no caption are answers and never queries.
        pairing: what belongs together.
        world: ranks that share the work; each gets all results.
    """
    of_texts, of_images = similarity_rank_stream(
        texts,
        images,
        x_groups=torch.from_numpy(pairing.text_groups),
        y_groups=torch.from_numpy(pairing.image_groups),
        tolerance=TIE_TOLERANCE,
        device=world.device,
        gather=world.size > 1,
    )
    assert of_images is not None
    asked = of_images.right > 0
    queries = RankCounts(
        of_images.above[asked],
        of_images.tied[asked],
        of_images.tied_right[asked],
        of_images.right[asked],
        of_images.candidates,
    )
    return Directions(ranks_of(of_texts), ranks_of(queries))


def rank_classes(images: Any, classes: torch.Tensor, labels: Ints, world: World) -> Ranks:
    """Rank of every image's class among all classes, by dot product.

    Args:
        images: (N, D) array with `shape` and slices of rows.
        classes: (C, D).
        labels: (N,) class of each image.
        world: ranks that share the work.
    """
    counts, _ = similarity_rank_stream(
        images,
        classes,
        x_groups=torch.from_numpy(labels),
        y_groups=torch.arange(len(classes)),
        tolerance=TIE_TOLERANCE,
        directions="rows",
        device=world.device,
        gather=world.size > 1,
    )
    return ranks_of(counts)
