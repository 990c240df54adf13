"""Attention over packed sequences from other libraries: torch's varlen attention and xformers."""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

_HALVES = (torch.bfloat16, torch.float16)


@functools.cache
def _varlen() -> tuple[Any, frozenset[str]]:
    """torch's function and its parameters (they grew from release to release); (None, ...) without it."""
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return None, frozenset()
    return module.varlen_attn, frozenset(inspect.signature(module.varlen_attn).parameters)


def varlen_refusal(q: Tensor, window: int | None, softcap: float | None) -> str:
    """Why torch's varlen attention cannot serve; empty if it can."""
    function, parameters = _varlen()
    if function is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if q.device.type != "cuda" or q.dtype not in _HALVES:
        return f"it serves bf16 and fp16 on CUDA, not {q.dtype} on {q.device.type}"
    if softcap is not None:
        return "it has no softcap"
    if q.shape[2] > 256 or q.shape[2] % 8:
        return f"it needs a head size up to 256 that 8 divides, not {q.shape[2]}"
    if window is not None and "window_size" not in parameters:
        return f"that of torch {torch.__version__} has no window"
    return ""


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    window: int | None,
    scale: float,
) -> Tensor:
    """torch's varlen attention; arguments as in `packed_attention`."""
    function, parameters = _varlen()
    options: dict[str, Any] = {}
    if "window_size" in parameters:
        left = -1 if window is None else window
        options["window_size"] = (left, 0 if causal else left)
    else:
        options["is_causal"] = causal
    if "scale" in parameters:
        options["scale"] = scale
    else:
        q = q * (scale * q.shape[2] ** 0.5)
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in parameters:
            options["enable_gqa"] = True
        else:
            k, v = _repeat(q, k, v)
    edges = cu_seqlens.to(torch.int32)
    result: Tensor = function(q, k, v, edges, edges, max_seqlen, max_seqlen, **options)
    return result


@functools.cache
def _xformers() -> tuple[Any, str]:
    """The module `xformers.ops`, or None and why not."""
    try:
        return importlib.import_module("xformers.ops"), ""
    except Exception as error:  # a build for another torch fails in ways of its own
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


@functools.cache
def _xformers_runs(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Why `memory_efficient_attention` does not run for such tensors; empty if it does."""
    ops, reason = _xformers()
    if ops is None:
        return reason
    try:
        # asked for under inference_mode, whose tensors have no gradient, it would be refused for good
        with torch.inference_mode(False), torch.enable_grad():
            probe = torch.zeros(1, 8, 1, width, device=device, dtype=dtype, requires_grad=True)
            mask = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens([3, 5])
            ops.memory_efficient_attention(probe, probe, probe, attn_bias=mask).sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def xformers_refusal(q: Tensor, causal: bool, window: int | None, softcap: float | None) -> str:
    """Why xformers cannot serve; empty if it can."""
    if softcap is not None:
        return "it has no softcap"
    if window is not None and not causal:
        return "it has no window in both directions for packed sequences"
    if q.dtype == torch.float64:
        return "it has no fp64"
    return _xformers_runs(q.device, q.dtype, q.shape[2])


def xformers_mask(lengths: list[int], causal: bool, window: int | None) -> Any:
    """The block-diagonal mask of xformers for sequences of these lengths (none of them 0)."""
    ops, _ = _xformers()
    masks = ops.fmha.attn_bias
    mask = (masks.BlockDiagonalCausalMask if causal else masks.BlockDiagonalMask).from_seqlens(lengths)
    # their window counts the token itself
    return mask if window is None else mask.make_local_attention(window + 1)


def xformers(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool, window: int | None, scale: float
) -> Tensor:
    """`memory_efficient_attention` with a block-diagonal mask; arguments as in `packed_attention`."""
    ops, _ = _xformers()
    k, v = _repeat(q, k, v)
    mask = xformers_mask([length for length in lengths if length], causal, window)
    result: Tensor = ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask, scale=scale)
    return result[0]


def _repeat(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    return (k, v) if group == 1 else (k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1))
