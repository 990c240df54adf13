"""adapter_block, layer_norm_linear and adapter against fp64, never worse than twice torch's own composition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from llm2clip_kernels import adapter, adapter_block, l2_normalize, native
from llm2clip_kernels.adapter import (
    adapter_block_reference,
    adapter_reference,
    head,
    layer_norm_linear,
    layer_norm_linear_reference,
    op,
    rows,
)
from llm2clip_kernels.dropout import keep_mask

FLOOR = {torch.float32: 4e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-14}
# rows, D, hidden: one of each, every side of a vector and of a block of rows, no powers of two, wide
SHAPES = [
    (1, 1, 1), (1, 8, 16), (2, 20, 7), (7, 96, 192), (63, 64, 65), (64, 65, 63), (65, 123, 246), (130, 40, 20),
    (5, 768, 96), (3, 96, 1280),
]  # fmt: skip
NAMES = ("x", "ln_weight", "ln_bias", "w1", "b1", "w2", "b2")


@pytest.fixture(params=["native", "chunked"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and not native.available():
        pytest.skip("the native library is not built")
    real = rows.backend.choose_rows

    def choose(device: torch.device, *dtypes: torch.dtype) -> str:
        return real(device, *dtypes) if torch.float64 in dtypes else request.param

    monkeypatch.setattr(rows.backend, "choose_rows", choose)
    return str(request.param)


def block(width: int, hidden: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """ln_weight, ln_bias, w1, b1, w2, b2 of a trained size, as leaves."""
    parameters = [
        1 + 0.3 * torch.randn(width),
        0.3 * torch.randn(width),
        torch.randn(hidden, width) * width**-0.5,
        0.3 * torch.randn(hidden),
        torch.randn(width, hidden) * hidden**-0.5,
        0.3 * torch.randn(width),
    ]
    return [p.to(dtype).requires_grad_() for p in parameters]


def run(
    function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor, **options: Any
) -> list[Tensor]:
    """The result and the gradients of all inputs under an upstream gradient that is not one, in fp64."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves, **options)
    gradients = torch.autograd.grad(y, leaves, upstream.to(y.dtype))
    assert all(g.dtype == t.dtype and g.shape == t.shape for g, t in zip(gradients, leaves, strict=True))
    return [t.detach().double() for t in (y, *gradients)]


def assert_as_good_as_torch(
    function: Any, reference: Any, inputs: list[Tensor], outputs: int, **options: Any
) -> None:
    upstream = torch.randn(*inputs[0].shape[:-1], outputs, dtype=torch.float64)
    true = run(reference, [t.double() for t in inputs], upstream, **options)
    torchs = run(reference, inputs, upstream, **options)
    ours = run(function, inputs, upstream, **options)
    for i, (t, p, o) in enumerate(zip(true, torchs, ours, strict=True)):
        # LayerNorm of a single number: a gradient of zero from terms of size 1 / sqrt(eps)
        least = 316.0 if inputs[0].shape[-1] == 1 else 1e-2
        noise = FLOOR[inputs[0].dtype] * t.abs().max().clamp_min(least) * t.numel() ** 0.5
        assert o.isfinite().all(), i
        assert (o - t).norm() <= 2 * (p - t).norm() + noise, (i, (o - t).norm(), (p - t).norm(), noise)


@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_accuracy(shape: tuple[int, int, int], dtype: torch.dtype, backend: str) -> None:
    n, width, hidden = shape
    inputs = [torch.randn(n, width).to(dtype), *block(width, hidden, dtype)]
    assert_as_good_as_torch(adapter_block, adapter_block_reference, inputs, width)


@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_head_accuracy(shape: tuple[int, int, int], dtype: torch.dtype, backend: str) -> None:
    n, width, out = shape
    inputs = [torch.randn(n, width).to(dtype), *block(width, out, dtype)[:4]]
    assert_as_good_as_torch(layer_norm_linear, layer_norm_linear_reference, inputs, out)


