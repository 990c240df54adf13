"""The Triton kernels of similarity_distill: arithmetic in the interpreter, code by cross-compiling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from llm2clip_kernels.similarity_distill import kernel, launch  # noqa: E402
from tests.cross_compile import TARGETS, assert_fits, cross_compile, run_interpreted, target_config  # noqa: E402

INTERPRETED = """
import torch, torch.nn.functional as F
from llm2clip_kernels.similarity_distill import launch
from llm2clip_kernels import similarity_distill

def check(got, want, limit, what):
    error = ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()
    assert error <= limit, f"{what}: {error:.2e} > {limit:.0e}"

def truth(x, y, s, p, q, t):
    dots = x.double() @ y.double().T
    logits, taught = s * dots, t * p.double() @ q.double().T
    by_row, by_col = taught.softmax(1), taught.softmax(0)
    return dots, logits, by_row, by_col, [
        logits.logsumexp(1), logits.logsumexp(0), (by_row * logits).sum(1), (by_col * logits).sum(0),
        taught.logsumexp(1), taught.logsumexp(0)]

torch.manual_seed(0)
NAMES = ("row", "col", "cross_row", "cross_col", "teacher_row", "teacher_col")
CASES = (
    # ragged tiles, several tiles, D = 1, underflow of either (scale 1e4), negative scale, rectangular both ways
    (33, 20, 5, 17, 10.0, 20.0), (7, 40, 33, 3, 1e4, 30.0), (18, 50, 16, 9, -30.0, 1e4), (5, 5, 1, 1, 1.0, 1.0),
    # rows on 16 bytes, as the copy engine needs them
    (20, 23, 24, 40, 15.0, 25.0),
)
for dtype, teacher_dtype, limit in (
    (torch.float32, torch.float32, 2e-6), (torch.float16, torch.float16, 1e-3), (torch.float16, torch.float32, 1e-3)
):
    for m, n, d, e, s, t in CASES:
        x, y = (F.normalize(torch.randn(k, d), dim=1).to(dtype) for k in (m, n))
        p, q = (F.normalize(torch.randn(k, e), dim=1).to(teacher_dtype) for k in (m, n))
        dots, logits, by_row, by_col, wanted = truth(x, y, s, p, q, t)
        diagonal = 2 if n >= m + 2 else -1
        origins = torch.zeros(m), torch.zeros(n)
        if diagonal >= 0:
            origins[0].copy_(logits.diagonal(diagonal)[:m])
            origins[1][diagonal : diagonal + m] = origins[0]
        args = x, y, torch.tensor(s), p, q, torch.tensor(t)
        results = launch.forward(*args, True, *origins)
        # at scale 1e4 an fp32 product of size 1 is off by 1e4 * 6e-8, a softmax by as much relatively
        bound = 2e-3 if 1e4 in (s, t) else 2e-6
        for got, want, name in zip(results, wanted, NAMES):
            check(got, want, bound, (name, dtype, m))
        # twice the same bits, although the slabs are not cleared
        assert all(map(torch.equal, results, launch.forward(*args, True, *origins)))
        only_rows = launch.forward(*args, False, *origins)
        assert all(map(torch.equal, only_rows[::2], results[::2]))
        assert all(r.numel() == 0 for r in only_rows[1::2])
        g_row, g_crow = torch.randn(m) / m, torch.randn(m) / m
        g_col, g_ccol = torch.randn(n) / n, torch.randn(n) / n
        g_pos = -torch.rand(m) if diagonal >= 0 else torch.empty(0)
        lses = [w.float() for w in (*wanted[:2], *wanted[4:])]
        for with_columns, taught, taught_columns in (
            (True, True, True), (True, False, False), (False, True, True), (True, True, False)
        ):
            g = g_row[:, None].double() * (logits - wanted[0][:, None]).exp()
            gs = [g_row, torch.empty(0), g_pos, torch.empty(0), torch.empty(0)]
            if with_columns:
                gs[1] = g_col
                g = g + g_col.double() * (logits - wanted[1]).exp()
            if taught:
                gs[3] = g_crow
                g = g + g_crow[:, None].double() * by_row
            if taught_columns:
                gs[4] = g_ccol
                g = g + g_ccol.double() * by_col
            if diagonal >= 0:
                g.diagonal(diagonal).add_(g_pos)
            dx, dy, dscale = launch.backward(*gs, *args, *lses, diagonal, True, True, True)
            # at scale 1e4 a rounded log-sum-exp alone moves the exponentials by 1e4 * 6e-8
            bound = max(limit, 2e-3) if 1e4 in (s, t) else limit
            check(dx, s * g @ y.double(), bound, ("dx", dtype, m))
            check(dy, s * g.T @ x.double(), bound, ("dy", dtype, m))
            size = (g.abs() * dots.abs()).sum()
            assert (dscale.double() - (g * dots).sum()).abs() <= bound * size, ("dscale", dtype, m)
        dx, dy, _ = launch.backward(*gs, *args, *lses, diagonal, False, True, False)
        assert dx.shape == (0, d) and dy.shape == (n, d)

