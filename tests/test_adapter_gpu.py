"""The adapter and the row ops on a CUDA GPU: accuracy, determinism, graphs, large rows. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llm2clip_kernels import adapter_block, l2_normalize, segment_mean
from llm2clip_kernels.adapter import (
    adapter_block_reference,
    layer_norm_linear,
    layer_norm_linear_reference,
)
from llm2clip_kernels.dropout import keep_mask
from llm2clip_kernels.l2_normalize import l2_normalize_reference
from llm2clip_kernels.segment_mean import segment_mean_reference
from tests.on_gpu import DTYPES, MARKS

pytestmark = MARKS

FLOOR = {torch.float32: 4e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHAPES = [(1, 8, 16), (7, 96, 192), (65, 123, 246), (300, 1280, 2560), (257, 4096, 8192)]


@pytest.fixture(autouse=True)
def exact_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def block(width: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    parameters = [
        1 + 0.3 * torch.randn(width), 0.3 * torch.randn(width), torch.randn(hidden, width) * width**-0.5,
        0.3 * torch.randn(hidden), torch.randn(width, hidden) * hidden**-0.5, 0.3 * torch.randn(width),
    ]  # fmt: skip
    return [p.cuda().to(dtype).requires_grad_() for p in parameters]


def run(
    function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor, **options: Any
) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves, **options)
    return [t.detach().double() for t in (y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype)))]


def assert_as_good_as_torch(
    function: Any, reference: Any, inputs: list[Tensor], shape: tuple[int, ...], **options: Any
) -> None:
    upstream = torch.randn(shape, dtype=torch.float64, device="cuda")
    true = run(reference, [t.double() for t in inputs], upstream, **options)
    torchs = run(reference, inputs, upstream, **options)
    ours = run(function, inputs, upstream, **options)
    for i, (t, p, o) in enumerate(zip(true, torchs, ours, strict=True)):
        noise = FLOOR[inputs[0].dtype] * t.abs().max().clamp_min(1e-2) * t.numel() ** 0.5
        assert o.isfinite().all(), i
        assert (o - t).norm() <= 2 * (p - t).norm() + noise, i


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adapter(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, width, hidden = shape
    inputs = [torch.randn(n, width).cuda().to(dtype), *block(width, hidden, dtype)]
    assert_as_good_as_torch(adapter_block, adapter_block_reference, inputs, (n, width))
    assert_as_good_as_torch(layer_norm_linear, layer_norm_linear_reference, inputs[:5], (n, hidden))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 20), (65, 4096), (33, 5000)], ids=str)
def test_l2_normalize(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).cuda().to(dtype)
    assert_as_good_as_torch(l2_normalize, l2_normalize_reference, [x], shape)
    zero = torch.zeros(2, 20, device="cuda", dtype=dtype)
    assert torch.equal(l2_normalize(zero), zero)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segment_mean(dtype: torch.dtype, normalize: bool) -> None:
    lengths = [1, 33, 500, 4, 129]
    edges = torch.tensor([0, *lengths]).cumsum(0).cuda()
    spans = torch.tensor([[n // 3, n] for n in lengths]).cuda()
    hidden = torch.randn(sum(lengths), 576).cuda().to(dtype)
    for chosen in (None, spans):
        assert_as_good_as_torch(
            lambda h, c=chosen: segment_mean(h, edges.int(), spans=c, normalize=normalize),
            lambda h, c=chosen: segment_mean_reference(h, edges, spans=c, normalize=normalize),
            [hidden],
            (5, 576),
        )


def test_edges_that_do_not_fit_touch_nothing_out_of_bounds() -> None:
    hidden = torch.ones(8, 20, device="cuda", requires_grad=True)
    edges = torch.tensor([0, 4, 4, 100], device="cuda")
    mean = segment_mean(hidden, edges)
    assert torch.equal(mean[0], torch.ones(20, device="cuda")) and mean[1].isnan().all()
    mean[0].sum().backward()
    torch.cuda.synchronize()


def test_dropout_draws_the_mask_of_the_cpu() -> None:
    from llm2clip_kernels.adapter import rows

    seed = torch.tensor([0x1234_5678_9ABC_DEF])
    ones, out = torch.full((130, 300), 5.0, device="cuda"), torch.empty(130, 300, device="cuda")
    rows.bias_gelu(ones, torch.empty(0, device="cuda"), seed.cuda(), 0.3, out)
    assert torch.equal((out != 0).cpu(), keep_mask(seed, 0, 130, 300, 0.3))


def test_the_same_bits_every_run() -> None:
    inputs = [torch.randn(4096, 1024).cuda().bfloat16(), *block(1024, 2048, torch.bfloat16)]
    upstream = torch.randn(4096, 1024, device="cuda")
    first = run(adapter_block, inputs, upstream)
    for _ in range(3):
        assert all(
            torch.equal(a, b) for a, b in zip(first, run(adapter_block, inputs, upstream), strict=True)
        )


def test_captured_in_a_cuda_graph() -> None:
    """No host synchronisation: the ops replay on other data, dropout's seed included."""
    parameters = block(64, 128, torch.bfloat16)
    x = torch.randn(256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    edges = torch.arange(0, 257, 32, device="cuda")

    def step() -> Tensor:
        y = adapter_block(l2_normalize(x), *parameters, dropout_p=0.1)
        loss = segment_mean(y, edges, normalize=True).square().sum(1).mean() + y.float().square().mean()
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    graph.replay()
    assert loss.isfinite() and x.grad is not None and x.grad.isfinite().all()


def test_more_elements_than_32_bits_count() -> None:
    rows, width = 600_000, 4096  # 2.4e9 elements
    x = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
    x[-1] = 3.0
    assert torch.allclose(
        l2_normalize(x)[-1].float(), torch.full((width,), width**-0.5, device="cuda"), rtol=1e-2
    )
    edges = torch.tensor([0, rows - 2, rows], device="cuda")
    assert torch.equal(segment_mean(x, edges)[1], torch.full((width,), 1.5, device="cuda"))
