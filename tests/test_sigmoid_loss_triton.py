"""The Triton kernel of sigmoid_loss: arithmetic in the interpreter, code by cross-compiling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from llm2clip_kernels.sigmoid_loss import kernel  # noqa: E402
from tests.cross_compile import TARGETS, assert_fits, cross_compile, run_interpreted, target_config  # noqa: E402

INTERPRETED = """
import torch, torch.nn.functional as F
from llm2clip_kernels.sigmoid_loss import kernel, sigmoid_loss_reference
from llm2clip_kernels import sigmoid_loss

def check(got, want, limit, what, size=None):
    error = ((got.double() - want).norm() / (want.norm().clamp_min(1e-30) if size is None else size)).item()
    assert error <= limit, f"{what}: {error:.2e} > {limit:.0e}"

def exact(x, y, scale, bias, ids, diagonal, weight):
    leaves = [t.detach().double().requires_grad_() for t in (x, y, scale, bias)]
    loss = sigmoid_loss_reference(*leaves, *ids, diagonal=diagonal)
    (loss if weight is None else loss * weight).sum().backward()
    return [loss.detach(), *(t.grad for t in leaves)]

torch.manual_seed(0)
NONE = torch.empty(0, dtype=torch.int64)
every = (True, True, True, True)
for dtype, limit in ((torch.float32, 3e-6), (torch.float16, 1e-3)):
    # ragged tiles, several tiles, D = 1, huge and negative scales, rectangular both ways
    for m, n, d, s, b in (
        (33, 20, 5, 10.0, -10.0), (7, 40, 33, 1e4, 3.0), (5, 5, 1, 1.0, 0.0), (18, 50, 16, -30.0, 1.0)
    ):
        x, y = (F.normalize(torch.randn(k, d), dim=1).to(dtype) for k in (m, n))
        scale, bias = torch.tensor(s), torch.tensor(b)
        grouped = torch.randint(-1, 4, (m,)), torch.randint(-1, 4, (n,))
        for ids, weight in (((NONE, NONE), None), (grouped, None), (grouped, 1e-4 * torch.randn(m))):
            want = exact(x, y, scale, bias, ids, 2, weight)
            got = kernel.compute(x, y, scale, bias, *ids, 2, weight, *every)
            check(got[0], want[0], 3e-6, ("loss", dtype, m))
            for name, g, w in zip(("dx", "dy"), got[1:], want[1:]):
                check(g, w, limit, (name, dtype, m, weight is None))
            # sums of both signs: their rounding is that of their terms
            size = (1 if weight is None else 1e-4) * m * n
            check(got[3][0], want[3], 1e-6, ("dscale", dtype, m), size)
            check(got[4][0], want[4], 1e-6, ("dbias", dtype, m), size)
            alone = kernel.compute(x, y, scale, bias, *ids, 2, weight, False, False, False, False)
            assert torch.equal(alone[0], got[0]) and all(t.numel() == 0 for t in alone[1:])
            part = kernel.compute(x, y, scale, bias, *ids, 2, weight, True, False, False, True)
            assert torch.equal(part[1], got[1]) and torch.equal(part[4], got[4]) and part[2].numel() == 0

# fp16 ends at 6e-8: gradients of learned pairs are smaller, and must not vanish on the way
x = torch.eye(40, 48).half()
scale, bias = torch.tensor(36.0), torch.tensor(-18.0)
want = exact(x, x, scale, bias, (NONE, NONE), 0, None)
got = kernel.compute(x, x, scale, bias, NONE, NONE, 0, None, *every)
check(got[0], want[0], 3e-6, "small loss")
check(got[1], want[1], 5e-3, "small dx")

# more than one stripe
kernel._STRIPE_BYTES = 16 * 70 * 4
x, y = (F.normalize(torch.randn(k, 8), dim=1) for k in (85, 70))
want = exact(x, y, torch.tensor(10.0), torch.tensor(-5.0), (NONE, NONE), -3, None)
got = kernel.compute(x, y, torch.tensor(10.0), torch.tensor(-5.0), NONE, NONE, -3, None, *every)
for name, g, w in zip(("loss", "dx", "dy", "dscale", "dbias"), got, want):
    check(g.reshape(w.shape), w, 5e-6, ("stripes", name))

