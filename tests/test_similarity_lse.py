"""similarity_lse against fp64, never worse than twice plain torch's own error in the same dtype."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

from llm2clip_kernels import native, similarity_lse, stripes
from llm2clip_kernels.similarity_lse import chunked, similarity_lse_reference, similarity_lse_with_positives
from llm2clip_kernels.similarity_lse import op as op_module

ROOT = Path(__file__).resolve().parents[1]
NO_GROUPS = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)

# one pair, D = 1, ragged on every side of a vector and a row block, more than one CPU tile, D no power of two
SHAPES = [
    (1, 1, 8), (2, 2, 1), (7, 5, 20), (63, 65, 96), (64, 64, 512), (65, 130, 7),
    (252, 507, 123), (70, 1100, 16), (1030, 40, 24), (33, 33, 1280),
]  # fmt: skip
# results below this are rounding noise of a result near zero, in units of the largest magnitude
FLOOR = {torch.float32: 4e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-14}


def features(rows: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1).to(dtype)


def run(function: Any, x: Tensor, y: Tensor, scale: float, weights: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Log-sum-exps and gradients of x, y, scale under upstream gradients that are not one, all in fp64."""
    x, y = (t.detach().clone().requires_grad_() for t in (x, y))
    factor = torch.tensor(scale, dtype=torch.promote_types(x.dtype, torch.float32)).requires_grad_()
    if function is similarity_lse_reference and x.dtype in (torch.bfloat16, torch.float16):
        row, col = function(x, y, factor.to(x.dtype))
    else:
        row, col = function(x, y, factor)
    ((row * weights[0].to(row.dtype)).sum() + (col * weights[1].to(col.dtype)).sum()).backward()
    assert x.grad is not None and y.grad is not None and factor.grad is not None
    return [t.detach().double() for t in (row, col, x.grad, y.grad, factor.grad)]


