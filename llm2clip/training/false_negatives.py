"""Which pairs of a batch must not be negatives of each other: one image, or an equal text, over all ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from llm2clip.training.pairs import TextPair
from llm2clip.training.world import World
from llm2clip_kernels.distributed import gather_rows, row_counts

NO_KEY = -1


def pair_keys(pair: TextPair) -> tuple[int, int, int]:
    """What a pair shares with its false negatives: group, query and positive, as numbers all ranks agree on."""
    return _key("group", pair.group), _key("text", pair.query), _key("text", pair.positive)


def negative_keys(pair: TextPair) -> tuple[int, int, int]:
    """The same of its hard negative: group if known, and text."""
    group = _key("group", pair.negative_group) if pair.negative_group else NO_KEY
    return group, _key("text", pair.negative), NO_KEY


def _key(kind: str, value: str) -> int:
    data = f"{kind}\x00{value}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def shared_ids(keys: Sequence[Tensor], world: World) -> list[Tensor] | None:
    """Group ids for the losses: rows of equal ids share a key, directly or over other rows.

    Args:
        keys: (B, 3) int64 of pairs, then (K, 3) of hard negatives or nothing; -1 is no key. Ranks may differ in rows.
        world: the ranks, whose rows count too.

    Returns:
        Ids of this rank's rows, one tensor of int64 for each of `keys`, one numbering over all ranks; None, on all
        ranks, where nothing is shared.
    """
    every, own = [], []
    start = 0
    for part in keys:
        counts, before = [len(part)], 0
        if world.size > 1:
            counts = row_counts(len(part), None, part.device)
            before = sum(counts[: dist.get_rank()])
            part = gather_rows(part, counts, None) if sum(counts) else part
        every.append(part.cpu())
        own.append(slice(start + before, start + before + counts[world.rank]))
        start += sum(counts)
    ids = torch.from_numpy(components(torch.cat(every).numpy()))
    if torch.equal(ids, torch.arange(len(ids))):
        return None
    return [ids[rows].to(part.device) for rows, part in zip(own, keys, strict=True)]


def components(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Connected rows of a table of keys (N, K), as the smallest row number of each component, (N,)."""
    rows = len(keys)
    labels = np.arange(rows)
    row, column = np.nonzero(keys != NO_KEY)
    _, key = np.unique(keys[row, column], return_inverse=True)
    lowest = np.full(int(key.max(initial=-1)) + 1, rows)
    while True:
        np.minimum.at(lowest, key, labels[row])
        updated = labels.copy()
        np.minimum.at(updated, row, lowest[key])
        if np.array_equal(updated, labels):
            return labels
        labels = updated
