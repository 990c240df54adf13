"""What the losses and similarity ops do under torch.autocast, in one place.

On a GPU the features come in the autocast dtype, as `torch.mm` would take them, and everything after the first
products stays in fp32. On the CPU the kernels compute in fp32 whatever comes, and autocast changes nothing; features
of different dtypes, which eager code may mix under autocast, become the widest of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")
_HALF_OR_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """A context without autocast, which would otherwise reach into an op and round its matmuls' results."""
    if torch.is_autocast_enabled(device.type):
        off: AbstractContextManager[None] = torch.autocast(device.type, enabled=False)
        return off
    return nullcontext()


def _features(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.dim() == 2 and value.dtype in _HALF_OR_SINGLE else []
    return [t for item in value for t in _features(item)] if isinstance(value, list | tuple) else []


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if _features(value) else value
    return (
        [_cast(item, dtype) for item in value]
        if isinstance(value, list | tuple) and _features(value)
        else value
    )


def follows_autocast(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates a function of features (2-D tensors, or lists of them) to do what this module says."""

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        features = _features([*args, *kwargs.values()])
        if not features or not torch.is_autocast_enabled(features[0].device.type):
            return function(*args, **kwargs)
        device = features[0].device.type
        dtype = torch.get_autocast_dtype(device)
        if device == "cpu":
            dtype = functools.reduce(torch.promote_types, (t.dtype for t in features))
        with torch.autocast(device, enabled=False):
            changed = {name: _cast(value, dtype) for name, value in kwargs.items()}
            return function(*(_cast(value, dtype) for value in args), **changed)  # type: ignore[arg-type]

    return wrapper