def test_gelu_is_the_erf_form_everywhere(backend: str) -> None:
    """Fine steps over the range where erf and tanh forms differ by 4e-4, and far tails, against fp64."""
    pre = torch.linspace(-20, 20, 40_001)[None]
    none, seed = torch.empty(0), torch.empty(0, dtype=torch.int64)
    out, gradient = torch.empty_like(pre), torch.ones_like(pre)
    rows.bias_gelu(pre, none, seed, 0.0, out)
    exact = pre.double().requires_grad_()
    F.gelu(exact).sum().backward()
    assert (out - F.gelu(exact)).abs().max() <= 2e-6
    again, _ = rows.bias_gelu_backward(pre, none, seed, 0.0, gradient, True, False)
    assert exact.grad is not None and (gradient - exact.grad).abs().max() <= 5e-7
    assert torch.equal(again, out)


@pytest.mark.parametrize(
    "left_out", [("ln_weight", "ln_bias"), ("b1",), ("b2",), ("ln_bias", "b1", "b2")], ids=str
)
def test_parameters_that_are_not_there(left_out: tuple[str, ...], backend: str) -> None:
    parameters = block(20, 37)
    given = [None if name in left_out else p for name, p in zip(NAMES[1:], parameters, strict=True)]
    there = [p for p in given if p is not None]
    x, upstream = torch.randn(9, 20, requires_grad=True), torch.randn(9, 20)
    got = torch.autograd.grad(adapter_block(x, *given), [x, *there], upstream)
    want = torch.autograd.grad(adapter_block_reference(x, *given), [x, *there], upstream)
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, atol=1e-5)


@pytest.mark.parametrize(
    "needed", [(n,) for n in NAMES] + [("x", "w1"), ("w1", "w2"), ("ln_bias", "b2")], ids=str
)
def test_nothing_is_computed_for_frozen_parameters(needed: tuple[str, ...], backend: str) -> None:
    inputs = dict(zip(NAMES, [torch.randn(9, 20), *block(20, 37)], strict=True))
    upstream = torch.randn(9, 20)
    full = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    wanted = torch.autograd.grad(adapter_block_reference(**full), list(full.values()), upstream)
    some = {name: t.detach().clone().requires_grad_(name in needed) for name, t in inputs.items()}
    y = adapter_block(**some)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y.backward(upstream)
    products = sum(event.count for event in profile.key_averages() if event.key == "aten::mm")
    for name, want in zip(NAMES, wanted, strict=True):
        got = some[name].grad
        assert (got is not None) == (name in needed), name
        assert got is None or torch.allclose(got, want, atol=1e-5), name
    before = {"x", "ln_weight", "ln_bias"} & set(needed)
    expected = bool(before | {"w1", "b1"} & set(needed)) + bool(before) + ("w1" in needed) + ("w2" in needed)
    assert products == expected