# a NaN row stays in its row
x[3, 0] = float("nan")
got = kernel.compute(x, y, torch.tensor(10.0), torch.tensor(-5.0), NONE, NONE, 0, None, *every)
assert got[0].isnan().nonzero().flatten().tolist() == [3]
assert got[1].isnan().any(1).nonzero().flatten().tolist() == [3]

# through the public op, autograd included
for reduction in ("mean", "none"):
    x, y = (F.normalize(torch.randn(20, 8), dim=1).requires_grad_() for _ in "xy")
    scale, bias = torch.tensor(7.0, requires_grad=True), torch.tensor([-3.0], requires_grad=True)
    ids = torch.randint(5, (20,))
    weight = torch.rand(20) if reduction == "none" else torch.tensor(1.7)
    (sigmoid_loss(x, y, scale, bias, x_groups=ids, reduction=reduction) * weight).sum().backward()
    leaves = [t.detach().double().requires_grad_() for t in (x, y, scale, bias)]
    loss = sigmoid_loss_reference(*leaves, ids, ids)
    ((loss if reduction == "none" else loss.sum() / 20) * weight).sum().backward()
    for got, want in zip((x, y, scale, bias), leaves):
        check(got.grad, want.grad, 5e-6, ("op", reduction))
print("interpreted: ok")
"""


def test_arithmetic_in_the_interpreter(tmp_path: Path) -> None:
    run_interpreted(INTERPRETED, tmp_path)


def compiled_for(target: str, *, grouped: bool, gradients: bool, tma: bool = False) -> Any:
    config = target_config(target)
    constants = {
        "TMA": tma, "GROUPS": grouped, "WEIGHTS": grouped, "STRIPE": gradients, "SCALE": gradients, "BIAS": gradients,
        "LIFT": 1.0, "PRECISION": "tf32",
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    pointers = {
        "stripe_ptr": "bf16",
        "x_code_ptr": "i32",
        "y_code_ptr": "i32",
        "x_ptr": "bf16",
        "y_ptr": "bf16",
    }
    if tma:
        pointers["x_ptr"] = f"tensordesc<bf16[{config.block_m}, {config.block_k}]>"
        pointers["y_ptr"] = f"tensordesc<bf16[{config.block_n}, {config.block_k}]>"
    return cross_compile(kernel.sigmoid_loss_kernel_stripe, target, constants, pointers, config)


@pytest.mark.parametrize(
    ("grouped", "gradients"), [(False, False), (False, True), (True, True)], ids=["value", "both", "grouped"]
)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_and_fits(target: str, grouped: bool, gradients: bool, tmp_path: Path) -> None:
    assert_fits(compiled_for(target, grouped=grouped, gradients=gradients), target, tmp_path)


@pytest.mark.parametrize("gradients", [False, True], ids=["value", "both"])
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_the_copy_engine_brings_the_operands(target: str, gradients: bool, tmp_path: Path) -> None:
    compiled = compiled_for(target, grouped=gradients, gradients=gradients, tma=True)
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
    assert_fits(compiled, target, tmp_path)


def test_offsets_are_64_bit() -> None:
    """A tile's first element, i·N + j, passes 2^31 long before memory is full; offsets within a tile do not."""
    code = compiled_for("sm_80", grouped=True, gradients=True).asm["ttir"]
    bases = [line for line in code.splitlines() if "tt.addptr" in line and "tensor<" not in line]
    products = [line for line in code.splitlines() if "arith.muli" in line and "tensor<" in line]
    assert bases and all("i64" in line for line in bases), bases
    # the only 32-bit product is that of a row within the tile with N, below 256·N
    assert len([line for line in products if "i64" not in line]) == 1, products


def test_more_columns_than_32_bits_reach_are_refused() -> None:
    import torch

    x, none = torch.ones(1, 1), torch.empty(0, dtype=torch.int64)
    y = x.expand(kernel._MOST_COLUMNS + 1, 1)
    one = torch.ones(())
    with pytest.raises(ValueError, match=f"at most {kernel._MOST_COLUMNS} rows of y on a GPU"):
        kernel.compute(x, y, one, one, none, none, 0, None, True, True, True, True)
