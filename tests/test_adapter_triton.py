"""The Triton kernels of the adapter: arithmetic in the interpreter, code by cross-compiling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from llm2clip_kernels.adapter import kernel  # noqa: E402
from llm2clip_kernels.triton_tiles import Config  # noqa: E402
from tests.cross_compile import TARGETS, assert_fits, cross_compile, run_interpreted  # noqa: E402

INTERPRETED = """
import torch
from llm2clip_kernels import adapter_block
from llm2clip_kernels.adapter import adapter_block_reference, kernel, plain
from llm2clip_kernels.dropout import keep_mask
from llm2clip_kernels.adapter import layer_norm_linear, layer_norm_linear_reference

def check(got, want, limit, what):
    error = ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-2)).item()
    assert error <= limit, f"{what}: {error:.2e} > {limit:.0e}"

torch.manual_seed(0)
seed = torch.tensor([0x1234_5678_9ABC_DEF])
none, unseeded = torch.empty(0), torch.empty(0, dtype=torch.int64)

# every row operation against plain torch: ragged tiles, several groups of rows, with and without parameters
kernel._PROGRAMS = 4
for dtype, limit in ((torch.float32, 2e-6), (torch.float16, 1e-3)):
    for n, d in ((1, 5), (9, 20), (70, 33)):
        x, dy, dh = (torch.randn(n, d).to(dtype) for _ in range(3))
        vector = torch.randn(d)
        for w, b in ((vector, vector), (none, none)):
            h = kernel.layer_norm(x, w, b, 1e-5, torch.float16)
            check(h, plain.layer_norm(x, w, b, 1e-5, torch.float32), 1e-3, "layer_norm")
            for residual in (dy, none):
                mine, other = dh.clone(), dh.clone()
                got = kernel.layer_norm_backward(x, w, b, 1e-5, mine, residual, True, True, True, True, True)
                want = plain.layer_norm_backward(x, w, b, 1e-5, other, residual, True, True, True, True, True)
                for i, (g, t) in enumerate(zip((*got, mine), (*want, other))):
                    assert g.dtype == t.dtype and g.shape == t.shape, i
                    check(g, t, limit, ("layer_norm_backward", dtype, n, i))
                got = kernel.layer_norm_backward(x, w, b, 1e-5, mine, residual, False, False, False, False, False)
                assert all(g.numel() == 0 for g in got)
        for bias in (vector, none):
            for p, s in ((0.0, unseeded), (0.3, seed), (1.0, seed)):
                out, expected = torch.empty_like(x), torch.empty_like(x)
                kernel.bias_gelu(x, bias, s, p, out)
                plain.bias_gelu(x, bias, s, p, expected)
                check(out, expected, limit, ("bias_gelu", dtype, n, p))
                mine, other = dy.clone(), dy.clone()
                got = kernel.bias_gelu_backward(x, bias, s, p, mine, True, True)
                want = plain.bias_gelu_backward(x, bias, s, p, other, True, True)
                for i, (g, t) in enumerate(zip((*got, mine), (*want, other))):
                    check(g, t, limit, ("bias_gelu_backward", dtype, n, p, i))
                got = kernel.bias_gelu_backward(x, bias, s, p, mine, False, False)
                assert all(g.numel() == 0 for g in got)

ones, out = torch.full((130, 300), 5.0), torch.empty(130, 300)
kernel.bias_gelu(ones, none, seed, 0.3, out)
assert torch.equal(out != 0, keep_mask(seed, 0, 130, 300, 0.3))

# through the public ops, autograd included
for dtype, limit in ((torch.float32, 3e-6), (torch.float16, 3e-3)):
    parameters = [1 + 0.3 * torch.randn(20), torch.randn(20), torch.randn(37, 20) / 4, torch.randn(37),
                  torch.randn(20, 37) / 6, torch.randn(20)]
    inputs = [t.to(dtype).requires_grad_() for t in (torch.randn(70, 20), *parameters)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    for ours, reference, count in ((adapter_block, adapter_block_reference, 7),
                                   (layer_norm_linear, layer_norm_linear_reference, 5)):
        y, true = ours(*inputs[:count]), reference(*exact[:count])
        upstream = torch.randn_like(y)
        check(y, true, limit, ours.__name__)
        got = torch.autograd.grad(y, inputs[:count], upstream)
        want = torch.autograd.grad(true, exact[:count], upstream.double())
        for i, (g, t) in enumerate(zip(got, want)):
            check(g, t, limit, (ours.__name__, dtype, i))
print("interpreted: ok")
"""


def test_arithmetic_in_the_interpreter(tmp_path: Path) -> None:
    run_interpreted(INTERPRETED, tmp_path)


ROW = {"WEIGHT": True, "BIAS": True, "RESIDUAL": True, "OUTPUT": True}
NEEDS = {"NEED_X": True, "NEED_WEIGHT": True, "NEED_BIAS": True, "NEED_SUM": True}
TILE = {"TILE_M": kernel._TILE_M, "TILE_N": kernel._TILE_N, "GROUP_M": kernel._GROUP_M, "DROPOUT": True}
KERNELS: dict[str, Any] = {
    "layer_norm": kernel.layer_norm_fwd_kernel,
    "layer_norm_backward": kernel.layer_norm_bwd_kernel,
    "bias_gelu": kernel.bias_gelu_fwd_kernel,
    "bias_gelu_backward": kernel.bias_gelu_bwd_kernel,
}


def compiled_for(name: str, target: str, width: int) -> Any:
    block, warps = kernel.row_block(width)
    if not name.startswith("layer_norm"):
        warps = 4
    half = dict.fromkeys(
        ("x_ptr", "out_ptr", "dh_ptr", "dy_ptr", "dx_ptr", "pre_ptr", "gradient_ptr"), "bf16"
    )
    return cross_compile(
        KERNELS[name],
        target,
        {**ROW, **NEEDS, **TILE, "BLOCK": block},
        {**half, "seed_ptr": "i64"},
        Config(0, 0, 0, warps, 2),
        ("D", "K"),
        scalars={"eps": "fp32", "scale": "fp32"},
    )


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_and_fits(name: str, target: str, tmp_path: Path) -> None:
    assert_fits(compiled_for(name, target, 4096), target, tmp_path, tensor_cores=False)


def test_a_row_of_8192_does_not_spill(tmp_path: Path) -> None:
    assert_fits(compiled_for("layer_norm_backward", "sm_90", 8192), "sm_90", tmp_path, tensor_cores=False)


@pytest.mark.parametrize("name", KERNELS)
def test_row_offsets_are_64_bit(name: str) -> None:
    """A row offset i·D or i·K passes 2^31 long before memory is full; columns and the hash may be 32-bit."""
    lines = compiled_for(name, "sm_80", 1024).asm["ttir"].splitlines()
    products = [line.strip() for line in lines if "arith.muli" in line]
    offsets = [line for line in products if not line.startswith(("%cols", "%h_", "%spread"))]
    assert offsets and all("i64" in line for line in offsets), products
