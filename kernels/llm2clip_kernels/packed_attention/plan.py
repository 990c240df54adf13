"""How the sequences of a pack are put together into dense batches of (nearly) equal length.

A pack from first-fit decreasing holds mostly neighbours in length, so a few dense batches cover it. Where all
lengths of a batch agree it is a view of the pack, and nothing is padded, gathered or masked.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

# logits of one head in one piece: 1 MiB of fp32, so that a few heads fit a core's cache
PIECE = 1 << 18
# a shorter sequence joins a batch if padding it there costs less than another batch would
_SHORTEST = 0.8
_SLACK = 8


@dataclass(frozen=True)
class Block:
    """Query rows `start` to `stop` of every sequence of a batch against the keys `low` to `high`.

    `hidden` marks the pairs that must not see each other: bool, broadcasts to (n, 1, 1, rows, keys).
    """

    start: int
    stop: int
    low: int
    high: int
    hidden: Tensor | None


@dataclass(frozen=True)
class Bucket:
    """`count` sequences padded to `length` tokens.

    Attributes:
        first: the first token of the pack that belongs here, if the tokens are one run of the pack.
        tokens: (t,) the tokens of the pack, sequence by sequence; None if they are one run.
        gather: (count · length,) the token behind each dense place, padding repeating the last one of its
            own sequence (values of another sequence would carry its NaN over); None if nothing is padded
            and the tokens are one run.
        places: (t,) the dense place of each token; None if nothing is padded.
        padding: (count, 1, 1, length, 1) bool, True where a place holds no token; None if nothing is padded.
        blocks: what to compute.
    """

    count: int
    length: int
    first: int
    tokens: Tensor | None
    gather: Tensor | None
    places: Tensor | None
    padding: Tensor | None
    blocks: tuple[Block, ...]


def check_edges(edges: tuple[int, ...], tokens: int, max_seqlen: int) -> None:
    """Raises ValueError unless cu_seqlens rises from 0 to the number of tokens in steps up to max_seqlen."""
    if edges[0] != 0 or edges[-1] != tokens:
        raise ValueError(
            f"packed_attention: cu_seqlens must run from 0 to the {tokens} tokens of q, "
            f"it runs from {edges[0]} to {edges[-1]}"
        )
    for index, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
        if stop < start:
            raise ValueError(
                f"packed_attention: cu_seqlens must not fall, sequence {index} runs from {start} to {stop}"
            )
        if stop - start > max_seqlen:
            raise ValueError(
                f"packed_attention: max_seqlen is {max_seqlen}, sequence {index} has {stop - start} tokens"
            )


@functools.lru_cache(maxsize=16)
def make_plan(
    edges: tuple[int, ...], causal: bool, window: int | None, device: torch.device
) -> tuple[Bucket, ...]:
    """The dense batches of a pack. Memoised: the layers of a model ask for the same plan one after another.

    Args:
        edges: cu_seqlens as numbers.
        causal: as in `packed_attention`.
        window: as in `packed_attention`.
        device: where index tensors and masks go.
    """
    lengths = [stop - start for start, stop in zip(edges, edges[1:], strict=False)]
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    for index in order:
        longest = lengths[groups[-1][0]] if groups else 0
        near = lengths[index] >= _SHORTEST * longest - _SLACK
        if groups and near and (len(groups[-1]) + 1) * longest * longest <= PIECE:
            groups[-1].append(index)
        else:
            groups.append([index])
    # tensors made under inference_mode could not be used outside of it later
    with torch.inference_mode(False):
        return tuple(_bucket(edges, sorted(group), causal, window, device) for group in groups)


def _bucket(
    edges: tuple[int, ...], group: list[int], causal: bool, window: int | None, device: torch.device
) -> Bucket:
    starts = torch.tensor([edges[i] for i in group], device=device)
    lengths = torch.tensor([edges[i + 1] - edges[i] for i in group], device=device)
    length = int(lengths.max())
    one_run = all(edges[i + 1] == edges[j] for i, j in zip(group, group[1:], strict=False))
    padded = bool((lengths != length).any())
    place = torch.arange(length, device=device)
    real = place < lengths[:, None]
    dense = starts[:, None] + torch.minimum(place, lengths[:, None] - 1)
    return Bucket(
        count=len(group),
        length=length,
        first=edges[group[0]],
        tokens=None if one_run else dense[real],
        gather=dense.reshape(-1) if padded or not one_run else None,
        places=real.reshape(-1).nonzero()[:, 0] if padded else None,
        padding=~real[:, None, None, :, None] if padded else None,
        blocks=_blocks(length, real, causal, window),
    )


def _blocks(length: int, real: Tensor, causal: bool, window: int | None) -> tuple[Block, ...]:
    rows = max(1, min(length, PIECE // length))
    result = []
    for start in range(0, length, rows):
        stop = min(length, start + rows)
        low = 0 if window is None else max(0, start - window)
        high = stop if causal else length if window is None else min(length, stop + window)
        place = torch.arange(length, device=real.device)
        distance = place[start:stop, None] - place[None, low:high]
        hidden = ~real[:, None, None, None, low:high]
        if causal:
            hidden = hidden | (distance < 0)
        if window is not None:
            hidden = hidden | (distance.abs() > window)
        result.append(Block(start, stop, low, high, hidden if bool(hidden.any()) else None))
    return tuple(result)
