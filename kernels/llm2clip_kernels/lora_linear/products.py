"""The matrix products of `lora_linear`, in the order that never makes an N×K or a second T×N matrix.

    u  = drop(x) Aᵀ (T, R)             y  = x Wᵀ + bias, then y += s·u Bᵀ in place
    v  = dy B       (T, R)             dx = dy W, then dx += s·drop(v A) in place
    dA = s·vᵀ drop(x)                  dB = s·(uᵀ dy)ᵀ

The scaling is the GEMM's own factor, or sits on R rows: nothing with T rows is gone through for it. Where a cast or a
mask stands between a matrix and its product, rows go in chunks that stay in cache: the cast or masked copy is never
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulator
from .dropout import dropout_rows_

# of one chunk of cast or masked rows
_CHUNK_BYTES = 2**22
# columns from which on MKL does not mind how they are stored
_THIN = 16


def factor_of(scaling: float, dropout_p: float) -> float:
    """s / (1 - p): what the low-rank product is multiplied with."""
    # everything dropped: what remains is a zero, not a division by it
    return scaling / (1 - dropout_p) if dropout_p < 1 else 0.0


def _chunks(rows: int, cols: int, element_size: int) -> Iterator[tuple[int, int]]:
    step = max(64, _CHUNK_BYTES // max(1, cols * element_size))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _plain(x: Tensor, low: torch.dtype, dropout_p: float) -> bool:
    return x.dtype == low and dropout_p == 0


def _rows(
    x: Tensor, start: int, stop: int, low: torch.dtype, seed: Tensor | None, dropout_p: float
) -> Tensor:
    """drop(x[start:stop]) in dtype `low`, not rescaled."""
    part = x[start:stop]
    if dropout_p == 0 or seed is None:
        return part.to(low)
    copy = part.to(low, copy=True, memory_format=torch.contiguous_format)
    return dropout_rows_(copy, seed, start, dropout_p)


def down(x: Tensor, a: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """u = drop(x) Aᵀ without the factor 1/(1-p). x (T, K), a (R, K) -> (T, R) in a's dtype."""
    at = a.t()
    if _plain(x, a.dtype, dropout_p):
        return torch.mm(x, at)
    u = a.new_empty(x.shape[0], a.shape[0])
    for start, stop in _chunks(x.shape[0], x.shape[1], a.element_size()):
        torch.mm(_rows(x, start, stop, a.dtype, seed, dropout_p), at, out=u[start:stop])
    return u


def add_product_(y: Tensor, u: Tensor, b: Tensor, factor: float) -> Tensor:
    """y += factor · u bᵀ, rounded once to y's dtype. y (T, N), u (T, R), b (N, R)."""
    if y.dtype == u.dtype:
        return y.addmm_(u, b.t(), alpha=factor)
    for start, stop in _chunks(y.shape[0], y.shape[1], u.element_size()):
        y[start:stop].add_(torch.mm(u[start:stop], b.t()), alpha=factor)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    u: Tensor,
    dx: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns dx (T, K), dA (R, K) and dB (N, R), None where not needed.

    dy (T, N), x (T, K), u (T, R); dx (T, K) holds dy W and gets the low-rank part in place, None where there is
    no base product.
    """
    factor = factor_of(scaling, dropout_p)
    low = a.dtype
    columns = _by_columns(b)
    need_v = need_a or need_x
    if dy.dtype == low:
        # (R, N) = uᵀ dy runs faster than dyᵀ u; the transposition back is of N·R numbers
        db = torch.mm(u.t(), dy).mul_(factor).t().contiguous() if need_b else None
        v = torch.mm(dy, columns) if need_v else None
    else:
        # one cast serves both products
        v = u.new_empty(dy.shape[0], b.shape[1]) if need_v else None

        def cast(start: int, stop: int) -> Tensor:
            part = dy[start:stop].to(low)
            if v is not None:
                torch.mm(part, columns, out=v[start:stop])
            return part

        if need_b:
            db = _sum_chunks(dy, u, cast).mul_(factor).t().contiguous()
        else:
            db = None
            for start, stop in _chunks(dy.shape[0], dy.shape[1], a.element_size()):
                cast(start, stop)
    if v is None:
        return None, None, db
    da = _gradient_a(x, v, low, seed, dropout_p).mul_(factor) if need_a else None
    if not need_x:
        return None, da, db
    if dropout_p == 0 and dx is None:
        # beta 0: what is in the new matrix does not count
        return torch.addmm(a.new_empty(x.shape), v, a, beta=0, alpha=factor), da, db
    if dx is None:
        dx = a.new_zeros(x.shape)
    if dropout_p == 0 and dx.dtype == low:
        return dx.addmm_(v, a, alpha=factor), da, db
    for start, stop in _chunks(x.shape[0], x.shape[1], a.element_size()):
        part = torch.mm(v[start:stop], a)
        if dropout_p > 0 and seed is not None:
            dropout_rows_(part, seed, start, dropout_p)
        dx[start:stop].add_(part, alpha=factor)
    return dx, da, db


def _by_columns(b: Tensor) -> Tensor:
    """b, stored by columns where the product with a few of them is several times faster so: MKL's in fp32."""
    thin = b.shape[1] < _THIN and b.dtype == torch.float32 and b.device.type == "cpu"
    return b.t().contiguous().t() if thin else b


def _gradient_a(x: Tensor, v: Tensor, low: torch.dtype, seed: Tensor | None, dropout_p: float) -> Tensor:
    """dA = vᵀ drop(x), (R, K)."""
    if _plain(x, low, dropout_p):
        return torch.mm(v.t(), x)
    return _sum_chunks(x, v, lambda start, stop: _rows(x, start, stop, low, seed, dropout_p))


def _sum_chunks(like: Tensor, left: Tensor, rows: Callable[[int, int], Tensor]) -> Tensor:
    """leftᵀ · rows, (R, columns) in left's dtype, where `rows` makes the rows (start, stop) of a matrix."""
    total: Tensor | None = None
    for start, stop in _chunks(like.shape[0], like.shape[1], left.element_size()):
        part = torch.mm(left[start:stop].t(), rows(start, stop))
        # chunks add up in fp32: in half precision every one of them would round the sum
        total = part if total is None else total.to(accumulator(left.dtype)).add_(part)
    return left.new_zeros(left.shape[1], like.shape[1]) if total is None else total.to(left.dtype)


def composed(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> Tensor:
    """y + s·(drop(x) Aᵀ) Bᵀ out of torch's differentiable ops, every intermediate kept: for few rows.

    y (..., N), x (..., K). The mask is the one of the other functions here.
    """
    x = x.to(a.dtype)
    if dropout_p > 0 and seed is not None:
        keep = torch.ones_like(x, memory_format=torch.contiguous_format)
        dropout_rows_(keep.view(-1, x.shape[-1]), seed, 0, dropout_p)
        x = x * keep
        scaling = factor_of(scaling, dropout_p)
    # the scaling on T·R numbers rather than on T·N
    update = F.linear(F.linear(x, a) * scaling, b)
    return y + update if y.dtype == update.dtype else (y + update).to(y.dtype)
