"""sigmoid_loss against fp64, never worse than twice plain torch's own error in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

from llm2clip_kernels import backend, native, sigmoid_loss, stripes
from llm2clip_kernels.sigmoid_loss import op as op_module
from llm2clip_kernels.sigmoid_loss import sigmoid_loss_reference, sigmoid_terms

# one pair, D = 1, ragged on every side of a vector and a row block, more than one CPU tile, D no power of two
SHAPES = [
    (1, 1, 8), (2, 2, 1), (7, 5, 20), (63, 65, 96), (64, 64, 512), (65, 130, 7),
    (252, 507, 123), (70, 1100, 16), (1030, 40, 24), (33, 33, 1280), (20, 20, 768),
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# results below this are rounding noise, in units of the largest magnitude
FLOOR = {torch.float32: 4e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-14}
NAMES = ("loss", "dx", "dy", "dscale", "dbias")


def features(rows: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1).to(dtype)


def run(function: Any, inputs: list[Tensor], upstream: Tensor, **options: Any) -> list[Tensor]:
    """Loss and gradients of x, y, scale, bias under an upstream gradient that is not one, all in fp64."""
    x, y = (t.detach().clone().requires_grad_() for t in inputs[:2])
    wide = torch.promote_types(x.dtype, torch.float32)
    scale, bias = (t.detach().to(wide).requires_grad_() for t in inputs[2:])
    if function is sigmoid_loss_reference and x.dtype in (torch.bfloat16, torch.float16):
        loss = function(x, y, scale.to(x.dtype), bias.to(x.dtype), **options)
    else:
        loss = function(x, y, scale, bias, **options)
    if upstream.numel() == 1:
        loss = loss.sum()
    (loss * upstream.to(loss.dtype)).sum().backward()
    return [loss.detach().double(), *(t.grad.double() for t in (x, y, scale, bias))]  # type: ignore[union-attr]


def assert_as_good_as_torch(
    x: Tensor, y: Tensor, scale: float, bias: float, *, rows: bool = False, **options: Any
) -> None:
    inputs = [x, y, torch.tensor(scale, dtype=torch.float64), torch.tensor(bias, dtype=torch.float64)]
    upstream = torch.randn(len(x) if rows else 1, dtype=torch.float64)
    exact = [t.double() for t in inputs]
    true = run(sigmoid_loss_reference, exact, upstream, **options)
    plain = run(sigmoid_loss_reference, inputs, upstream, **options)
    ours = run(sigmoid_terms, inputs, upstream, rows=rows, **options)
    # dscale and dbias are sums of M·N terms of both signs: their rounding is that of the terms
    with torch.no_grad():
        dots = exact[0] @ exact[1].T
        terms = (scale * dots + bias).sigmoid() * upstream.abs().reshape(-1, 1)
        magnitude = {"dscale": (terms * dots).abs().sum(), "dbias": terms.sum()}
    for name, t, p, o in zip(NAMES, true, plain, ours, strict=True):
        size = t.abs().max().clamp_min(1e-6) + magnitude.get(name, 0.0)
        limit = 2 * (p - t).norm() + FLOOR[x.dtype] * size * t.numel() ** 0.5
        assert o.isfinite().all(), name
        assert (o - t).norm() <= limit, (name, (o - t).norm(), limit)


@pytest.mark.parametrize("rows", [False, True], ids=["sum", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape: tuple[int, int, int], dtype: torch.dtype, rows: bool) -> None:
    m, n, d = shape
    assert_as_good_as_torch(features(m, d, dtype), features(n, d, dtype), 10.0, -10.0, rows=rows)


@pytest.mark.parametrize("bias", [-10.0, 0.0, 3.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, 1e4, -30.0])
def test_scales_and_biases(scale: float, bias: float) -> None:
    x = features(90, 32)
    # correlated positives, as in a trained model, and a duplicate
    y = F.normalize(x + 0.5 * features(90, 32), dim=1)
    y[7] = y[3]
    assert_as_good_as_torch(x, y, scale, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chosen", ["native", "chunked"])
def test_small_terms_are_not_lost(chosen: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned pairs: every term of the loss is e^-15 or less, which 1 + e or 1 - p would round away."""
    if chosen == "native" and not native.available():
        pytest.skip("the native library is not built")
    monkeypatch.setattr(backend, "choose", lambda *_: chosen)
    x = torch.eye(60, 64).to(dtype)
    inputs = [x, x, torch.tensor(30.0), torch.tensor(-15.0)]
    true = run(sigmoid_loss_reference, [t.double() for t in inputs], torch.ones(1))
    ours = run(sigmoid_terms, inputs, torch.ones(1))
    assert abs(true[0].item() / (3600 * math.exp(-15)) - 1) < 1e-6
    for name, t, o in zip(NAMES, true, ours, strict=True):
        # dx and dy round to half precision at the very end only; dbias is a sum that cancels
        limit = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 2e-2}[dtype]
        if name in ("loss", "dscale", "dbias"):
            limit = 2e-6
        assert (o - t).norm() <= limit * t.norm(), (name, (o - t).norm() / t.norm())


