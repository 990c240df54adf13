"""l2_normalize against fp64, never worse than twice torch.nn.functional.normalize in the same dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from llm2clip_kernels import l2_normalize, native
from llm2clip_kernels.l2_normalize import l2_normalize_reference
from llm2clip_kernels.l2_normalize import op as op_module

# one element, D = 1, every side of a vector and of a block of rows, D no power of two
SHAPES = [(1, 1), (1, 8), (2, 20), (7, 96), (63, 65), (64, 64), (65, 123), (252, 507), (3, 768), (5, 1280)]
FLOOR = {torch.float32: 4e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-14}
BACKENDS = ["native", "chunked"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Serves fp32 and half precision by one implementation after the other; fp64 is always plain torch."""
    if request.param == "native" and not native.available():
        pytest.skip("the native library is not built")
    real = op_module.backend.choose_rows

    def choose(device: torch.device, *dtypes: torch.dtype) -> str:
        return real(device, *dtypes) if torch.float64 in dtypes else request.param

    monkeypatch.setattr(op_module.backend, "choose_rows", choose)
    return str(request.param)


def run(function: Any, x: Tensor, weights: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The result and the gradient of x under an upstream gradient that is not one, in fp64."""
    x = x.detach().clone().requires_grad_()
    y = function(x, **options)
    y.backward(weights.to(y.dtype))
    assert x.grad is not None and x.grad.dtype == x.dtype
    return y.detach().double(), x.grad.double()


def assert_as_good_as_torch(x: Tensor, **options: Any) -> None:
    weights = torch.randn(x.shape, dtype=torch.float64)
    true = run(l2_normalize_reference, x.double(), weights)
    plain = run(l2_normalize_reference, x, weights, **options)
    ours = run(l2_normalize, x, weights, **options)
    for name, t, p, o in zip(("y", "dx"), true, plain, ours, strict=True):
        noise = max(FLOOR[x.dtype], FLOOR[options.get("dtype") or x.dtype])
        # the gradient of a direction is a difference of terms of this size
        size = t.abs().max() if name == "y" else (weights / x.double().norm(dim=-1, keepdim=True)).abs().max()
        assert o.isfinite().all(), name
        assert (o - t).norm() <= 2 * (p - t).norm() + noise * size * t.numel() ** 0.5, name


@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    assert_as_good_as_torch(3 * torch.randn(shape).to(dtype))


@pytest.mark.parametrize("to", list(FLOOR), ids=str)
@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
def test_casts_in_the_same_pass(dtype: torch.dtype, to: torch.dtype, backend: str) -> None:
    x = torch.randn(9, 37).to(dtype)
    assert l2_normalize(x, dtype=to).dtype == to
    assert_as_good_as_torch(x, dtype=to)


def test_a_cast_does_not_cost_the_gradient_its_precision(backend: str) -> None:
    """fp32 in, bf16 out: what is saved must be x, not the rounded y."""
    x, weights = torch.randn(20, 64), torch.randn(20, 64).bfloat16().double()
    _, true = run(l2_normalize, x.double(), weights)
    _, ours = run(l2_normalize, x, weights, dtype=torch.bfloat16)
    assert (ours - true).norm() <= 1e-6 * true.norm()


@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_short_rows_and_their_gradient(eps: float, backend: str) -> None:
    """Rows below eps are divided by eps, and their norm has no gradient, as in torch."""
    x = torch.randn(6, 20)
    x[1] = 0
    x[3] *= 1e-3
    weights = torch.randn(6, 20, dtype=torch.float64)
    true = run(l2_normalize_reference, x.double(), weights, eps=eps)
    ours = run(l2_normalize, x, weights, eps=eps)
    for t, o in zip(true, ours, strict=True):
        assert torch.allclose(o, t, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours[0][1], torch.zeros(20).double())


def test_a_zero_row_of_half_precision_is_zero(backend: str) -> None:
    """In fp16 the default eps underflows: torch gives NaN, we compute in fp32."""
    x = torch.zeros(2, 8, dtype=torch.float16)
    assert torch.equal(l2_normalize(x), x)


def test_bad_values_stay_in_their_row(backend: str) -> None:
    x = torch.randn(5, 20)
    x[1, 2] = float("nan")
    x[3, 4] = float("inf")
    ours, torchs = l2_normalize(x), F.normalize(x, dim=1)
    assert torch.equal(ours.isnan(), torchs.isnan())
    assert torch.allclose(ours.nan_to_num(7.0), torchs.nan_to_num(7.0), atol=1e-6)
    leaf = x.clone().requires_grad_()
    l2_normalize(leaf)[[0, 2, 4]].sum().backward()
    assert leaf.grad is not None and leaf.grad[[0, 2, 4]].isfinite().all()


def test_any_number_of_dimensions_and_strides(backend: str) -> None:
    x = torch.randn(4, 5, 18)
    want = F.normalize(x, dim=-1)
    assert torch.allclose(l2_normalize(x), want, atol=1e-6)
    assert torch.allclose(l2_normalize(x.transpose(0, 1)), want.transpose(0, 1), atol=1e-6)
    assert torch.allclose(l2_normalize(x[:, 1:4, 2:9]), F.normalize(x[:, 1:4, 2:9], dim=-1), atol=1e-6)
    assert torch.allclose(l2_normalize(x[0, 0]), want[0, 0], atol=1e-6)
    row = x[:1, :1].expand(4, 5, 18)
    leaf = x[0, 0].clone().requires_grad_()
    l2_normalize(leaf.expand(4, 5, 18)).sum().backward()
    other = x[0, 0].clone().requires_grad_()
    F.normalize(other.expand(4, 5, 18), dim=-1).sum().backward()
    assert torch.allclose(l2_normalize(row), F.normalize(row, dim=-1), atol=1e-6)
    assert leaf.grad is not None and other.grad is not None
    assert torch.allclose(leaf.grad, other.grad, atol=1e-5)
    before = x.clone()
    l2_normalize(x)
    assert torch.equal(x, before)
    assert l2_normalize(torch.empty(0, 7)).shape == (0, 7)


def test_gradcheck() -> None:
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: l2_normalize(t), x)
    assert torch.autograd.gradcheck(lambda t: l2_normalize(t, eps=100.0), x)


def test_opcheck() -> None:
    x = torch.randn(6, 20)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(op_module._forward, (x.clone().requires_grad_(), dtype, 1e-12))
        torch.library.opcheck(op_module._forward, (x, dtype, 1e-12))
    y, norm = op_module._forward(x, torch.float32, 1e-12)
    torch.library.opcheck(op_module._backward, (x, y, norm, 1e-12, True, torch.float32))
    torch.library.opcheck(op_module._backward, (x.bfloat16(), x, norm, 1e-12, False, torch.float32))


def test_compiles_without_breaks_and_without_recompiling() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda t: l2_normalize(2 * t, dtype=torch.bfloat16).float().sum(0),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    compiled_after_first = 0
    for rows in (12, 17, 23):
        x = torch.randn(rows, 20, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        compiled(x).square().sum().backward()
        l2_normalize(2 * y, dtype=torch.bfloat16).float().sum(0).square().sum().backward()
        assert x.grad is not None and y.grad is not None and torch.allclose(x.grad, y.grad, atol=1e-6)
        # torch may trace twice at first, to make a constant of eps
        compiled_after_first = compiled_after_first or counter.frame_count
    assert counter.frame_count == compiled_after_first > 0


def test_deterministic_whatever_the_number_of_threads() -> None:
    x = torch.randn(700, 123)
    threads = torch.get_num_threads()
    first = l2_normalize(x)
    try:
        torch.set_num_threads(2)
        assert torch.equal(l2_normalize(x), first)
    finally:
        torch.set_num_threads(threads)


def test_autocast_changes_nothing() -> None:
    x = torch.randn(3, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert l2_normalize(x).dtype == torch.float32
        assert torch.equal(l2_normalize(x), l2_normalize(x))
        assert l2_normalize(x.bfloat16()).dtype == torch.bfloat16


def test_no_gradient_where_none_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 20)
    assert not l2_normalize(x).requires_grad
    with torch.no_grad():
        assert not l2_normalize(x.requires_grad_()).requires_grad


X = torch.ones(3, 4)
BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ((X.numpy(),), {}, TypeError, "tensor"),
    ((X.int(),), {}, TypeError, "x must be fp32"),
    ((X,), {"dtype": torch.int8}, TypeError, "dtype must be fp32"),
    ((X[0, 0],), {}, ValueError, "last dimension"),
    ((X,), {"eps": 0.0}, ValueError, "greater than 0"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_input(args: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        l2_normalize(*args, **options)
