"""similarity_distill against fp64, never worse than twice plain torch's own error in the same dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_kernels import distill_loss, native, similarity_distill, similarity_lse, stripes
from llm2clip_kernels.similarity_distill import (
    chunked,
    similarity_distill_reference,
    similarity_distill_with_rounding,
)
from llm2clip_kernels.similarity_distill import op as op_module

# rows, columns, D, E: one pair, D = 1, tails of a vector and a row block, more than one CPU tile, D above and below E
SHAPES = [
    (1, 1, 8, 3), (2, 2, 1, 5), (7, 5, 20, 1), (63, 65, 96, 8), (64, 64, 512, 768), (65, 130, 7, 20),
    (252, 507, 123, 96), (70, 1100, 16, 24), (800, 40, 24, 16), (33, 33, 20, 1280),
]  # fmt: skip
# results below this are rounding noise of a result near zero, in units of the largest magnitude
FLOOR = {torch.float32: 4e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-14}
NAMES = ("row", "col", "cross_row", "cross_col", "dx", "dy", "dscale")


def features(rows: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1).to(dtype)


def four(m: int, n: int, d: int, e: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [features(m, d, dtype), features(n, d, dtype), features(m, e, dtype), features(n, e, dtype)]


def ours(*inputs: Any) -> tuple[Tensor, ...]:
    terms = similarity_distill(*inputs)
    assert terms.col_lse is not None and terms.cross_col is not None
    return terms.row_lse, terms.col_lse, terms.cross_row, terms.cross_col


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


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 0)], ids=str)
@pytest.mark.parametrize("chosen", ["auto", "chunked"])
def test_only_what_is_needed(
    needs: tuple[int, int, int], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chosen == "chunked":
        monkeypatch.setattr(op_module.backend, "choose", lambda *_: "chunked")
    x, y, p, q = four(20, 30, 6, 4)
    inputs = [x, y, torch.tensor([9.0])]
    full = [t.clone().requires_grad_() for t in inputs]
    sum(t.sum() for t in ours(*full, p, q, 8.0)).backward()  # type: ignore[union-attr]
    some = [t.clone().requires_grad_(bool(need)) for t, need in zip(inputs, needs, strict=True)]
    asked: list[tuple[Any, ...]] = []
    real = torch.ops.llm2clip_kernels.similarity_distill_backward

    def spy(*args: Any) -> Any:
        asked.append(tuple(args[-3:]))
        out = real(*args)
        assert [out[0].shape[0], out[1].shape[0]] == [20 * needs[0], 30 * needs[1]]
        return out

    monkeypatch.setattr(torch.ops.llm2clip_kernels, "similarity_distill_backward", spy)
    sum(t.sum() for t in ours(*some, p, q, 8.0)).backward()  # type: ignore[union-attr]
    assert asked == [tuple(map(bool, needs))]
    for got, want, need in zip(some, full, needs, strict=True):
        assert (got.grad is not None) == bool(need)
        if need:
            assert got.grad is not None and want.grad is not None
            assert torch.allclose(got.grad, want.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", ["row_lse", "col_lse", "positives", "cross_row", "cross_col"])
@pytest.mark.parametrize("chosen", ["auto", "chunked"])
def test_one_result_alone(used: str, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if chosen == "chunked":
        monkeypatch.setattr(op_module.backend, "choose", lambda *_: "chunked")
    seen: list[int] = []
    real = torch.ops.llm2clip_kernels.similarity_distill_backward

    def spy(*args: Any) -> Any:
        seen.append(args[3].numel())
        return real(*args)

    monkeypatch.setattr(torch.ops.llm2clip_kernels, "similarity_distill_backward", spy)
    x, y, p, q = four(20, 30, 6, 4)
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    result = getattr(similarity_distill(a, y, 9.0, p, q, 8.0, diagonal=4), used)
    row, col, cross_row, cross_col = similarity_distill_reference(
        b, y.double(), 9.0, p.double(), q.double(), 8.0
    )
    every = {"row_lse": row, "col_lse": col, "cross_row": cross_row, "cross_col": cross_col}
    every["positives"] = 9.0 * (b * y[4:24].double()).sum(1)
    result.sum().backward()
    every[used].sum().backward()
    assert a.grad is not None and b.grad is not None
    assert torch.allclose(a.grad.double(), b.grad, atol=1e-5)
    # the teacher's matrix is only made again for results that depend on it
    assert (seen[0] > 0) == used.startswith("cross")


def test_gradcheck() -> None:
    x, y, p, q = four(4, 5, 3, 2, torch.float64)
    inputs = [x.requires_grad_(), y.requires_grad_(), torch.tensor(2.0).double().requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda x, y, s: [t for t in similarity_distill(x, y, s, p, q, 3.0, diagonal=1)[:5] if t is not None],
        inputs,
    )


def test_opcheck() -> None:
    x, y, p, q = four(6, 9, 4, 3)
    scale, teacher_scale = torch.tensor(3.0), torch.tensor(5.0)
    for needs in (True, False):
        a, b, s = (t.clone().requires_grad_(needs) for t in (x, y, scale))
        torch.library.opcheck(op_module._forward, (a, b, s, p, q, teacher_scale, True, 2))
    torch.library.opcheck(op_module._forward, (x.requires_grad_(), y, scale, p, q, teacher_scale, False, -1))
    x = x.detach()
    row, col, pos, cross_row, cross_col, t_row, t_col, low = op_module._forward(
        x, y, scale, p, q, teacher_scale, True, 2
    )
    ones = [torch.ones_like(t) for t in (row, col, pos, cross_row, cross_col)]
    saved = x, y, scale, p, q, teacher_scale, row, col, t_row, t_col, low, 2
    torch.library.opcheck(op_module._backward, (*ones, *saved, True, True, True))
    torch.library.opcheck(op_module._backward, (*ones, *saved, False, True, False))


def test_compiles_without_breaks_and_without_recompiling() -> None:
    def loss(x: Tensor, y: Tensor, scale: Tensor, p: Tensor, q: Tensor) -> Tensor:
        unit = [F.normalize(t, dim=1) for t in (x, y, p, q)]
        contrastive, distill = distill_loss(unit[0], unit[1], scale.exp(), unit[2], unit[3], 30.0)
        return contrastive + 2 * distill

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for rows in (12, 17, 23):
        inputs = [torch.randn(rows, 8), torch.randn(rows, 8), torch.tensor(1.0)]
        teacher = torch.randn(rows, 5), torch.randn(rows, 5)
        a = [t.clone().requires_grad_() for t in inputs]
        b = [t.clone().requires_grad_() for t in inputs]
        compiled(*a, *teacher).backward()
        loss(*b, *teacher).backward()
        for p, q in zip(a, b, strict=True):
            assert p.grad is not None and q.grad is not None and torch.allclose(p.grad, q.grad, atol=1e-6)
        frames.append(counter.frame_count)
    # the first compilation may start over once it has seen the losses' constants
    assert frames[0] <= 2 and frames[0] == frames[2]


def test_layouts_and_untouched_inputs() -> None:
    inputs = four(24, 31, 10, 6)
    before = [t.clone() for t in inputs]
    want = ours(*inputs[:2], 7.0, *inputs[2:], torch.tensor([9.0]))
    assert all(torch.equal(t, b) for t, b in zip(inputs, before, strict=True))
    strided = [torch.empty(t.shape[1], t.shape[0]).T.copy_(t) for t in inputs[:3]]
    strided.append(torch.empty(31, 25)[:, 3:9].copy_(inputs[3]))
    assert all(map(torch.equal, ours(*strided[:2], 7.0, *strided[2:], 9.0), want))
    x = inputs[0][:1].expand(24, 10).requires_grad_()
    p = inputs[2][:1].expand(24, 6)
    row, _, cross_row, _ = ours(x, inputs[1], 7.0, p, inputs[3], 9.0)
    (row - cross_row).sum().backward()
    assert torch.allclose(row, want[0][:1].expand(24), atol=1e-6)
    assert torch.allclose(cross_row, want[2][:1].expand(24), atol=1e-6)


def test_kinds_of_scale() -> None:
    x, y, p, q = four(5, 6, 4, 4)
    want = ours(x, y, 3.0, p, q, 2.0)
    for s, t in (
        (3, torch.tensor([2.0])),
        (torch.tensor([[3]]), 2),
        (torch.tensor(3.0).double(), torch.tensor(2)),
    ):
        assert all(map(torch.equal, ours(x, y, s, p, q, t), want))
    scale = torch.tensor([3.0], dtype=torch.float16, requires_grad=True)
    teacher_scale = torch.tensor(2.0, requires_grad=True)
    p.requires_grad_()
    sum(t.sum() for t in ours(x, y, scale, p, q, teacher_scale)).backward()  # type: ignore[union-attr]
    assert scale.grad is not None and scale.grad.shape == (1,) and scale.grad.dtype == torch.float16
    assert p.grad is None and teacher_scale.grad is None


def test_deterministic_and_callable_twice() -> None:
    x, y, p, q = four(300, 800, 33, 20)

    def once() -> list[Tensor]:
        a, b, s = (t.clone().requires_grad_() for t in (x, y, torch.tensor(20.0)))
        results = ours(a, b, s, p, q, 30.0)
        loss = sum(t.mean() for t in results)
        first = torch.autograd.grad(loss, [a, b, s], retain_graph=True)
        second = torch.autograd.grad(loss, [a, b, s])
        assert all(map(torch.equal, first, second))
        return [*results, *first]

    assert all(map(torch.equal, once(), once()))
    with torch.no_grad():
        assert not ours(x.requires_grad_(), y, 5.0, p, q, 5.0)[0].requires_grad


def test_bad_values_stay_where_the_maths_puts_them() -> None:
    x, y, p, q = four(9, 7, 4, 3)
    x[2, 1] = float("nan")
    x[5] = float("inf")
    p[6, 0] = float("nan")
    wanted = similarity_distill_reference(x.double(), y.double(), 10.0, p.double(), q.double(), 5.0)
    for g, w in zip(ours(x, y, 10.0, p, q, 5.0), wanted, strict=True):
        good = w.isfinite()
        assert torch.equal(g.isfinite(), good) and torch.allclose(g[good].double(), w[good], atol=1e-5)
    x, y, p, q = four(9, 7, 4, 3)
    x[3, 0] = p[4, 0] = float("nan")
    x.requires_grad_()
    row, _, cross_row, _ = ours(x, y, 10.0, p, q, 5.0)
    (row[:3] - cross_row[:3]).sum().backward()
    assert x.grad is not None and x.grad[:3].isfinite().all()
    # a spoilt teacher leaves the contrastive results alone
    x, y, p, q = four(9, 9, 4, 3)
    p[4] = float("nan")
    x.requires_grad_()
    terms = similarity_distill(x, y, 10.0, p, q, 5.0, diagonal=0)
    assert terms.col_lse is not None and terms.positives is not None
    (terms.row_lse + terms.col_lse - 2 * terms.positives).sum().backward()
    assert terms.row_lse.isfinite().all() and x.grad is not None and x.grad.isfinite().all()


def test_huge_upstream_gradients_do_not_overflow() -> None:
    """Loss scaling: 2^100 times exp(shift - lse) passes fp32, its product with exp(S - shift) does not."""
    x, y, p, q = four(20, 20, 8, 8)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    for leaf, factor in ((a, 1.0), (b, 2.0**100)):
        (sum(t.sum() for t in ours(leaf, y, 130.0, p, q, 130.0)) * factor).backward()  # type: ignore[operator]
    assert a.grad is not None and b.grad is not None and b.grad.isfinite().all()
    assert torch.allclose(b.grad / 2.0**100, a.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
def test_rounding_completes_the_results() -> None:
    x, y, p, q = four(50, 60, 16, 12)
    terms, low = similarity_distill_with_rounding(x, y, 500.0, p, q, 40.0, diagonal=0)
    exact = chunked.forward(
        x.double(), y.double(), torch.tensor(500.0).double(), p.double(), q.double(), torch.tensor(40.0).double(),
        True, torch.zeros(50).double(), torch.zeros(60).double(),
    )  # fmt: skip
    names = ("row_lse", "col_lse", "cross_row", "cross_col", "teacher_row_lse", "teacher_col_lse")
    for name, want in zip(names, exact, strict=True):
        rounded, rest = getattr(terms, name), getattr(low, name)
        assert rest.abs().max() > 0 and (rest.abs() <= rounded.abs() * 6e-8 + 1e-12).all(), name
        # what is left are the products' own fp32 errors
        assert torch.allclose(rounded.double() + rest.double(), want, atol=2e-4), name


X, Y, P, Q = torch.ones(3, 4), torch.ones(5, 4), torch.ones(3, 2), torch.ones(5, 2)
BAD: list[tuple[Any, type[Exception], str]] = [
    ((X[0], Y, 1.0, P, Q, 1.0), ValueError, "x must be 2-D"),
    ((X, torch.ones(5, 6), 1.0, P, Q, 1.0), ValueError, "one D"),
    ((X, Y.half(), 1.0, P, Q, 1.0), TypeError, "one dtype"),
    ((X, Y, 1.0, P.int(), Q.int(), 1.0), TypeError, "teacher.*int32"),
    ((X, Y, 1.0, P, Q.half(), 1.0), TypeError, "teacher.*one dtype"),
    ((X, Y, 1.0, P, torch.ones(5, 3), 1.0), ValueError, "teacher.*one D"),
    ((X, Y, 1.0, P.to("meta"), Q.to("meta"), 1.0), ValueError, "student's device"),
    ((X, Y, 1.0, P[:2], Q, 1.0), ValueError, "x's rows"),
    ((X, Y, 1.0, P, Q[:4], 1.0), ValueError, "q y's"),
    ((X[:0], Y, 1.0, P[:0], Q, 1.0), ValueError, "empty"),
    ((X, Y, torch.ones(2), P, Q, 1.0), ValueError, "1-element"),
    ((X, Y, 1.0, P, Q, "20"), TypeError, "number"),
    ((X, Y, 1.0, P.numpy(), Q, 1.0), TypeError, "tensor"),
]


@pytest.mark.parametrize(("args", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input(args: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        similarity_distill(*args)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="directions"):
        similarity_distill(X, Y, 1.0, P, Q, 1.0, directions="columns")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rows without a positive"):
        similarity_distill(X, Y, 1.0, P, Q, 1.0, diagonal=3)
