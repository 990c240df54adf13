"""similarity_lse and the loss on a CUDA GPU: accuracy, determinism, streams, graphs. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llm2clip_kernels import infonce_loss, similarity_lse
from llm2clip_kernels.similarity_lse import similarity_lse_reference
from tests.on_gpu import DTYPES, MARKS, SHAPES, features

pytestmark = MARKS


def run(function: Any, x: Tensor, y: Tensor, scale: float, weights: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Log-sum-exps and gradients of x, y and scale, in fp64."""
    x, y = (t.detach().clone().requires_grad_() for t in (x, y))
    wide = x.dtype in (torch.float32, torch.float64)
    factor = torch.tensor(scale, device="cuda", dtype=x.dtype if wide else torch.float32).requires_grad_()
    plain = function is similarity_lse_reference
    row, col = function(x, y, factor.to(x.dtype) if plain else factor)
    ((row * weights[0].to(row.dtype)).sum() + (col * weights[1].to(col.dtype)).sum()).backward()
    assert x.grad is not None and y.grad is not None and factor.grad is not None
    return [t.detach().double() for t in (row, col, x.grad, y.grad, factor.grad)]


def assert_as_good_as_torch(x: Tensor, y: Tensor, scale: float) -> None:
    """Error against fp64 at most twice that of plain torch in the same dtype, above rounding noise."""
    weights = (
        torch.randn(len(x), device="cuda", dtype=torch.float64),
        torch.randn(len(y), device="cuda", dtype=torch.float64),
    )
    true = run(similarity_lse_reference, x.double(), y.double(), scale, weights)
    plain = run(similarity_lse_reference, x, y, scale, weights)
    ours = run(similarity_lse, x, y, scale, weights)
    floor = 4 * torch.finfo(x.dtype).eps
    for name, t, p, o in zip(("row", "col", "dx", "dy", "dscale"), true, plain, ours, strict=True):
        size = t.abs().max().clamp_min(1.0 if name in ("row", "col") else 1e-6)
        if name == "dscale":
            size = size + weights[0].abs().sum() + weights[1].abs().sum()
        assert o.isfinite().all(), name
        assert (o - t).norm() <= 2 * (p - t).norm() + floor * size * t.numel() ** 0.5, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, d = shape
    assert_as_good_as_torch(features(m, d, dtype), features(n, d, dtype), 20.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, 1e4, -30.0])
def test_scales(scale: float, dtype: torch.dtype) -> None:
    assert_as_good_as_torch(features(300, 64, dtype), features(280, 64, dtype), scale)


def test_inputs_of_any_norm_take_the_online_path() -> None:
    x, y = 30 * torch.randn(50, 16).cuda(), torch.randn(60, 16).cuda()
    for dtype in DTYPES:
        assert_as_good_as_torch(x.to(dtype), y.to(dtype), 3.0)


def loss_and_gradients(x: Tensor, y: Tensor, scale: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, y, scale)]
    loss = infonce_loss(*leaves)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def test_the_same_bits_every_run() -> None:
    x, y, scale = (
        features(3000, 512, torch.bfloat16),
        features(3000, 512, torch.bfloat16),
        torch.tensor(50.0).cuda(),
    )
    first = loss_and_gradients(x, y, scale)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, loss_and_gradients(x, y, scale), strict=True))


def test_on_a_stream_of_the_callers() -> None:
    x, y, scale = (
        features(500, 96, torch.bfloat16),
        features(500, 96, torch.bfloat16),
        torch.tensor(20.0).cuda(),
    )
    expected = loss_and_gradients(x, y, scale)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = loss_and_gradients(x, y, scale)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_captured_in_a_cuda_graph() -> None:
    """No host synchronisation and no data-dependent allocation: the op replays on other data."""
    x, y = (features(256, 64, torch.bfloat16).requires_grad_() for _ in range(2))
    scale = torch.tensor(20.0, device="cuda", requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            x.grad = y.grad = scale.grad = None
            infonce_loss(x, y, scale).backward()
    torch.cuda.current_stream().wait_stream(side)
    x.grad = y.grad = scale.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = infonce_loss(x, y, scale)
        loss.backward()
    other = features(256, 64, torch.bfloat16), features(256, 64, torch.bfloat16)
    with torch.no_grad():
        x.copy_(other[0])
        y.copy_(other[1])
    graph.replay()
    expected = loss_and_gradients(*other, torch.tensor(20.0).cuda())
    assert all(
        torch.equal(a, b) for a, b in zip(expected, (loss.detach(), x.grad, y.grad, scale.grad), strict=True)
    )


def test_more_pairs_than_32_bits_count() -> None:
    rows = 50_000  # 2.5e9 pairs
    x = features(rows, 16, torch.bfloat16)
    row, col = similarity_lse(x, x, 20.0)
    chosen = torch.tensor([0, 1, rows // 2, rows - 1], device="cuda")
    true = torch.logsumexp(20.0 * x[chosen].double() @ x.double().T, dim=1)
    for found in (row, col):
        assert torch.allclose(found[chosen].double(), true, rtol=0, atol=1e-4)
