"""The Triton kernels of l2_normalize and segment_mean: arithmetic in the interpreter, code by cross-compiling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from llm2clip_kernels.l2_normalize import kernel as l2  # noqa: E402
from llm2clip_kernels.segment_mean import kernel as segment  # noqa: E402
from llm2clip_kernels.triton_tiles import Config  # noqa: E402
from tests.cross_compile import TARGETS, assert_fits, cross_compile, run_interpreted  # noqa: E402

INTERPRETED = """
import torch
from llm2clip_kernels import l2_normalize, segment_mean
from llm2clip_kernels.l2_normalize import kernel as l2
from llm2clip_kernels.l2_normalize import l2_normalize_reference
from llm2clip_kernels.segment_mean import segment_mean_reference

def check(got, want, limit, what):
    error = ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()
    assert error <= limit, f"{what}: {error:.2e} > {limit:.0e}"

def gradients(function, x, weights):
    x = x.detach().clone().requires_grad_()
    y = function(x)
    y.backward(weights.to(y.dtype))
    return y.detach(), x.grad

torch.manual_seed(0)
halves = {torch.float32: 1e-6, torch.float16: 1e-3}
for block in (l2.LARGEST_BLOCK, 16):  # 16: rows longer than a block
    l2.LARGEST_BLOCK = block
    for dtype, limit in halves.items():
        for out in halves:
            for shape in ((1, 1), (7, 20), (33, 65)):
                x, weights = torch.randn(shape).to(dtype), torch.randn(shape, dtype=torch.float64).to(out)
                x[0] = 0 if shape[0] > 1 and dtype == torch.float32 == out else x[0]
                got = gradients(lambda t: l2_normalize(t, dtype=out), x, weights)
                want = gradients(l2_normalize_reference, x.double(), weights.double())
                assert got[0].dtype == out
                bound = max(limit, halves[out])
                check(got[0], want[0], bound, ("y", dtype, out, shape))
                if shape[1] > 1:
                    check(got[1][1:], want[1][1:], bound, ("dx", dtype, out, shape))
                    assert torch.allclose(got[1][0].double(), want[1][0], rtol=2e-3, atol=2e-3)

x = torch.randn(3, 20); x[1, 2] = float("nan")
assert l2_normalize(x).isnan().any(1).tolist() == [False, True, False]

for dtype, limit in halves.items():
    for lengths in ([1], [3, 40, 1, 130]):
        edges = torch.tensor([0, *lengths]).cumsum(0)
        spans = torch.tensor([[n // 3, n] for n in lengths])
        for width in (5, 131):
            hidden = torch.randn(sum(lengths), width).to(dtype)
            weights = torch.randn(len(lengths), width, dtype=torch.float64)
            for normalize in (False, True):
                for s in (None, spans):
                    got = gradients(lambda t: segment_mean(t, edges, spans=s, normalize=normalize), hidden, weights)
                    want = gradients(
                        lambda t: segment_mean_reference(t, edges, spans=s, normalize=normalize),
                        hidden.double(), weights)
                    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
                    check(got[0], want[0], 1e-6, ("mean", dtype, lengths, width))
                    check(got[1], want[1], limit, ("dhidden", dtype, lengths, width))
hidden[0] = float("nan")  # outside the span of no sequence but the first
mean = segment_mean(hidden, edges, spans=spans + torch.tensor([[1, 0], [0, 0], [0, 0], [0, 0]]))
assert mean.isfinite().all()
print("interpreted: ok")
"""


def test_arithmetic_in_the_interpreter(tmp_path: Path) -> None:
    run_interpreted(INTERPRETED, tmp_path)


KERNELS: dict[str, tuple[Any, dict[str, Any], dict[str, str], tuple[str, ...]]] = {
    "l2_forward": (
        l2.l2_normalize_fwd_kernel,
        {"BLOCK": l2.LARGEST_BLOCK},
        {"x_ptr": "fp32", "y_ptr": "bf16"},
        ("D",),
    ),
    "l2_backward": (
        l2.l2_normalize_bwd_kernel,
        {"BLOCK": l2.LARGEST_BLOCK, "UNIT": False},
        {"g_ptr": "bf16"},
        ("D",),
    ),
    "segment_forward": (
        segment.segment_mean_fwd_kernel,
        {"BLOCK_T": segment._BLOCK_T, "BLOCK_H": segment._BLOCK_H},
        {"hidden_ptr": "bf16", "start_ptr": "i64", "stop_ptr": "i64"},
        ("H",),
    ),
    "segment_backward": (
        segment.segment_mean_bwd_kernel,
        {"BLOCK_T": segment._BLOCK_T, "BLOCK_H": segment._BLOCK_H, "SPLIT": segment._SPLIT},
        {"out_ptr": "bf16", "start_ptr": "i64", "stop_ptr": "i64", "edge_ptr": "i64"},
        ("H",),
    ),
}


def compiled_for(name: str, target: str) -> Any:
    function, constants, pointers, divisible = KERNELS[name]
    warps = 8 if name.startswith("l2") else 4
    config = Config(0, 0, 0, warps, 2)
    return cross_compile(function, target, constants, pointers, config, divisible, scalars={"eps": "fp32"})


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_and_fits(name: str, target: str, tmp_path: Path) -> None:
    assert_fits(compiled_for(name, target), target, tmp_path, tensor_cores=False)


@pytest.mark.parametrize("name", KERNELS)
def test_row_offsets_are_64_bit(name: str) -> None:
    """A row offset i·D passes 2^31 long before memory is full."""
    code = compiled_for(name, "sm_80").asm["ttir"]
    products = [line for line in code.splitlines() if "arith.muli" in line]
    width = "D" if name.startswith("l2") else "H"
    rows = [line for line in products if f"%{width}" in line or "tensor<" in line or "i64" in line]
    assert rows and all("i64" in line for line in rows), products
