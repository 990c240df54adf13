"""`packed_attention`: schema, checks, autograd, and the one place that picks the implementation.

With s = scale · q kᵀ inside each sequence (soft-capped where asked), hidden pairs at -inf, p = softmax(s):

    out = p v        ds = p ∘ (g vᵀ - Σ p ∘ g vᵀ)
    dv = pᵀ g        dq = scale · ds k        dk = scale · dsᵀ q

Saved for the backward: q, k and v. p is made again.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal

import torch
from torch import Tensor

from .. import backend as backends
from .. import native
from ..checks import FLOATS
from . import buckets, library
from .plan import check_edges, make_plan

Backend = Literal["auto", "varlen", "xformers", "buckets"]

_logger = logging.getLogger("llm2clip_kernels")
_WIDEST = 2**31 - 1


def _edges(q: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[int, ...]:
    edges = tuple(cu_seqlens.tolist())
    check_edges(edges, q.shape[0], max_seqlen)
    return edges


def _native(q: Tensor, softcap: float) -> bool:
    return softcap == 0 and backends.choose(q.device, q.dtype) == "native" and native.available()


def _floats(*tensors: Tensor) -> list[Tensor]:
    return [t.float().contiguous() for t in tensors]


# window -1 and softcap 0 stand for None: one schema type each, whatever the caller leaves out
@torch.library.custom_op("llm2clip_kernels::packed_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    edges = _edges(q, cu_seqlens, max_seqlen)
    if _native(q, softcap):
        out: Tensor = torch.ops.llm2clip_native.packed_attention_forward(
            *_floats(q, k, v), cu_seqlens.long().contiguous(), causal, window, scale
        )
        return out.to(q.dtype)
    plan = make_plan(edges, causal, None if window < 0 else window, q.device)
    return buckets.forward(q, k, v, plan, scale, softcap or None)


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("llm2clip_kernels::packed_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    need_q: bool,
    need_k: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    edges = _edges(q, cu_seqlens, max_seqlen)
    if _native(q, softcap):
        dq, dk, dv = torch.ops.llm2clip_native.packed_attention_backward(
            *_floats(grad, q, k, v),
            cu_seqlens.long().contiguous(),
            causal,
            window,
            scale,
            need_q,
            need_k,
            need_v,
        )
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)
    plan = make_plan(edges, causal, None if window < 0 else window, q.device)
    return buckets.backward(grad, q, k, v, plan, scale, softcap or None, need_q, need_k, need_v)


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    need_q: bool,
    need_k: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape if need_q else (0,)),
        k.new_empty(k.shape if need_k else (0,)),
        v.new_empty(v.shape if need_v else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    found = torch.ops.llm2clip_kernels.packed_attention_backward(
        grad, *ctx.saved_tensors, *ctx.options, *needs
    )
    gradients = [g if need else None for g, need in zip(found, needs, strict=True)]
    return (*gradients, None, None, None, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"packed_attention: {name} must be a tensor, got {type(t).__name__}")
        if t.dim() != 3:
            raise ValueError(
                f"packed_attention: {name} must be 3-D (tokens, heads, head size), got {tuple(t.shape)}"
            )
        if t.dtype not in FLOATS:
            raise TypeError(f"packed_attention: {name} must be fp32, bf16, fp16 or fp64, got {t.dtype}")
        if t.dtype != q.dtype or t.device != q.device:
            raise TypeError(
                f"packed_attention: q, k and v must have one dtype and device, {name} has {t.dtype} on "
                f"{t.device}, q {q.dtype} on {q.device}"
            )
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            "packed_attention: q must be (T, Hq, Dh), k and v (T, Hk, Dh), got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[1] == 0 or k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[2] == 0:
        raise ValueError(
            f"packed_attention: the number of query heads must be a multiple of that of key heads, got "
            f"{q.shape[1]} and {k.shape[1]} of size {q.shape[2]}"
        )
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        found = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"packed_attention: cu_seqlens must be an int32 or int64 tensor, got {found}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"packed_attention: cu_seqlens must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != q.device:
        raise ValueError(
            f"packed_attention: cu_seqlens must be on the device of q, got {cu_seqlens.device} and {q.device}"
        )
    if max_seqlen < 0:
        raise ValueError(f"packed_attention: max_seqlen must be at least 0, got {max_seqlen}")


@functools.cache
def _log(level: int, text: str) -> None:
    _logger.log(level, text)


def _announce(level: int, text: str) -> None:
    """Log a sentence once; not while torch.compile traces, which knows no logger."""
    if not torch.compiler.is_compiling():
        _log(level, text)


def _choose(q: Tensor, causal: bool, window: int | None, softcap: float | None) -> Backend:
    if q.device.type != "cuda":
        chosen: Backend = "buckets"
    elif not (refusal := library.varlen_refusal(q, window, softcap)):
        chosen = "varlen"
    elif not (other := library.xformers_refusal(q, causal, window, softcap)):
        chosen = "xformers"
    else:
        chosen = "buckets"
        text = f"packed_attention: varlen attention is not used: {refusal}; xformers is not used: {other}"
        _announce(logging.WARNING, text)
    _announce(logging.INFO, f"packed_attention: {chosen} serves {q.dtype} on {q.device.type}")
    return chosen


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Softmax attention of every token to the tokens of its own sequence, for sequences laid end to end.

    Differentiable in q, k and v; nothing is computed for inputs that need no gradient, and no (T, T) matrix
    is made. Deterministic with the backend `buckets`.

    Args:
        q: (T, Hq, Dh) fp32, bf16, fp16 or fp64, any strides.
        k: (T, Hk, Dh), Hk divides Hq: query head h reads key head h // (Hq / Hk).
        v: (T, Hk, Dh).
        cu_seqlens: (B + 1,) int32 or int64 on the device of q, from 0 to T, not falling: sequence b owns the
            tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1, none if both are equal. On a GPU its values are
            not checked where torch's varlen attention serves (that would wait for the GPU).
        max_seqlen: no sequence has more tokens.
        causal: a token sees itself and the tokens before it.
        window: a token sees at most so many tokens before it, and after it if not causal; None: all.
            (transformers counts the token itself for causal layers: sliding_window - 1.)
        scale: factor on the dot products; None: Dh ** -0.5.
        softcap: logits become softcap · tanh(logits / softcap) (Gemma 2); None: as they are.
        backend: "auto"; "varlen" (torch.nn.attention.varlen, CUDA fp16/bf16), "xformers" (CUDA; reads
            cu_seqlens on the host), "buckets" (batched products over sequences of like length; any device,
            reads cu_seqlens on the host). "auto" takes the first of these that can serve and logs it once.

    Returns:
        (T, Hq, Dh) of q's dtype.

    Raises:
        TypeError, ValueError: shapes, dtypes, cu_seqlens or options that do not fit, with what was expected;
            RuntimeError: the backend asked for cannot serve, with the reason.

    Examples:
        >>> out = packed_attention(q, k, v, torch.tensor([0, 3, 8]), 5, causal=False)
    """
    _check(q, k, v, cu_seqlens, max_seqlen)
    if window is not None and window < 0:
        raise ValueError(f"packed_attention: window must be at least 0, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"packed_attention: softcap must be positive, got {softcap}")
    if backend not in ("auto", "varlen", "xformers", "buckets"):
        raise ValueError(
            f"packed_attention: backend must be auto, varlen, xformers or buckets, got {backend!r}"
        )
    factor = q.shape[2] ** -0.5 if scale is None else float(scale)
    chosen = _choose(q, causal, window, softcap) if backend == "auto" else backend
    if chosen == "varlen":
        refusal = library.varlen_refusal(q, window, softcap)
        if refusal:
            raise RuntimeError(f"packed_attention: varlen attention cannot serve: {refusal}")
        return library.varlen(q, k, v, cu_seqlens, max_seqlen, causal, window, factor)
    if chosen == "xformers":
        refusal = library.xformers_refusal(q, causal, window, softcap)
        if refusal:
            raise RuntimeError(f"packed_attention: xformers cannot serve: {refusal}")
        edges = cu_seqlens.tolist()
        check_edges(tuple(edges), q.shape[0], max_seqlen)
        lengths = [stop - start for start, stop in zip(edges, edges[1:], strict=False)]
        return library.xformers(q, k, v, lengths, causal, window, factor)
    # wider than any sequence is no window at all; a bound that the C++ may add to a position
    reach = -1 if window is None else min(window, _WIDEST)
    result: Tensor = _forward(q, k, v, cu_seqlens, max_seqlen, causal, reach, factor, softcap or 0.0)
    return result


__all__ = ["Backend", "packed_attention"]