def saved_bytes(function: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes that a forward keeps for its backward, parameters not counted and every storage once."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    sizes: dict[int, int] = {}
    alive = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(t)  # a freed address would be counted with another tensor's
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    assert y.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saves_half_of_what_torch_saves(dtype: torch.dtype) -> None:
    x, parameters = torch.randn(33, 64, requires_grad=True).to(dtype), block(64, 128, dtype)
    ours = saved_bytes(lambda: adapter_block(x, *parameters), parameters)
    torchs = saved_bytes(lambda: adapter_block_reference(x, *parameters), parameters)
    assert ours == 33 * (64 + 128) * dtype.itemsize
    assert 2 * ours <= torchs
    with torch.no_grad():
        kept = op._forward(x, *parameters, None, 1e-5, 0.0, False)[1]
    assert kept.numel() == 0
    blocks, top = [block(64, 128, dtype) for _ in range(3)], block(64, 40, dtype)[:4]
    every = [p for part in (*blocks, top) for p in part]
    ours = saved_bytes(lambda: adapter(x, blocks, top), every)  # type: ignore[arg-type]
    assert 2 * ours <= saved_bytes(lambda: adapter_reference(x, blocks, top), every)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout(p: float, backend: str) -> None:
    """Equal, gradients too, to torch's composition with the mask that the seed stands for."""
    seed = torch.tensor([0x1234_5678_9ABC_DEF])
    x, parameters = torch.randn(70, 20), block(20, 37)
    keep = keep_mask(seed, 0, 70, 37, p)
    upstream = torch.randn(70, 20, dtype=torch.float64)
    ours = run(adapter_block, [x, *parameters], upstream, dropout_p=p, seed=seed)
    if p == 1:
        want = [x + parameters[-1].detach()]
        ours = ours[:1]
        assert not keep.any()
    else:
        want = run(adapter_block_reference, [x, *parameters], upstream, dropout_p=p, keep=keep)
        assert abs(keep.double().mean() - (1 - p)) < 4 * (p * (1 - p) / keep.numel()) ** 0.5
    for o, w in zip(ours, want, strict=True):
        assert torch.allclose(o, w.double(), atol=2e-5)


def test_dropout_masks_look_random_and_follow_the_generator() -> None:
    masks = torch.stack([keep_mask(torch.tensor([s]), 0, 400, 300, 0.5) for s in (1, 2, 1 << 40)]).double()
    signs = 2 * masks - 1
    assert signs.mean((1, 2)).abs().max() < 4 / (400 * 300) ** 0.5
    assert signs.mean(1).abs().max() < 5 / 400**0.5 and signs.mean(2).abs().max() < 5 / 300**0.5
    for shift in ((0, 1), (1, 0), (3, 5)):
        rolled = signs.roll(shift, (1, 2))
        assert (signs * rolled).mean((1, 2)).abs().max() < 4 / (400 * 300) ** 0.5
    assert (signs[0] * signs[1]).mean().abs() < 4 / (400 * 300) ** 0.5
    x, parameters = torch.randn(5, 20), block(20, 37)
    torch.manual_seed(3)
    first = adapter_block(x, *parameters, dropout_p=0.5)
    other = adapter_block(x, *parameters, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(adapter_block(x, *parameters, dropout_p=0.5), first)
    assert not torch.equal(first, other)


def test_backends_drop_the_same_elements() -> None:
    if not native.available():
        pytest.skip("the native library is not built")
    seed, ones = torch.tensor([987_654_321_987]), torch.full((130, 45), 5.0)
    out = torch.empty_like(ones)
    torch.ops.llm2clip_native.bias_gelu(ones, torch.empty(0), seed, 0.3, out)
    assert torch.equal(out != 0, keep_mask(seed, 0, 130, 45, 0.3))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_half_precision_under_an_fp32_stream(kind: torch.dtype, backend: str) -> None:
    """What autocast makes of it: the GEMMs round, LayerNorm, GELU and the residual stream do not."""
    x, parameters = torch.randn(30, 20), block(20, 37)
    upstream = torch.randn(30, 20, dtype=torch.float64)
    true = run(adapter_block_reference, [t.double() for t in (x, *parameters)], upstream)

    def with_autocast(function: Any, *inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=kind):
            return function(*inputs)

    torchs = run(lambda *t: with_autocast(adapter_block_reference, *t), [x, *parameters], upstream)
    ours = run(lambda *t: with_autocast(adapter_block, *t), [x, *parameters], upstream)
    for t, p, o in zip(true, torchs, ours, strict=True):
        assert (o - t).norm() <= 2 * (p - t).norm() + 4e-7 * t.norm()
    with torch.autocast("cpu", dtype=kind):
        y = adapter_block(x, *parameters)
        assert y.dtype == torch.float32
        assert layer_norm_linear(x, *parameters[:4]).dtype == kind
        # fp64 is left alone, as autocast leaves it
        wide = [t.double() for t in (x, *parameters)]
        assert adapter_block(*wide).dtype == torch.float64
    explicit = [p.to(kind) if p.dim() == 2 else p for p in parameters]
    assert torch.equal(adapter_block(x, *explicit), y)


@pytest.mark.parametrize("ends", [(True, False), (True, True), (False, False)], ids=str)
def test_the_whole_adapter(ends: tuple[bool, bool], backend: str) -> None:
    blocks, top = [block(20, 40) for _ in range(2)], block(20, 12)[:4]
    options = {"normalize_input": ends[0], "normalize_output": ends[1]}

    def flat(function: Any) -> Callable[..., Tensor]:
        return lambda x, *p: function(x, [p[0:6], p[6:12]], p[12:16], **options)

    inputs = [5 * torch.randn(30, 20), *blocks[0], *blocks[1], *top]
    assert_as_good_as_torch(flat(adapter), flat(adapter_reference), inputs, 12)
    features = adapter(inputs[0], blocks, top, dtype=torch.bfloat16, **options)  # type: ignore[arg-type]
    assert features.dtype == torch.bfloat16
    none = adapter(inputs[0], [], top)  # type: ignore[arg-type]
    want = layer_norm_linear_reference(l2_normalize(inputs[0]), *top)
    assert torch.allclose(none, want, atol=1e-5)


def test_gradcheck() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    parameters = block(4, 5, torch.float64)
    seed = torch.tensor([7])
    assert torch.autograd.gradcheck(adapter_block, (x, *parameters))
    dropped = lambda *t: adapter_block(*t, dropout_p=0.4, seed=seed)  # noqa: E731
    assert torch.autograd.gradcheck(dropped, (x, *parameters))
    assert torch.autograd.gradcheck(layer_norm_linear, (x, *parameters[:4]))


def test_opcheck() -> None:
    x, parameters = torch.randn(6, 20), [p.detach() for p in block(20, 37)]
    seed = torch.tensor([5])
    for leaves in ([x, *parameters], [t.clone().requires_grad_() for t in (x, *parameters)]):
        torch.library.opcheck(op._forward, (*leaves, None, 1e-5, 0.0, True))
        torch.library.opcheck(head._forward, (*leaves[:5], 1e-5))
    torch.library.opcheck(op._forward, (x, None, None, *parameters[2:], seed, 1e-5, 0.5, False))
    pre = x @ parameters[2].T
    for needs in (
        [True] * 7,
        [False] * 5 + [True] * 2,
        [False, True] + [False] * 5,
        [False] * 4 + [True] + [False] * 2,
    ):
        args = (x, x, pre, *parameters[:5], seed, 1e-5, 0.5, needs)
        torch.library.opcheck(op._backward, args)
    for needs in ([True] * 5, [False] * 3 + [True] * 2, [False, False, True, True, False]):
        torch.library.opcheck(head._backward, (x @ parameters[2].T, x, *parameters[:3], 1e-5, needs))


def test_compiles_without_breaks_and_without_recompiling() -> None:
    parameters, top = block(20, 37), block(20, 12)[:4]
    counter = CompileCounterWithBackend("aot_eager")

    def features(x: Tensor) -> Tensor:
        return adapter(x, [parameters], top, normalize_output=True)  # type: ignore[list-item, arg-type]

    compiled = torch.compile(features, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for n in (14, 17, 23):
        x = torch.randn(n, 20)
        upstream = torch.randn(n, 12)
        got = torch.autograd.grad(compiled(x), parameters + top, upstream)
        want = torch.autograd.grad(features(x), parameters + top, upstream)
        counts.append(counter.frame_count)
        for g, w in zip(got, want, strict=True):
            assert torch.allclose(g, w, atol=1e-5)
    assert counts[0] == counts[-1] > 0


def test_layouts_and_untouched_inputs(backend: str) -> None:
    x, parameters = torch.randn(6, 5, 20), block(20, 37)
    want = adapter_block_reference(x, *parameters)
    assert torch.allclose(adapter_block(x, *parameters), want, atol=1e-5)
    assert torch.allclose(adapter_block(x.transpose(0, 1), *parameters), want.transpose(0, 1), atol=1e-5)
    wide = torch.randn(7, 50)[:, 3:23]
    strided = [p.detach().t().contiguous().t() if p.dim() == 2 else p.detach() for p in parameters]
    assert torch.allclose(adapter_block(wide, *strided), adapter_block_reference(wide, *strided), atol=1e-5)
    leaf = torch.randn(20, requires_grad=True)
    (got,) = torch.autograd.grad(adapter_block(leaf.expand(4, 20), *parameters).sum(), leaf)
    (wanted,) = torch.autograd.grad(adapter_block_reference(leaf.expand(4, 20), *parameters).sum(), leaf)
    assert torch.allclose(got, wanted, atol=1e-4)
    before = [t.detach().clone() for t in (x, *parameters)]
    adapter_block(x.requires_grad_(), *parameters).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *parameters), strict=True))
    assert adapter_block(torch.empty(0, 20), *parameters).shape == (0, 20)


