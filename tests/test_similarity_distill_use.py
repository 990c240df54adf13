"""similarity_distill as it is used: autograd, torch.compile, layouts, bad values, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_kernels import distill_loss, native, similarity_distill
from llm2clip_kernels.similarity_distill import (
    chunked,
    similarity_distill_reference,
    similarity_distill_with_rounding,
)
from llm2clip_kernels.similarity_distill import op as op_module
from tests.distill_kit import four, ours


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
