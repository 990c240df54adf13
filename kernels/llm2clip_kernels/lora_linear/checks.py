"""What `lora_linear` and `lora_add` refuse, and the dtype that autocast gives their parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import FLOATS


def settle(t: Tensor, x: Tensor) -> Tensor:
    """Returns t in autocast's dtype where autocast is on for x's device, as for a linear layer; else t itself."""
    kind = x.device.type
    if t.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return t.to(torch.get_autocast_dtype(kind))
    return t


def _check_low_rank(
    name: str, x: Tensor, lora_a: Tensor, lora_b: Tensor, out_features: int, dropout_p: float
) -> None:
    for label, t in (("x", x), ("lora_a", lora_a), ("lora_b", lora_b)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: {label} must be a tensor, got {type(t).__name__}")
        if t.dtype not in FLOATS:
            raise TypeError(
                f"{name}: {label} must be fp32, bf16, fp16 or fp64, got {t.dtype}; convert it first"
            )
        if t.device != x.device:
            raise ValueError(
                f"{name}: all tensors must be on one device, {label} is on {t.device}, x on {x.device}"
            )
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: x must be (..., K) with K >= 1, got shape {tuple(x.shape)}")
    if lora_a.dim() != 2 or lora_a.shape[1] != x.shape[-1]:
        raise ValueError(f"{name}: lora_a must be (R, {x.shape[-1]}), got shape {tuple(lora_a.shape)}")
    if lora_a.shape[0] == 0:
        raise ValueError(f"{name}: rank 0; a low-rank update needs R >= 1, use the base layer alone")
    if lora_b.dim() != 2 or lora_b.shape != (out_features, lora_a.shape[0]):
        raise ValueError(
            f"{name}: lora_b must be ({out_features}, {lora_a.shape[0]}), got shape {tuple(lora_b.shape)}"
        )
    if lora_a.dtype != lora_b.dtype:
        raise TypeError(
            f"{name}: lora_a and lora_b must have one dtype, got {lora_a.dtype} and {lora_b.dtype}"
        )
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{name}: dropout_p must be from 0 to 1, got {dropout_p}")


def check_seed(name: str, seed: Tensor | None, x: Tensor) -> None:
    """Raises TypeError or ValueError unless seed is None or one int64 on x's device."""
    if seed is None:
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
        given = f"{seed.dtype} {tuple(seed.shape)}" if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"{name}: seed must be one int64 in a tensor, got {given}")
    if seed.device != x.device:
        raise ValueError(f"{name}: seed must be on the device of x, {x.device}, got {seed.device}")


def check_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, dropout_p: float
) -> None:
    """Raises TypeError or ValueError unless x (..., K), weight (N, K), bias (N,), lora_a (R, K), lora_b (N, R)."""
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"lora_linear: weight must be a matrix (N, K), got {shape}")
    _check_low_rank("lora_linear", x, lora_a, lora_b, weight.shape[0], dropout_p)
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(f"lora_linear: weight must be (N, {x.shape[-1]}), got shape {tuple(weight.shape)}")
    if weight.dtype not in FLOATS or weight.device != x.device:
        raise TypeError(
            f"lora_linear: weight must be a float matrix on {x.device}, got {weight.dtype} on {weight.device}; "
            "use lora_add with a quantised base layer"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"lora_linear: bias must be ({weight.shape[0]},) {weight.dtype}, got {tuple(bias.shape)} {bias.dtype}"
        )
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"lora_linear: x and weight must have one dtype, got {x.dtype} and {weight.dtype}; "
            "convert one of them or use autocast"
        )


def check_add(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, dropout_p: float) -> None:
    """Raises TypeError or ValueError unless y is (..., N) over the rows of x (..., K)."""
    if not isinstance(y, Tensor) or y.dim() == 0 or y.dtype not in FLOATS:
        raise TypeError("lora_add: y must be a float tensor (..., N), the output of the base layer")
    _check_low_rank("lora_add", x, lora_a, lora_b, y.shape[-1], dropout_p)
    if y.shape[:-1] != x.shape[:-1] or y.device != x.device:
        raise ValueError(
            f"lora_add: y and x must have the same rows on one device, got {tuple(y.shape)} on {y.device} and "
            f"{tuple(x.shape)} on {x.device}"
        )
