"""peft's LoRA layers through `lora_linear`: `fuse_lora(model)` swaps the forward, nothing else.

A fused layer is a subclass of peft's own with the same parameters, names and settings: what is saved, merged,
switched or added works as before. Where a call is not covered, peft's own forward runs, and the reason is
logged once.
"""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from llm2clip_kernels import lora_add, lora_linear
from llm2clip_kernels.checks import is_plain

from .handle import Handle

log = logging.getLogger(__name__)

# numbers in the input and output of a layer below which peft's forward is as fast: there calls are what costs
_FEW = 2**19
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Notes:
    """Reasons for peft's own forward that were logged, shared by the layers of one `fuse_lora`."""

    def __init__(self) -> None:
        self.said: set[str] = set()

    def say(self, reason: str) -> None:
        if reason not in self.said:
            self.said.add(reason)
            log.info("fused LoRA layers use peft's own forward: %s", reason)


def _hooked(module: nn.Module) -> bool:
    # a forward of its own on the instance is how accelerate attaches its hooks
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _plain(weight: Any) -> bool:
    return is_plain(weight) and weight.dtype in _FLOATS


class _Fused:
    """Mixin before a peft LoRA layer: overrides forward alone."""

    _llm2clip_notes: _Notes

    def _adapter(self: Any, x: Tensor, arguments: bool) -> tuple[str, str]:
        """The adapter to fuse with and "", or "" and why peft's forward must run."""
        if arguments:
            return "", "a call has arguments besides the input (adapter_names, alora_offsets)"
        if self._disable_adapters:
            return "", "adapters are disabled"
        if self.merged_adapters:
            return "", "an adapter is merged"
        downs = self._modules["lora_A"]._modules
        active = self._active_adapter
        names = [active] if isinstance(active, str) else active
        names = [name for name in names if name in downs]
        if len(names) != 1:
            return "", "several adapters are active" if names else "no adapter is active"
        name: str = names[0]
        if name in self.lora_variant:
            return "", f"the adapter is a {type(self.lora_variant[name]).__name__}"
        down, up = downs[name], self._modules["lora_B"]._modules[name]
        dropout = self._modules["lora_dropout"]._modules[name]
        if type(down) is not nn.Linear or type(up) is not nn.Linear or up.bias is not None:
            return "", "the adapter has a bias or layers of its own kind"
        if type(dropout) not in (nn.Dropout, nn.Identity):
            return "", f"the adapter's dropout is a {type(dropout).__name__}"
        if _hooked(down) or _hooked(up) or _hooked(dropout):
            return "", "the adapter's layers have hooks"
        a, b = down.weight, up.weight
        if not (_plain(a) and _plain(b) and a.dtype == b.dtype and x.dtype in _FLOATS):
            return "", "the adapter is sharded, quantised or of a dtype without a kernel"
        if x.dtype != a.dtype and not getattr(self, "cast_input_dtype_enabled", True):
            return "", "casting the input to the adapter's dtype is disabled"
        return name, ""

    def _is_small(self: Any, x: Tensor) -> bool:
        numbers = x.numel() + x.numel() // self.in_features * self.out_features
        if numbers >= _FEW or torch.compiler.is_compiling():
            return False
        if numbers < _FEW // 8 or not self.training:
            return True
        # a stored mask and a dropped copy cost more than calls do, much earlier
        return all(
            type(dropout) is not nn.Dropout for dropout in self._modules["lora_dropout"]._modules.values()
        )

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._is_small(x):
            small: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return small
        name, reason = self._adapter(x, bool(args or kwargs))
        if reason:
            if not torch.compiler.is_compiling():
                self._llm2clip_notes.say(reason)
            result: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return result
        modules = self._modules
        a = modules["lora_A"]._modules[name].weight
        b = modules["lora_B"]._modules[name].weight
        dropout = modules["lora_dropout"]._modules[name]
        p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
        base, scaling = modules["base_layer"], float(self.scaling[name])
        if type(base) is nn.Linear and _plain(base.weight) and not _hooked(base):
            autocast = torch.is_autocast_enabled(x.device.type)
            if autocast or x.dtype == base.weight.dtype:
                return lora_linear(x, base.weight, base.bias, a, b, scaling, dropout_p=p)
        # whatever the base layer is, it makes its own product
        y = base(x)
        # what a hook has kept of it must not change
        return lora_add(y.clone() if base._forward_hooks else y, x, a, b, scaling, dropout_p=p)


