"""`similarity_lse`: schema, checks, autograd, and the one place that picks the implementation.

With S = scale · x yᵀ (M, N), never stored:

    row_lse_i = log Σ_j exp S_ij          col_lse_j = log Σ_i exp S_ij          pos_i = S_{i, diagonal+i}
    G = g_row ∘ exp(S - row_lse) + g_col ∘ exp(S - col_lse) + g_pos on the diagonal
    dx = scale · G y          dy = scale · Gᵀ x          dscale = Σ G ∘ (x yᵀ)

One matmul in the forward and three in the backward (two with the exponentials cached). The positive logit is
part of the op because 1 - p cancels: it must be subtracted before G is rounded to half precision.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import _env, backend, host_memory
from ..autocast import follows_autocast, full_precision
from ..checks import accumulator, check_groups, check_pair, positive_logits, scale_tensor
from . import chunked, plain

Directions = Literal["both", "rows"]
Method = Literal["auto", "recompute", "cached"]

# rows and columns of a CPU tile of fp32 dot products, 4 MiB: best of 512, 1024, 2048 on two machines
_CPU_TILE = 1024
# read once: torch.compile must not trace into the environment
_CACHE_BUDGET = _env.cache_budget_bytes()
_SMALL_PAIRS = _env.small_pairs()
NO_DIAGONAL = -1


def _cache_for(x: Tensor, y: Tensor, wanted: bool) -> tuple[int, torch.dtype]:
    """How many exponentials are kept, and as what.

    Plain torch has no use for a cache and recomputes, which costs time and never memory. A GPU keeps bf16, which
    reaches as far as fp32 and takes half the reading, for inputs that are no more exact than that.
    """
    chosen = backend.choose(x.device, x.dtype)
    serves = chosen == "native" or (chosen == "triton" and x.dtype != torch.float32)
    kept = x.shape[0] * y.shape[0] if wanted and serves else 0
    return kept, torch.bfloat16 if chosen == "triton" else accumulator(x.dtype)


@torch.library.custom_op("llm2clip_kernels::similarity_lse", mutates_args=())
def _forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    columns: bool,
    diagonal: int,
    cached: bool,
    x_groups: Tensor,
    y_groups: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, y = x.contiguous(), y.contiguous()
    wide = accumulator(x.dtype)
    chosen = backend.choose(x.device, x.dtype)
    kept, cache_dtype = _cache_for(x, y, cached)
    if chosen == "native":
        cache = host_memory.floats(kept)
        row, col, pos, low = torch.ops.llm2clip_native.similarity_lse_forward(
            x.float(),
            y.float(),
            scale.detach().item(),
            columns,
            diagonal,
            cache,
            x_groups,
            y_groups,
            _CPU_TILE,
        )
        return row, col, pos, low, cache
    # a custom op runs under its caller's autocast
    with full_precision(x.device):
        if chosen == "triton":
            from . import launch

            row, col, cache = launch.forward(x, y, scale, columns, diagonal, x_groups, y_groups, kept > 0)
        else:
            row, col = chunked.forward(x, y, scale, columns, diagonal, x_groups, y_groups)
            cache = x.new_empty(kept, dtype=cache_dtype)
    pos = x.new_empty(0, dtype=wide) if diagonal < 0 else positive_logits(x, y, scale, diagonal)
    low = x.new_zeros(row.numel() + col.numel() + pos.numel(), dtype=wide)
    return row, col, pos, low, cache


@_forward.register_fake
def _(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    columns: bool,
    diagonal: int,
    cached: bool,
    x_groups: Tensor,
    y_groups: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    m, n = x.shape[0], y.shape[0]
    dtype = accumulator(x.dtype)
    kept, cache_dtype = _cache_for(x, y, cached)
    return (
        x.new_empty(m, dtype=dtype),
        x.new_empty(n if columns else 0, dtype=dtype),
        x.new_empty(0 if diagonal < 0 else m, dtype=dtype),
        x.new_empty(m + (n if columns else 0) + (0 if diagonal < 0 else m), dtype=dtype),
        x.new_empty(kept, dtype=cache_dtype),
    )


@torch.library.custom_op("llm2clip_kernels::similarity_lse_backward", mutates_args=())
def _backward(
    g_row: Tensor,
    g_col: Tensor,
    g_pos: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    low: Tensor,
    cache: Tensor,
    diagonal: int,
    x_groups: Tensor,
    y_groups: Tensor,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, y = x.contiguous(), y.contiguous()
    g_row, g_col, g_pos = g_row.contiguous(), g_col.contiguous(), g_pos.contiguous()
    chosen = backend.choose(x.device, x.dtype)
    if chosen == "native":
        dx, dy, dscale = torch.ops.llm2clip_native.similarity_lse_backward(
            g_row, g_col, g_pos, x.float(), y.float(), scale.detach().item(), row_lse, col_lse, low, cache,
            diagonal, x_groups, y_groups, need_x, need_y, need_scale, _CPU_TILE,
        )  # fmt: skip
    else:
        with full_precision(x.device):
            if chosen == "triton":
                from . import launch

                dx, dy, dscale = launch.backward(
                    g_row, g_col, g_pos, x, y, scale, row_lse, col_lse, cache,
                    diagonal, x_groups, y_groups, need_x, need_y, need_scale,
                )  # fmt: skip
            else:
                dx, dy, dscale = chunked.backward(
                    g_row, g_col, g_pos, x, y, scale, row_lse, col_lse,
                    diagonal, x_groups, y_groups, need_x, need_y, need_scale,
                )  # fmt: skip
    dscale = dscale.reshape(()).to(scale.dtype) if need_scale else scale.new_zeros(())
    return dx.to(x.dtype), dy.to(y.dtype), dscale


@_backward.register_fake
def _(
    g_row: Tensor,
    g_col: Tensor,
    g_pos: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    low: Tensor,
    cache: Tensor,
    diagonal: int,
    x_groups: Tensor,
    y_groups: Tensor,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape[0] if need_x else 0, x.shape[1]),
        y.new_empty(y.shape[0] if need_y else 0, y.shape[1]),
        scale.new_empty(()),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, scale, ctx.columns, ctx.diagonal, _, x_groups, y_groups = inputs
    row_lse, col_lse, _, low, cache = output
    ctx.save_for_backward(x, y, scale, row_lse, col_lse, low, cache, x_groups, y_groups)
    # otherwise autograd would make M·N zeros for the gradient of the cache
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(low, cache)


def _autograd(
    ctx: Any, g_row: Tensor | None, g_col: Tensor | None, g_pos: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, y, scale, row_lse, col_lse, low, cache, x_groups, y_groups = ctx.saved_tensors
    need_x, need_y, need_scale = ctx.needs_input_grad[:3]
    if g_row is None and g_col is None and g_pos is None:
        return (None,) * 8
    none = row_lse.new_empty(0)
    dx, dy, dscale = torch.ops.llm2clip_kernels.similarity_lse_backward(
        row_lse.new_zeros(row_lse.shape) if g_row is None else g_row,
        none if g_col is None or not ctx.columns else g_col,
        none if g_pos is None or ctx.diagonal < 0 else g_pos,
        x, y, scale, row_lse,
        none if g_col is None else col_lse,
        low, cache, ctx.diagonal, x_groups, y_groups, need_x, need_y, need_scale,
    )  # fmt: skip
    needed = [g if need else None for g, need in ((dx, need_x), (dy, need_y), (dscale, need_scale))]
    return (*needed, None, None, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _wants_cache(method: str, x: Tensor, y: Tensor, scale: Tensor) -> bool:
    if method not in ("auto", "recompute", "cached"):
        raise ValueError(f"method must be 'auto', 'recompute' or 'cached', got {method!r}")
    if method == "recompute" or x.dtype == torch.float64:
        return False
    if not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or scale.requires_grad)):
        return False
    each = 4 if x.device.type == "cpu" else 2
    return method == "cached" or each * x.shape[0] * y.shape[0] <= _CACHE_BUDGET


def is_small(x: Tensor, y: Tensor, method: str) -> bool:
    """Returns whether `method` leaves this many pairs to plain torch with the matrix in memory."""
    return method == "auto" and x.shape[0] * y.shape[0] <= _SMALL_PAIRS


@follows_autocast
def similarity_lse_with_positives(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    directions: Directions = "both",
    diagonal: int = NO_DIAGONAL,
    method: Method = "auto",
    x_groups: Tensor | None = None,
    y_groups: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """`similarity_lse`, and the logits of the pairs (i, diagonal + i) from the same backward pass.

    Args:
        x: (M, D).
        y: (N, D).
        scale: multiplier of the dot products.
        directions: "both", or "rows" to leave the columns out.
        diagonal: column of row 0's positive, 0 <= diagonal <= N - M; -1 for none.
        method: as in `similarity_lse`.
        x_groups, y_groups: (M,) and (N,) integer ids, or both None. Pairs of equal ids are left out of both
            log-sum-exps, except the pairs (i, diagonal + i); a negative id equals nothing. Where nothing is
            left the log-sum-exp is -inf and the gradient zero.

    Returns:
        row_lse (M,); col_lse (N,) or None; positive logits (M,) or None; and what rounding took from these
        three, one after the other: add it after subtracting them from each other. fp32 (fp64 for fp64).
    """
    check_pair(x, y, "similarity_lse")
    if directions not in ("both", "rows"):
        raise ValueError(f"directions must be 'both' or 'rows', got {directions!r}")
    if diagonal != NO_DIAGONAL and not 0 <= diagonal <= y.shape[0] - x.shape[0]:
        raise ValueError(
            f"diagonal {diagonal} leaves rows without a positive: x has {x.shape[0]} rows, y {y.shape[0]}"
        )
    factor = scale_tensor(scale, x, "similarity_lse")
    columns = directions == "both"
    groups = check_groups(x_groups, y_groups, x, y, "similarity_lse")
    if is_small(x, y, method):
        return plain.forward(x, y, factor, columns, diagonal, *groups)
    row, col, pos, low, _ = _forward(
        x, y, factor, columns, diagonal, _wants_cache(method, x, y, factor), *groups
    )
    return row, col if columns else None, pos if diagonal >= 0 else None, low


@overload
def similarity_lse(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    directions: Literal["both"] = "both",
    method: Method = "auto",
) -> tuple[Tensor, Tensor]: ...
@overload
def similarity_lse(
    x: Tensor, y: Tensor, scale: Tensor | float, *, directions: Literal["rows"], method: Method = "auto"
) -> tuple[Tensor, None]: ...
def similarity_lse(
    x: Tensor, y: Tensor, scale: Tensor | float, *, directions: Directions = "both", method: Method = "auto"
) -> tuple[Tensor, Tensor | None]:
    """Row and column log-sum-exp of S = scale · x yᵀ without storing S.

    Differentiable in x, y and scale; nothing is computed for inputs that need no gradient. O((M+N)·D) memory
    besides a workspace of a few MiB, and M·N·4 bytes more where the exponentials are cached.

    Args:
        x: (M, D) fp32, bf16, fp16 or fp64, any strides; unit norm is fastest, anything is right.
        y: (N, D), dtype and device of x.
        scale: multiplier of the dot products (already exponentiated, not a temperature): a number, or a 0-dim
            or 1-element tensor, which then gets a gradient.
        directions: "both", or "rows" for the first result alone at the same cost less the column sums.
        method: "recompute" (4 matmuls, bounded workspace), "cached" (3 matmuls, exponentials kept for the
            backward), "auto" (cached under LLM2CLIP_CACHE_MIB; plain torch up to LLM2CLIP_SMALL_PAIRS pairs,
            where launching kernels costs more than the matrix).

    Returns:
        row_lse (M,) and col_lse (N,), fp32 (fp64 for fp64 inputs); col_lse is None for directions="rows".

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or options that do not fit, with what was expected.

    Examples:
        >>> row, col = similarity_lse(image_features, text_features, logit_scale.exp())
    """
    row, col, _, _ = similarity_lse_with_positives(x, y, scale, directions=directions, method=method)
    return row, col


__all__ = [
    "Directions",
    "Method",
    "is_small",
    "similarity_lse",
    "similarity_lse_with_positives",
]
