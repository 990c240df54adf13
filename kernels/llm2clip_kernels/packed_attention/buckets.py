"""Packed attention as batched matrix products over dense batches, forward and backward.

Query heads that share a key head are stacked as rows, so grouped-query attention needs no copy of keys and
values. The backward recomputes the weights: nothing of size length² outlives a bucket.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator
from .plan import Block, Bucket


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: tuple[Bucket, ...], scale: float, softcap: float | None
) -> Tensor:
    """(T, Hq, Dh) of q's dtype; arguments as in `packed_attention`."""
    out = q.new_empty(q.shape)
    for bucket in plan:
        queries = _stack_queries(_dense(q, bucket), k.shape[1])
        keys, values = (_by_head(_dense(t, bucket)) for t in (k, v))
        parts = []
        for block in bucket.blocks:
            some = queries[:, :, block.start : block.stop].flatten(1, 2)
            weights, _ = _weights(some, keys[:, block.low : block.high], block, bucket, scale, softcap)
            part = torch.bmm(weights.to(q.dtype), values[:, block.low : block.high])
            parts.append(part.unflatten(1, (queries.shape[1], -1)))
        _put(out, _unstack(_join(parts, 2), bucket), bucket)
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: tuple[Bucket, ...],
    scale: float,
    softcap: float | None,
    need_q: bool,
    need_k: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; an empty tensor for one that is not needed."""
    dq, dk, dv = (t.new_empty(t.shape if n else (0,)) for t, n in ((q, need_q), (k, need_k), (v, need_v)))
    for bucket in plan:
        queries, grads = (_stack_queries(_dense(t, bucket), k.shape[1]) for t in (q, grad))
        if bucket.padding is not None:
            # a padded row repeats a real token, whose gradient must not count twice
            grads = grads.unflatten(0, (bucket.count, -1)).masked_fill(bucket.padding, 0).flatten(0, 1)
        keys, values = (_by_head(_dense(t, bucket)) for t in (k, v))
        parts = []
        sum_k, sum_v = (torch.zeros_like(keys) if len(bucket.blocks) > 1 else None for _ in range(2))
        for block in bucket.blocks:
            rows, span = slice(block.start, block.stop), slice(block.low, block.high)
            some, g = queries[:, :, rows].flatten(1, 2), grads[:, :, rows].flatten(1, 2)
            weights, slope = _weights(some, keys[:, span], block, bucket, scale, softcap)
            if need_v:
                part = torch.bmm(weights.to(q.dtype).transpose(1, 2), g)
                sum_v = _add(sum_v, span, part)
            if not (need_q or need_k):
                continue
            inner = torch.bmm(g, values[:, span].transpose(1, 2)).to(weights.dtype)
            logits = torch.ops.aten._softmax_backward_data(inner, weights, -1, weights.dtype)
            if slope is not None:
                logits = logits * slope
            logits = logits.to(q.dtype)
            if need_q:
                part = _product(logits, keys[:, span], scale)
                parts.append(part.unflatten(1, (queries.shape[1], -1)))
            if need_k:
                sum_k = _add(sum_k, span, _product(logits.transpose(1, 2), some, scale))
        if need_q:
            _put(dq, _unstack(_join(parts, 2), bucket), bucket)
        for needed, total, target in ((need_k, sum_k, dk), (need_v, sum_v, dv)):
            if needed:
                assert total is not None
                _put(target, _unstack(total[:, None], bucket), bucket)
    return dq, dk, dv


def _weights(
    queries: Tensor, keys: Tensor, block: Block, bucket: Bucket, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Attention weights (n · Hk, group · rows, keys) in fp32 (fp64), and the slope of the soft cap."""
    logits = _product(queries, keys.transpose(1, 2), scale)
    slope = None
    if softcap is not None:
        bent = torch.tanh(logits.to(accumulator(logits.dtype)) / softcap)
        logits, slope = softcap * bent, 1 - bent * bent
    if block.hidden is not None:
        rows = block.stop - block.start
        shape = (bucket.count, -1, logits.shape[1] // rows, rows, logits.shape[2])
        # finite, because a padded row may see nothing at all
        logits.view(shape).masked_fill_(block.hidden, torch.finfo(logits.dtype).min)
    return torch.softmax(logits, -1, dtype=accumulator(logits.dtype)), slope


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    empty = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(empty, a, b, beta=0, alpha=scale)


def _dense(x: Tensor, bucket: Bucket) -> Tensor:
    """(count, length, H, Dh)."""
    if bucket.gather is None:
        x = x[bucket.first : bucket.first + bucket.count * bucket.length]
    else:
        x = x.index_select(0, bucket.gather)
    return x.unflatten(0, (bucket.count, bucket.length))


def _by_head(x: Tensor) -> Tensor:
    """(count, length, H, Dh) -> (count · H, length, Dh)."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _stack_queries(x: Tensor, key_heads: int) -> Tensor:
    """(count, length, Hq, Dh) -> (count · Hk, group, length, Dh)."""
    count, length, heads, width = x.shape
    grouped = x.reshape(count, length, key_heads, heads // key_heads, width).permute(0, 2, 3, 1, 4)
    return grouped.reshape(count * key_heads, heads // key_heads, length, width)


def _unstack(x: Tensor, bucket: Bucket) -> Tensor:
    """(count · Hk, group, length, Dh) -> (count · length, Hq, Dh), a view where torch can make one."""
    split = x.unflatten(0, (bucket.count, -1))
    return split.permute(0, 3, 1, 2, 4).reshape(bucket.count * bucket.length, -1, x.shape[3])


def _put(out: Tensor, dense: Tensor, bucket: Bucket) -> None:
    """Write the real tokens of a dense batch where they belong in the pack."""
    if bucket.places is not None:
        dense = dense.index_select(0, bucket.places)
    if bucket.tokens is None:
        out[bucket.first : bucket.first + dense.shape[0]] = dense
    else:
        out.index_copy_(0, bucket.tokens, dense)


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _add(total: Tensor | None, span: slice, part: Tensor) -> Tensor:
    if total is None:
        return part
    total[:, span] += part
    return total
