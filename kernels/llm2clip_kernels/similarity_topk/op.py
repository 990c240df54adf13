"""`similarity_topk`: the k best columns of every row of x yᵀ, which is never stored.

Exact and deterministic: products in fp32 (fp64 for fp64) only say who might be among the best, within their proven
rounding error; those candidates are scored in fp64 and ordered by score, then by index. So the result depends
neither on tiles and threads nor on how a gallery is cut into chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..autocast import follows_autocast
from ..checks import check_groups, check_pair
from . import chunked

MAX_K = 64
# rows and columns of a CPU tile of fp32 dot products
_CPU_TILE = 1024
# rows of a gallery read at a time, converted where its dtype is not fp32
_CHUNK_ROWS = 1 << 16


@torch.library.custom_op("llm2clip_kernels::similarity_topk_update", mutates_args=())
def _update(
    x: Tensor, y: Tensor, scores: Tensor, indices: Tensor, first: int, x_groups: Tensor, y_groups: Tensor
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    # a half-precision gallery is converted in parts: whole it may not fit
    native = backend.choose(x.device, x.dtype) == "native"
    step = y.shape[0] if y.dtype == torch.float32 or not native else _CHUNK_ROWS
    wide = x.float() if native else x
    for start in range(0, y.shape[0], step):
        part = y[start : start + step].contiguous()
        groups = y_groups[start : start + step] if y_groups.numel() else y_groups
        if native:
            scores, indices = torch.ops.llm2clip_native.similarity_topk_update(
                wide, part.float(), scores.contiguous(), indices.contiguous(), first + start,
                x_groups.contiguous(), groups.contiguous(), _CPU_TILE,
            )  # fmt: skip
        else:
            scores, indices = chunked.update(x, part, scores, indices, first + start, x_groups, groups)
    return scores.clone(), indices.clone()


@_update.register_fake
def _(
    x: Tensor, y: Tensor, scores: Tensor, indices: Tensor, first: int, x_groups: Tensor, y_groups: Tensor
) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape), indices.new_empty(indices.shape)


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MAX_K:
        raise ValueError(f"similarity_topk: k must be a whole number from 1 to {MAX_K}, got {k!r}")


class SimilarityTopK:
    """The k best of a gallery that comes in chunks; the order of chunks does not matter but for the indices.

    Args:
        x: (M, D) queries; fp32, bf16, fp16 or fp64.
        k: 1 to 64.
        groups: (M,) int64; gallery rows of the same id >= 0 are left out. None: nothing is left out.

    Examples:
        >>> best = SimilarityTopK(queries, 10)
        >>> for chunk in chunks:
        ...     best.update(chunk)
        >>> scores, indices = best.result()
    """

    def __init__(self, x: Tensor, k: int, *, groups: Tensor | None = None) -> None:
        _check_k(k)
        check_pair(x, x, "similarity_topk")
        self._x = x.detach().contiguous()
        self._groups = groups
        self._scores = torch.full((x.shape[0], k), -torch.inf, dtype=torch.float64, device=x.device)
        self._indices = torch.full((x.shape[0], k), -1, dtype=torch.int64, device=x.device)
        self.rows = 0

    def update(self, y: Tensor, groups: Tensor | None = None) -> None:
        """Takes the next rows of the gallery.

        Args:
            y: (n, D), dtype and device of the queries; its first row has the index `self.rows`.
            groups: (n,) int64, when the queries have groups.

        Raises:
            TypeError, ValueError: a chunk that does not fit.
        """
        check_pair(self._x, y, "similarity_topk")
        own, other = check_groups(self._groups, groups, self._x, y, "similarity_topk")
        self._scores, self._indices = _update(
            self._x, y.detach(), self._scores, self._indices, self.rows, own, other
        )
        self.rows += y.shape[0]

    def result(self) -> tuple[Tensor, Tensor]:
        """Returns scores (M, k) fp32, best first, and indices (M, k) int64; -inf and -1 where there are fewer."""
        return self._scores.float(), self._indices


@follows_autocast
def similarity_topk(
    x: Tensor,
    y: Tensor,
    k: int,
    *,
    x_groups: Tensor | None = None,
    y_groups: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest dot products of every row of x with the rows of y, and where they are.

    Exact: scores are compared in fp64, equal ones go by the lower index. O(M·k) memory besides a bounded
    workspace. No gradients: inputs are detached.

    Args:
        x: (M, D) queries; fp32, bf16, fp16 or fp64, any norm.
        y: (N, D) gallery, dtype and device of x.
        k: 1 to 64.
        x_groups: (M,) int64, and
        y_groups: (N,) int64: pairs of equal ids >= 0 are left out (a query's own entry, its duplicates).

    Returns:
        scores (M, k) fp32, best first, and indices (M, k) int64. Where a row has fewer than k candidates the
        rest is -inf and -1. Scores that are NaN are no candidates.

    Raises:
        TypeError, ValueError: inputs that do not fit.

    Examples:
        >>> scores, indices = similarity_topk(text_features, image_features, 10)
    """
    check_pair(x, y, "similarity_topk")
    best = SimilarityTopK(x, k, groups=x_groups)
    best.update(y, y_groups)
    return best.result()


def similarity_topk_stream(
    x: Tensor, gallery: Any, k: int, *, rows: int = _CHUNK_ROWS, x_groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`similarity_topk` over a gallery larger than memory.

    Args:
        x: (M, D) queries.
        gallery: an array with `shape` and slices of rows, such as a numpy memory map or a tensor, or an
            iterable of chunks (n, D); with `x_groups`, an iterable of (chunk, ids). Chunks are moved to x's
            device and dtype.
        k: 1 to 64.
        rows: of an array read at a time.
        x_groups: (M,) int64, as in `similarity_topk`.

    Returns:
        As `similarity_topk`; indices count over all chunks.

    Raises:
        TypeError, ValueError: inputs that do not fit, or a gallery without rows.

    Examples:
        >>> gallery = numpy.memmap("features.bin", "float32", "r", shape=(10_000_000, 768))
        >>> scores, indices = similarity_topk_stream(queries, gallery, 10)
    """
    best = SimilarityTopK(x, k, groups=x_groups)
    for chunk in _chunks(gallery, rows):
        part, groups = chunk if isinstance(chunk, tuple) else (chunk, None)
        if groups is not None:
            groups = torch.as_tensor(groups, device=x.device)
        best.update(_tensor(part).to(device=x.device, dtype=x.dtype), groups)
    if best.rows == 0:
        raise ValueError("similarity_topk_stream: the gallery has no rows")
    return best.result()


def _tensor(part: Any) -> Tensor:
    if isinstance(part, Tensor):
        return part
    # a copy: a memory map may be read-only, which a tensor cannot be
    return torch.tensor(part)


def _chunks(gallery: Any, rows: int) -> Iterator[Any]:
    if rows < 1:
        raise ValueError(f"similarity_topk_stream: rows must be 1 or more, got {rows}")
    if hasattr(gallery, "shape"):
        for start in range(0, gallery.shape[0], rows):
            yield gallery[start : start + rows]
    elif isinstance(gallery, Iterable):
        yield from gallery
    else:
        raise TypeError(
            f"similarity_topk_stream: gallery must be an array or an iterable of chunks, got {type(gallery).__name__}"
        )


__all__ = ["SimilarityTopK", "similarity_topk", "similarity_topk_stream"]
