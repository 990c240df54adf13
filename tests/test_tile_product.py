"""The product of tiles: every kernel of this processor against fp64, alone and under the ops that use it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_kernels import (
    build_info,
    native,
    sigmoid_loss,
    similarity_distill,
    similarity_lse,
    similarity_rank,
)

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library is not built")
ROOT = Path(__file__).resolve().parents[1]
GEMMS = ("torch", "avx2", "avx512")
OURS = GEMMS[1:]
# one number, and sizes around a strip (4, 8 rows), a vector (8, 16), a panel (24, 48), a group (96) of columns, and
# a sum (256) and a slice (512) of k
SHAPES = [
    (1, 1, 1), (1, 5, 3), (3, 1, 7), (4, 8, 16), (7, 15, 255), (8, 16, 256), (9, 17, 257), (12, 24, 511),
    (13, 47, 512), (16, 48, 513), (17, 49, 40), (31, 95, 33), (40, 96, 700), (41, 97, 64), (5, 203, 1025),
]  # fmt: skip


def use(name: str) -> None:
    try:
        torch.ops.llm2clip_native.use_gemm(name)
    except RuntimeError:
        pytest.skip(f"this processor does not run {name}")


@pytest.fixture(autouse=True)
def usual_gemm() -> Iterator[None]:
    before = torch.ops.llm2clip_native.gemm_in_use()
    yield
    torch.ops.llm2clip_native.use_gemm(before)


@pytest.fixture(params=GEMMS)
def gemm(request: pytest.FixtureRequest) -> str:
    use(request.param)
    return str(request.param)


def framed(matrix: Tensor, frame: float) -> tuple[Tensor, Tensor]:
    """A copy of a matrix inside a larger one full of `frame`, and the larger one."""
    rows, cols = matrix.shape
    whole = torch.full((rows + 4, cols + 13), frame)
    inside = whole[2 : 2 + rows, 5 : 5 + cols]
    return inside.copy_(matrix), whole


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("layout", ["ab", "abt", "atb"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(shape: tuple[int, int, int], layout: str, accumulate: bool, gemm: str) -> None:
    """Right to twice the error of torch.mm, reading and writing nothing beside the matrices."""
    m, n, k = shape
    a, b, start = torch.randn(m, k), torch.randn(k, n), torch.randn(m, n)
    ours_a = framed(a.T, torch.nan)[0].T if layout == "atb" else framed(a, torch.nan)[0]
    ours_b = framed(b.T, torch.nan)[0].T if layout == "abt" else framed(b, torch.nan)[0]
    out, whole = framed(start if accumulate else start * torch.nan, 7.0)
    torch.ops.llm2clip_native.tile_product(out, ours_a, ours_b, accumulate)
    first = start if accumulate else torch.zeros(m, n)
    true = first.double() + a.double() @ b.double()
    limit = 2 * (first + a @ b - true).norm() + 1e-6 * true.norm()
    assert (out - true).norm() <= limit
    out.fill_(7.0)
    assert (whole == 7.0).all()


@pytest.mark.parametrize("name", OURS)
def test_a_long_sum_rounds_no_worse_than_torch(name: str) -> None:
    """Terms of one sign, whose rounding errors add up most: the sum is made in parts."""
    a, b = torch.rand(64, 4096), torch.rand(4096, 96)
    true = a.double() @ b.double()
    use(name)
    out = torch.empty(64, 96)
    torch.ops.llm2clip_native.tile_product(out, a, b, False)
    assert (out - true).norm() <= 2 * (a @ b - true).norm()
    # one running sum over all of k would not pass
    one_sum = torch.zeros(64, 96)
    for i in range(4096):
        one_sum.addr_(a[:, i], b[i])
    assert (one_sum - true).norm() > 2 * (a @ b - true).norm()


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("shape", [(300, 40, 530), (40, 300, 530)], ids=str)
def test_threads_change_no_bit(shape: tuple[int, int, int], name: str) -> None:
    m, n, k = shape
    use(name)
    a, b, before = torch.randn(m, k), torch.randn(k, n), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = torch.empty(m, n)
            torch.ops.llm2clip_native.tile_product(out, a, b, False)
            results.append(out)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("name", OURS)
def test_bad_numbers_stay_in_their_rows_and_columns(name: str) -> None:
    use(name)
    a, b = torch.randn(21, 30), torch.randn(30, 53)
    a[20, 3], b[4, 52] = torch.nan, torch.inf
    out = torch.empty(21, 53)
    torch.ops.llm2clip_native.tile_product(out, a, b, False)
    want = a @ b
    assert torch.equal(out.isnan(), want.isnan()) and torch.equal(out.isinf(), want.isinf())
    assert out[:20, :52].isfinite().all()


def unit(rows: int, dim: int) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1)


def results(dtype: torch.dtype, m: int, n: int, d: int) -> list[Tensor]:
    """Losses and gradients of every op whose tiles are multiplied so; fp64 goes through plain torch."""
    torch.manual_seed(1)
    found: list[Tensor] = []
    x0, y0, p, q = (unit(rows, dim).to(dtype) for rows, dim in ((m, d), (n, d), (m, d + 3), (n, d + 3)))
    for op in ("recompute", "cached", "sigmoid", "distill"):
        x, y = x0.clone().requires_grad_(), y0.clone().requires_grad_()
        if op == "sigmoid":
            values: tuple[Tensor, ...] = (sigmoid_loss(x, y[:m], 10.0, -5.0, reduction="sum"),)
        elif op == "distill":
            values = tuple(v for v in similarity_distill(x, y, 10.0, p, q, 8.0) if v is not None)
        else:
            values = similarity_lse(x, y, 10.0, method=op)  # type: ignore[call-overload]
        sum(v.sum() for v in values).backward()  # type: ignore[union-attr]
        assert x.grad is not None and y.grad is not None
        found += [v.detach() for v in values] + [x.grad, y.grad]
    return found


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(9, 13, 5), (50, 99, 33), (110, 260, 300)], ids=str)
def test_ops_over_every_kernel(shape: tuple[int, int, int], threads: int, gemm: str) -> None:
    want = results(torch.float64, *shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = results(torch.float32, *shape)
    finally:
        torch.set_num_threads(before)
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= 2e-6 * w.norm()


@pytest.mark.parametrize("name", OURS)
def test_ranks_do_not_depend_on_the_kernel(name: str) -> None:
    x, y = unit(90, 40), unit(90, 40)
    y[17] = y[16]
    use("torch")
    want = similarity_rank(x, y)
    use(name)
    assert all(torch.equal(g, w) for g, w in zip(similarity_rank(x, y), want, strict=True))


def in_process(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT / "kernels")} | env,
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip


def test_the_choice() -> None:
    """Ours on AMD processors, torch's elsewhere, or what the environment says."""
    cpuinfo = Path("/proc/cpuinfo")
    vendor = cpuinfo.read_text() if cpuinfo.is_file() else ""
    torch.ops.llm2clip_native.use_gemm("auto")
    amd = platform.machine() == "x86_64" and "AuthenticAMD" in vendor
    capability = build_info()["cpu_capability"]
    assert build_info()["cpu_gemm"] == (capability if amd and capability != "portable" else "torch")
    code = "import llm2clip_kernels as k; print(k.build_info()['cpu_gemm'])"
    done = in_process(code, LLM2CLIP_CPU_GEMM="torch")
    assert done.stdout.strip() == "torch", done.stderr
    done = in_process(code, LLM2CLIP_CPU_GEMM="mkl")
    assert done.returncode != 0 and "LLM2CLIP_CPU_GEMM is 'mkl'; expected one of auto, torch" in done.stderr
    with pytest.raises(RuntimeError, match="no GEMM 'sse' on this processor; expected auto, torch"):
        torch.ops.llm2clip_native.use_gemm("sse")


def test_shapes_that_do_not_fit() -> None:
    product = torch.ops.llm2clip_native.tile_product
    with pytest.raises(RuntimeError, match=r"out \(m, n\), a \(m, k\), b \(k, n\)"):
        product(torch.empty(3, 4), torch.ones(3, 5), torch.ones(6, 4), False)
    with pytest.raises(RuntimeError, match="float32"):
        product(torch.empty(3, 4), torch.ones(3, 5).double(), torch.ones(5, 4), False)
    with pytest.raises(RuntimeError, match="rows of out"):
        product(torch.empty(4, 3).T, torch.ones(3, 5), torch.ones(5, 4), False)
