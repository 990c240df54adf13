"""lora_linear's schemas, its compiled form, its dropout mask, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

from llm2clip_kernels import lora_add, lora_linear, native
from llm2clip_kernels.dropout import keep_mask
from llm2clip_kernels.lora_linear import op
from llm2clip_kernels.lora_linear.dropout import dropout_rows_

ROOT = Path(__file__).resolve().parents[1]
FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64


def tensors(t: int, k: int, n: int, r: int, low: torch.dtype = FP32) -> list[Tensor]:
    """x, weight, bias, lora_a, lora_b."""
    sizes = ((t, k), (n, k), (n,))
    return [torch.randn(size) for size in sizes] + [torch.randn(size).to(low) for size in ((r, k), (n, r))]


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("low", [FP32, BF16], ids=str)
def test_opcheck(low: torch.dtype, p: float) -> None:
    seed = torch.tensor(5) if p else None
    x, w, bias, a, b = tensors(6, 5, 4, 2, low)
    for needs in (True, False):
        leaves = [t.clone().requires_grad_(needs) for t in (x, w, bias, a, b)]
        torch.library.opcheck(op._linear, (*leaves, seed, 2.0, p))
        torch.library.opcheck(op._linear, (*leaves[:2], None, *leaves[3:], seed, 2.0, p))
        y = torch.randn(6, 4).requires_grad_(needs)
        torch.library.opcheck(op._add, (y, leaves[0], *leaves[3:], seed, 2.0, p))
    u = torch.randn(6, 2).to(low)
    for flags in ((True,) * 5, (True, False, False, True, False)):
        torch.library.opcheck(op._backward, (torch.randn(6, 4), x, w, a, b, u, seed, 2.0, p, *flags))


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_without_breaks_and_without_recompiling() -> None:
    seed = torch.tensor(9)

    def layer(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = lora_linear(x, w, bias, a, b, 2.0, dropout_p=0.5, seed=seed)
        return lora_add(y * 2, x, a, b, 0.5).square().sum() + lora_linear(x, w, None, a, b, 1.0).sum()

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (12, 17, 23):
        inputs = tensors(rows, 8, 6, 3)
        got = [t.clone().requires_grad_() for t in inputs]
        want = [t.clone().requires_grad_() for t in inputs]
        compiled(*got).backward()
        layer(*want).backward()
        for q, r in zip(got, want, strict=True):
            assert q.grad is not None and r.grad is not None
            assert torch.allclose(q.grad, r.grad, rtol=1e-4, atol=1e-3)


def test_a_compiled_layer_draws_its_own_seeds() -> None:
    x, w, bias, a, b = tensors(12, 8, 6, 3)
    compiled = torch.compile(
        lambda x: lora_linear(x, w, bias, a, b, 2.0, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    assert not torch.equal(compiled(x), compiled(x))


def test_the_mask_is_the_same_everywhere_and_fair() -> None:
    seed = torch.tensor(2**50 + 99)
    mask = keep_mask(seed, 0, 500, 300, 0.3)
    if native.available():
        for dtype in (FP32, BF16, FP64):
            assert torch.equal(dropout_rows_(torch.ones(500, 300, dtype=dtype), seed, 0, 0.3) != 0, mask)
        part = dropout_rows_(torch.ones(3, 300), seed, 2**33 + 5, 0.3)
        assert torch.equal(part != 0, keep_mask(seed, 2**33 + 5, 3, 300, 0.3))
    assert torch.equal(keep_mask(seed, 200, 100, 300, 0.3), mask[200:300])
    # 150,000 draws: five standard deviations of the share are 0.006, of a row's or column's mean far more
    assert abs(mask.double().mean() - 0.7) < 0.006
    assert (mask.double().mean(0) - 0.7).abs().max() < 5 * (0.21 / 500) ** 0.5
    assert (mask.double().mean(1) - 0.7).abs().max() < 5 * (0.21 / 300) ** 0.5
    z = mask.double() - 0.7
    for other in (
        z.roll(1, 0),
        z.roll(1, 1),
        z.roll((1, 1), (0, 1)),
        keep_mask(seed + 1, 0, 500, 300, 0.3).double() - 0.7,
    ):
        assert abs((z * other).mean() / 0.21) < 5 / 150_000**0.5


def test_without_the_native_library() -> None:
    script = (
        "import torch; from llm2clip_kernels import lora_linear, native; assert not native.available(); "
        "args = [torch.randn(s, requires_grad=True) for s in ((800, 400), (500, 400), (500,), (4, 400), (500, 4))]; "
        "y = lora_linear(*args, 2.0, dropout_p=0.5); y.sum().backward(); print(y.isfinite().all().item())"
    )
    env = os.environ | {"LLM2CLIP_DISABLE_NATIVE": "1", "PYTHONPATH": f"{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=env, capture_output=True, text=True
    )
    assert done.stdout.strip() == "True", done.stderr[-2000:]


X, W, BIAS, A, B = torch.ones(3, 4), torch.ones(5, 4), torch.ones(5), torch.ones(2, 4), torch.ones(5, 2)
BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ((X, W, None, A[:0], B[:, :0], 1.0), {}, ValueError, "rank 0"),
    ((X, W, None, A[:, :3], B, 1.0), {}, ValueError, r"lora_a must be \(R, 4\)"),
    ((X, W, None, A, B[:4], 1.0), {}, ValueError, r"lora_b must be \(5, 2\)"),
    ((X, W[0], None, A, B, 1.0), {}, ValueError, "matrix"),
    ((X, torch.ones(5, 3), None, A, B, 1.0), {}, ValueError, r"weight must be \(N, 4\)"),
    ((X, W, BIAS[:4], A, B, 1.0), {}, ValueError, "bias"),
    ((X, W, BIAS.half(), A, B, 1.0), {}, ValueError, "bias"),
    ((X.bfloat16(), W, None, A, B, 1.0), {}, TypeError, "one dtype"),
    ((X, W, None, A, B.half(), 1.0), {}, TypeError, "lora_a and lora_b"),
    ((X, W.to(torch.int8), None, A, B, 1.0), {}, TypeError, "lora_add"),
    ((X.long(), W, None, A, B, 1.0), {}, TypeError, "int64"),
    ((X, W, None, A.to("meta"), B, 1.0), {}, ValueError, "one device"),
    ((X[:, :0], W, None, A, B, 1.0), {}, ValueError, "K >= 1"),
    ((X.numpy(), W, None, A, B, 1.0), {}, TypeError, "tensor"),
    ((X, W, None, A, B, 1.0), {"dropout_p": 1.5}, ValueError, "from 0 to 1"),
    ((X, W, None, A, B, 1.0), {"dropout_p": 0.5, "seed": 3}, TypeError, "one int64 in a tensor, got int"),
    ((X, W, None, A, B, 1.0), {"dropout_p": 0.5, "seed": torch.ones(())}, TypeError, "got torch.float32"),
    ((X, W, None, A, B, 1.0), {"dropout_p": float("nan")}, ValueError, "from 0 to 1"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_input(args: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lora_linear(*args, **options)


def test_bad_input_of_lora_add() -> None:
    with pytest.raises(ValueError, match="same rows"):
        lora_add(torch.ones(4, 5), X, A, B, 1.0)
    with pytest.raises(TypeError, match="output of the base layer"):
        lora_add(torch.ones(3, 5).long(), X, A, B, 1.0)
    with pytest.raises(ValueError, match="lora_b must be"):
        lora_add(torch.ones(3, 6), X, A, B, 1.0)