# several tiles per program and several stripes: the loops that only large inputs reach
launch._SIDE, launch._STRIPE_BYTES = 2, 70 * 4 * 32
x, y, p, q = (F.normalize(torch.randn(k, 8), dim=1) for k in (85, 70, 85, 70))
for s, t, limit in ((12.0, 15.0, 3e-6), (400.0, 15.0, 6e-5), (12.0, 400.0, 6e-5)):
    dots, logits, by_row, by_col, wanted = truth(x, y, s, p, q, t)
    args = x, y, torch.tensor(s), p, q, torch.tensor(t)
    results = launch.forward(*args, True, torch.zeros(85), torch.zeros(70))
    for got, want, name in zip(results, wanted, NAMES):
        check(got, want, limit, (name, "groups", s, t))
    g = (logits - wanted[0][:, None]).exp() + (logits - wanted[1]).exp() - by_row - by_col
    ones = torch.ones(85), torch.ones(70), torch.empty(0), -torch.ones(85), -torch.ones(70)
    lses = [results[i] for i in (0, 1, 4, 5)]
    dx, dy, _ = launch.backward(*ones, *args, *lses, -1, True, True, False)
    check(dx, s * g @ y.double(), limit, "dx stripes")
    check(dy, s * g.T @ x.double(), limit, "dy stripes")

# NaN rows stay in their row and in the columns of their matrix, and the kernels end
x[3, 0] = p[5, 0] = float("nan")
row, col, cross_row, cross_col, teacher_row, _ = launch.forward(*args, True, torch.zeros(85), torch.zeros(70))
assert row.isnan().nonzero().flatten().tolist() == [3] and teacher_row.isnan().nonzero().flatten().tolist() == [5]
assert cross_row.isnan().nonzero().flatten().tolist() == [3, 5] and cross_col.isnan().all()

# through the public op, autograd included
x, y, p, q = (F.normalize(torch.randn(20, 8), dim=1) for _ in range(4))
x.requires_grad_(), y.requires_grad_()
scale = torch.tensor(7.0, requires_grad=True)
of = similarity_distill(x, y, scale, p, q, 9.0, diagonal=0)
loss = of.row_lse + 2 * of.col_lse - of.positives - of.cross_row - 2 * of.cross_col
loss.sum().backward()
a, b, c = (t.detach().double().requires_grad_() for t in (x, y, scale))
s, t = c * a @ b.T, 9.0 * p.double() @ q.double().T
want = s.logsumexp(1) + 2 * s.logsumexp(0) - s.diagonal() - (t.softmax(1) * s).sum(1) - 2 * (t.softmax(0) * s).sum(0)
want.sum().backward()
check(loss.detach(), want.detach(), 2e-6, "loss")
for got, true in ((x.grad, a.grad), (y.grad, b.grad), (scale.grad, c.grad)):
    check(got, true, 4e-6, "op")
print("interpreted: ok")
"""


def test_arithmetic_in_the_interpreter(tmp_path: Path) -> None:
    run_interpreted(INTERPRETED, tmp_path)


KERNELS = {
    "sums": kernel.similarity_distill_fwd_kernel_sums,
    "online": kernel.similarity_distill_fwd_kernel_online,
    "stripe": kernel.similarity_distill_bwd_kernel_stripe,
}


def compiled_for(name: str, target: str, tma: bool = False) -> Any:
    config = launch.distill_config(target_config(target))
    if name == "online":
        config = launch.online_config(config)
    constants = {
        "TMA": tma, "TEACHER_TMA": tma, "COLUMNS": True, "POSITIVES": True, "SCALE": True,
        "TEACHER": True, "TEACHER_COLUMNS": True, "PRECISION": "tf32", "TEACHER_PRECISION": "tf32",
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    pointers = {f"{t}_ptr": "bf16" for t in ("x", "y", "p", "q", "stripe")} | {"flag_ptr": "i32"}
    if tma:
        for left, right in ("xy", "pq"):
            pointers[f"{left}_ptr"] = f"tensordesc<bf16[{config.block_m}, {config.block_k}]>"
            pointers[f"{right}_ptr"] = f"tensordesc<bf16[{config.block_n}, {config.block_k}]>"
    return cross_compile(KERNELS[name], target, constants, pointers, config, divisible=("N", "D", "E"))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_and_fits(name: str, target: str, tmp_path: Path) -> None:
    assert_fits(compiled_for(name, target), target, tmp_path)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_the_copy_engine_brings_the_operands(name: str, target: str, tmp_path: Path) -> None:
    compiled = compiled_for(name, target, tma=True)
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
    assert_fits(compiled, target, tmp_path)


def test_offsets_are_64_bit() -> None:
    """A row offset i·D or i·N passes 2^31 long before memory is full."""
    for name in ("sums", "stripe"):
        code = compiled_for(name, "sm_80").asm["ttir"]
        products = [line for line in code.splitlines() if "arith.muli" in line and "tensor<" in line]
        assert products and all("i64" in line for line in products), products