def test_degenerate_inputs() -> None:
    x, y = 30 * torch.randn(50, 16), torch.randn(60, 16)
    x[4] = 0
    y[5] = 0
    assert_as_good_as_torch(x, y, 3.0, -1.0)
    assert_as_good_as_torch(torch.zeros(4, 8), torch.zeros(3, 8), 5.0, -10.0)
    same = features(1, 16).repeat(40, 1)
    assert_as_good_as_torch(same, same, 100.0, -10.0)
    # logits of 1e7 and more, both signs: the loss is the logit, its gradient one or zero
    assert_as_good_as_torch(1e3 * x, y, 1e4, 0.0)


def groups_for(m: int, n: int) -> tuple[Tensor, Tensor]:
    # large ids, several of a kind on both sides, ids of one side only, and ids below zero, which equal nothing
    choice = torch.tensor([2**40, 2**40 + 2**32, 5, 0, -1, -7])
    return choice[torch.randint(6, (m,))], choice[torch.randint(6, (n,))]


@pytest.mark.parametrize("chosen", ["native", "chunked"])
@pytest.mark.parametrize("shape", [(1, 1, 3), (40, 21, 12), (21, 40, 12), (70, 1030, 5)], ids=str)
def test_several_positives(shape: tuple[int, int, int], chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if chosen == "native" and not native.available():
        pytest.skip("the native library is not built")
    monkeypatch.setattr(backend, "choose", lambda *_: chosen)
    m, n, d = shape
    x_groups, y_groups = groups_for(m, n)
    for rows in (False, True):
        assert_as_good_as_torch(
            features(m, d), features(n, d), 10.0, -5.0, rows=rows, x_groups=x_groups, y_groups=y_groups
        )


def test_groups_that_pair_up_are_the_diagonal() -> None:
    x, y = features(30, 8), features(30, 8)
    want = sigmoid_loss(x, y, 10.0, -10.0)
    ids = torch.randperm(30)
    assert torch.equal(sigmoid_loss(x, y, 10.0, -10.0, x_groups=ids), want)
    assert torch.equal(sigmoid_loss(x, y, 10.0, -10.0, x_groups=ids.int(), y_groups=ids.short()), want)
    nobody = torch.full((30,), -1)
    only_negatives = sigmoid_loss(x, y, 10.0, -10.0, x_groups=nobody, reduction="sum")
    assert torch.allclose(only_negatives, F.softplus(10 * x @ y.T - 10).sum(), rtol=1e-5)


@pytest.mark.parametrize("diagonal", [-3, 0, 4, 9, 100])
def test_the_diagonal_may_lie_anywhere(diagonal: int) -> None:
    for dtype in (torch.float32, torch.float64):
        assert_as_good_as_torch(features(6, 5, dtype), features(9, 5, dtype), 10.0, -5.0, diagonal=diagonal)


def test_the_chunked_path_and_its_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stripes, "STRIPE_BYTES", 4)
    monkeypatch.setattr(backend, "choose", lambda *_: "chunked")
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (False, True):
            x, y = features(300, 20, dtype), features(310, 20, dtype)
            assert_as_good_as_torch(x, y, 10.0, -10.0, rows=rows)


@pytest.mark.parametrize("kind", ["plain", "native", "chunked"])
def test_autocast_takes_no_bits_on_the_cpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_module, "_SMALL_PAIRS", 2**30 if kind == "plain" else 0)
    if kind == "chunked":
        monkeypatch.setattr(backend, "choose", lambda *_: "chunked")
    inputs = [features(20, 8), features(20, 8), torch.tensor(10.0), torch.tensor(-5.0)]
    for reduction in ("mean", "none"):
        upstream = torch.ones(1 if reduction == "mean" else 20)
        want = run(sigmoid_loss, inputs, upstream, reduction=reduction)
        forward = torch.autocast("cpu", dtype=torch.bfloat16)(sigmoid_loss)
        got = run(forward, inputs, upstream, reduction=reduction)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [False, True], ids=["sum", "rows"])
