"""Launching Triton kernels on the device of their tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def on_its_device(
    function: Callable[Concatenate[Tensor, _P], _R],
) -> Callable[Concatenate[Tensor, _P], _R]:
    """Makes the GPU of the first argument the current one during a call.

    Triton launches on the current GPU, wherever the tensors are, and torch switches for its own ops alone.
    """

    @functools.wraps(function)
    def launch(first: Tensor, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return function(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return function(first, *args, **kwargs)

    return launch
