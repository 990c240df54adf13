"""`segment_mean`: schema, checks, autograd, and the one place that picks the implementation.

For the span [a_b, e_b) of every packed sequence b, and with `normalize` y_b = mean_b / max(‖mean_b‖, 1e-12):

    mean_b = 1/(e_b - a_b) Σ hidden_t          dhidden_t = dmean_b / (e_b - a_b) inside the span, 0 outside

One read of hidden forward, one write of its gradient backward; of hidden nothing is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..checks import FLOATS, accumulator, native_rows
from . import plain

_EPS = 1e-12


def _check_values(start: Tensor, stop: Tensor, cu_seqlens: Tensor, tokens: int) -> None:
    edges = cu_seqlens.tolist()
    if edges[0] != 0 or edges[-1] != tokens:
        raise ValueError(
            f"segment_mean: cu_seqlens must begin with 0 and end with the number of tokens {tokens}, got "
            f"{edges[0]} and {edges[-1]}"
        )
    empty = [b for b in range(len(edges) - 1) if edges[b + 1] <= edges[b]]
    if empty:
        b = empty[0]
        raise ValueError(
            f"segment_mean: cu_seqlens must increase, got {edges[b]}, {edges[b + 1]} at sequence {b} "
            f"({len(empty)} empty or negative of {len(edges) - 1}); leave empty sequences out of the pack"
        )
    for b, (first, last) in enumerate(zip(start.tolist(), stop.tolist(), strict=True)):
        if not edges[b] <= first < last <= edges[b + 1]:
            raise ValueError(
                f"segment_mean: span [{first - edges[b]}, {last - edges[b]}) of sequence {b} must be non-empty and "
                f"lie within its {edges[b + 1] - edges[b]} tokens"
            )


@torch.library.custom_op("llm2clip_kernels::segment_mean", mutates_args=())
def _forward(
    hidden: Tensor, start: Tensor, stop: Tensor, cu_seqlens: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    if cu_seqlens.device.type == "cpu":
        # here, and not in the caller, where torch.compile would have to trace it
        _check_values(start, stop, cu_seqlens, hidden.shape[0])
    chosen = backend.choose_rows(hidden.device, hidden.dtype)
    if chosen == "native":
        outputs: tuple[Tensor, Tensor] = torch.ops.llm2clip_native.segment_mean_forward(
            native_rows(hidden), start, stop, normalize, _EPS
        )
        return outputs
    if chosen == "triton":
        from . import kernel

        return kernel.forward(hidden.contiguous(), start, stop, cu_seqlens, normalize, _EPS)
    return plain.forward(hidden, start, stop, cu_seqlens, normalize, _EPS)


@_forward.register_fake
def _(
    hidden: Tensor, start: Tensor, stop: Tensor, cu_seqlens: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    wide, segments = accumulator(hidden.dtype), start.shape[0]
    mean = hidden.new_empty(segments, hidden.shape[1], dtype=wide)
    return mean, hidden.new_empty(segments if normalize else 0, dtype=wide)


@torch.library.custom_op("llm2clip_kernels::segment_mean_backward", mutates_args=())
def _backward(
    g: Tensor,
    unit: Tensor,
    norm: Tensor,
    start: Tensor,
    stop: Tensor,
    cu_seqlens: Tensor,
    tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    g = g.contiguous()
    chosen = backend.choose_rows(g.device, g.dtype, dtype)
    if chosen == "native":
        out: Tensor = torch.ops.llm2clip_native.segment_mean_backward(
            g, unit, norm, start, stop, cu_seqlens, tokens, _EPS, dtype == torch.bfloat16
        )
        return out.to(dtype)
    if chosen == "triton":
        from . import kernel

        return kernel.backward(g, unit, norm, start, stop, cu_seqlens, tokens, _EPS, dtype)
    return plain.backward(g, unit, norm, start, stop, cu_seqlens, tokens, _EPS, dtype)


@_backward.register_fake
def _(
    g: Tensor,
    unit: Tensor,
    norm: Tensor,
    start: Tensor,
    stop: Tensor,
    cu_seqlens: Tensor,
    tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    return g.new_empty(tokens, g.shape[1], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, start, stop, cu_seqlens, normalize = inputs
    mean, norm = output
    ctx.tokens, ctx.dtype = hidden.shape[0], hidden.dtype
    ctx.save_for_backward(mean if normalize else norm, norm, start, stop, cu_seqlens)
    ctx.mark_non_differentiable(norm)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None, None]:
    if g is None:
        return None, None, None, None, None
    dhidden = torch.ops.llm2clip_kernels.segment_mean_backward(g, *ctx.saved_tensors, ctx.tokens, ctx.dtype)
    return dhidden, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _check(hidden: Tensor, cu_seqlens: Tensor, spans: Tensor | None) -> None:
    for label, t in (("hidden", hidden), ("cu_seqlens", cu_seqlens)):
        if not isinstance(t, Tensor):
            raise TypeError(f"segment_mean: {label} must be a tensor, got {type(t).__name__}")
    if hidden.dim() != 2 or hidden.shape[1] == 0:
        raise ValueError(f"segment_mean: hidden must be (tokens, H) with H >= 1, got {tuple(hidden.shape)}")
    if hidden.dtype not in FLOATS:
        raise TypeError(f"segment_mean: hidden must be fp32, bf16, fp16 or fp64, got {hidden.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"segment_mean: cu_seqlens must be (sequences + 1,) with one sequence or more, got shape "
            f"{tuple(cu_seqlens.shape)}"
        )
    if spans is not None and tuple(spans.shape) != (cu_seqlens.shape[0] - 1, 2):
        raise ValueError(
            f"segment_mean: spans must be ({cu_seqlens.shape[0] - 1}, 2), a start and a stop for every sequence, "
            f"got {tuple(spans.shape)}"
        )
    for label, t in (("cu_seqlens", cu_seqlens), ("spans", cu_seqlens if spans is None else spans)):
        if t.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"segment_mean: {label} must be int32 or int64, got {t.dtype}")
        if t.device != hidden.device:
            raise ValueError(
                f"segment_mean: {label} must be on the device of hidden, {hidden.device}, got {t.device}"
            )


def segment_mean(
    hidden: Tensor, cu_seqlens: Tensor, *, spans: Tensor | None = None, normalize: bool = False
) -> Tensor:
    """The mean over each sequence of a pack, or over a span inside each.

    Tokens outside the spans may hold anything, NaN included; their gradient is zero. Sums are in fp32 (fp64 for
    fp64), in a fixed order. Differentiable in hidden, once. Autocast leaves it as it is.

    Args:
        hidden: (T, H) token states, fp32, bf16, fp16 or fp64, one sequence after another.
        cu_seqlens: (B + 1,) int32 or int64, ascending edges of the sequences: 0, ..., T.
        spans: (B, 2) int32 or int64, the pooled tokens [start, stop) of every sequence, counted from that
            sequence's first token (instructions excluded); None for whole sequences.
        normalize: scale the means to unit length, as `l2_normalize`.

    Returns:
        (B, H) fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: shapes, dtypes and devices that do not fit; on the CPU also edges that do not
            increase from 0 to T, and empty or protruding spans. On a GPU the values are not looked at, which
            would wait for it: an empty segment gives NaN, and nothing out of bounds is touched.

    Examples:
        >>> embeddings = segment_mean(hidden, cu_seqlens, spans=spans, normalize=True)
    """
    _check(hidden, cu_seqlens, spans)
    edges = cu_seqlens.to(torch.int64).contiguous()
    if spans is None:
        start, stop = edges[:-1].clone(), edges[1:].clone()
    else:
        start, stop = ((edges[:-1] + column) for column in spans.unbind(1))
    mean, _ = _forward(hidden, start, stop, edges, normalize)
    return mean


__all__ = ["segment_mean"]
