"""lora_linear on a CUDA GPU: accuracy, dropout, streams, graphs. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm2clip_kernels import lora_add, lora_linear
from llm2clip_kernels.dropout import keep_mask
from llm2clip_kernels.lora_linear import lora_linear_reference, op
from llm2clip_kernels.lora_linear.dropout import dropout_rows_
from tests.on_gpu import DTYPES, MARKS

pytestmark = MARKS

SHAPES = [
    (1, 8, 8, 1),
    (7, 20, 5, 32),
    (252, 123, 507, 16),
    (300, 96, 64, 200),
    (1030, 576, 1536, 16),
    (65, 40, 130, 3),
]


@pytest.fixture(autouse=True)
def many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels at every size."""
    monkeypatch.setattr(op, "_SMALL", 0)


def tensors(
    t: int, k: int, n: int, r: int, dtype: torch.dtype, low: torch.dtype | None = None
) -> list[Tensor]:
    x, w, bias = torch.randn(t, k), torch.randn(n, k) / k**0.5, torch.randn(n)
    a, b = torch.randn(r, k) / k**0.5, torch.randn(n, r) / r**0.5
    return [s.cuda().to(dtype) for s in (x, w, bias)] + [s.cuda().to(low or dtype) for s in (a, b)]


def assert_as_good_as_torch(inputs: list[Tensor], p: float = 0.0) -> None:
    """Output and gradients: error against fp64 at most twice that of plain torch, above rounding noise."""
    upstream = torch.randn(len(inputs[0]), len(inputs[1]), device="cuda").to(inputs[0].dtype)
    seed = torch.tensor(2**45 + 17, device="cuda")
    keep = keep_mask(seed, 0, *inputs[0].shape, p) if p else None
    found = []
    for kind in ("exact", "plain", "ours"):
        leaves = [(t.double() if kind == "exact" else t).detach().clone().requires_grad_() for t in inputs]
        if kind == "ours":
            y = lora_linear(*leaves, 2.0, dropout_p=p, seed=seed if p else None)
        else:
            y = lora_linear_reference(*leaves, 2.0, keep=keep, dropout_p=p)
        y.backward(upstream.to(y.dtype))
        found.append([y.detach().double()] + [t.grad.double() for t in leaves if t.grad is not None])
    floor = 4 * torch.finfo(inputs[0].dtype).eps
    for true, plain, ours in zip(*found, strict=True):
        assert ours.isfinite().all()
        assert (ours - true).norm() <= 2 * (
            plain - true
        ).norm() + floor * true.abs().max() * true.numel() ** 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_as_good_as_torch(tensors(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("low", [None, torch.float32], ids=str)
def test_dropout_and_adapters_in_fp32(dtype: torch.dtype, low: torch.dtype | None) -> None:
    assert_as_good_as_torch(tensors(300, 96, 64, 8, dtype, low), p=0.3)
    assert_as_good_as_torch(tensors(300, 96, 64, 8, dtype, low))


def test_the_mask_is_that_of_the_cpu() -> None:
    for seed, first in ((5, 0), (2**61 + 3, 2**32 + 7)):
        on_cpu = dropout_rows_(torch.ones(40, 1500), torch.tensor(seed), first, 0.3)
        on_gpu = dropout_rows_(
            torch.ones(40, 1500, device="cuda"), torch.tensor(seed, device="cuda"), first, 0.3
        )
        assert torch.equal(on_gpu.cpu(), on_cpu)


def test_deterministic_in_a_graph_and_on_another_stream() -> None:
    inputs = [t.requires_grad_() for t in tensors(500, 64, 96, 16, torch.bfloat16)]
    seed = torch.tensor(3, device="cuda")

    def step() -> list[Tensor]:
        y = lora_linear(*inputs, 2.0, dropout_p=0.1, seed=seed)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), inputs)]

    want = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(p, q) for p, q in zip(again, want, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a wait of the host would fail the capture
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(p, q) for p, q in zip(captured, want, strict=True))


def test_compiled() -> None:
    inputs = [t.requires_grad_() for t in tensors(300, 64, 96, 16, torch.bfloat16)]
    y = torch.compile(lambda *a: lora_linear(*a, 2.0), fullgraph=True)(*inputs)
    assert torch.equal(y, lora_linear(*inputs, 2.0))


def test_lora_add() -> None:
    x, _, _, a, b = tensors(300, 64, 96, 16, torch.bfloat16)
    y = torch.randn(300, 96, device="cuda").bfloat16()
    want = y.double() + 2.0 * x.double() @ a.double().T @ b.double().T
    assert (lora_add(y.clone(), x, a, b, 2.0).double() - want).norm() <= 0.01 * want.norm()


def test_more_numbers_than_32_bits_count() -> None:
    x, w, _, a, b = tensors(1, 16, 65_600, 16, torch.bfloat16)
    rows = x.expand(33_000, 16).contiguous()  # 2.2e9 results
    y = lora_linear(rows, w, None, a, b, 2.0)
    want = lora_linear_reference(x.double(), w.double(), None, a.double(), b.double(), 2.0)
    for row in (0, 16_000, 32_999):
        assert (y[row].double() - want[0]).norm() <= 0.01 * want.norm()