def assert_as_good_as_torch(x: Tensor, y: Tensor, scale: float, **options: Any) -> None:
    weights = torch.randn(x.shape[0], dtype=torch.float64), torch.randn(y.shape[0], dtype=torch.float64)
    true = run(similarity_lse_reference, x.double(), y.double(), scale, weights)
    plain = run(similarity_lse_reference, x, y, scale, weights)
    ours = run(lambda *a: similarity_lse(*a, **options), x, y, scale, weights)
    for name, t, p, o in zip(("row", "col", "dx", "dy", "dscale"), true, plain, ours, strict=True):
        size = t.abs().max().clamp_min(1.0 if name in ("row", "col") else 1e-6)
        if name == "dscale":
            # a sum of M·N terms of both signs: its rounding is that of the terms, not of their sum
            size = size + (weights[0].abs().sum() + weights[1].abs().sum())
        limit = 2 * (p - t).norm() + FLOOR[x.dtype] * size * t.numel() ** 0.5
        assert o.isfinite().all(), name
        assert (o - t).norm() <= limit, (name, (o - t).norm(), limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, d = shape
    assert_as_good_as_torch(features(m, d, dtype), features(n, d, dtype), 20.0)


@pytest.mark.parametrize("method", ["recompute", "cached"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 14.3, 100.0, 1e4, -30.0])
def test_scales(scale: float, method: str) -> None:
    x = features(90, 32)
    # correlated positives, as in a trained model, and a duplicate
    y = F.normalize(x + 0.5 * features(90, 32), dim=1)
    y[7] = y[3]
    assert_as_good_as_torch(x, y, scale, method=method)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_small_batches_in_plain_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the limit the op is not called at all, over it it is; the results are the same."""
    monkeypatch.setattr(op_module, "_SMALL_PAIRS", 9 * 12)
    x, y = features(9, 16, dtype), features(12, 16, dtype)
    assert_as_good_as_torch(x, y, 20.0)
    want = similarity_lse(x, y, 20.0, method="recompute")
    called: list[int] = []
    real = op_module._forward
    monkeypatch.setattr(op_module, "_forward", lambda *a: (called.append(1), real(*a))[1])
    got = similarity_lse(x, y, 20.0)
    assert not called and all(torch.allclose(g, w, atol=1e-5) for g, w in zip(got, want, strict=True))
    similarity_lse(x, features(13, 16, dtype), 20.0)
    similarity_lse(x, y, 20.0, method="recompute")
    assert len(called) == 2


@pytest.mark.parametrize("kind", ["native", "chunked", "plain"])
def test_autocast_takes_no_bits_on_the_cpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_module, "_SMALL_PAIRS", 2**30 if kind == "plain" else 0)
    if kind == "chunked":
        monkeypatch.setattr(op_module.backend, "choose", lambda *_: "chunked")
    weights = torch.randn(20, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    x, y = features(20, 8), features(30, 8)
    want = run(similarity_lse, x, y, 20.0, weights)

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def under_autocast(*args: Any) -> Any:
        return similarity_lse(*args)

    got = run(under_autocast, x, y, 20.0, weights)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["recompute", "cached"])
@pytest.mark.parametrize("scale", [20.0, 1e4])
def test_tiles_shared_among_threads(scale: float, method: str, three_threads: None) -> None:
    """Several workers and several stripes, by the static shift and by running maxima."""
    x, y = features(1050, 8), features(900, 8)
    assert_as_good_as_torch(x, y, scale, method=method)
    assert_as_good_as_torch(x[:40], y, scale, method=method)
    # fewer columns than one tile for each: one worker, whose blocks the threads share
    assert_as_good_as_torch(x, y[:30], scale, method=method)


@pytest.mark.parametrize("method", ["recompute", "cached"])
def test_inputs_of_any_norm(method: str) -> None:
    x, y = 30 * torch.randn(50, 16), torch.randn(60, 16)
    x[4] = 0
    y[5] = 0
    assert_as_good_as_torch(x, y, 3.0, method=method)
    assert_as_good_as_torch(torch.zeros(4, 8), torch.zeros(3, 8), 5.0, method=method)


def test_sums_that_underflow_take_the_online_path() -> None:
    """All cosines near -1 at scale 200: exp(S - 130) is zero in fp32, only true maxima help."""
    base = features(1, 16)
    x, y = base.repeat(40, 1), -F.normalize(base + 0.01 * torch.randn(30, 16), dim=1)
    assert_as_good_as_torch(x, y, 200.0)


def test_the_chunked_path_and_its_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stripes, "STRIPE_BYTES", 4)
    monkeypatch.setattr(op_module.backend, "choose", lambda *_: "chunked")
    for dtype in (torch.float32, torch.bfloat16):
        assert_as_good_as_torch(features(300, 20, dtype), features(70, 20, dtype), 20.0)


@pytest.mark.parametrize("diagonal", [0, 3])
def test_positives(diagonal: int) -> None:
    x, y = features(6, 5, torch.float64), features(9, 5, torch.float64)
    scale = torch.tensor(4.0, dtype=torch.float64)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        inputs = [t.detach().clone().to(dtype).requires_grad_() for t in (x, y, scale)]
        row, col, pos, _ = similarity_lse_with_positives(*inputs, diagonal=diagonal)  # type: ignore[arg-type]
        assert col is not None and pos is not None
        (row.sum() + 2 * col.sum() - 3 * (pos * torch.arange(6)).sum()).backward()
        wanted = [t.detach().clone().requires_grad_() for t in (x, y, scale)]
        logits = wanted[2] * wanted[0] @ wanted[1].T
        diag = logits[torch.arange(6), torch.arange(6) + diagonal]
        loss = logits.logsumexp(1).sum() + 2 * logits.logsumexp(0).sum() - 3 * (diag * torch.arange(6)).sum()
        loss.backward()
        assert torch.allclose(pos.double(), diag, atol=limit)
        for got, want in zip(inputs, wanted, strict=True):
            assert torch.allclose(got.grad.double(), want.grad, atol=10 * limit)  # type: ignore[union-attr]


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)], ids=str)
@pytest.mark.parametrize("method", ["recompute", "cached"])
def test_only_what_is_needed(
    needs: tuple[int, int, int], method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [features(20, 6), features(30, 6), torch.tensor([9.0])]
    full = [t.clone().requires_grad_() for t in inputs]
    row, col = similarity_lse(full[0], full[1], full[2], method="recompute")
    (row.sum() + col.sum()).backward()
    some = [t.clone().requires_grad_(bool(need)) for t, need in zip(inputs, needs, strict=True)]
    asked: list[tuple[bool, ...]] = []
    real = torch.ops.llm2clip_kernels.similarity_lse_backward

    def spy(*args: Any) -> Any:
        asked.append(tuple(args[-3:]))
        return real(*args)

    monkeypatch.setattr(torch.ops.llm2clip_kernels, "similarity_lse_backward", spy)
    row, col = similarity_lse(some[0], some[1], some[2], method=method)
    (row.sum() + col.sum()).backward()
    assert asked == [tuple(map(bool, needs))]
    for got, want, need in zip(some, full, needs, strict=True):
        assert (got.grad is not None) == bool(need)
        if need:
            assert got.grad is not None and want.grad is not None
            assert torch.allclose(got.grad, want.grad, rtol=1e-5, atol=1e-5)


def test_one_direction_and_one_result() -> None:
    x, y = features(20, 6).requires_grad_(), features(30, 6).requires_grad_()
    row, none = similarity_lse(x, y, 5.0, directions="rows")
    assert none is None
    row.sum().backward()
    rows_only = x.grad
    x.grad = y.grad = None
    both = similarity_lse(x, y, 5.0)
    assert torch.equal(both[0], row)
    both[0].sum().backward()
    assert rows_only is not None and x.grad is not None and torch.equal(x.grad, rows_only)
    x.grad = None
    similarity_lse(x, y, 5.0)[1].sum().backward()
    a = x.detach().double().requires_grad_()
    (5 * a @ y.detach().double().T).logsumexp(0).sum().backward()
    assert a.grad is not None and torch.allclose(x.grad.double(), a.grad, atol=1e-6)


def test_gradcheck() -> None:
    inputs = [features(4, 3, torch.float64), features(5, 3, torch.float64), torch.tensor(2.0).double()]
    for t in inputs:
        t.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y, s: similarity_lse(x, y, s), inputs)
    assert torch.autograd.gradcheck(
        lambda x, y, s: similarity_lse_with_positives(x, y, s, diagonal=1)[:3], inputs
    )


@pytest.mark.parametrize("cached", [False, True])
def test_opcheck(cached: bool) -> None:
    x, y, scale = features(6, 4), features(9, 4), torch.tensor(3.0)
    for needs in (True, False):
        inputs = [t.clone().requires_grad_(needs) for t in (x, y, scale)]
        torch.library.opcheck(op_module._forward, (*inputs, True, 2, cached, *NO_GROUPS))
    torch.library.opcheck(op_module._forward, (x.requires_grad_(), y, scale, False, -1, False, *NO_GROUPS))
    row, col, pos, low, cache = op_module._forward(x.detach(), y, scale, True, 2, cached, *NO_GROUPS)
    args = (row * 0 + 1, col * 0 + 1, pos * 0 + 1, x.detach(), y, scale, row, col, low, cache, 2, *NO_GROUPS)
    torch.library.opcheck(op_module._backward, (*args, True, True, True))
    torch.library.opcheck(op_module._backward, (*args, False, True, False))


def test_compiles_without_breaks_and_without_recompiling() -> None:
    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        row, col = similarity_lse(F.normalize(x, dim=1), F.normalize(y, dim=1), scale.exp())
        return row.mean() + col.mean()

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for rows in (12, 17, 23):
        inputs = [torch.randn(rows, 8), torch.randn(rows + 3, 8), torch.tensor(1.0)]
        a = [t.clone().requires_grad_() for t in inputs]
        b = [t.clone().requires_grad_() for t in inputs]
        compiled(*a).backward()
        loss(*b).backward()
        for p, q in zip(a, b, strict=True):
            assert p.grad is not None and q.grad is not None and torch.allclose(p.grad, q.grad, atol=1e-6)
    assert counter.frame_count == 1


def test_layouts_and_untouched_inputs() -> None:
    x, y = features(24, 10), features(31, 10)
    want = similarity_lse(x, y, 7.0)
    strided = torch.empty(10, 24).T.copy_(x), torch.empty(31, 25)[:, 3:13].copy_(y)
    got = similarity_lse(*strided, 7.0)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    expanded = x[:1].expand(24, 10).requires_grad_()
    row, _ = similarity_lse(expanded, y, 7.0)
    row.sum().backward()
    assert torch.allclose(row, want[0][:1].expand(24), atol=1e-6)
    before = x.clone()
    similarity_lse(x, y, torch.tensor([7.0]))
    assert torch.equal(x, before)


def test_kinds_of_scale() -> None:
    x, y = features(5, 4), features(6, 4)
    want = similarity_lse(x, y, 3.0)[0]
    for scale in (3, torch.tensor(3.0), torch.tensor([3.0]), torch.tensor([[3]]), torch.tensor(3.0).double()):
        assert torch.equal(similarity_lse(x, y, scale)[0], want)
    scale = torch.tensor([3.0], dtype=torch.float16, requires_grad=True)
    similarity_lse(x, y, scale)[0].sum().backward()
    assert scale.grad is not None and scale.grad.shape == (1,) and scale.grad.dtype == torch.float16


@pytest.mark.parametrize("method", ["recompute", "cached"])
def test_deterministic(method: Any) -> None:
    x, y = features(300, 33), features(1100, 33)

    def once() -> list[Tensor]:
        a, b, s = (t.clone().requires_grad_() for t in (x, y, torch.tensor(20.0)))
        row, col = similarity_lse(a, b, s, method=method)
        (row.sum() + col.mean()).backward()
        assert a.grad is not None and b.grad is not None and s.grad is not None
        return [row, col, a.grad, b.grad, s.grad]

    first = once()
    for _ in range(2):
        assert all(torch.equal(p, q) for p, q in zip(first, once(), strict=True))


def test_bad_values_stay_where_the_maths_puts_them() -> None:
    x, y = features(9, 4), features(7, 4)
    x[2, 1] = float("nan")
    x[5] = float("inf")
    row, col = similarity_lse(x, y, 10.0)
    wanted_row, wanted_col = similarity_lse_reference(x.double(), y.double(), 10.0)
    clean = [i for i in range(9) if i not in (2, 5)]
    assert row[clean].isfinite().all() and torch.allclose(row[clean].double(), wanted_row[clean], atol=1e-5)
    assert torch.equal(row.isnan(), wanted_row.isnan()) and torch.equal(col.isnan(), wanted_col.isnan())
    good = features(9, 4)
    good[3] = torch.tensor([float("nan"), 0, 0, 0])
    a, b = good.requires_grad_(), y.clone().requires_grad_()
    similarity_lse(a, b, 10.0)[0][:3].sum().backward()
    assert a.grad is not None and a.grad[:3].isfinite().all()


def test_second_backward_and_no_grad() -> None:
    x, y = features(8, 4).requires_grad_(), features(8, 4)
    row, col = similarity_lse(x, y, 5.0, method="cached")
    (first,) = torch.autograd.grad(row.sum() + col.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(row.sum() + col.sum(), x)
    assert torch.equal(first, second)
    with torch.no_grad():
        assert not similarity_lse(x, y, 5.0)[0].requires_grad


X, Y = torch.ones(3, 4), torch.ones(5, 4)
BAD: list[tuple[Any, type[Exception], str]] = [
    ((X[0], Y, 1.0), ValueError, "2-D"),
    ((X, torch.ones(5, 6), 1.0), ValueError, "one D"),
    ((X, Y.half(), 1.0), TypeError, "one dtype"),
    ((X.int(), Y.int(), 1.0), TypeError, "int32"),
    ((X, Y.to("meta"), 1.0), ValueError, "one device"),
    ((X[:0], Y, 1.0), ValueError, "empty"),
    ((X, Y[:, :0], 1.0), ValueError, "one D"),
    ((X[:, :0], Y[:, :0], 1.0), ValueError, "empty"),
    ((X, Y, torch.ones(2)), ValueError, "1-element"),
    ((X, Y, "20"), TypeError, "number"),
    ((X.numpy(), Y, 1.0), TypeError, "tensor"),
]


@pytest.mark.parametrize(("args", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input(args: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        similarity_lse(*args)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="directions"):
        similarity_lse(X, Y, 1.0, directions="columns")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="method"):
        similarity_lse(X, Y, 1.0, method="fast")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="rows without a positive"):
        similarity_lse_with_positives(X, Y, 1.0, diagonal=3)


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
def test_native_variants_of_the_processor_agree() -> None:
    """What this processor chose against the chunked path on a shape with every tail."""
    x, y = features(67, 19), features(131, 19)
    want = chunked.forward(x.double(), y.double(), torch.tensor(11.0).double(), True, -1, *NO_GROUPS)
    got = torch.ops.llm2clip_native.similarity_lse_forward(
        x, y, 11.0, True, -1, torch.empty(0), *NO_GROUPS, 50
    )
    assert torch.allclose(got[0].double(), want[0], atol=2e-6)
    assert torch.allclose(got[1].double(), want[1], atol=2e-6)
    slabs = torch.rand(7, 40)
    flag = torch.zeros(1, dtype=torch.int32)
    lse = torch.ops.llm2clip_native.lse_from_slabs(slabs, torch.tensor([3.0]), flag)
    assert torch.allclose(lse, slabs.sum(0).log() + 3, atol=1e-6) and flag.item() == 0
    torch.ops.llm2clip_native.lse_from_slabs(slabs * 1e-30, torch.tensor([3.0]), flag)
    assert flag.item() == 1


def test_serves_without_the_native_library() -> None:
    code = (
        "import torch, warnings; warnings.simplefilter('error')\n"
        "from llm2clip_kernels import similarity_lse, build_info\n"
        "info = build_info(); assert not info['native']['loaded'], info\n"
        "assert info['backends']['similarity_lse']['cpu float32'] == 'chunked'\n"
        "x = torch.eye(4); r, c = similarity_lse(x, x, 2.0)\n"
        "assert torch.allclose(r, (2 * x).logsumexp(1)) and torch.allclose(c, r)\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "LLM2CLIP_DISABLE_NATIVE": "1"}
    env["LLM2CLIP_REQUIRE_NATIVE"] = "0"  # which the tests under sanitizers set
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, "-c", "from llm2clip_kernels import native; native.load()"],
        env=env | {"LLM2CLIP_REQUIRE_NATIVE": "1"}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode != 0 and "LLM2CLIP_REQUIRE_NATIVE=1" in done.stderr
