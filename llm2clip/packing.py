"""Packing captions of different lengths under a token budget: first-fit decreasing, deterministic."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_host: Any
try:
    _host = importlib.import_module("llm2clip._host")
except ImportError:  # built without a C++ compiler
    _host = None


def pack(lengths: Sequence[int] | NDArray[np.int64], budget: int) -> list[NDArray[np.int64]]:
    """Sort sequences into bins of at most `budget` tokens, at most 11/9 of the fewest possible bins.

    Longest first, each into the first bin that has room; equal lengths in their given order. A sequence
    longer than the budget gets a bin of its own. Same result with and without the native module.

    Args:
        lengths: tokens of each sequence, shape (n,).
        budget: tokens per bin, at least 1.

    Returns:
        For each bin the indices of its sequences, ascending; the bins in the order of their opening.

    Raises:
        ValueError: the budget is below 1, a length is negative, or `lengths` has not one dimension.
    """
    array = np.ascontiguousarray(lengths, dtype=np.int64)
    if array.size == 0:
        array = array.reshape(0)
    bins = pack_python(array, budget) if _host is None else np.asarray(_host.pack(array, budget))
    order = np.argsort(bins, kind="stable")
    edges = np.flatnonzero(np.diff(bins[order])) + 1
    return [part for part in np.split(order, edges) if len(part)]


def pack_python(lengths: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """The bin number of every sequence, int64 of shape (n,); the definition of the native packer."""
    if lengths.ndim != 1:
        raise ValueError("lengths must have one dimension")
    if budget < 1:
        raise ValueError("the token budget must be at least 1")
    if (lengths < 0).any():
        raise ValueError("a length is negative")
    # a sequence over the budget fills a bin of its own
    sizes = np.minimum(lengths, budget)
    bins = np.zeros(len(lengths), dtype=np.int64)
    room: list[int] = []
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        number = next((place for place, free in enumerate(room) if free >= size), len(room))
        if number == len(room):
            room.append(budget)
        room[number] -= size
        bins[index] = number
    return bins
