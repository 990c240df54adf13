"""similarity_distill against fp64, never worse than twice plain torch's own error in the same dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_kernels import distill_loss, native, similarity_distill, similarity_lse, stripes
from llm2clip_kernels.similarity_distill import op as op_module
from llm2clip_kernels.similarity_distill import (
    similarity_distill_reference,
)
from tests.distill_kit import NAMES, features, four, ours

# rows, columns, D, E: one pair, D = 1, tails of a vector and a row block, more than one CPU tile, D above and below E
SHAPES = [
    (1, 1, 8, 3), (2, 2, 1, 5), (7, 5, 20, 1), (63, 65, 96, 8), (64, 64, 512, 768), (65, 130, 7, 20),
    (252, 507, 123, 96), (70, 1100, 16, 24), (800, 40, 24, 16), (33, 33, 20, 1280),
]  # fmt: skip


# results below this are rounding noise of a result near zero, in units of the largest magnitude
FLOOR = {torch.float32: 4e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-14}


def run(
    function: Any, inputs: list[Tensor], scale: float, teacher_scale: float, weights: list[Tensor]
) -> list[Tensor]:
    """Results and gradients of x, y, scale under upstream gradients that are not one, all in fp64."""
    x, y = (t.detach().clone().requires_grad_() for t in inputs[:2])
    factor = torch.tensor(scale, dtype=torch.promote_types(x.dtype, torch.float32)).requires_grad_()
    used = factor.to(x.dtype) if function is similarity_distill_reference else factor
    results = function(x, y, used, *inputs[2:], teacher_scale)
    sum((r * w.to(r.dtype)).sum() for r, w in zip(results, weights, strict=True)).backward()
    assert x.grad is not None and y.grad is not None and factor.grad is not None
    return [t.detach().double() for t in (*results, x.grad, y.grad, factor.grad)]


def assert_as_good_as_torch(inputs: list[Tensor], scale: float, teacher_scale: float) -> None:
    x, y = inputs[:2]
    weights = [torch.randn(k, dtype=torch.float64) for k in (len(x), len(y), len(x), len(y))]
    args = scale, teacher_scale, weights
    true = run(similarity_distill_reference, [t.double() for t in inputs], *args)
    plain = run(similarity_distill_reference, inputs, *args)
    got = run(ours, inputs, *args)
    for name, t, p, o in zip(NAMES, true, plain, got, strict=True):
        size = t.abs().max().clamp_min(1e-6 if name in ("dx", "dy") else 1.0)
        if name == "dscale":
            # a sum of M·N terms of both signs: its rounding is that of the terms, not of their sum
            size = size + sum(w.abs().sum() for w in weights)
        limit = 2 * (p - t).norm() + FLOOR[x.dtype] * size * t.numel() ** 0.5
        assert o.isfinite().all(), name
        assert (o - t).norm() <= limit, (name, (o - t).norm(), limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_as_good_as_torch(four(*shape, dtype), 20.0, 35.0)


@pytest.mark.parametrize("teacher_scale", [0.0, 14.3, 1e4, -30.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, 1e4, -30.0])
def test_scales(scale: float, teacher_scale: float) -> None:
    x, _, p, _ = four(90, 90, 32, 20)
    # correlated positives, as in trained models, and a duplicate
    y, q = (F.normalize(t + 0.5 * features(*t.shape), dim=1) for t in (x, p))
    y[7], q[7] = y[3], q[3]
    assert_as_good_as_torch([x, y, p, q], scale, teacher_scale)


def test_inputs_of_any_norm() -> None:
    x, y, p, q = 30 * torch.randn(50, 16), torch.randn(60, 16), torch.randn(50, 8), 20 * torch.randn(60, 8)
    x[4] = y[5] = 0
    p[6] = q[7] = 0
    assert_as_good_as_torch([x, y, p, q], 3.0, 2.0)
    assert_as_good_as_torch(
        [torch.zeros(4, 8), torch.zeros(3, 8), torch.zeros(4, 2), torch.zeros(3, 2)], 5.0, 5.0
    )


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_sums_that_underflow_take_the_online_path(which: str) -> None:
    """All cosines near -1 at scale 200: exp(S - 130) is zero in fp32, only true maxima help."""
    inputs = four(40, 30, 16, 12)
    for i, name in ((0, "student"), (2, "teacher")):
        if which in (name, "both"):
            base = inputs[i][:1]
            inputs[i] = base.repeat(40, 1)
            inputs[i + 1] = -F.normalize(base + 0.01 * torch.randn(30, base.shape[1]), dim=1)
    assert_as_good_as_torch(inputs, 200.0, 200.0)


def test_cross_terms_that_overflow_take_the_online_path() -> None:
    """Sums of exp(69) fit fp32 and so does a logit of 1e7; 64 of their products do not."""
    ones = torch.ones(70, 1)
    assert_as_good_as_torch([ones] * 4, 1e7, 1e3)


def test_the_chunked_path_and_its_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stripes, "STRIPE_BYTES", 4)
    monkeypatch.setattr(op_module.backend, "choose", lambda *_: "chunked")
    for dtype in (torch.float32, torch.bfloat16):
        assert_as_good_as_torch(four(300, 70, 20, 9, dtype), 20.0, 40.0)


@pytest.mark.parametrize("kind", ["auto", "chunked"])
def test_autocast_takes_no_bits_on_the_cpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "chunked":
        monkeypatch.setattr(op_module.backend, "choose", lambda *_: "chunked")
    inputs = four(20, 30, 8, 6)
    weights = [torch.randn(k, dtype=torch.float64) for k in (20, 30, 20, 30)]
    want = run(ours, inputs, 20.0, 30.0, weights)

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def under_autocast(*args: Any) -> Any:
        return ours(*args)

    got = run(under_autocast, inputs, 20.0, 30.0, weights)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
@pytest.mark.parametrize("tile", [50, 64, 131])
def test_tiles_of_the_native_kernel(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_module, "_CPU_TILE", tile)
    assert_as_good_as_torch(four(130, 157, 19, 7), 20.0, 40.0)
    assert_as_good_as_torch([30 * t for t in four(130, 157, 19, 7)], 20.0, 40.0)


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_a_stripe(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_module, "_CPU_TILE", 50)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_as_good_as_torch(four(130, 157, 19, 7), 20.0, 40.0)
        assert_as_good_as_torch([30 * t for t in four(130, 157, 19, 7)], 20.0, 40.0)
    finally:
        torch.set_num_threads(before)


def learned(rows: int, noise: float, dtype: torch.dtype) -> list[Tensor]:
    """A student that has nearly become its teacher."""
    p = features(rows, 24)
    q = F.normalize(p + 0.3 * features(rows, 24), dim=1)
    x, y = (F.normalize(t + noise * features(rows, 24), dim=1) for t in (p, q))
    return [t.to(dtype) for t in (x, y, p, q)]


def plain_losses(x: Tensor, y: Tensor, s: Tensor, p: Tensor, q: Tensor, t: Tensor | float) -> list[Tensor]:
    """open_clip's definition, matrices and all."""
    student, teacher = s * x @ y.T, (t * p @ q.T).detach()
    target = torch.arange(len(x))
    contrastive = 0.5 * (F.cross_entropy(student, target) + F.cross_entropy(student.T, target))
    by_row = -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()
    by_col = -(teacher.T.softmax(1) * student.T.log_softmax(1)).sum(1).mean()
    return [contrastive, 0.5 * (by_row + by_col)]