def test_deterministic_whatever_the_number_of_threads() -> None:
    x, parameters = torch.randn(300, 40), block(40, 64)
    pre = torch.randn(300, 64)

    def sweeps() -> list[Tensor]:
        gradient, dh = pre.clone(), x.clone()
        none, seed = torch.empty(0), torch.tensor([3])
        _, db1 = rows.bias_gelu_backward(pre, parameters[3].detach(), seed, 0.2, gradient, True, True)
        sums = rows.layer_norm_backward(x, parameters[0].detach(), none, 1e-5, dh, x, True, *[True] * 4)
        return [gradient, db1, dh, *sums]

    threads = torch.get_num_threads()
    first = sweeps()
    try:
        torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(first, sweeps(), strict=True))
    finally:
        torch.set_num_threads(threads)
    leaves = [x.requires_grad_(), *parameters]
    runs = [torch.autograd.grad(adapter_block(*leaves).square().sum(), leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_bad_values_stay_in_their_row(backend: str) -> None:
    x, parameters = torch.randn(70, 20), block(20, 37)
    x[3, 4], x[66, 0] = float("nan"), float("inf")
    leaf = x.requires_grad_()
    y = adapter_block(leaf, *parameters)
    bad = y.isnan().any(1)
    assert bad.nonzero().flatten().tolist() == [3, 66]
    y[~bad].sum().backward()
    assert leaf.grad is not None and leaf.grad[~bad].isfinite().all()


def test_constant_and_zero_rows(backend: str) -> None:
    """LayerNorm of a constant row divides by sqrt(eps)."""
    x = torch.cat([torch.zeros(1, 20), torch.full((1, 20), 3.0), 1e-4 * torch.randn(2, 20)])
    assert_as_good_as_torch(adapter_block, adapter_block_reference, [x, *block(20, 37)], 20)


X = torch.ones(3, 4)
P = [torch.ones(4), torch.ones(4), torch.ones(6, 4), torch.ones(6), torch.ones(4, 6), torch.ones(4)]


def swapped(**changes: Any) -> list[Any]:
    return [changes.get(name, value) for name, value in zip(NAMES, [X, *P], strict=True)]


BAD: list[tuple[list[Any], dict[str, Any], type[Exception], str]] = [
    (swapped(x=X.numpy()), {}, TypeError, "x must be a tensor"),
    (swapped(x=torch.ones(3, 5)), {}, ValueError, r"x must be \(..., 4\)"),
    (swapped(x=X.int()), {}, TypeError, "x must be fp32"),
    (swapped(x=torch.tensor(1.0)), {}, ValueError, "D >= 1"),
    (swapped(w1=torch.ones(6)), {}, ValueError, "w1 must be a matrix"),
    (swapped(w2=torch.ones(6, 4)), {}, ValueError, r"w2 must be \(4, 6\)"),
    (swapped(w2=P[4].double()), {}, TypeError, "one dtype"),
    (swapped(x=X.bfloat16()), {}, TypeError, "half precision under an fp32 x"),
    (swapped(b1=torch.ones(4)), {}, ValueError, r"b1 must be \(6,\)"),
    (swapped(ln_weight=torch.ones(1, 4)), {}, ValueError, r"ln_weight must be \(4,\)"),
    (swapped(b2=torch.ones(4, device="meta")), {}, ValueError, "b2 must be on the device"),
    (swapped(), {"dropout_p": 1.5}, ValueError, r"\[0, 1\]"),
    (swapped(), {"dropout_p": 0.5, "seed": torch.ones(2)}, ValueError, "one int64"),
]


@pytest.mark.parametrize(("inputs", "options", "error", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_input(inputs: list[Any], options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        adapter_block(*inputs, **options)


def test_bad_input_of_the_head() -> None:
    with pytest.raises(ValueError, match=r"x must be \(..., 4\)"):
        layer_norm_linear(torch.ones(3, 5), *P[:4])
    with pytest.raises(ValueError, match="weight must be a matrix"):
        layer_norm_linear(X, *P[:2], torch.ones(4), None)
    with pytest.raises(ValueError, match=r"bias must be \(6,\)"):
        layer_norm_linear(X, *P[:3], torch.ones(4))
