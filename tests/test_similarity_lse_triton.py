"""The Triton kernels of similarity_lse: arithmetic in the interpreter, code by cross-compiling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from llm2clip_kernels.similarity_lse import kernel, launch  # noqa: E402
from llm2clip_kernels.triton_tiles import choose_config  # noqa: E402
from tests.cross_compile import TARGETS, assert_fits, cross_compile, run_interpreted, target_config  # noqa: E402

INTERPRETED = """
import torch, torch.nn.functional as F
from llm2clip_kernels.similarity_lse import launch
from llm2clip_kernels import similarity_lse

def check(got, want, limit, what):
    error = ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()
    assert error <= limit, f"{what}: {error:.2e} > {limit:.0e}"

torch.manual_seed(0)
empty = torch.empty(0, dtype=torch.bfloat16)
none = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
for dtype, limit in ((torch.float32, 2e-6), (torch.float16, 1e-3)):
    # ragged tiles, several tiles, D = 1, underflow (scale 1e4), negative scale, rectangular both ways
    for m, n, d, s in ((33, 20, 5, 10.0), (7, 40, 33, 1e4), (5, 5, 1, 1.0), (18, 50, 16, -30.0)):
        x, y = (F.normalize(torch.randn(k, d), dim=1).to(dtype) for k in (m, n))
        scale = torch.tensor(s)
        dots = x.double() @ y.double().T
        logits = s * dots
        rows, cols = logits.logsumexp(1), logits.logsumexp(0)
        row_lse, col_lse, _ = launch.forward(x, y, scale, True, -1, *none, False)
        check(row_lse, rows, 2e-6, ("row_lse", dtype, m))
        check(col_lse, cols, 2e-6, ("col_lse", dtype, m))
        only_rows, nothing, _ = launch.forward(x, y, scale, False, -1, *none, False)
        assert torch.equal(only_rows, row_lse) and nothing.numel() == 0
        g_row, g_col = torch.randn(m) / m, torch.randn(n) / m
        diagonal = 2 if n >= m + 2 else -1
        g_pos = -torch.rand(m) if diagonal >= 0 else torch.empty(0)
        g = g_row[:, None].double() * (logits - rows[:, None]).exp() + g_col.double() * (logits - cols).exp()
        if diagonal >= 0:
            g.diagonal(diagonal).add_(g_pos)
        # at scale 1e4 a rounded log-sum-exp alone moves the exponentials by 1e4 * 6e-8
        bound = max(limit, 6e-4) if s == 1e4 else limit
        dx, dy, dscale = launch.backward(
            g_row, g_col, g_pos, x, y, scale, rows.float(), cols.float(), empty, diagonal, *none, True, True, True)
        check(dx, s * g @ y.double(), bound, ("dx", dtype, m))
        check(dy, s * g.T @ x.double(), bound, ("dy", dtype, m))
        check(dscale, (g * dots).sum(), 10 * bound, ("dscale", dtype, m))

# more tiles a side than programs, so that one program owns several tiles, and more than one stripe
launch._SIDE, launch._STRIPE_BYTES = 2, 16 * 70 * 4
x, y = (F.normalize(torch.randn(k, 8), dim=1) for k in (85, 70))
for s, limit in ((2e3, 2e-4), (5.0, 5e-6)):
    logits = s * x.double() @ y.double().T
    row_lse, col_lse, _ = launch.forward(x, y, torch.tensor(s), True, -1, *none, False)
    check(row_lse, logits.logsumexp(1), 2e-6, "row groups")
    check(col_lse, logits.logsumexp(0), 2e-6, "col groups")
    g = (logits - logits.logsumexp(1)[:, None]).exp() + (logits - logits.logsumexp(0)).exp()
    ones = torch.ones(85), torch.ones(70), torch.empty(0)
    dx, dy, _ = launch.backward(*ones, x, y, torch.tensor(s), row_lse, col_lse, empty, -1, *none, True, True, False)
    check(dx, s * g @ y.double(), limit, "dx stripes")
    check(dy, s * g.T @ x.double(), limit, "dy stripes")

