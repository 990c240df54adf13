"""lora_linear against fp64, never worse than twice plain torch's own error in the same dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llm2clip_kernels import lora_add, lora_linear
from llm2clip_kernels.dropout import keep_mask
from llm2clip_kernels.lora_linear import lora_linear_reference, op, products

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# (T, K, N, R): one of each, R = 1, R above K and N, ragged everywhere, more rows than a chunk, R = 256
SHAPES = [
    (1, 1, 1, 1), (2, 8, 7, 1), (7, 20, 5, 32), (63, 65, 96, 16), (64, 64, 64, 8), (65, 130, 7, 3),
    (252, 123, 507, 16), (300, 96, 64, 64), (33, 512, 768, 256),
]  # fmt: skip
# rounding noise of a result near zero, in units of the largest magnitude
FLOOR = {FP32: 4e-7, BF16: 4e-3, FP16: 5e-4, FP64: 1e-14}
NAMES = ("y", "dx", "dweight", "dbias", "dlora_a", "dlora_b")


@pytest.fixture(params=["few rows", "many rows"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test through torch's differentiable ops, and through the hand-written backward pass by small chunks."""
    if request.param == "many rows":
        monkeypatch.setattr(op, "_SMALL", 0)
        monkeypatch.setattr(products, "_CHUNK_BYTES", 4)
    return str(request.param)


def tensors(t: int, k: int, n: int, r: int, dtype: torch.dtype = FP32, low: Any = None) -> list[Tensor]:
    """x, weight, bias, lora_a, lora_b with results of order one."""
    x, weight, bias = torch.randn(t, k), torch.randn(n, k) / k**0.5, torch.randn(n)
    a, b = torch.randn(r, k) / k**0.5, torch.randn(n, r) / r**0.5
    return [s.to(dtype) for s in (x, weight, bias)] + [s.to(low or dtype) for s in (a, b)]


