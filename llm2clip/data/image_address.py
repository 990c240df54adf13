"""Addresses of stored image features: by the content of the image's file, as captions are stored by their text.

A renamed shard, another order or a mixture of data sets then changes nothing, and two sources cannot be confused.
"""

from __future__ import annotations

import hashlib

import numpy as np


def image_address(image: bytes, view: int | None = None) -> str:
    """Address of an image, or of one of its augmented views, in an embedding store.

    Args:
        image: the encoded file.
        view: number of the view; None is the whole image, as evaluation sees it.
    """
    digest = hashlib.blake2b(image, digest_size=16).hexdigest()
    return f"image {digest}" if view is None else f"image {digest} view {view}"


def view_rng(address: str) -> np.random.Generator:
    """Random numbers of the augmentation that makes a view: the same for the teacher and the student."""
    return np.random.default_rng(np.frombuffer(hashlib.blake2b(address.encode()).digest(), dtype=np.uint32))