# a NaN row stays in its row and in the columns, and an infinite norm ends
x[3, 0] = float("nan")
row_lse, _, _ = launch.forward(x, y, torch.tensor(5.0), True, -1, *none, False)
assert row_lse.isnan().nonzero().flatten().tolist() == [3]

# through the public op, autograd included
x, y = (F.normalize(torch.randn(20, 8), dim=1).requires_grad_() for _ in "xy")
scale = torch.tensor(7.0, requires_grad=True)
row_lse, col_lse = similarity_lse(x, y, scale)
(row_lse.sum() + 2 * col_lse.sum()).backward()
a, b, c = (t.detach().double().requires_grad_() for t in (x, y, scale))
s = c * a @ b.T
(s.logsumexp(1).sum() + 2 * s.logsumexp(0).sum()).backward()
for got, want in ((x.grad, a.grad), (y.grad, b.grad), (scale.grad, c.grad)):
    check(got, want, 2e-6, "op")

# the exponentials cached in bf16: the forward is the same, the gradients are right to bf16, the positives better
for s in (9.0, 0.0, 100.0, 1e4):
    x, y = (F.normalize(torch.randn(k, 16), dim=1).half() for k in (37, 45))
    y[2:39] = F.normalize(x.float() + 0.1 * torch.randn(37, 16), dim=1).half()
    scale = torch.tensor(s)
    row_lse, col_lse, _ = launch.forward(x, y, scale, True, 2, *none, False)
    again, _, cache = launch.forward(x, y, scale, True, 2, *none, True)
    assert torch.equal(again, row_lse) and cache.shape == (37 * 45,)
    g_row, g_col, g_pos = torch.full((37,), 1 / 74), torch.full((45,), 1 / 90), torch.full((37,), -1 / 37)
    arguments = g_row, g_col, g_pos, x, y, scale, row_lse, col_lse
    want = launch.backward(*arguments, empty, 2, *none, True, True, True)
    got = launch.backward(*arguments, cache, 2, *none, True, True, True)
    for name, g, w in zip(("dx", "dy", "dscale"), got, want):
        if s == 1e4:
            # running maxima: the cache is not used at all
            assert torch.equal(g, w), name
        else:
            check(g, w.double(), 6e-3, ("cached", name, s))
    _, _, only_scale = launch.backward(*arguments, cache, 2, *none, False, False, True)
    check(only_scale, want[2].double(), 1e-6, "scale alone")

# pairs of one group left out, with and without positives, a row with nothing left, by both shifts
for dtype, limit in ((torch.float32, 2e-6), (torch.float16, 1e-3)):
    for s, diagonal in ((9.0, -1), (9.0, 2), (1e4, 2)):
        x, y = (F.normalize(torch.randn(k, 12), dim=1).to(dtype) for k in (20, 37))
        ids = torch.randint(-1, 4, (20,)), torch.randint(-1, 4, (37,))
        if diagonal < 0:
            ids[0][4], ids[1][:] = 3, 3
        mask = (ids[0][:, None] == ids[1]) & (ids[0] >= 0)[:, None]
        if diagonal >= 0:
            mask.diagonal(diagonal).fill_(False)
        logits = (s * x.double() @ y.double().T).masked_fill(mask, -torch.inf)
        rows, cols = logits.logsumexp(1), logits.logsumexp(0)
        row_lse, col_lse, _ = launch.forward(x, y, torch.tensor(s), True, diagonal, *ids, False)
        assert torch.equal(row_lse.isinf(), rows.isinf())
        check(row_lse[rows.isfinite()], rows[rows.isfinite()], 2e-6, "masked rows")
        check(col_lse[cols.isfinite()], cols[cols.isfinite()], 2e-6, "masked columns")
        g_row, g_col = torch.randn(20) / 20, torch.randn(37) / 37
        g_pos = -torch.rand(20) if diagonal >= 0 else torch.empty(0)
        g = g_row[:, None].double() * (logits - rows[:, None]).exp() + g_col.double() * (logits - cols).exp()
        g = g.masked_fill(mask, 0.0)
        if diagonal >= 0:
            g.diagonal(diagonal).add_(g_pos)
        dx, dy, dscale = launch.backward(
            g_row, g_col, g_pos, x, y, torch.tensor(s), rows.float(), cols.float(), empty, diagonal, *ids,
            True, True, True)
        bound = max(limit, 6e-4) if s == 1e4 else limit
        check(dx, s * g @ y.double(), bound, "masked dx")
        check(dy, s * g.T @ x.double(), bound, "masked dy")
