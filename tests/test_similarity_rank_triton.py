"""The Triton kernels of similarity_rank: arithmetic in the interpreter, code by cross-compiling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from llm2clip_kernels.similarity_rank import kernel  # noqa: E402
from llm2clip_kernels.triton_tiles import choose_config  # noqa: E402
from tests.cross_compile import TARGETS, assert_fits, cross_compile, run_interpreted  # noqa: E402

INTERPRETED = """
import torch, torch.nn.functional as F
from llm2clip_kernels import backend, similarity_rank, similarity_rank_counts
from llm2clip_kernels.similarity_rank import kernel, similarity_rank_reference

def check(x, y, of_x, of_y, tolerance):
    assert backend.choose_retrieval(x.device, x.dtype) == "triton"
    right = (of_x[:, None] == of_y) & (of_x >= 0)[:, None]
    ours = similarity_rank_counts(x, y, x_groups=of_x, y_groups=of_y, tolerance=tolerance)
    for counts, want in zip(ours, similarity_rank_reference(x, y, right, tolerance)):
        got = torch.stack([counts.above, counts.tied, counts.tied_right, counts.right])
        assert torch.equal(got, want), (x.shape, y.shape, x.dtype, tolerance)
    rows, none = similarity_rank_counts(
        x, y, x_groups=of_x, y_groups=of_y, tolerance=tolerance, directions="rows")
    assert none is None and torch.equal(rows.above, ours[0].above)

torch.manual_seed(0)
for m, n, d in ((1, 1, 8), (7, 40, 33), (33, 20, 5), (18, 17, 1)):
    of_x, of_y = torch.randint(-1, 5, (m,)), torch.randint(-1, 5, (n,))
    for dtype in (torch.float32, torch.float16):
        x, y = (F.normalize(torch.randn(k, d), dim=1).to(dtype) for k in (m, n))
        for tolerance in (0.0, 0.05):
            check(x, y, of_x, of_y, tolerance)

# more tiles a side than programs, so that one program owns several tiles, and more than one stripe
kernel._SIDE, kernel._STRIPE_PAIRS = 2, 32 * 50
of_x, of_y = torch.arange(70) % 20, torch.arange(50) % 25 - 3
# whole numbers: many exact ties, many pairs for the list; a NaN and an infinity
x, y = torch.randint(-1, 2, (70, 6)).float(), torch.randint(-1, 2, (50, 6)).float()
x[3, 1], y[5, 2] = float("nan"), float("inf")
check(x, y, of_x, of_y, 0.0)
# nothing to tell apart: every list overflows
same = torch.ones(70, 6)
check(same, same[:50], of_x, of_y, 0.0)
assert similarity_rank(same, same)[0].tolist() == [70] * 70
# one huge row, whose products overflow in fp32
x = torch.randn(40, 6)
x[7] *= 3e38
check(x, x, torch.arange(40), torch.arange(40), 0.0)
print("interpreted: ok")
"""


def test_arithmetic_in_the_interpreter(tmp_path: Path) -> None:
    run_interpreted(INTERPRETED, tmp_path)


KERNELS = {
    "count": kernel.similarity_rank_kernel_count,
    "decide": kernel.similarity_rank_kernel_decide,
}
POINTERS = {
    "row_slab_ptr": "i32", "col_slab_ptr": "i32", "list_ptr": "i32", "found_ptr": "i32", "row_best_ptr": "fp64",
    "col_best_ptr": "fp64", "x_norm_ptr": "fp64", "y_norm_ptr": "fp64", "limits_ptr": "fp64", "row_ptr": "i32",
    "col_ptr": "i32",
}  # fmt: skip


def compiled_for(name: str, target: str, dtype: str = "bf16", tma: bool = False) -> Any:
    size = 4 if dtype == "fp32" else 2
    config = kernel.rank_config(choose_config(*TARGETS[target][3][:2], size))
    constants = {
        "TMA": tma, "COLUMNS": True, "CAPACITY": 8192, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "BLOCK_P": kernel._PAIRS,
    }  # fmt: skip
    pointers = POINTERS | {"x_ptr": dtype, "y_ptr": dtype}
    if tma:
        pointers["x_ptr"] = f"tensordesc<{dtype}[{config.block_m},{config.block_k}]>"
        pointers["y_ptr"] = f"tensordesc<{dtype}[{config.block_n},{config.block_k}]>"
    scalars = {"tolerance": "fp32"}
    return cross_compile(KERNELS[name], target, constants, pointers, config, scalars=scalars)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_and_fits(name: str, target: str, tmp_path: Path) -> None:
    assert_fits(compiled_for(name, target), target, tmp_path, tensor_cores=name == "count")


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_compiles_and_fits_with_the_copy_engine(target: str, tmp_path: Path) -> None:
    assert_fits(compiled_for("count", target, tma=True), target, tmp_path)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_single_precision_compiles_and_fits(target: str, tmp_path: Path) -> None:
    assert_fits(compiled_for("count", target, "fp32"), target, tmp_path, tensor_cores=False)


def test_offsets_are_64_bit() -> None:
    """A row offset i·D or i·N, and the number of a pair, pass 2^31 long before memory is full."""
    code = compiled_for("count", "sm_80").asm["ttir"]
    products = [line for line in code.splitlines() if "arith.muli" in line and "tensor<" in line]
    # the flags of a pair and its number within one program, which a stripe's size keeps small, may be 32 bits
    rows = [line for line in products if "_row" in line]
    assert rows and all("i64" in line for line in rows), rows
    code = compiled_for("decide", "sm_80").asm["ttir"]
    products = [line for line in code.splitlines() if "arith.muli" in line and "tensor<" in line]
    assert products and all("i64" in line for line in products), products
