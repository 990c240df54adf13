"""Every op of the native library on every instruction set of this processor: as exact as plain torch, bit for bit
where results are integers, and right at the edges of exp, GELU and bf16's rounding."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_kernels import (
    adapter_block,
    l2_normalize,
    native,
    packed_attention,
    segment_mean,
    sigmoid_loss,
    similarity_distill,
    similarity_lse,
    similarity_rank,
    similarity_topk,
)
from llm2clip_kernels.adapter import adapter_block_reference
from llm2clip_kernels.dropout import keep_mask
from llm2clip_kernels.packed_attention import packed_attention_reference
from llm2clip_kernels.segment_mean import segment_mean_reference
from llm2clip_kernels.sigmoid_loss import sigmoid_loss_reference
from llm2clip_kernels.similarity_distill import similarity_distill_reference
from llm2clip_kernels.similarity_lse import similarity_lse_reference, similarity_lse_with_positives
from llm2clip_kernels.similarity_topk import similarity_topk_reference

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library is not built")
ROOT = Path(__file__).resolve().parents[1]
SETS = ("portable", "avx2", "avx512")
FLOOR = {torch.float32: 4e-7, torch.bfloat16: 4e-3}
# rows, columns and widths around vectors of 4, 8 and 16 numbers, and none of them a multiple
SHAPES = [(1, 1, 3), (5, 7, 8), (18, 31, 17), (50, 67, 40)]
WIDTHS = [1, 7, 16, 33, 100]

Inputs = list[Tensor]
Function = Callable[..., Any]


def use(name: str) -> None:
    try:
        torch.ops.llm2clip_native.use_instruction_set(name)
    except RuntimeError:
        pytest.skip(f"this processor does not run {name}")


@pytest.fixture(autouse=True)
def usual_instruction_set() -> Iterator[None]:
    before = torch.ops.llm2clip_native.cpu_capability()
    yield
    torch.ops.llm2clip_native.use_instruction_set(before)


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> str:
    use(request.param)
    return str(request.param)


def run(function: Function, inputs: Inputs) -> list[Tensor]:
    """Results of a function, and their gradients for every floating input, in fp64."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    results = function(*leaves)
    results = [r for r in (results if isinstance(results, tuple) else (results,)) if r is not None]
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(results, wanted, upstream)
    return [t.detach().double() for t in (*results, *gradients)]


def assert_as_exact_as_torch(ours: Function, reference: Function, inputs: Inputs) -> None:
    dtype = inputs[0].dtype
    true = run(reference, [t.double() if t.is_floating_point() else t for t in inputs])
    for i, (o, p, t) in enumerate(zip(run(ours, inputs), run(reference, inputs), true, strict=True)):
        noise = FLOOR[dtype] * t.abs().max().clamp_min(1e-2) * t.numel() ** 0.5
        assert o.isfinite().all(), i
        assert (o - t).norm() <= 2 * (p - t).norm() + noise, (i, (o - t).norm(), (p - t).norm(), noise)


def unit(rows: int, dim: int) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1)


