"""What the Triton kernels over a similarity matrix share: the tile of dot products, its size, the static shift."""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of its kernels as types of its own)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _env
from .tuning import Config, choose_config, config_for

__all__ = [
    "Config",
    "choose_config",
    "config_for",
    "counted",
    "dots_tile",
    "finite",
    "group_codes",
    "operands",
    "precision",
    "product_tile",
    "static_shift",
]

HEADROOM = 70.0
LARGEST_BOUND = 1e30


@triton.jit
def dots_tile(
    x_ptr,  # (M, D), row-major
    y_ptr,  # (N, D), row-major
    offs_m,  # (BLOCK_M,) int64
    offs_n,  # (BLOCK_N,) int64
    M,
    N,
    D,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # rows past the end repeat the last one: a load in bounds needs no mask, and the tile is masked later
    x_row = x_ptr + tl.minimum(offs_m, M - 1)[:, None] * D
    y_row = y_ptr + tl.minimum(offs_n, N - 1)[None, :] * D
    for k in range(0, D, BLOCK_K):
        depth = k + offs_k
        x = tl.load(x_row + depth[None, :], mask=depth[None, :] < D, other=0.0)
        y = tl.load(y_row + depth[:, None], mask=depth[:, None] < D, other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    return acc


@triton.jit
def product_tile(
    x_ptr,  # (M, D), row-major; or its descriptor
    y_ptr,  # (N, D), row-major; or its descriptor
    start_m,
    start_n,
    M,
    N,
    D,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The (BLOCK_M, BLOCK_N) dot products from row start_m of x and row start_n of y, fp32."""
    if TMA:
        # the copy engine fills what lies outside with zeros and needs neither masks nor address registers
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        first_m, first_n = start_m.to(tl.int32), start_n.to(tl.int32)
        for k in range(0, D, BLOCK_K):
            x = x_ptr.load([first_m, k])
            y = y_ptr.load([first_n, k])
            acc = tl.dot(x, y.T, acc, input_precision=PRECISION)
    else:
        offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
        acc = dots_tile(x_ptr, y_ptr, offs_m, offs_n, M, N, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    return acc


@triton.jit
def finite(value):
    # an infinite maximum cannot be subtracted
    return tl.where(value - value == 0.0, value, 0.0)


@triton.jit
def counted(
    x_code_ptr,  # (M,) i32
    y_code_ptr,  # (N,) i32
    start_m,
    start_n,
    diagonal,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Which pairs of a tile count: those of one group are left out, except a row's own positive."""
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mine = tl.load(x_code_ptr + start_m + rows, mask=rows < (M - start_m).to(tl.int32), other=-1)
    others = tl.load(y_code_ptr + start_n + cols, mask=cols < (N - start_n).to(tl.int32), other=-2)
    # a row's own column within this tile; far to the left where there are no positives
    own = tl.where(diagonal >= 0, start_m + diagonal - start_n, -(2**30)).to(tl.int32)
    return (mine[:, None] != others[None, :]) | (rows[:, None] + own == cols[None, :])


def group_codes(x_groups: Tensor, y_groups: Tensor) -> tuple[Tensor, Tensor]:
    """Int64 group ids as int32 codes, equal where the ids are; negative ids equal nothing. No host sync."""
    if not x_groups.numel():
        return x_groups.to(torch.int32), y_groups.to(torch.int32)
    known = x_groups.sort().values
    x_code = torch.searchsorted(known, x_groups)
    y_code = torch.searchsorted(known, y_groups).clamp_max(known.numel() - 1)
    x_code = torch.where(x_groups < 0, -1, x_code)
    y_code = torch.where((y_groups < 0) | (known[y_code] != y_groups), -2, y_code)
    return x_code.to(torch.int32), y_code.to(torch.int32)


def precision(x: Tensor) -> str:
    """Returns the `input_precision` of tl.dot for the dtype of x."""
    # never the default, which would silently be TF32 for fp32 inputs
    return "ieee" if x.dtype == torch.float32 else "tf32"


def operands(x: Tensor, y: Tensor, config: Config) -> tuple[Any, Any, bool]:
    """x and y as the kernels take them: TMA descriptors on Hopper and later, else as they are; and which.

    The copy engine needs rows and a first element that lie on 16 bytes.
    """
    hopper = x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] >= 9
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in (x, y))
    if not (hopper or _env.triton_interpreted()) or not aligned or x.dtype == torch.float32:
        return x, y, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(y, [config.block_n, config.block_k]),
        True,
    )


def static_shift(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The static shift () f32 and whether it is unusable () i32, both on the device."""
    norms = [torch.linalg.vector_norm(t, dim=1, dtype=torch.float32).amax() for t in (x, y)]
    # 1e-5 covers the rounding of the norms and of the dot products
    bound = scale.abs() * norms[0] * norms[1] * (1 + 1e-5)
    usable = bound < LARGEST_BOUND
    shift = torch.where(usable, (bound - HEADROOM).clamp_min(0.0).ceil(), torch.zeros_like(bound))
    return shift, usable.logical_not().to(torch.int32)