def run(
    function: Any, inputs: list[Tensor], upstream: Tensor, scaling: float, **options: Any
) -> list[Tensor]:
    """y and the gradients of all five inputs under an upstream gradient that is not one, in fp64."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves, scaling, **options)
    y.backward(upstream.to(y.dtype))
    return [y.detach().double()] + [t.grad.double() for t in leaves if t.grad is not None]


def assert_as_good_as_torch(inputs: list[Tensor], scaling: float = 2.0, p: float = 0.0) -> None:
    dtype = inputs[0].dtype
    upstream = torch.randn(inputs[0].shape[:-1] + inputs[1].shape[:1]).to(dtype)
    rows = inputs[0].numel() // inputs[0].shape[-1]
    seed = torch.tensor(2**45 + 17) if p else None
    keep = None if seed is None else keep_mask(seed, 0, rows, inputs[0].shape[-1], p).view(inputs[0].shape)
    plain_options = {"keep": keep, "dropout_p": p}
    true = run(lora_linear_reference, [t.double() for t in inputs], upstream, scaling, **plain_options)
    plain = run(lora_linear_reference, inputs, upstream, scaling, **plain_options)
    ours = run(lora_linear, inputs, upstream, scaling, dropout_p=p, seed=seed)
    assert len(ours) == len(true) == 6
    for name, t, q, o in zip(NAMES, true, plain, ours, strict=True):
        limit = 2 * (q - t).norm() + FLOOR[dtype] * t.abs().max() * t.numel() ** 0.5
        assert o.shape == t.shape and o.isfinite().all(), name
        assert (o - t).norm() <= limit, (name, (o - t).norm(), limit)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_as_good_as_torch(tensors(*shape, dtype))


@pytest.mark.parametrize(("dtype", "low"), [(BF16, FP32), (FP16, FP32), (FP32, BF16)], ids=str)
def test_adapters_of_another_dtype(dtype: torch.dtype, low: torch.dtype) -> None:
    """fp32 adapters on a half-precision model, as peft makes them: the low-rank gradients stay fp32-exact."""
    inputs = tensors(200, 48, 40, 8, dtype, low)
    assert_as_good_as_torch(inputs)
    assert_as_good_as_torch(inputs, p=0.3)
    assert lora_linear(*inputs, 2.0).dtype == dtype


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_dropout(dtype: torch.dtype, p: float) -> None:
    assert_as_good_as_torch(tensors(150, 33, 20, 4, dtype), p=p)


def test_everything_dropped() -> None:
    inputs = tensors(9, 6, 5, 2)
    y, *gradients = run(lora_linear, inputs, torch.randn(9, 5), 2.0, dropout_p=1.0)
    base = torch.nn.functional.linear(*inputs[:3])
    assert torch.allclose(y.float(), base) and (gradients[3] == 0).all() and (gradients[4] == 0).all()


@pytest.mark.parametrize("scaling", [0.0, 1.0, 0.37, -3.0, 1e4])
def test_scalings(scaling: float) -> None:
    for dtype in (FP32, BF16):
        assert_as_good_as_torch(tensors(70, 24, 18, 4, dtype), scaling)


def test_degenerate_inputs() -> None:
    x, w, bias, a, b = tensors(70, 24, 18, 4)
    x[3:] = x[3]
    assert_as_good_as_torch([x, w, bias, a, b])
    assert_as_good_as_torch([torch.zeros_like(x), w, bias, a, b])
    # as peft starts: B = 0
    assert_as_good_as_torch([x, w, bias, a, torch.zeros_like(b)])
    empty = run(lora_linear, [x[:0], w, bias, a, b], torch.ones(0, 18), 2.0)
    assert empty[0].shape == (0, 18) and all((g == 0).all() for g in empty[1:])
    # two leading dimensions one of which is empty
    assert lora_linear(x.new_ones(2, 0, 24), w, bias, a, b, 1.0).shape == (2, 0, 18)


def test_bad_values_stay_where_the_maths_puts_them() -> None:
    x, w, bias, a, b = tensors(70, 24, 18, 4)
    x[2, 1] = float("nan")
    x[5, 0] = float("inf")
    y = lora_linear(x, w, bias, a, b, 2.0)
    assert (~y.isfinite()).any(1).nonzero().flatten().tolist() == [2, 5]


@pytest.mark.parametrize("needs", ["x", "weight", "bias", "a", "b", "x a b", "a b", "x weight"])
def test_only_what_is_needed(needs: str, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    names = ("x", "weight", "bias", "a", "b")
    inputs = tensors(40, 12, 10, 3)
    upstream = torch.randn(40, 10)
    full = [t.clone().requires_grad_() for t in inputs]
    lora_linear(*full, 2.0).backward(upstream)
    some = [t.clone().requires_grad_(name in needs.split()) for name, t in zip(names, inputs, strict=True)]
    made: list[tuple[int, ...]] = []
    real = torch.mm

    def spy(p: Tensor, q: Tensor, **options: Any) -> Tensor:
        made.append((p.shape[0], q.shape[1]))
        return real(p, q, **options)

    y = lora_linear(*some, 2.0)
    monkeypatch.setattr(torch, "mm", spy)
    y.backward(upstream)
    for name, got, want in zip(names, some, full, strict=True):
        assert (got.grad is not None) == (name in needs.split()), name
        if got.grad is not None:
            assert want.grad is not None and torch.allclose(got.grad, want.grad, rtol=1e-5, atol=1e-5)
    if way == "many rows":
        assert ((10, 12) in made) == ("weight" in needs), "dy Tx is the largest product of all"
        assert ((40, 12) in made) == ("x" in needs.split())


def test_no_bias_any_layout_and_leading_dimensions() -> None:
    x, w, bias, a, b = tensors(60, 24, 18, 4)
    want = lora_linear_reference(x, w, None, a, b, 1.5)
    for leading in ((60,), (5, 12), (3, 4, 5), (60, 1)):
        got = lora_linear(x.view(*leading, 24), w, None, a, b, 1.5)
        assert got.shape == (*leading, 18) and torch.allclose(got.view(60, 18), want, atol=1e-5)
    assert torch.allclose(lora_linear(x[7], w, None, a, b, 1.5), want[7], atol=1e-5)
    strided = [
        torch.empty(24, 60).T.copy_(x),
        torch.empty(18, 40)[:, 3:27].copy_(w),
        torch.empty(24, 18).T.copy_(w),
    ]
    before = [t.clone() for t in (x, w, a, b)]
    for sx, sw in ((strided[0], strided[1]), (x, strided[2])):
        leaves = [sx.detach().requires_grad_(), sw, a.T.contiguous().T.requires_grad_(), b.requires_grad_()]
        y = lora_linear(leaves[0], leaves[1], None, leaves[2], leaves[3], 1.5, dropout_p=0.5)
        y.sum().backward()  # an upstream gradient of stride 0
        assert all(t.grad is not None and t.grad.isfinite().all() for t in (leaves[0], leaves[2], leaves[3]))
        b.grad = None
        assert torch.allclose(lora_linear(sx, sw, None, a, b, 1.5), want, atol=1e-5)
    expanded = x[:1].expand(60, 24)
    assert torch.allclose(lora_linear(expanded, w, None, a, b, 1.5), want[:1].expand(60, 18), atol=1e-5)
    assert all(torch.equal(p, q) for p, q in zip((x, w, a, b), before, strict=True)), (
        "inputs are not written to"
    )


def test_gradcheck() -> None:
    inputs = [t.requires_grad_() for t in tensors(5, 4, 3, 2, FP64)]
    seed = torch.tensor(3)
    assert torch.autograd.gradcheck(lambda *a: lora_linear(*a, 0.7), inputs)
    assert torch.autograd.gradcheck(lambda *a: lora_linear(*a, 0.7, dropout_p=0.4, seed=seed), inputs)
    y = torch.randn(5, 3, dtype=FP64, requires_grad=True)
    x, _, _, a, b = inputs
    assert torch.autograd.gradcheck(lambda y, x, a, b: lora_add(y * 1, x, a, b, 0.7), (y, x, a, b))


def test_checkpointing_makes_the_same_mask_again() -> None:
    inputs = tensors(80, 16, 12, 4)
    upstream = torch.randn(80, 12)

    def step(reentrant: bool | None) -> list[Tensor]:
        torch.manual_seed(4)
        leaves = [t.clone().requires_grad_() for t in inputs]

        def layer(*args: Tensor) -> Tensor:
            return lora_linear(*args, 2.0, dropout_p=0.5)

        y = layer(*leaves) if reentrant is None else checkpoint(layer, *leaves, use_reentrant=reentrant)
        y.backward(upstream)
        return [y.detach()] + [t.grad for t in leaves if t.grad is not None]

    want = step(None)
    for reentrant in (False, True):
        assert all(torch.equal(p, q) for p, q in zip(step(reentrant), want, strict=True))


@pytest.mark.parametrize("base", [FP32, BF16], ids=str)
@pytest.mark.parametrize("given", [FP32, BF16], ids=str)
def test_autocast(base: torch.dtype, given: torch.dtype) -> None:
    """As autocast does for the three linear layers; gradients come back in the dtypes of the parameters."""
    x, w, bias, a, b = tensors(90, 40, 24, 4)
    inputs = [x.to(given), w.to(base), bias.to(base), a, b]
    upstream = torch.randn(90, 24).to(BF16)
    true = run(lora_linear_reference, [t.double() for t in inputs], upstream, 2.0)
    with torch.autocast("cpu", BF16):
        plain = run(lora_linear_reference, inputs, upstream, 2.0)
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = lora_linear(*leaves, 2.0)
        assert y.dtype == BF16
    y.backward(upstream)
    assert [t.grad.dtype for t in leaves if t.grad is not None] == [t.dtype for t in inputs]
    ours = [y.detach().double()] + [t.grad.double() for t in leaves if t.grad is not None]
    for name, t, q, o in zip(NAMES, true, plain, ours, strict=True):
        assert (o - t).norm() <= 2 * (q - t).norm() + 4e-3 * t.abs().max() * t.numel() ** 0.5, name
    # the backward pass inside autocast is the same, and fp64 stays fp64
    again = [t.clone().requires_grad_() for t in inputs]
    with torch.autocast("cpu", BF16):
        lora_linear(*again, 2.0).backward(upstream)
        assert lora_linear(*(t.double() for t in inputs), 2.0).dtype == FP64
    for p, q in zip(again, leaves, strict=True):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_deterministic_and_twice_backward(p: float) -> None:
    inputs = [t.requires_grad_() for t in tensors(200, 33, 20, 4)]
    seed = torch.tensor(1)
    y = lora_linear(*inputs, 2.0, dropout_p=p, seed=seed)
    first = torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), inputs)
    again = lora_linear(*inputs, 2.0, dropout_p=p, seed=seed)
    assert torch.equal(y, again) and all(torch.equal(q, r) for q, r in zip(first, second, strict=True))
    with torch.no_grad():
        assert not lora_linear(*inputs, 2.0).requires_grad


def test_what_is_kept_for_the_backward_pass(way: str) -> None:
    """x, the parameters and T·R numbers; no mask, no dropped copy, nothing of size T·N."""
    inputs = [t.requires_grad_() for t in tensors(300, 40, 30, 4)]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda _: None):
        lora_linear(*inputs, 2.0, dropout_p=0.5)
    allowed = {300 * 40, 30 * 40, 4 * 40, 30 * 4, 300 * 4, 1}
    if way == "many rows":
        assert set(kept) <= allowed and kept.count(300 * 40) == 1


def test_lora_add_in_place_only_where_that_is_allowed(way: str) -> None:
    x, _, _, a, b = tensors(30, 12, 10, 3)
    want = 2.0 * x @ a.T @ b.T
    fresh = torch.zeros(30, 10)
    got = lora_add(fresh, x, a, b, 2.0)
    assert torch.allclose(got, want, atol=1e-5)
    if way == "many rows":
        assert got.data_ptr() == fresh.data_ptr()
    leaf = torch.zeros(30, 10, requires_grad=True)
    for y in (leaf, (leaf * 1).view(5, 6, 10), (leaf * 1).T.contiguous().T):
        leaf.grad = None
        got = lora_add(y, x.view(*y.shape[:-1], 12), a, b, 2.0)
        got.backward(torch.ones_like(got))
        assert torch.allclose(got.detach().reshape(30, 10), want, atol=1e-5) and (leaf == 0).all()
        assert leaf.grad is not None and (leaf.grad == 1).all()


class Quantised(torch.autograd.Function):
    """A base layer as bitsandbytes has it: a frozen product that ends in a view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return (x.view(-1, x.shape[-1]) @ weight.T).view(*x.shape[:-1], -1)


