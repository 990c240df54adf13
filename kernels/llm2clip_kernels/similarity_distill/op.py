"""`similarity_distill`: schema, checks, autograd, and the one place that picks the implementation.

With S = scale · x yᵀ and T = teacher_scale · p qᵀ, both (M, N), neither stored:

    row_lse_i = log Σ_j exp S_ij      cross_row_i = Σ_j softmax_j(T_i·) S_ij      pos_i = S_{i, diagonal+i}
    col_lse_j = log Σ_i exp S_ij      cross_col_j = Σ_i softmax_i(T_·j) S_ij
    G = g_row ∘ exp(S - row_lse) + g_col ∘ exp(S - col_lse) + g_pos on the diagonal
        + g_cross_row ∘ softmax_rows(T) + g_cross_col ∘ softmax_cols(T)
    dx = scale · G y          dy = scale · Gᵀ x          dscale = Σ G ∘ (x yᵀ)

Two matmuls in the forward, four in the backward (two remade, two gradients), for the contrastive and the
distillation loss together. Both are one op because the student's softmax less the teacher's, or less one, cancels
as the student learns: that must happen before G is rounded to half precision.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backend
from ..autocast import follows_autocast, full_precision
from ..checks import accumulator, check_pair, positive_logits, scale_tensor
from ..similarity_lse.op import Directions
from . import chunked

# rows and columns of the two CPU tiles of fp32 dot products, 1 MiB each: larger ones were no faster
_CPU_TILE = 512
NO_DIAGONAL = -1


class DistillTerms(NamedTuple):
    """Results of `similarity_distill`, fp32 (fp64 for fp64); None where not asked for.

    The teacher's log-sum-exps have no gradient; with them, averages over parts of a row or column can be merged.
    """

    row_lse: Tensor  # (M,)
    col_lse: Tensor | None  # (N,)
    positives: Tensor | None  # (M,)
    cross_row: Tensor  # (M,)
    cross_col: Tensor | None  # (N,)
    teacher_row_lse: Tensor  # (M,)
    teacher_col_lse: Tensor | None  # (N,)


def _lengths(m: int, n: int, columns: bool, diagonal: int) -> list[int]:
    n = n if columns else 0
    return [m, n, 0 if diagonal < 0 else m, m, n, m, n]


@torch.library.custom_op("llm2clip_kernels::similarity_distill", mutates_args=())
def _forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    p: Tensor,
    q: Tensor,
    teacher_scale: Tensor,
    columns: bool,
    diagonal: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, y, p, q = x.contiguous(), y.contiguous(), p.contiguous(), q.contiguous()
    wide = accumulator(x.dtype)
    chosen = backend.choose(x.device, x.dtype)
    if chosen == "native":
        outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
        outputs = torch.ops.llm2clip_native.similarity_distill_forward(
            x.float(), y.float(), scale.detach().item(), p.float(), q.float(), teacher_scale.detach().item(),
            columns, diagonal, _CPU_TILE,
        )  # fmt: skip
        return outputs
    row_origin, col_origin = x.new_zeros(x.shape[0], dtype=wide), x.new_zeros(y.shape[0], dtype=wide)
    pos = x.new_empty(0, dtype=wide)
    if diagonal >= 0:
        pos = positive_logits(x, y, scale, diagonal)
        # most of a teacher's weight lies on the positive; what is left after it is subtracted rounds little
        row_origin = pos.nan_to_num(0.0, 0.0, 0.0)
        col_origin[diagonal : diagonal + x.shape[0]] = row_origin
    implementation: Any = chunked
    if chosen == "triton":
        from . import launch

        implementation = launch
    # a custom op runs under its caller's autocast
    with full_precision(x.device):
        row, col, cross_row, cross_col, teacher_row, teacher_col = implementation.forward(
            x, y, scale, p, q, teacher_scale, columns, row_origin, col_origin
        )
    low = x.new_zeros(sum(_lengths(x.shape[0], y.shape[0], columns, diagonal)), dtype=wide)
    return row, col, pos, cross_row, cross_col, teacher_row, teacher_col, low


@_forward.register_fake
def _(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    p: Tensor,
    q: Tensor,
    teacher_scale: Tensor,
    columns: bool,
    diagonal: int,
) -> tuple[Tensor, ...]:
    lengths = _lengths(x.shape[0], y.shape[0], columns, diagonal)
    return tuple(x.new_empty(k, dtype=accumulator(x.dtype)) for k in (*lengths, sum(lengths)))


@torch.library.custom_op("llm2clip_kernels::similarity_distill_backward", mutates_args=())
def _backward(
    g_row: Tensor,
    g_col: Tensor,
    g_pos: Tensor,
    g_cross_row: Tensor,
    g_cross_col: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    p: Tensor,
    q: Tensor,
    teacher_scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    teacher_row: Tensor,
    teacher_col: Tensor,
    low: Tensor,
    diagonal: int,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, y, p, q = x.contiguous(), y.contiguous(), p.contiguous(), q.contiguous()
    gradients = [g.contiguous() for g in (g_row, g_col, g_pos, g_cross_row, g_cross_col)]
    chosen = backend.choose(x.device, x.dtype)
    if chosen == "native":
        dx, dy, dscale = torch.ops.llm2clip_native.similarity_distill_backward(
            *gradients, x.float(), y.float(), scale.detach().item(), p.float(), q.float(),
            teacher_scale.detach().item(), row_lse, col_lse, teacher_row, teacher_col, low, diagonal, need_x,
            need_y, need_scale, _CPU_TILE,
        )  # fmt: skip
    else:
        implementation: Any = chunked
        if chosen == "triton":
            from . import launch

            implementation = launch
        with full_precision(x.device):
            dx, dy, dscale = implementation.backward(
                *gradients, x, y, scale, p, q, teacher_scale, row_lse, col_lse, teacher_row, teacher_col,
                diagonal, need_x, need_y, need_scale,
            )  # fmt: skip
    dscale = dscale.reshape(()).to(scale.dtype) if need_scale else scale.new_zeros(())
    return dx.to(x.dtype), dy.to(y.dtype), dscale


@_backward.register_fake
def _(
    g_row: Tensor,
    g_col: Tensor,
    g_pos: Tensor,
    g_cross_row: Tensor,
    g_cross_col: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    p: Tensor,
    q: Tensor,
    teacher_scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    teacher_row: Tensor,
    teacher_col: Tensor,
    low: Tensor,
    diagonal: int,
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
    x, y, scale, p, q, teacher_scale, ctx.columns, ctx.diagonal = inputs
    row, col, _, _, _, teacher_row, teacher_col, low = output
    ctx.save_for_backward(x, y, scale, p, q, teacher_scale, row, col, teacher_row, teacher_col, low)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(teacher_row, teacher_col, low)


def _autograd(
    ctx: Any,
    g_row: Tensor | None,
    g_col: Tensor | None,
    g_pos: Tensor | None,
    g_cross_row: Tensor | None,
    g_cross_col: Tensor | None,
    *_: Tensor | None,
) -> tuple[Tensor | None, ...]:
    x, y, scale, p, q, teacher_scale, row, col, teacher_row, teacher_col, low = ctx.saved_tensors
    need_x, need_y, need_scale = ctx.needs_input_grad[:3]
    nothing: tuple[None, ...] = (None,) * 5
    if all(g is None for g in (g_row, g_col, g_pos, g_cross_row, g_cross_col)):
        return None, None, None, *nothing
    none = row.new_empty(0)
    # columns and teacher are left out of the sweep where nothing came back for them
    g_col = none if g_col is None or not ctx.columns else g_col
    g_cross_col = none if g_cross_col is None or not ctx.columns else g_cross_col
    if g_cross_row is None:
        g_cross_row = none if g_cross_col is none else torch.zeros_like(row)
    dx, dy, dscale = torch.ops.llm2clip_kernels.similarity_distill_backward(
        torch.zeros_like(row) if g_row is None else g_row, g_col,
        none if g_pos is None or ctx.diagonal < 0 else g_pos, g_cross_row, g_cross_col,
        x, y, scale, p, q, teacher_scale, row, col, teacher_row, teacher_col, low,
        ctx.diagonal, need_x, need_y, need_scale,
    )  # fmt: skip
    return dx if need_x else None, dy if need_y else None, dscale if need_scale else None, *nothing


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _check_teacher(x: Tensor, y: Tensor, p: Tensor, q: Tensor) -> None:
    check_pair(p, q, "similarity_distill (teacher, p and q in place of x and y)")
    if p.device != x.device:
        raise ValueError(
            f"similarity_distill: the teacher must be on the student's device, got {p.device} and {x.device}"
        )
    if p.shape[0] != x.shape[0] or q.shape[0] != y.shape[0]:
        raise ValueError(
            "similarity_distill: p must have x's rows and q y's, got "
            f"{p.shape[0]} and {x.shape[0]}, {q.shape[0]} and {y.shape[0]}"
        )


def similarity_distill_with_rounding(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    p: Tensor,
    q: Tensor,
    teacher_scale: Tensor | float,
    *,
    directions: Directions = "both",
    diagonal: int = NO_DIAGONAL,
) -> tuple[DistillTerms, DistillTerms]:
    """`similarity_distill`, and what rounding took from each result.

    Add the second to differences of the first: a log-sum-exp and an average of the logits it is made of nearly
    cancel. Arguments as in `similarity_distill`.
    """
    if all(isinstance(t, Tensor) for t in (x, y, p, q)):
        check_pair(x, y, "similarity_distill")
    _check_teacher(x, y, p, q)
    if directions not in ("both", "rows"):
        raise ValueError(f"similarity_distill: directions must be 'both' or 'rows', got {directions!r}")
    if diagonal != NO_DIAGONAL and not 0 <= diagonal <= y.shape[0] - x.shape[0]:
        raise ValueError(
            f"similarity_distill: diagonal {diagonal} leaves rows without a positive: x has {x.shape[0]} rows, "
            f"y {y.shape[0]}"
        )
    factor = scale_tensor(scale, x, "similarity_distill")
    teacher_factor = scale_tensor(teacher_scale, x, "similarity_distill").detach()
    columns = directions == "both"
    # fp32 is what the sums are made in: a wider teacher would cost a GEMM in fp64
    if p.dtype == torch.float64 and x.dtype != torch.float64:
        p, q = p.float(), q.float()
    *results, low = _forward(x, y, factor, p.detach(), q.detach(), teacher_factor, columns, diagonal)
    rounding = low.split(_lengths(x.shape[0], y.shape[0], columns, diagonal))

    def terms(parts: Any) -> DistillTerms:
        row, col, pos, cross_row, cross_col, teacher_row, teacher_col = parts
        return DistillTerms(
            row,
            col if columns else None,
            pos if diagonal >= 0 else None,
            cross_row,
            cross_col if columns else None,
            teacher_row,
            teacher_col if columns else None,
        )

    return terms(results), terms(rounding)


@follows_autocast
def similarity_distill(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    p: Tensor,
    q: Tensor,
    teacher_scale: Tensor | float,
    *,
    directions: Directions = "both",
    diagonal: int = NO_DIAGONAL,
) -> DistillTerms:
    """What contrastive and distillation losses need of S = scale · x yᵀ and T = teacher_scale · p qᵀ.

    The cross-entropy of the student against the teacher is `row_lse - cross_row` along rows and
    `col_lse - cross_col` along columns. Differentiable in x, y and scale; the teacher gets no gradient. Nothing is
    computed for inputs that need no gradient, nor for results that get none. O((M+N)·(D+E)) memory besides a
    workspace of a few MiB.

    Args:
        x: (M, D) student, fp32, bf16, fp16 or fp64, any strides; unit norm is fastest, anything is right.
        y: (N, D) student, dtype and device of x.
        scale: multiplier of the student's dot products (already exponentiated, not a temperature).
        p: (M, E) teacher, on x's device; any E. A dtype of its own, in which its products are made: half precision
            in half, fp64 as fp32 unless the student is fp64.
        q: (N, E) teacher, dtype of p.
        teacher_scale: multiplier of the teacher's dot products; no gradient.
        directions: "both", or "rows" to leave out what runs along columns.
        diagonal: column of row 0's positive, 0 <= diagonal <= N - M; -1 for none.

    Returns:
        `DistillTerms`; what was not asked for is None.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or options that do not fit, with what was expected.
    """
    return similarity_distill_with_rounding(
        x, y, scale, p, q, teacher_scale, directions=directions, diagonal=diagonal
    )[0]