@pytest.mark.parametrize("scale", [10.0, 600.0], ids=["constant shift", "running maxima"])
@pytest.mark.parametrize("method", ["recompute", "cached"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_similarity_lse(shape: tuple[int, int, int], method: str, scale: float, isa: str) -> None:
    m, n, d = shape
    inputs = [unit(m, d), unit(n, d), torch.tensor(scale)]
    assert_as_exact_as_torch(
        lambda x, y, s: similarity_lse(x, y, s, method=method),  # type: ignore[call-overload]
        similarity_lse_reference, inputs,
    )  # fmt: skip


@pytest.mark.parametrize("scale", [10.0, 600.0], ids=["constant shift", "running maxima"])
def test_similarity_lse_leaves_pairs_out(scale: float, isa: str) -> None:
    x, y = unit(30, 17), unit(53, 17)
    of_x, of_y = torch.arange(30) % 5 - 1, torch.arange(53) % 7 - 1

    def ours(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor | None]:
        options: dict[str, Any] = {"diagonal": 11, "method": "recompute", "x_groups": of_x, "y_groups": of_y}
        return similarity_lse_with_positives(x, y, s, **options)[:2]

    def reference(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return similarity_lse_reference(x, y, s, of_x, of_y, 11)

    assert_as_exact_as_torch(ours, reference, [x, y, torch.tensor(scale)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sigmoid_loss(shape: tuple[int, int, int], isa: str) -> None:
    m, n, d = shape
    groups = torch.arange(m) % 3, torch.arange(n) % 4
    inputs = [unit(m, d), unit(n, d), torch.tensor(10.0), torch.tensor(-5.0)]
    assert_as_exact_as_torch(
        lambda *a: sigmoid_loss(*a, x_groups=groups[0], y_groups=groups[1], reduction="sum"),
        lambda *a: sigmoid_loss_reference(*a, *groups).sum(), inputs,
    )  # fmt: skip


@pytest.mark.parametrize("scales", [(10.0, 8.0), (600.0, 500.0)], ids=["constant shift", "running maxima"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_similarity_distill(shape: tuple[int, int, int], scales: tuple[float, float], isa: str) -> None:
    m, n, d = shape
    p, q = unit(m, d + 3), unit(n, d + 3)

    def ours(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(v for v in similarity_distill(x, y, s, p.to(x), q.to(x), scales[1]) if v is not None)[:4]

    def reference(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        return similarity_distill_reference(x, y, s, p.to(x), q.to(x), scales[1])

    assert_as_exact_as_torch(ours, reference, [unit(m, d), unit(n, d), torch.tensor(scales[0])])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize("width", WIDTHS[1:])
def test_adapter_block(width: int, dtype: torch.dtype, dropout_p: float, isa: str) -> None:
    rows, hidden, seed = 50, 2 * width + 1, torch.tensor(2**40 + 5)
    shapes = [(rows, width), (width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,)]
    inputs = [torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 1) for shape in shapes]
    inputs[0] = torch.randn(rows, width)
    keep = keep_mask(seed, 0, rows, hidden, dropout_p)
    assert_as_exact_as_torch(
        lambda *a: adapter_block(*a, dropout_p=dropout_p, seed=seed),
        lambda *a: adapter_block_reference(*a, keep=keep, dropout_p=dropout_p),
        [t.to(dtype) for t in inputs],
    )


@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize("width", WIDTHS[1:])
def test_l2_normalize_and_segment_mean(width: int, dtype: torch.dtype, isa: str) -> None:
    x = (torch.randn(97, width) + 0.1).to(dtype)
    edges = torch.tensor([0, 1, 2, 5, 38, 97])
    spans = torch.tensor([[0, 1], [0, 1], [1, 3], [0, 32], [7, 58]])
    assert_as_exact_as_torch(l2_normalize, lambda t: F.normalize(t, dim=-1), [x])
    for options in ({}, {"spans": spans}, {"spans": spans, "normalize": True}):
        assert_as_exact_as_torch(
            lambda t, o=options: segment_mean(t, edges, **o),
            lambda t, o=options: segment_mean_reference(t, edges, **o), [x],
        )  # fmt: skip


@pytest.mark.parametrize("rule", [(False, None), (True, None), (False, 5), (True, 3)], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_packed_attention(width: int, rule: tuple[bool, int | None], isa: str) -> None:
    lengths = [1, 3, 16, 23, 70]
    edges = torch.tensor([0, *lengths]).cumsum(0)
    causal, window = rule
    heads = (6, 2) if width < 50 else (1, 1)
    inputs = [torch.randn(sum(lengths), h, width) for h in (heads[0], heads[1], heads[1])]
    assert_as_exact_as_torch(
        lambda q, k, v: packed_attention(q, k, v, edges, 70, causal=causal, window=window),
        lambda q, k, v: packed_attention_reference(q, k, v, edges, causal=causal, window=window), inputs,
    )  # fmt: skip


def test_retrieval_gives_the_same_everywhere(isa: str) -> None:
    """Exact ranks, indices and fp64 scores, also among ties and where features are not finite."""
    x, y = unit(90, 41), unit(203, 41)
    y[17], y[18], y[90] = y[16], x[3], x[3]
    x[40, 2], y[150, 1] = torch.nan, torch.nan
    groups = torch.arange(90) % 11, torch.arange(203) % 13
    found = [
        *similarity_topk(x, y, 7), *similarity_topk(x, y, 7, x_groups=groups[0], y_groups=groups[1]),
        *similarity_rank(x, y[:90]), *similarity_rank(x, y[:90], tolerance=0.05),
    ]  # fmt: skip
    use("portable")
    again = [
        *similarity_topk(x, y, 7), *similarity_topk(x, y, 7, x_groups=groups[0], y_groups=groups[1]),
        *similarity_rank(x, y[:90]), *similarity_rank(x, y[:90], tolerance=0.05),
    ]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    use(isa)
    scores, indices = similarity_topk(x[:40], y[:150], 7)
    want_scores, want_indices = similarity_topk_reference(x[:40], y[:150], 7)
    assert torch.equal(indices, want_indices)
    torch.testing.assert_close(scores.double(), want_scores, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cols", [1, 15, 37])
def test_dropout_keeps_what_the_mask_says(cols: int, dtype: torch.dtype, isa: str) -> None:
    seed = 2**33 + 12345
    kept = torch.randn(35, cols).to(dtype)
    want = kept * keep_mask(torch.tensor(seed), 3, 35, cols, 0.4)
    torch.ops.llm2clip_native.dropout_rows_(kept, seed, 3, 0.4)
    assert torch.equal(kept, want)


def test_exp_from_one_to_nothing(isa: str) -> None:
    """Every weight of a softmax by itself: values are unit vectors, the largest logit is zero."""
    width = 512
    logits = torch.cat([torch.zeros(1), -torch.linspace(1e-4, 95, width - 1)])
    q, k = torch.zeros(2, width, 1, width)
    q[:, 0, 0], k[:, 0, 0] = 1.0, logits
    edges = torch.tensor([0, width])
    got = packed_attention(q, k, torch.eye(width)[:, None], edges, width, causal=False, scale=1.0)[0, 0]
    want = logits.double().softmax(0)
    normal = logits > -87.3
    assert ((got / want - 1).abs()[normal] <= 6e-7).all()
    # not below the smallest normal number: either it or nothing
    assert (got[~normal] <= 1.3e-38).all() and got[-1] == 0


def test_gelu_from_tail_to_tail(isa: str) -> None:
    pre = torch.linspace(-14, 14, 20_001)[None]
    none, seed = torch.empty(0), torch.empty(0, dtype=torch.int64)
    out, gradient = torch.empty_like(pre), torch.ones_like(pre)
    torch.ops.llm2clip_native.bias_gelu(pre, none, seed, 0.0, out)
    torch.ops.llm2clip_native.bias_gelu_backward(pre, none, seed, 0.0, gradient, False, False)
    exact = pre.double().requires_grad_()
    # F.gelu's 1 + erf is zero in the lower tail
    want = exact * torch.special.erfc(exact * -(0.5**0.5)) / 2
    want.sum().backward()
    assert exact.grad is not None
    # the square of a large argument is rounded before its exponential
    allowed = (6e-7 + 7e-8 * exact.square()) * want.abs() + 1e-37
    assert ((out - want).abs() <= allowed).all()
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-6, atol=3e-7)
    strange = torch.tensor([[math.nan, math.inf, -math.inf, 1e30, -1e30] * 4])
    torch.ops.llm2clip_native.bias_gelu(strange, none, seed, 0.0, strange)
    assert strange[0, 0].isnan() and strange[0, 1] == math.inf and strange[0, 3] == 1e30
    assert strange[0, 4] == 0


def test_bfloat16_rounds_as_torch_does(isa: str) -> None:
    """To the nearest, ties to even, with NaN, infinities, denormal numbers and overflow among them."""
    bits = torch.randint(-(2**31), 2**31, (999,), dtype=torch.int64).to(torch.int32)
    bits[::3] = (bits[::3] & ~0xFFFF) | 0x8000
    g = torch.cat(
        [bits.view(torch.float32), torch.tensor([math.nan, math.inf, -math.inf, 3.4e38, 1e-40, -0.0])]
    )
    token = torch.zeros(1, g.numel(), dtype=torch.bfloat16, requires_grad=True)
    (got,) = torch.autograd.grad(segment_mean(token, torch.tensor([0, 1])), token, g[None])
    want = g.bfloat16()
    assert torch.equal(got[0].isnan(), want.isnan())
    assert torch.equal(got[0].view(torch.int16)[~want.isnan()], want.view(torch.int16)[~want.isnan()])


@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="code for the sanitizers fuses no multiply-add")
def test_sets_are_code_of_their_own() -> None:
    """SSE2 has no fused multiply-add, so that something rounds differently."""
    pre, none, seed = torch.linspace(-3, 3, 4001)[None], torch.empty(0), torch.empty(0, dtype=torch.int64)
    results = []
    for name in ("portable", "avx2"):
        use(name)
        assert torch.ops.llm2clip_native.cpu_capability() == name
        out = torch.empty_like(pre)
        torch.ops.llm2clip_native.bias_gelu(pre, none, seed, 0.0, out)
        results.append(out)
    assert not torch.equal(*results)


def in_process(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT / "kernels")} | env,
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip


def test_the_choice() -> None:
    torch.ops.llm2clip_native.use_instruction_set("portable")
    assert torch.ops.llm2clip_native.gemm_in_use() in ("torch", os.environ.get("LLM2CLIP_CPU_GEMM"))
    torch.ops.llm2clip_native.use_instruction_set("auto")
    best = torch.ops.llm2clip_native.cpu_capability()
    for name in SETS[SETS.index(best) + 1 :]:
        with pytest.raises(RuntimeError, match=f"no instruction set '{name}' on this processor"):
            torch.ops.llm2clip_native.use_instruction_set(name)
    with pytest.raises(
        RuntimeError, match="no instruction set 'sse9' on this processor; expected auto, portable"
    ):
        torch.ops.llm2clip_native.use_instruction_set("sse9")
    code = "import llm2clip_kernels as k; print(k.build_info()['cpu_capability'])"
    done = in_process(code, LLM2CLIP_CPU_ISA="portable")
    assert done.stdout.strip() == "portable", done.stderr
    done = in_process(code, LLM2CLIP_CPU_ISA="sse9")
    assert (
        done.returncode != 0 and "LLM2CLIP_CPU_ISA is 'sse9'; expected one of auto, portable" in done.stderr
    )
