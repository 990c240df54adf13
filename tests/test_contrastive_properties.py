"""Properties that hold for every batch: order, swapping towers, adding pieces, bounds."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm2clip_kernels import infonce_loss, sigmoid_loss, similarity_lse, similarity_rank

sizes = st.integers(1, 90)
depths = st.integers(1, 40)
scales = st.floats(-50, 200, width=32)
seeds = st.integers(0, 2**31)
quick = settings(max_examples=40, deadline=None)


def unit(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=1)


@quick
@given(sizes, sizes, depths, scales, seeds)
def test_order_and_sides(m: int, n: int, d: int, scale: float, seed: int) -> None:
    """Permuting rows permutes results; swapping x and y swaps them."""
    x, y = unit(m, d, seed), unit(n, d, seed + 1)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    row, col = similarity_lse(x, y, scale)
    moved, same = similarity_lse(x[order], y, scale)
    limit = 2e-6 * max(1.0, abs(scale))
    assert torch.allclose(moved, row[order], rtol=1e-6, atol=limit)
    assert torch.allclose(same, col, rtol=1e-6, atol=limit)
    other_row, other_col = similarity_lse(y, x, scale)
    assert torch.allclose(other_row, col, rtol=1e-6, atol=limit)
    assert torch.allclose(other_col, row, rtol=1e-6, atol=limit)


@quick
@given(sizes, st.integers(2, 90), depths, scales, seeds, st.data())
def test_pieces_add_up(m: int, n: int, d: int, scale: float, seed: int, data: st.DataObject) -> None:
    """The log-sum-exp over all columns is that over two parts of them, and every row's own columns stay."""
    x, y = unit(m, d, seed), unit(n, d, seed + 1)
    cut = data.draw(st.integers(1, n - 1))
    row, col = similarity_lse(x, y, scale)
    left, right = similarity_lse(x, y[:cut], scale), similarity_lse(x, y[cut:], scale)
    limit = 2e-6 * max(1.0, abs(scale))
    assert torch.allclose(torch.logaddexp(left[0], right[0]), row, rtol=1e-6, atol=limit)
    assert torch.allclose(torch.cat([left[1], right[1]]), col, rtol=1e-6, atol=limit)


@quick
@given(sizes, sizes, depths, scales, seeds)
def test_bounds(m: int, n: int, d: int, scale: float, seed: int) -> None:
    """Every log-sum-exp lies between the largest logit and that plus log N."""
    x, y = unit(m, d, seed), unit(n, d, seed + 1)
    largest = (scale * x.double() @ y.double().T).amax(1)
    row, _ = similarity_lse(x, y, scale)
    slack = 2e-6 * max(1.0, abs(scale))
    assert (row >= largest - slack).all() and (row <= largest + math.log(n) + slack).all()


@quick
@given(st.integers(2, 60), depths, st.floats(0, 100, width=32), seeds)
def test_losses(n: int, d: int, scale: float, seed: int) -> None:
    """Losses are not negative and depend on neither order nor sides; at scale 0 they are those of guessing."""
    x, y = unit(n, d, seed), unit(n, d, seed + 1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    loss = infonce_loss(x, y, scale)
    assert loss >= -1e-6 * max(1.0, scale)
    limit = 1e-5 * max(1.0, abs(scale))
    for a, b in ((x[order], y[order]), (y, x)):
        assert torch.allclose(infonce_loss(a, b, scale), loss, atol=limit)
        assert torch.allclose(
            sigmoid_loss(a, b, scale, -10.0), sigmoid_loss(x, y, scale, -10.0), rtol=1e-5, atol=limit
        )
    assert torch.allclose(infonce_loss(x, y, 0.0), torch.tensor(math.log(n)), atol=1e-5)


@quick
@given(st.integers(2, 60), depths, seeds)
def test_the_gradient_of_a_softmax_sums_to_zero(n: int, d: int, seed: int) -> None:
    """Adding one vector to every y changes no row's softmax: the rows' part of Σ dy is zero."""
    x, y = unit(n, d, seed), unit(n, d, seed + 1).requires_grad_()
    row, _ = similarity_lse(x, y, 10.0)
    pos = 10.0 * (x * y).sum(1)
    (row - pos).sum().backward()
    # Σ_j dy_j = scale Σ_i (Σ_j p_ij - 1) x_i
    assert y.grad is not None
    assert y.grad.sum(0).norm() <= 1e-5 * n * 10


@quick
@given(st.integers(1, 60), depths, seeds)
def test_ranks_are_a_loss_away(n: int, d: int, seed: int) -> None:
    """A pair ranked k-th (from 1) has k - 1 candidates at least as good, so its row's loss is at least log k."""
    x, y = unit(n, d, seed), unit(n, d, seed + 1)
    rank, _ = similarity_rank(x, y)
    row, _ = similarity_lse(x, y, 20.0)
    loss = row - 20.0 * (x * y).sum(1)
    assert rank.min() >= 1 and (loss.double() >= torch.log(rank.double()) - 1e-4).all()
