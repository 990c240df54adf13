"""The Triton kernels of lora_linear: arithmetic in the interpreter, code by cross-compiling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from llm2clip_kernels.lora_linear import kernel  # noqa: E402
from tests.cross_compile import TARGETS, assert_fits, cross_compile, run_interpreted, target_config  # noqa: E402

INTERPRETED = """
import torch
from llm2clip_kernels import lora_add, lora_linear
from llm2clip_kernels.lora_linear import kernel, lora_linear_reference
from llm2clip_kernels.dropout import keep_mask

def check(got, want, limit, what):
    error = ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()
    assert error <= limit, f"{what}: {error:.2e} > {limit:.0e}"

torch.manual_seed(0)
for dtype, limit in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
    # one row, ragged tiles, several tiles and groups of tiles, R below, at and above a step of depth
    for m, n, k, r in ((1, 1, 1, 1), (7, 20, 33, 3), (33, 40, 16, 16), (20, 17, 8, 37), (150, 40, 5, 2)):
        x, w, u, bt = (torch.randn(s).to(dtype) for s in ((m, k), (n, k), (m, r), (r, n)))
        bias = torch.randn(n).to(dtype)
        want = x.double() @ w.double().T + u.double() @ bt.double()
        check(kernel.forward(x, w, None, u, bt), want, limit, (dtype, m))
        check(kernel.forward(x, w, bias, u, bt), want + bias.double(), limit, (dtype, m, "bias"))
        # a slice of a joined projection: rows apart by more than K
        wide = torch.randn(n, k + 3).to(dtype)
        sliced = wide[:, :k]
        want = x.double() @ sliced.double().T + u.double() @ bt.double()
        check(kernel.forward(x, sliced, None, u, bt), want, limit, (dtype, m, "sliced"))
assert kernel.forward(torch.ones(0, 4), torch.ones(3, 4), None, torch.ones(0, 2), torch.ones(2, 3)).shape == (0, 3)

# a NaN row stays in its row
x = torch.ones(20, 4)
x[3, 1] = float("nan")
y = kernel.forward(x, torch.ones(17, 4), None, torch.ones(20, 2), torch.ones(2, 17))
assert y.isnan().any(1).nonzero().flatten().tolist() == [3]

# the mask of the kernel is that of torch, for any part of the rows, seeds and rows beyond 32 bits
for seed in (0, 5, 2**40 + 3, 2**61 + 12345):
    for first, rows, cols, p in ((0, 5, 50, 0.3), (7, 3, 16, 0.05), (2**32 + 1, 2, 33, 0.9), (0, 1, 1, 0.5)):
        t = torch.ones(rows, cols)
        kernel.dropout_rows_(t, torch.tensor(seed), first, round(p * 2**24))
        assert torch.equal(t != 0, keep_mask(torch.tensor(seed), first, rows, cols, p)), (seed, first)

# through the public ops, autograd and dropout included
for p in (0.0, 0.4):
    seed = torch.tensor(11)
    args = [torch.randn(s) for s in ((3, 7, 20), (18, 20), (18,), (5, 20), (18, 5))]
    got = [t.clone().requires_grad_() for t in args]
    want = [t.double().requires_grad_() for t in args]
    y = lora_linear(*got, 1.5, dropout_p=p, seed=seed)
    keep = keep_mask(seed, 0, 21, 20, p).view(3, 7, 20) if p else None
    exact = lora_linear_reference(*want, 1.5, keep=keep, dropout_p=p)
    g = torch.randn(3, 7, 18)
    y.backward(g)
    exact.backward(g.double())
    check(y.detach(), exact.detach(), 1e-6, ("y", p))
    for a, b in zip(got, want):
        check(a.grad, b.grad, 1e-6, ("gradient", p))
    added = lora_add(args[0].new_zeros(3, 7, 18), args[0], args[3], args[4], 1.5, dropout_p=p, seed=seed)
    base = lora_linear_reference(*want[:3], want[3] * 0, want[4], 1.5)
    check(added, (exact - base).detach(), 1e-5, ("add", p))
print("interpreted: ok")
"""


def test_arithmetic_in_the_interpreter(tmp_path: Path) -> None:
    run_interpreted(INTERPRETED, tmp_path)


def compiled_forward(target: str, depth: int) -> Any:
    config = target_config(target)
    constants = {
        "BIAS": True, "PRECISION": "tf32", "GROUP": kernel._GROUP,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "BLOCK_R": depth,
    }  # fmt: skip
    pointers = {f"{name}_ptr": "bf16" for name in ("x", "w", "bias", "u", "b", "y")}
    divisible = ("N", "K", "R", "stride_w")
    return cross_compile(kernel.lora_linear_fwd_kernel, target, constants, pointers, config, divisible)


@pytest.mark.parametrize("rank", [4, 16, 256])
@pytest.mark.parametrize("target", TARGETS)
def test_forward_compiles_and_fits(target: str, rank: int, tmp_path: Path) -> None:
    assert_fits(compiled_forward(target, kernel._depth(target_config(target), rank)), target, tmp_path)


@pytest.mark.parametrize("target", TARGETS)
def test_dropout_compiles_and_fits(target: str, tmp_path: Path) -> None:
    compiled = cross_compile(
        kernel.dropout_rows_kernel, target, {"BLOCK": kernel._DROP_BLOCK}, {"t_ptr": "bf16", "seed_ptr": "i64"},
        target_config(target), ("cols",),
    )  # fmt: skip
    assert_fits(compiled, target, tmp_path, tensor_cores=False)


def test_offsets_are_64_bit() -> None:
    """A row offset i·K or i·N passes 2^31 long before memory is full."""
    code = compiled_forward("sm_80", 16).asm["ttir"]
    products = [line for line in code.splitlines() if "arith.muli" in line and "tensor<" in line]
    assert products and all("i64" in line for line in products), products