print("interpreted: ok")
"""


def test_arithmetic_in_the_interpreter(tmp_path: Path) -> None:
    run_interpreted(INTERPRETED, tmp_path)


KERNELS = {
    "sums": kernel.similarity_lse_fwd_kernel_sums,
    "online": kernel.similarity_lse_fwd_kernel_online,
    "cached": kernel.similarity_lse_bwd_kernel_cached,
    "stripe": kernel.similarity_lse_bwd_kernel_stripe,
}


def compiled_for(name: str, target: str, groups: bool = False, tma: bool = False) -> Any:
    config = target_config(target)
    if name == "online":
        config = launch.online_config(config)
    constants = {
        "TMA": tma, "COLUMNS": True, "GROUPS": groups, "POSITIVES": True, "SCALE": True, "CACHE": True, "ROWS": 16,
        "PRECISION": "tf32",
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    pointers = {
        "x_ptr": "bf16",
        "y_ptr": "bf16",
        "stripe_ptr": "bf16",
        "flag_ptr": "i32",
        "cache_ptr": "bf16",
    }
    pointers |= {"x_code_ptr": "i32", "y_code_ptr": "i32"}
    if tma:
        pointers["x_ptr"] = f"tensordesc<bf16[{config.block_m}, {config.block_k}]>"
        pointers["y_ptr"] = f"tensordesc<bf16[{config.block_n}, {config.block_k}]>"
    return cross_compile(KERNELS[name], target, constants, pointers, config)


@pytest.mark.parametrize("groups", [False, True], ids=["all", "groups"])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_and_fits(name: str, target: str, groups: bool, tmp_path: Path) -> None:
    assert_fits(compiled_for(name, target, groups), target, tmp_path, tensor_cores=name != "cached")


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "cached"])
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_the_copy_engine_brings_the_operands(name: str, target: str, tmp_path: Path) -> None:
    compiled = compiled_for(name, target, groups=True, tma=True)
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
    assert_fits(compiled, target, tmp_path)


def test_offsets_are_64_bit() -> None:
    """A tile's first element, i·N + j, passes 2^31 long before memory is full; offsets within a tile do not."""
    for name in ("sums", "online", "stripe", "cached"):
        code = compiled_for(name, "sm_80").asm["ttir"]
        bases = [line for line in code.splitlines() if "tt.addptr" in line and "tensor<" not in line]
        products = [line for line in code.splitlines() if "arith.muli" in line and "tensor<" in line]
        assert all("i64" in line for line in bases), (name, bases)
        if name == "stripe":
            # the only 32-bit product is that of a row within the tile with N, below 128·N
            narrow = [line for line in products if "i64" not in line]
            assert bases and len(narrow) == 1, (name, narrow)
        else:
            assert products and all("i64" in line for line in products), (name, products)


def test_a_config_for_every_architecture() -> None:
    assert choose_config("cuda", 12, 2) == choose_config("hip", 11, 4)
    largest = choose_config("cuda", 12, 4)
    operands = (largest.block_m + largest.block_n) * largest.block_k * 4 * largest.num_stages
    assert operands <= 64 * 1024, "the fallback must fit the smallest shared memory"