def loss_gradients(function: Any, inputs: list[Tensor], scale: float) -> list[Tensor]:
    x, y = (t.detach().clone().requires_grad_() for t in inputs[:2])
    factor = torch.tensor(scale, dtype=torch.promote_types(x.dtype, torch.float32)).requires_grad_()
    used = factor.to(x.dtype) if function is plain_losses else factor
    contrastive, distill = function(x, y, used, *inputs[2:], 100.0)
    (0.3 * contrastive + 1.7 * distill).backward()
    return [t.detach().double() for t in (contrastive, distill, x.grad, y.grad, factor.grad)]  # type: ignore[union-attr]


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_student_like_its_teacher_keeps_its_small_gradients(dtype: torch.dtype, noise: float) -> None:
    """p_S - p_T cancels: what is left must not drown in rounding."""
    inputs = learned(70, noise, dtype)
    true = loss_gradients(plain_losses, [t.double() for t in inputs], 100.0)
    plain = loss_gradients(plain_losses, inputs, 100.0)
    got = loss_gradients(distill_loss, inputs, 100.0)
    # the last bit of a softmax, and what scale times a unit vector makes of it
    resolution = [1e-7, 1e-7, 1e-5, 1e-5, 1e-7]
    for t, p, o, bit in zip(true, plain, got, resolution, strict=True):
        floor = {torch.float32: 1e-8, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype] * t.norm()
        assert (o - t).norm() <= 2 * (p - t).norm() + floor + bit, ((o - t).norm(), (p - t).norm())


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
def test_small_losses_at_a_huge_scale() -> None:
    """At scale 1e4 a rounded log-sum-exp alone is off by 1e-3; the losses are not."""
    inputs = learned(64, 1e-3, torch.float32)
    scale = torch.tensor(1e4)
    true = plain_losses(inputs[0].double(), inputs[1].double(), scale, *(t.double() for t in inputs[2:]), 1e4)
    plain = plain_losses(*inputs[:2], scale, *inputs[2:], 1e4)  # type: ignore[arg-type]
    for t, p, o in zip(true, plain, distill_loss(*inputs[:2], scale, *inputs[2:], 1e4), strict=True):
        assert (o - t).abs() <= 2 * (p - t).abs() + 1e-6


