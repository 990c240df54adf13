"""similarity_distill and its loss on a CUDA GPU: accuracy, determinism, streams, graphs. Skipped without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llm2clip_kernels import distill_loss, similarity_distill
from llm2clip_kernels.similarity_distill import similarity_distill_reference
from tests.on_gpu import DTYPES, MARKS, features

pytestmark = MARKS

# rows, columns, D, E
SHAPES = [
    (1, 1, 8, 3),
    (7, 5, 20, 1),
    (63, 65, 96, 8),
    (65, 130, 7, 20),
    (252, 507, 123, 96),
    (1030, 40, 24, 16),
    (333, 4100, 512, 1280),
]
NAMES = ("row", "col", "cross_row", "cross_col", "dx", "dy", "dscale")


def four(m: int, n: int, d: int, e: int, dtype: torch.dtype) -> list[Tensor]:
    return [features(m, d, dtype), features(n, d, dtype), features(m, e, dtype), features(n, e, dtype)]


def ours(*inputs: Any) -> tuple[Tensor, ...]:
    terms = similarity_distill(*inputs)
    assert terms.col_lse is not None and terms.cross_col is not None
    return terms.row_lse, terms.col_lse, terms.cross_row, terms.cross_col


def run(
    function: Any, inputs: list[Tensor], scales: tuple[float, float], weights: list[Tensor]
) -> list[Tensor]:
    """Results and gradients of x, y and scale, in fp64."""
    x, y = (t.detach().clone().requires_grad_() for t in inputs[:2])
    wide = x.dtype in (torch.float32, torch.float64)
    factor = torch.tensor(scales[0], device="cuda", dtype=x.dtype if wide else torch.float32).requires_grad_()
    used = factor.to(x.dtype) if function is similarity_distill_reference else factor
    results = function(x, y, used, *inputs[2:], scales[1])
    torch.stack([(r * w.to(r.dtype)).sum() for r, w in zip(results, weights, strict=True)]).sum().backward()
    assert x.grad is not None and y.grad is not None and factor.grad is not None
    return [t.detach().double() for t in (*results, x.grad, y.grad, factor.grad)]


def assert_as_good_as_torch(inputs: list[Tensor], *scales: float) -> None:
    """Error against fp64 at most twice that of plain torch in the same dtype, above rounding noise."""
    x, y = inputs[:2]
    weights = [torch.randn(k, device="cuda", dtype=torch.float64) for k in (len(x), len(y), len(x), len(y))]
    pair = scales[0], scales[1]
    true = run(similarity_distill_reference, [t.double() for t in inputs], pair, weights)
    plain = run(similarity_distill_reference, inputs, pair, weights)
    got = run(ours, inputs, pair, weights)
    floor = 4 * torch.finfo(x.dtype).eps
    for name, t, p, o in zip(NAMES, true, plain, got, strict=True):
        size = t.abs().max().clamp_min(1e-6 if name in ("dx", "dy") else 1.0)
        if name == "dscale":
            size = size + torch.stack([w.abs().sum() for w in weights]).sum()
        assert o.isfinite().all(), name
        assert (o - t).norm() <= 2 * (p - t).norm() + floor * size * t.numel() ** 0.5, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_as_good_as_torch(four(*shape, dtype), 20.0, 35.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("teacher_scale", [0.0, 100.0, 1e4])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, 1e4, -30.0])
def test_scales(scale: float, teacher_scale: float, dtype: torch.dtype) -> None:
    assert_as_good_as_torch(four(300, 280, 64, 40, dtype), scale, teacher_scale)


def test_inputs_of_any_norm_take_the_online_path() -> None:
    for dtype in DTYPES:
        x, y, p, q = four(50, 60, 16, 8, dtype)
        assert_as_good_as_torch([30 * x, y, p, q], 3.0, 3.0)
        assert_as_good_as_torch([x, y, 30 * p, q], 3.0, 3.0)


@pytest.mark.parametrize("teacher", DTYPES, ids=str)
def test_a_teacher_of_another_dtype(teacher: torch.dtype) -> None:
    x, y, p, q = four(200, 333, 64, 40, torch.bfloat16)
    p, q = p.to(teacher), q.to(teacher)
    want = similarity_distill_reference(x.double(), y.double(), 10.0, p.double(), q.double(), 15.0)
    for g, w in zip(ours(x, y, 10.0, p, q, 15.0), want, strict=True):
        assert torch.allclose(g.double(), w, atol=1e-4)


def losses_and_gradients(inputs: list[Tensor], scale: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (*inputs[:2], scale)]
    contrastive, distill = distill_loss(*leaves, *inputs[2:], 50.0)
    (contrastive + 2 * distill).backward()
    return [contrastive.detach(), distill.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def test_the_same_bits_every_run() -> None:
    inputs, scale = four(3000, 3000, 512, 256, torch.bfloat16), torch.tensor(50.0).cuda()
    first = losses_and_gradients(inputs, scale)
    for _ in range(3):
        assert all(map(torch.equal, first, losses_and_gradients(inputs, scale)))


def test_on_a_stream_of_the_callers() -> None:
    inputs, scale = four(500, 500, 96, 64, torch.bfloat16), torch.tensor(20.0).cuda()
    expected = losses_and_gradients(inputs, scale)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = losses_and_gradients(inputs, scale)
    stream.synchronize()
    assert all(map(torch.equal, expected, found))


def test_captured_in_a_cuda_graph() -> None:
    """No host synchronisation and no data-dependent allocation: the op replays on other data."""
    inputs = four(256, 256, 64, 48, torch.bfloat16)
    x, y = (t.requires_grad_() for t in inputs[:2])
    scale = torch.tensor(20.0, device="cuda", requires_grad=True)
    teacher_scale = torch.tensor(50.0, device="cuda")

    def step() -> Tensor:
        contrastive, distill = distill_loss(x, y, scale, *inputs[2:], teacher_scale)
        loss = contrastive + 2 * distill
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            x.grad = y.grad = scale.grad = None
            step()
    torch.cuda.current_stream().wait_stream(side)
    x.grad = y.grad = scale.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    others = four(256, 256, 64, 48, torch.bfloat16)
    with torch.no_grad():
        for mine, other in zip(inputs, others, strict=True):
            mine.copy_(other)
    graph.replay()
    contrastive, distill, *gradients = losses_and_gradients(others, torch.tensor(20.0).cuda())
    assert torch.equal(loss.detach(), contrastive + 2 * distill)
    for want, leaf in zip(gradients, (x, y, scale), strict=True):
        assert leaf.grad is not None and torch.equal(leaf.grad, want)


def test_more_pairs_than_32_bits_count() -> None:
    rows = 50_000  # 2.5e9 pairs
    x, p = features(rows, 16, torch.bfloat16), features(rows, 16, torch.bfloat16)
    of = similarity_distill(x, x, 20.0, p, p, 30.0)
    chosen = torch.tensor([0, 1, rows // 2, rows - 1], device="cuda")
    logits = 20.0 * x[chosen].double() @ x.double().T
    weights = (30.0 * p[chosen].double() @ p.double().T).softmax(1)
    for found, want in (
        (of.row_lse, logits.logsumexp(1)),
        (of.col_lse, logits.logsumexp(1)),
        (of.cross_row, (weights * logits).sum(1)),
        (of.cross_col, (weights * logits).sum(1)),
    ):
        assert found is not None and torch.allclose(found[chosen].double(), want, rtol=0, atol=1e-3)
