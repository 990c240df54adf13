"""What every op over two feature matrices checks, and the dtype it accumulates in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums and results for inputs of `dtype`: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_plain(t: Tensor) -> bool:
    """Returns whether an op may read a tensor's memory: sharded and quantised ones are subclasses that may not be.

    Tensors without values, with which memory is planned, stand for plain ones; not so where a program is exported,
    which would then hold our ops.
    """
    kind = type(t)
    if kind in (Tensor, nn.Parameter):
        return True
    without_values = kind.__module__ == "torch._subclasses.fake_tensor"
    return without_values and not torch.compiler.is_compiling()


def native_rows(t: Tensor) -> Tensor:
    """Returns t as the C++ row kernels read it: fp32 or bf16, contiguous; fp16 is converted."""
    return (t.float() if t.dtype == torch.float16 else t).contiguous()


def check_pair(x: Tensor, y: Tensor, name: str) -> None:
    """Raises TypeError or ValueError unless x is (M, D) and y is (N, D), floats of one dtype and device."""
    for label, t in (("x", x), ("y", y)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: {label} must be a tensor, got {type(t).__name__}")
        if t.dim() != 2:
            raise ValueError(f"{name}: {label} must be 2-D (rows, D), got shape {tuple(t.shape)}")
        if t.dtype not in FLOATS:
            raise TypeError(
                f"{name}: {label} must be fp32, bf16, fp16 or fp64, got {t.dtype}; convert it first"
            )
    if x.dtype != y.dtype:
        raise TypeError(
            f"{name}: x and y must have one dtype, got {x.dtype} and {y.dtype}; convert one of them"
        )
    if x.device != y.device:
        raise ValueError(f"{name}: x and y must be on one device, got {x.device} and {y.device}")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{name}: x and y must have one D, got {tuple(x.shape)} and {tuple(y.shape)}")
    if x.shape[0] == 0 or y.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(
            f"{name}: empty input, got {tuple(x.shape)} and {tuple(y.shape)}; one row and D >= 1 needed"
        )


def check_paired(x: Tensor, y: Tensor, name: str, rows: str = "x and y") -> None:
    """As `check_pair`, and that row i of x can belong to row i of y; `rows` is what messages call the two."""
    check_pair(x, y, name)
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"{name}: {rows} must pair up, got {x.shape[0]} and {y.shape[0]} rows")


def scale_tensor(scale: Tensor | float, like: Tensor, name: str, label: str = "scale") -> Tensor:
    """Returns scale as a 0-dim tensor, fp32 (fp64 for fp64), on like's device; keeps its gradient.

    `label` is what messages call it, e.g. "bias".
    """
    dtype = accumulator(like.dtype)
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(
                f"{name}: {label} must be a number or a 1-element tensor, got shape {tuple(scale.shape)}"
            )
        if not (scale.is_floating_point() or scale.dtype in (torch.int32, torch.int64)):
            raise TypeError(f"{name}: {label} must be a real number, got {scale.dtype}")
        # a view would be one more node for autograd to walk through
        scalar = scale.reshape(()) if scale.dim() > 0 else scale
        return scalar.to(device=like.device, dtype=dtype)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"{name}: {label} must be a number or a 1-element tensor, got {type(scale).__name__}")
    return torch.full((), float(scale), dtype=dtype, device=like.device)


def check_integers(t: object, label: str, name: str) -> None:
    """Raises TypeError unless t is a tensor of integers."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: {label} must be an integer tensor, got {type(t).__name__}")
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise TypeError(f"{name}: {label} must be an integer tensor, got {t.dtype}")


def check_groups(
    x_groups: Tensor | None, y_groups: Tensor | None, x: Tensor, y: Tensor, name: str
) -> tuple[Tensor, Tensor]:
    """Returns the group ids as contiguous int64 (M,) and (N,), two empty tensors where there are none.

    Raises:
        TypeError, ValueError: one of the two is missing, they are not integers, or they do not fit x and y.
    """
    if x_groups is None and y_groups is None:
        none = torch.empty(0, dtype=torch.int64, device=x.device)
        return none, none.clone()
    if x_groups is None or y_groups is None:
        raise ValueError(f"{name}: groups are needed for the rows of x and of y, got only one of the two")
    for label, ids, rows in (("x_groups", x_groups, x), ("y_groups", y_groups, y)):
        check_integers(ids, label, name)
        if ids.shape != rows.shape[:1]:
            raise ValueError(
                f"{name}: {label} must hold one id for each of {rows.shape[0]} rows, got {tuple(ids.shape)}"
            )
        if ids.device != rows.device:
            raise ValueError(f"{name}: {label} must be on {rows.device}, got {ids.device}")
    return x_groups.to(torch.int64).contiguous(), y_groups.to(torch.int64).contiguous()


def positive_logits(x: Tensor, y: Tensor, scale: Tensor, diagonal: int) -> Tensor:
    """Returns scale · <x_i, y_{diagonal + i}>, (M,), in the accumulator's dtype."""
    wide = accumulator(x.dtype)
    partners = y[diagonal : diagonal + x.shape[0]]
    return (x.to(wide) * partners.to(wide)).sum(1) * scale