@pytest.mark.parametrize("diagonal", [-1, 0, 3])
@pytest.mark.parametrize("directions", ["both", "rows"])
def test_positives_and_directions(diagonal: int, directions: Any) -> None:
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        base = [t.double() for t in (*four(6, 9, 5, 4), torch.tensor(4.0))]
        x, y, p, q, scale = (t.to(dtype) for t in base)
        leaves = [t.clone().requires_grad_() for t in (x, y, scale)]
        terms = similarity_distill(*leaves, p, q, 7.0, directions=directions, diagonal=diagonal)
        assert (terms.positives is None) == (diagonal < 0)
        assert (terms.col_lse is None) == (terms.cross_col is None) == (directions == "rows")
        loss = terms.row_lse.sum() + 2 * terms.cross_row.square().sum()
        wanted = [t.clone().requires_grad_() for t in (base[0], base[1], base[4])]
        row, col, cross_row, cross_col = similarity_distill_reference(*wanted, *base[2:4], 7.0)
        want = row.sum() + 2 * cross_row.square().sum()
        if terms.col_lse is not None and terms.cross_col is not None:
            loss = loss + terms.col_lse.exp().mean() - 3 * terms.cross_col.sum()
            want = want + col.exp().mean() - 3 * cross_col.sum()
        if terms.positives is not None:
            logits = wanted[2] * wanted[0] @ wanted[1].T
            diag = logits[torch.arange(6), torch.arange(6) + diagonal]
            assert torch.allclose(terms.positives.double(), diag, atol=limit)
            loss, want = loss + terms.positives.cos().sum(), want + diag.cos().sum()
        assert torch.allclose(loss.double(), want, rtol=limit, atol=limit)
        loss.backward()
        want.backward()
        for got, true in zip(leaves, wanted, strict=True):
            assert torch.allclose(got.grad.double(), true.grad, atol=20 * limit, rtol=limit)  # type: ignore[union-attr]


def test_the_teachers_sums() -> None:
    x, y, p, q = four(40, 30, 8, 6)
    terms = similarity_distill(x.requires_grad_(), y, 9.0, p, q, 12.0)
    want = similarity_lse(p.double(), q.double(), 12.0)
    assert terms.teacher_col_lse is not None
    assert torch.allclose(terms.teacher_row_lse.double(), want[0], atol=2e-6)
    assert torch.allclose(terms.teacher_col_lse.double(), want[1], atol=2e-6)
    assert terms.row_lse.requires_grad and not terms.teacher_row_lse.requires_grad


@pytest.mark.parametrize("teacher", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("student", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_teacher_of_another_dtype(student: torch.dtype, teacher: torch.dtype) -> None:
    x, y, p, q = four(20, 33, 12, 7)
    x, y, p, q = x.to(student), y.to(student), p.to(teacher), q.to(teacher)
    want = similarity_distill_reference(*(t.double() for t in (x, y)), 10.0, p.double(), q.double(), 15.0)
    got = ours(x, y, 10.0, p, q, 15.0)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == (torch.float64 if student == torch.float64 else torch.float32)
        assert torch.allclose(g.double(), w, atol=1e-5)