def test_lora_add_takes_a_view_made_without_a_graph(way: str) -> None:
    x, w, _, a, b = tensors(30, 12, 10, 3)
    a.requires_grad_()
    rows = x.view(5, 6, 12)
    got = lora_add(Quantised.apply(rows, w), rows, a, b, 2.0)
    got.sum().backward()
    want = x @ w.T + 2.0 * x @ a.T @ b.T
    assert torch.allclose(got.view(30, 10), want, atol=1e-5)
    assert a.grad is not None and torch.allclose(a.grad, 2.0 * b.sum(0)[:, None] * x.sum(0), atol=1e-4)


@pytest.mark.parametrize("dtypes", [(FP32, FP32, FP32), (BF16, BF16, FP32), (FP16, FP32, FP32)], ids=str)
def test_lora_add_gradients(dtypes: tuple[torch.dtype, ...]) -> None:
    kind_y, kind_x, low = dtypes
    x, w, _, a, b = tensors(150, 24, 18, 4)
    inputs = [torch.randn(150, 18).to(kind_y), x.to(kind_x), a.to(low), b.to(low)]
    upstream = torch.randn(150, 18).to(kind_y)
    got = [t.clone().requires_grad_() for t in inputs]
    want = [t.double().requires_grad_() for t in inputs]
    seed = torch.tensor(8)
    lora_add(got[0] * 1, got[1], got[2], got[3], 1.5, dropout_p=0.2, seed=seed).backward(upstream)
    keep = keep_mask(seed, 0, 150, 24, 0.2) / 0.8
    (want[0] + 1.5 * (want[1] * keep) @ want[2].T @ want[3].T).backward(upstream.double())
    for q, r in zip(got, want, strict=True):
        assert q.grad is not None and r.grad is not None and q.grad.dtype == q.dtype
        assert (q.grad.double() - r.grad).norm() <= 2 * FLOOR[q.dtype] * r.grad.norm() + 1e-6 * r.grad.norm()