class FusedLoraLinear(_Fused, lora.Linear):  # type: ignore[misc]
    """peft's `lora.Linear` with the fused forward."""


_FUSED: dict[type[nn.Module], type[nn.Module]] = {lora.Linear: FusedLoraLinear}

if hasattr(lora, "Linear8bitLt"):

    class FusedLinear8bitLt(_Fused, lora.Linear8bitLt):  # type: ignore[misc]
        """peft's 8-bit LoRA layer; bitsandbytes makes the base product."""

    _FUSED[lora.Linear8bitLt] = FusedLinear8bitLt

if hasattr(lora, "Linear4bit"):

    class FusedLinear4bit(_Fused, lora.Linear4bit):  # type: ignore[misc]
        """peft's 4-bit LoRA layer; bitsandbytes makes the base product."""

    _FUSED[lora.Linear4bit] = FusedLinear4bit


def _why_skipped(layer: Any) -> str:
    if isinstance(layer, _Fused):
        return "fused already"
    if type(layer) not in _FUSED:
        return f"{type(layer).__name__} layer"
    if "forward" in layer.__dict__:
        # it has bound peft's forward, and would call that one whatever the class
        return "its forward is replaced (accelerate's hooks)"
    if layer.lora_A and all(name in layer.lora_variant for name in layer.lora_A):
        return f"{type(next(iter(layer.lora_variant.values()))).__name__} layer"
    return ""


class FusedLora(Handle):
    """What `fuse_lora` changed; `undo()` or leaving a `with` block changes it back.

    Attributes:
        fused: LoRA layers that got the fused forward.
        skipped: reason -> LoRA layers that were left as they are.
    """

    def __init__(self, layers: list[tuple[nn.Module, type[nn.Module]]], skipped: dict[str, int]) -> None:
        super().__init__(*(partial(_unfuse, layer, original) for layer, original in layers))
        self.fused = len(layers)
        self.skipped = skipped

    def __enter__(self) -> FusedLora:
        return self


def _unfuse(layer: nn.Module, original: type[nn.Module]) -> None:
    layer.__class__ = original
    layer.__dict__.pop("_llm2clip_notes", None)


def fuse_lora(model: nn.Module) -> FusedLora:
    """Runs the LoRA layers of a peft model through `llm2clip_kernels.lora_linear`, in place.

    Parameters, their names and the files that peft writes stay as they are; adapters may be loaded, switched,
    merged and deleted afterwards. A layer is fused for calls with one active, unmerged, plain LoRA adapter;
    any other call runs peft's own forward, and the reason is logged once; so does one with few rows, where peft is
    as fast. A deep copy or a pickle of the model
    is fused like the model; `undo` concerns the model itself.

    The results differ from peft's by rounding alone, except that dropout draws its mask from one seed per call
    rather than one number per element: the same distribution, another mask under the same seed.

    Args:
        model: a peft model, or any module with peft LoRA layers in it.

    Returns:
        The handle: `undo()`, `fused`, `skipped`; also a context manager.

    Raises:
        ValueError: the model has no LoRA layer.

    Example:
        >>> handle = fuse_lora(get_peft_model(model, LoraConfig(target_modules="all-linear")))
    """
    notes = _Notes()
    layers: list[tuple[nn.Module, type[nn.Module]]] = []
    skipped: Counter[str] = Counter()
    for layer in [m for m in model.modules() if isinstance(m, LoraLayer)]:
        reason = _why_skipped(layer)
        if reason:
            skipped[reason] += 1
            continue
        layers.append((layer, type(layer)))
        layer.__class__ = _FUSED[type(layer)]
        layer.__dict__["_llm2clip_notes"] = notes
    if not layers and not skipped:
        raise ValueError(
            f"fuse_lora: {type(model).__name__} has no LoRA layer; give it the model after get_peft_model"
        )
    kept = ", ".join(f"{count} ({reason})" for reason, count in skipped.items()) or "none"
    log.info("fuse_lora: %d LoRA layers fused, left as they are: %s", len(layers), kept)
    return FusedLora(layers, dict(skipped))
