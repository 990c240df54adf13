"""segment_mean against fp64, one sequence after another, never worse than twice torch's mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from llm2clip_kernels import native, segment_mean
from llm2clip_kernels.segment_mean import op as op_module
from llm2clip_kernels.segment_mean import segment_mean_reference

FLOOR = {torch.float32: 4e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-14}
# lengths around the chunks of the kernels, and a long one
LENGTHS = [[1], [2, 1, 7], [3, 4, 5, 31, 32, 33, 1], [63, 64, 65], [500, 3, 129]]
WIDTHS = [1, 20, 96, 123]


@pytest.fixture(params=["native", "chunked"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and not native.available():
        pytest.skip("the native library is not built")
    real = op_module.backend.choose_rows

    def choose(device: torch.device, *dtypes: torch.dtype) -> str:
        return real(device, *dtypes) if torch.float64 in dtypes else request.param

    monkeypatch.setattr(op_module.backend, "choose_rows", choose)
    return str(request.param)


def pack(lengths: list[int], width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (T, width), cu_seqlens, and a span that leaves the head out and now and then the tail."""
    edges = torch.tensor([0, *lengths]).cumsum(0)
    spans = torch.tensor([[n // 3, n - (n > 4) * (i % 2)] for i, n in enumerate(lengths)])
    return (torch.randn(sum(lengths), width) + 0.1).to(dtype), edges, spans


def run(function: Any, hidden: Tensor, weights: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    hidden = hidden.detach().clone().requires_grad_()
    mean = function(hidden, *args, **options)
    mean.backward(weights.to(mean.dtype))
    assert hidden.grad is not None and hidden.grad.dtype == hidden.dtype
    return mean.detach().double(), hidden.grad.double()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("spanned", [False, True])
@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_accuracy(
    lengths: list[int], dtype: torch.dtype, spanned: bool, normalize: bool, backend: str
) -> None:
    for width in WIDTHS:
        hidden, edges, spans = pack(lengths, width, dtype)
        weights = torch.randn(len(lengths), width, dtype=torch.float64)
        options: dict[str, Any] = {"spans": spans if spanned else None, "normalize": normalize}
        true = run(segment_mean_reference, hidden.double(), weights, edges, **options)
        plain = run(segment_mean_reference, hidden, weights, edges, **options)
        ours = run(segment_mean, hidden, weights, edges, **options)
        for name, t, p, o in zip(("mean", "dhidden"), true, plain, ours, strict=True):
            noise = FLOOR[dtype] * t.abs().max() * t.numel() ** 0.5
            if normalize and width == 1:
                # the gradient of a sign is zero; what is left is rounding of g / |mean|
                noise = noise + FLOOR[dtype] * 100 * t.numel() ** 0.5
            assert o.isfinite().all(), name
            assert (o - t).norm() <= 2 * (p - t).norm() + noise, (name, width)


def test_tokens_outside_the_spans_may_hold_anything(backend: str) -> None:
    hidden, edges, spans = pack([7, 3, 9], 20)
    want = segment_mean(hidden, edges, spans=spans)
    outside = torch.ones(19, dtype=torch.bool)
    for edge, (start, stop) in zip(edges.tolist(), spans.tolist(), strict=False):
        outside[edge + start : edge + stop] = False
    assert outside.any()
    hidden[outside] = float("nan")
    hidden.requires_grad_()
    mean = segment_mean(hidden, edges, spans=spans)
    assert torch.equal(mean, want)
    mean.sum().backward()
    assert hidden.grad is not None
    assert (hidden.grad[outside] == 0).all() and (hidden.grad[~outside] != 0).all()


def test_bad_values_stay_in_their_segment(backend: str) -> None:
    hidden, edges, _ = pack([4, 5, 6], 20)
    hidden[6, 3] = float("nan")
    mean = segment_mean(hidden, edges)
    assert mean.isnan().nonzero().tolist() == [[1, 3]]
    unit = segment_mean(hidden, edges, normalize=True)
    assert unit[[0, 2]].isfinite().all() and unit[1].isnan().all()


def test_a_mean_of_zero_normalises_to_zero(backend: str) -> None:
    hidden, edges, _ = pack([4, 6], 20)
    hidden[:4] = 0
    hidden.requires_grad_()
    unit = segment_mean(hidden, edges, normalize=True)
    unit.sum().backward()
    assert torch.equal(unit[0], torch.zeros(20)) and hidden.grad is not None
    assert torch.allclose(hidden.grad[:4], torch.full((4, 20), 1e12 / 4))


def test_kinds_of_edges_and_layouts(backend: str) -> None:
    hidden, edges, spans = pack([5, 8, 2], 20)
    want = segment_mean(hidden, edges, spans=spans)
    assert torch.equal(segment_mean(hidden, edges.int(), spans=spans.int()), want)
    strided = torch.empty(20, 15).T.copy_(hidden)
    assert torch.equal(segment_mean(strided, edges, spans=spans.T.contiguous().T), want)
    expanded = hidden[:1].expand(15, 20)
    assert torch.allclose(segment_mean(expanded, edges), hidden[:1].expand(3, 20), atol=1e-6)
    leaf = hidden.clone().requires_grad_()
    segment_mean(leaf, edges)[:1].expand(4, 20).sum().backward()
    assert leaf.grad is not None and torch.allclose(leaf.grad[:5], torch.full((5, 20), 4 / 5))


def test_gradcheck() -> None:
    hidden, edges, spans = pack([3, 1, 4], 3, torch.float64)
    hidden.requires_grad_()
    for normalize in (False, True):
        assert torch.autograd.gradcheck(
            lambda t, n=normalize: segment_mean(t, edges, spans=spans, normalize=n), hidden
        )


def test_opcheck() -> None:
    hidden, edges, spans = pack([3, 1, 4], 20)
    start, stop = edges[:-1] + spans[:, 0], edges[:-1] + spans[:, 1]
    for normalize in (False, True):
        args = (start, stop, edges, normalize)
        torch.library.opcheck(op_module._forward, (hidden.clone().requires_grad_(), *args))
        torch.library.opcheck(op_module._forward, (hidden, *args))
        mean, norm = op_module._forward(hidden, *args)
        unit = mean if normalize else norm
        torch.library.opcheck(op_module._backward, (mean, unit, norm, start, stop, edges, 8, torch.bfloat16))


def test_compiles_without_breaks_and_without_recompiling() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def pooled(hidden: Tensor, edges: Tensor, spans: Tensor) -> Tensor:
        return segment_mean(2 * hidden, edges, spans=spans, normalize=True)

    compiled = torch.compile(pooled, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ([3, 4, 2], [5, 6, 7, 1], [2, 9, 4, 8, 3]):
        hidden, edges, spans = pack(lengths, 20)
        a, b = (hidden.clone().requires_grad_() for _ in range(2))
        compiled(a, edges, spans).square().sum(0).max().backward()
        pooled(b, edges, spans).square().sum(0).max().backward()
        assert a.grad is not None and b.grad is not None and torch.allclose(a.grad, b.grad, atol=1e-6)
    assert counter.frame_count == 1


def test_deterministic_and_independent_of_the_pack() -> None:
    hidden, edges, _ = pack([40, 70, 33], 50)
    mean = segment_mean(hidden, edges, normalize=True)
    assert torch.equal(segment_mean(hidden, edges, normalize=True), mean)
    alone = segment_mean(hidden[40:110], torch.tensor([0, 70]), normalize=True)
    assert torch.equal(alone[0], mean[1])


def test_autocast_changes_nothing() -> None:
    hidden, edges, _ = pack([4, 5], 20)
    want = segment_mean(hidden, edges)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(segment_mean(hidden, edges), want)


HIDDEN, EDGES = torch.ones(6, 4), torch.tensor([0, 2, 6])
BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ((HIDDEN.numpy(), EDGES), {}, TypeError, "hidden must be a tensor"),
    ((HIDDEN, [0, 2, 6]), {}, TypeError, "cu_seqlens must be a tensor"),
    ((HIDDEN[None], EDGES), {}, ValueError, r"\(tokens, H\)"),
    ((HIDDEN.int(), EDGES), {}, TypeError, "hidden must be fp32"),
    ((HIDDEN, EDGES[:1]), {}, ValueError, "one sequence or more"),
    ((HIDDEN, EDGES.float()), {}, TypeError, "int32 or int64"),
    ((HIDDEN, EDGES.to("meta")), {}, ValueError, "on the device of hidden"),
    ((HIDDEN, torch.tensor([1, 2, 6])), {}, ValueError, "begin with 0"),
    ((HIDDEN, torch.tensor([0, 2, 5])), {}, ValueError, "number of tokens 6"),
    ((HIDDEN, torch.tensor([0, 2, 2, 6])), {}, ValueError, "must increase, got 2, 2 at sequence 1"),
    ((HIDDEN, torch.tensor([0, 4, 2, 6])), {}, ValueError, "must increase, got 4, 2"),
    ((HIDDEN, EDGES), {"spans": torch.tensor([[0, 2]])}, ValueError, r"spans must be \(2, 2\)"),
    ((HIDDEN, EDGES), {"spans": torch.tensor([[0, 2], [1, 1]])}, ValueError, r"\[1, 1\) of sequence 1"),
    ((HIDDEN, EDGES), {"spans": torch.tensor([[0, 3], [1, 2]])}, ValueError, "within its 2 tokens"),
    ((HIDDEN, EDGES), {"spans": torch.tensor([[-1, 2], [1, 2]])}, ValueError, r"\[-1, 2\)"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_input(args: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        segment_mean(*args, **options)