def test_tiles_shared_among_threads(rows: bool, three_threads: None) -> None:
    """Several workers and several stripes; then one worker, whose blocks the threads share."""
    x, y = features(1050, 8), features(900, 8)
    assert_as_good_as_torch(x, y, 10.0, -10.0, rows=rows)
    assert_as_good_as_torch(x, y[:30], 10.0, -10.0, rows=rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_batches_in_plain_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the limit no op is called; above it one is; the results are the same."""
    monkeypatch.setattr(op_module, "_SMALL_PAIRS", 9 * 12)
    called: list[int] = []
    real = op_module.compute
    monkeypatch.setattr(op_module, "compute", lambda *a: (called.append(1), real(*a))[1])
    ids = {"x_groups": torch.arange(9) // 2, "y_groups": torch.arange(12) // 3}
    for rows in (False, True):
        for options in ({}, ids):
            for scale, bias in ((10.0, -5.0), (1e4, 0.0)):
                inputs = features(9, 16, dtype), features(12, 16, dtype), scale, bias
                assert_as_good_as_torch(*inputs, rows=rows, **options)
    assert not called
    sigmoid_terms(features(9, 16, dtype), features(13, 16, dtype), 10.0, -5.0)
    assert called


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction: Any) -> None:
    x, y = features(12, 6, torch.float64), features(12, 6, torch.float64)
    rows = sigmoid_loss_reference(x, y, 10.0, -10.0)
    want = {"mean": rows.sum() / 12, "sum": rows.sum(), "none": rows}[reduction]
    assert torch.allclose(sigmoid_loss(x, y, 10.0, -10.0, reduction=reduction), want)


@pytest.mark.parametrize("rows", [False, True], ids=["sum", "rows"])
@pytest.mark.parametrize(
    "needs", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 1, 1)], ids=str
)
def test_only_what_is_needed(needs: tuple[int, ...], rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [features(20, 6), features(30, 6), torch.tensor([9.0]), torch.tensor(-3.0)]
    full = [t.clone().requires_grad_() for t in inputs]
    sigmoid_terms(full[0], full[1], full[2], full[3], rows=rows).sum().backward()
    some = [t.clone().requires_grad_(bool(need)) for t, need in zip(inputs, needs, strict=True)]
    asked: list[tuple[bool, ...]] = []
    real = op_module.compute

    def spy(*args: Any) -> Any:
        asked.append(args[-1])
        results = real(*args)
        for made, need in zip(results[1:], args[-1], strict=True):
            assert (made.numel() > 0) == need
        return results

    monkeypatch.setattr(op_module, "compute", spy)
    sigmoid_terms(some[0], some[1], some[2], some[3], rows=rows).sum().backward()
    wanted = tuple(map(bool, needs))
    # one sweep makes the value and the gradients of the sum; of the rows, a second one
    assert asked == ([(False,) * 4, wanted] if rows else [wanted])
    for got, want, need in zip(some, full, needs, strict=True):
        assert (got.grad is not None) == bool(need)
        if need:
            assert got.grad is not None and want.grad is not None and got.grad.shape == got.shape
            assert torch.allclose(got.grad, want.grad, rtol=1e-5, atol=1e-5)
    asked.clear()
    with torch.no_grad():
        assert not sigmoid_terms(some[0], some[1], some[2], some[3], rows=rows).requires_grad
    assert asked == [(False,) * 4]


@pytest.mark.parametrize("rows", [False, True], ids=["sum", "rows"])
def test_gradcheck(rows: bool) -> None:
    inputs = [features(5, 4, torch.float64), features(7, 4, torch.float64)]
    inputs += [torch.tensor(3.0, dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)]
    leaves = [t.requires_grad_() for t in inputs]
    ids = {"x_groups": torch.tensor([0, 1, 1, 2, -1]), "y_groups": torch.tensor([1, 0, 2, 2, 1, -1, 5])}
    for options in ({}, ids):
        assert torch.autograd.gradcheck(lambda *a, o=options: sigmoid_terms(*a, rows=rows, **o), leaves)


def test_differentiating_twice_is_refused() -> None:
    """The gradients were made in the forward: a second derivative of them would be silently wrong."""
    for rows in (False, True):
        x = features(5, 4).requires_grad_()
        unit = F.normalize(x, dim=1)
        loss = sigmoid_terms(unit, features(5, 4), 10.0, -10.0, rows=rows).sum()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            dx.square().sum().backward()


@pytest.mark.parametrize("needs", [True, False])
def test_opcheck(needs: bool) -> None:
    inputs = [features(6, 4), features(9, 4), torch.tensor(3.0), torch.tensor(-3.0)]
    x, y, scale, bias = (t.clone().requires_grad_(needs) for t in inputs)
    ids = torch.arange(6), torch.arange(9)
    for groups in ((torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)), ids):
        torch.library.opcheck(op_module._summed, (x, y, scale, bias, *groups, 2, *[needs] * 4))
        torch.library.opcheck(op_module._rows, (x, y, scale, bias, *groups, 2))
    g = torch.rand(6)
    arguments = (g, *(t.detach() for t in (x, y, scale, bias)), *ids, 0)
    torch.library.opcheck(op_module._rows_backward, (*arguments, needs, True, False, True))
    made = op_module._summed(*arguments[1:], True, True, True, True)
    torch.library.opcheck(op_module._summed_backward, (g[0], *arguments[1:5], *made[1:]))


def test_compiles_without_breaks_and_without_recompiling() -> None:
    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        rows = sigmoid_loss(x, y, scale.exp(), bias, reduction="none")
        return sigmoid_loss(x, y, scale.exp(), bias) + rows.square().mean()

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for rows in (12, 17, 23):
        inputs = [torch.randn(rows, 8), torch.randn(rows, 8), torch.tensor(1.0), torch.tensor(-2.0)]
        a = [t.clone().requires_grad_() for t in inputs]
        b = [t.clone().requires_grad_() for t in inputs]
        compiled(*a).backward()
        loss(*b).backward()
        for p, q in zip(a, b, strict=True):
            assert p.grad is not None and q.grad is not None and torch.allclose(p.grad, q.grad, atol=1e-6)
        counts.append(counter.frame_count)
    # the first compilation may try twice; another batch size compiles nothing
    assert len(set(counts)) == 1


def test_layouts_and_untouched_inputs() -> None:
    x, y = features(24, 10), features(31, 10)
    want = sigmoid_terms(x, y, 7.0, -2.0)
    strided = torch.empty(10, 24).T.copy_(x), torch.empty(31, 25)[:, 3:13].copy_(y)
    assert torch.equal(sigmoid_terms(*strided, 7.0, -2.0), want)
    expanded = x[:1].expand(24, 10).requires_grad_()
    (dx,) = torch.autograd.grad(sigmoid_terms(expanded, y, 7.0, -2.0), expanded)
    copied = x[:1].repeat(24, 1).requires_grad_()
    (wanted,) = torch.autograd.grad(sigmoid_terms(copied, y, 7.0, -2.0), copied)
    assert torch.equal(dx, wanted)
    ids = torch.arange(62)
    every_other = sigmoid_terms(x, y, 7.0, -2.0, x_groups=ids[: 2 * 24 : 2], y_groups=ids[::2])
    assert torch.allclose(every_other, want, rtol=1e-6)
    before = x.clone(), y.clone()
    leaves = x.requires_grad_(), y.requires_grad_()
    sigmoid_terms(*leaves, torch.tensor([7.0]), -2).backward()
    assert torch.equal(leaves[0].detach(), before[0]) and torch.equal(leaves[1].detach(), before[1])


def test_kinds_of_scale_and_bias() -> None:
    x, y = features(5, 4), features(6, 4)
    want = sigmoid_terms(x, y, 3.0, -2.0)
    for kind in (int, float, torch.tensor, lambda v: torch.tensor([v]), lambda v: torch.tensor([[int(v)]])):
        assert torch.equal(sigmoid_terms(x, y, kind(3.0), kind(-2.0)), want)
    scale = torch.tensor([3.0], dtype=torch.float16, requires_grad=True)
    bias = torch.tensor([[-2.0]], dtype=torch.float64, requires_grad=True)
    sigmoid_terms(x, y, scale, bias).backward()
    assert scale.grad is not None and scale.grad.shape == (1,) and scale.grad.dtype == torch.float16
    assert bias.grad is not None and bias.grad.shape == (1, 1) and bias.grad.dtype == torch.float64


@pytest.mark.parametrize("rows", [False, True], ids=["sum", "rows"])
def test_deterministic_and_repeatable(rows: bool) -> None:
    inputs = [features(300, 33), features(1100, 33), torch.tensor(20.0), torch.tensor(-10.0)]

    def once() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        loss = sigmoid_terms(leaves[0], leaves[1], leaves[2], leaves[3], rows=rows).sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves)
        assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
        return [loss, *first]

    first = once()
    for _ in range(2):
        assert all(torch.equal(p, q) for p, q in zip(first, once(), strict=True))


def test_bad_values_stay_where_the_maths_puts_them() -> None:
    x, y = features(9, 4), features(7, 4)
    x[2, 1] = float("nan")
    x[5] = float("inf")
    leaf = x.clone().requires_grad_()
    loss = sigmoid_terms(leaf, y, 10.0, -10.0, rows=True)
    want = sigmoid_loss_reference(x.double(), y.double(), 10.0, -10.0)
    assert torch.equal(loss.isnan(), want.isnan()) and torch.equal(loss.isinf(), want.isinf())
    clean = [i for i in range(9) if i not in (2, 5)]
    assert torch.allclose(loss[clean].double(), want[clean], atol=1e-5)
    loss[clean].sum().backward()
    assert leaf.grad is not None and leaf.grad[clean].isfinite().all()
    # the gradients of the sum too: a row's gradient needs its own row only
    leaf = x.clone().requires_grad_()
    sigmoid_terms(leaf, y, 10.0, -10.0).backward()
    assert leaf.grad is not None and leaf.grad[clean].isfinite().all() and leaf.grad[2].isnan().all()


X, Y = torch.ones(3, 4), torch.ones(3, 4)
BAD: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((X[0], Y, 1.0, 0.0), {}, ValueError, "2-D"),
    ((X, Y[:, :2], 1.0, 0.0), {}, ValueError, "one D"),
    ((X, Y.half(), 1.0, 0.0), {}, TypeError, "one dtype"),
    ((X.int(), Y.int(), 1.0, 0.0), {}, TypeError, "int32"),
    ((X, Y.to("meta"), 1.0, 0.0), {}, ValueError, "one device"),
    ((X[:0], Y, 1.0, 0.0), {}, ValueError, "empty"),
    ((X, Y, torch.ones(2), 0.0), {}, ValueError, "scale must be .* 1-element"),
    ((X, Y, 1.0, torch.ones(2)), {}, ValueError, "bias must be .* 1-element"),
    ((X, Y, 1.0, "-10"), {}, TypeError, "bias must be a number"),
    ((X, Y, 1.0, None), {}, TypeError, "bias must be a number"),
    ((X, Y[:2], 1.0, 0.0), {}, ValueError, "pair up, got 3 and 2 rows; or give x_groups and y_groups"),
    ((X, Y[:2], 1.0, 0.0), {"x_groups": torch.arange(3)}, ValueError, "or give y_groups too"),
    ((X, Y, 1.0, 0.0), {"y_groups": torch.arange(3)}, ValueError, "y_groups without x_groups"),
    ((X, Y, 1.0, 0.0), {"x_groups": torch.arange(4)}, ValueError, "one id for each of 3 rows"),
    ((X, Y, 1.0, 0.0), {"x_groups": torch.ones(3)}, TypeError, "integer tensor, got torch.float32"),
    ((X, Y, 1.0, 0.0), {"x_groups": [0, 1, 2]}, TypeError, "integer tensor, got list"),
    ((X, Y, 1.0, 0.0), {"reduction": "max"}, ValueError, "reduction"),
    ((X, Y, 1.0, 0.0), {"grad_reduction": "mean"}, ValueError, "grad_reduction"),
    ((X, Y, 1.0, 0.0), {"gather": "bidir"}, ValueError, "gather must be"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_input(args: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sigmoid_loss(*args, **options)


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
def test_the_native_kernel_by_itself() -> None:
    """Every tail, several tiles, weights, and errors instead of reading past the end."""
    x, y, weight = features(67, 19), features(131, 19), torch.rand(67)
    ids = groups_for(67, 131)
    for groups in (ids, (torch.empty(0, dtype=torch.int64),) * 2):
        arguments = (*groups, 3, weight, True, True, True, True, 50)
        got = torch.ops.llm2clip_native.sigmoid_loss(x, y, 11.0, -4.0, *arguments)
        leaves = [t.double().requires_grad_() for t in (x, y, torch.tensor(11.0), torch.tensor(-4.0))]
        given = groups if groups[0].numel() else (None, None)
        want = sigmoid_loss_reference(*leaves, *given, diagonal=3)  # type: ignore[arg-type]
        (want * weight).sum().backward()
        for g, w in zip(got, [want, *(t.grad for t in leaves)], strict=True):
            assert torch.allclose(g.double().reshape(w.shape), w, rtol=2e-6, atol=2e-5)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="one group id per row"):
        torch.ops.llm2clip_native.sigmoid_loss(
            x, y, 1.0, 0.0, ids[0], ids[1][:-1], 0, weight, True, True, True, True, 50
        )
    with pytest.raises(RuntimeError, match="one float32 weight per row"):
        torch.ops.llm2clip_native.sigmoid_loss(
            x, y, 1.0, 0.0, *ids, 0, weight[:-1], True, True, True, True, 50
        )
