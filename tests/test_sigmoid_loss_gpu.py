"""sigmoid_loss on a CUDA GPU: accuracy, determinism, streams, graphs. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_kernels import sigmoid_loss
from llm2clip_kernels.sigmoid_loss import sigmoid_loss_reference, sigmoid_terms
from tests.on_gpu import DTYPES, MARKS, SHAPES, features

pytestmark = MARKS


def scalars(scale: float = 10.0, bias: float = -10.0) -> list[Tensor]:
    return [torch.tensor(value, device="cuda") for value in (scale, bias)]


def run(function: Any, inputs: list[Tensor], weight: Tensor, **options: Any) -> list[Tensor]:
    """Row losses or their sum, and the gradients of x, y, scale and bias, in fp64."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    half = inputs[0].dtype in (torch.bfloat16, torch.float16)
    given = [t.to(inputs[0].dtype) if half and function is sigmoid_loss_reference else t for t in leaves[2:]]
    loss = function(*leaves[:2], *given, **options)
    if weight.numel() == 1:
        loss = loss.sum()
    (loss * weight.to(loss.dtype)).sum().backward()
    return [t.detach().double() for t in (loss, *(leaf.grad for leaf in leaves))]  # type: ignore[union-attr]


def assert_as_good_as_torch(
    x: Tensor, y: Tensor, scale: float, bias: float, *, rows: bool = False, **options: Any
) -> None:
    """Error against fp64 at most twice that of plain torch in the same dtype, above rounding noise."""
    inputs = [x, y, *scalars(scale, bias)]
    weight = torch.randn(len(x) if rows else 1, device="cuda", dtype=torch.float64)
    true = run(sigmoid_loss_reference, [t.double() for t in inputs], weight, **options)
    plain = run(sigmoid_loss_reference, inputs, weight, **options)
    ours = run(sigmoid_terms, inputs, weight, rows=rows, **options)
    dots = x.double() @ y.double().T
    terms = (scale * dots + bias).sigmoid() * weight.abs().reshape(-1, 1)
    magnitude = {"dscale": (terms * dots).abs().sum(), "dbias": terms.sum()}
    for name, t, p, o in zip(("loss", "dx", "dy", "dscale", "dbias"), true, plain, ours, strict=True):
        size = t.abs().max().clamp_min(1e-6) + magnitude.get(name, 0.0)
        floor = 4 * torch.finfo(x.dtype).eps * size * t.numel() ** 0.5
        assert o.isfinite().all(), name
        assert (o - t).norm() <= 2 * (p - t).norm() + floor, name


@pytest.mark.parametrize("rows", [False, True], ids=["sum", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape: tuple[int, int, int], dtype: torch.dtype, rows: bool) -> None:
    m, n, d = shape
    assert_as_good_as_torch(features(m, d, dtype), features(n, d, dtype), 10.0, -10.0, rows=rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, 1e4, -30.0])
def test_scales(scale: float, dtype: torch.dtype) -> None:
    assert_as_good_as_torch(features(300, 64, dtype), features(280, 64, dtype), scale, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_positives(dtype: torch.dtype) -> None:
    ids = {"x_groups": torch.randint(-1, 9, (300,)).cuda(), "y_groups": torch.randint(-1, 9, (520,)).cuda()}
    for rows in (False, True):
        x, y = features(300, 64, dtype), features(520, 64, dtype)
        assert_as_good_as_torch(x, y, 10.0, -5.0, rows=rows, **ids)


def test_small_terms_are_not_lost() -> None:
    """Learned pairs: every term is e^-15 or less, which 1 + e or fp16 would round away."""
    for dtype in DTYPES:
        x = torch.eye(600, 640, device="cuda", dtype=dtype)
        inputs = [x, x, *scalars(30.0, -15.0)]
        one = torch.ones(1, device="cuda")
        true = run(sigmoid_loss_reference, [t.double() for t in inputs], one)
        ours = run(sigmoid_terms, inputs, one)
        limits = (1e-5, 2e-2, 2e-2, 1e-5, 1e-5)
        for t, o, limit in zip(true, ours, limits, strict=True):
            assert (o - t).norm() <= limit * t.norm()


def loss_and_gradients(x: Tensor, y: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, y, *scalars())]
    loss = sigmoid_loss(leaves[0], leaves[1], leaves[2], leaves[3])
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def test_the_same_bits_every_run() -> None:
    x, y = features(3000, 512, torch.bfloat16), features(3000, 512, torch.bfloat16)
    first = loss_and_gradients(x, y)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, loss_and_gradients(x, y), strict=True))


def test_on_a_stream_of_the_callers() -> None:
    x, y = features(500, 96, torch.bfloat16), features(500, 96, torch.bfloat16)
    expected = loss_and_gradients(x, y)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = loss_and_gradients(x, y)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_captured_in_a_cuda_graph() -> None:
    """No host synchronisation and no data-dependent allocation: the op replays on other data."""
    x, y = (features(256, 64, torch.bfloat16).requires_grad_() for _ in range(2))
    scale, bias = (t.requires_grad_() for t in scalars())
    leaves = (x, y, scale, bias)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            for leaf in leaves:
                leaf.grad = None
            sigmoid_loss(x, y, scale, bias).backward()
    torch.cuda.current_stream().wait_stream(side)
    for leaf in leaves:
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = sigmoid_loss(x, y, scale, bias)
        loss.backward()
    other = features(256, 64, torch.bfloat16), features(256, 64, torch.bfloat16)
    with torch.no_grad():
        x.copy_(other[0])
        y.copy_(other[1])
    graph.replay()
    expected = loss_and_gradients(*other)
    found = (loss.detach(), *(leaf.grad for leaf in leaves))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))  # type: ignore[arg-type]


def test_more_pairs_than_32_bits_count() -> None:
    rows = 50_000  # 2.5e9 pairs
    x = features(rows, 16, torch.bfloat16)
    found = sigmoid_terms(x, x, 10.0, -10.0, rows=True)
    chosen = torch.tensor([0, 1, rows // 2, rows - 1], device="cuda")
    logits = 10.0 * x[chosen].double() @ x.double().T - 10.0
    true = F.softplus(logits).sum(1) - logits[torch.arange(4), chosen]
    assert torch.allclose(found[chosen].double(), true, rtol=1e-4)
