"""Which implementation serves which tensor, and what to print about it."""

from __future__ import annotations

import functools
import importlib.util
import platform
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch

from . import _env, native

Backend = Literal["native", "triton", "chunked"]


@functools.cache
def triton_available() -> bool:
    """Returns whether Triton is installed; importing it is left to the first use."""
    return importlib.util.find_spec("triton") is not None


def choose(device: torch.device, dtype: torch.dtype) -> Backend:
    """Returns the implementation of the similarity ops for tensors of this kind.

    CPU: the C++ kernel, for fp32 and for bf16/fp16 converted once. CUDA and ROCm: Triton for bf16/fp16; fp32
    goes through torch's own GEMM, which follows the user's TF32 setting. fp64 and every other device: plain
    torch by chunks.
    """
    forced = _env.forced_backend()
    if forced != "auto" and dtype != torch.float64:
        return forced  # type: ignore[return-value]
    if device.type == "cpu" and dtype != torch.float64 and native.available():
        return "native"
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and triton_available():
        return "triton"
    return "chunked"


def choose_retrieval(device: torch.device, dtype: torch.dtype) -> Backend:
    """Returns the implementation of `similarity_rank` for tensors of this kind.

    As `choose`, but CUDA fp32 goes to Triton too: exact fp32 products whatever the TF32 setting.
    """
    chosen = choose(device, dtype)
    if (
        device.type == "cuda"
        and dtype == torch.float32
        and _env.forced_backend() == "auto"
        and triton_available()
    ):
        return "triton"
    return chosen


def choose_rows(device: torch.device, *dtypes: torch.dtype) -> Backend:
    """Returns the implementation of the ops that work row by row on tensors of these dtypes.

    CPU: C++ for fp32 and bf16, fp16 converted once. CUDA and ROCm: Triton for fp32, bf16, fp16. With an fp64
    tensor among them, and on every other device: plain torch ("chunked").
    """
    if torch.float64 in dtypes:
        return "chunked"
    forced = _env.forced_backend()
    if forced != "auto":
        return forced  # type: ignore[return-value]
    if device.type == "cpu" and native.available():
        return "native"
    if device.type == "cuda" and triton_available():
        return "triton"
    return "chunked"


def _choose_either(device: torch.device, dtype: torch.dtype, fast: Backend) -> Backend:
    """For an op that has one fast implementation, and plain torch for everything else."""
    return fast if choose(device, dtype) == fast else "chunked"


_CHOICES: dict[str, Callable[[torch.device, torch.dtype], Backend]] = {
    "adapter": choose_rows,
    "l2_normalize": choose_rows,
    # its products; dropout in place has C++ too
    "lora_linear": functools.partial(_choose_either, fast="triton"),
    "packed_attention": choose,
    "segment_mean": choose_rows,
    "sigmoid_loss": choose,
    "similarity_distill": choose,
    "similarity_lse": choose,
    "similarity_rank": choose_retrieval,
    "similarity_topk": functools.partial(_choose_either, fast="native"),
}


def build_info() -> dict[str, Any]:
    """Returns versions, what was built, and which backend each op uses; printed by `llm2clip env`."""
    reason = native.load()
    triton_version = None
    if triton_available():
        from importlib import metadata

        try:
            triton_version = metadata.version("triton")
        except metadata.PackageNotFoundError:
            triton_version = "unknown"
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": triton_version,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "native": {"loaded": reason == "", "reason": reason, **native.build_record()},
        "cpu_capability": torch.ops.llm2clip_native.cpu_capability() if reason == "" else None,
        "cpu_gemm": torch.ops.llm2clip_native.gemm_in_use() if reason == "" else "torch",
        "backends": {
            op: {
                f"{device} {str(dtype).removeprefix('torch.')}": chosen(torch.device(device), dtype)
                # on a GPU packed attention asks torch and xformers, call by call (docs/packing.md)
                for device in (["cpu"] if op == "packed_attention" else devices)
                for dtype in dtypes
            }
            for op, chosen in _CHOICES.items()
        },
    }
