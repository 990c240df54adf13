"""FLOPs of a training sample, counted once by running it, and what the device could do at best (for the MFU)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import llm2clip_kernels  # noqa: F401  # registers the ops counted here
from llm2clip.training.gradient_cache import RandomState
from llm2clip.training.precision import Autocast

log = logging.getLogger("llm2clip.training")

# dense bf16 TFLOP/s (fp16 before Ampere) as NVIDIA's data sheets have them; the first name found counts
_PEAK_TFLOPS = {
    "B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H800": 989.0,
    "A100": 312.0, "A800": 312.0, "A40": 149.7, "A10": 125.0, "L40S": 362.0, "L4": 121.0, "V100": 125.0, "T4": 65.0,
}  # fmt: skip


def peak_tflops(device: torch.device) -> float:
    """Dense half-precision TFLOP/s of a known GPU; 0 for any other device."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAK_TFLOPS.items() if known in name), 0.0)


def flops_per_sample(
    module: nn.Module, chunks: Sequence[Any], device: torch.device, autocast: Autocast
) -> float:
    """FLOPs of one sample's forward and backward, without what is recomputed to save memory.

    The chunks run once in evaluation mode (which leaves gradient checkpointing out); gradients, buffers and random
    numbers are afterwards as before. 0 where they cannot be counted, with a warning.

    Args:
        module: maps a chunk to named outputs; not compiled, not wrapped.
        chunks: a few samples.
        device: device of the module, for its random state.
        autocast: context of the forward.
    """
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    counter = FlopCounterMode(display=False, custom_mapping=OWN_OPS)
    training = module.training
    module.eval()
    try:
        with RandomState.capture(device).replay(device), counter:
            for chunk in chunks:
                with autocast():
                    outputs: Mapping[str, Tensor] = module(chunk)
                roots = [output for output in outputs.values() if output.requires_grad]
                torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
    except RuntimeError as problem:
        log.warning("FLOPs are not counted: %s", str(problem).splitlines()[0])
        return 0.0
    finally:
        for parameter in trained:
            parameter.grad = None
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])
        module.train(training)
    return counter.get_total_flops() / max(1, sum(len(chunk) for chunk in chunks))


def _rows(shape: Sequence[int]) -> int:
    return math.prod(shape[:-1])


def _adapter_block(x: Any, ln_weight: Any, ln_bias: Any, w1: Any, *rest: Any, **more: Any) -> int:
    return 4 * _rows(x) * math.prod(w1)


def _adapter_block_backward(
    dy: Any, x: Any, pre: Any, ln_weight: Any, ln_bias: Any, w1: Any, *rest: Any, **more: Any
) -> int:
    return 8 * _rows(x) * math.prod(w1)


def _layer_norm_linear(x: Any, ln_weight: Any, ln_bias: Any, weight: Any, *rest: Any, **more: Any) -> int:
    return 2 * _rows(x) * math.prod(weight)


def _layer_norm_linear_backward(
    dy: Any, x: Any, ln_weight: Any, ln_bias: Any, weight: Any, *rest: Any, **more: Any
) -> int:
    return 4 * _rows(x) * math.prod(weight)


def _lora_linear(x: Any, weight: Any, bias: Any, a: Any, b: Any, *rest: Any, **more: Any) -> int:
    return 2 * _rows(x) * (math.prod(weight) + math.prod(a) + math.prod(b))


def _lora_linear_backward(dy: Any, x: Any, weight: Any, a: Any, b: Any, *rest: Any, **more: Any) -> int:
    whole = math.prod(weight) if weight is not None else 0
    return 2 * _rows(x) * (whole + 2 * math.prod(a) + 2 * math.prod(b))


def _lora_add(y: Any, x: Any, a: Any, b: Any, *rest: Any, **more: Any) -> int:
    return 2 * _rows(x) * (math.prod(a) + math.prod(b))


def _packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *rest: Any, **more: Any) -> int:
    lengths = cu_seqlens.diff().double()
    return int(4 * q.shape[-2] * q.shape[-1] * lengths.square().sum().item())


def _packed_attention_backward(grad: Tensor, *rest: Any, **more: Any) -> int:
    # five products for the forward's two, the scores made again among them
    return _packed_attention(*rest) * 5 // 2


def _attention_on_cpu(q: Any, k: Any, v: Any, *rest: Any, **more: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _attention_on_cpu_backward(grad: Any, q: Any, k: Any, v: Any, *rest: Any, **more: Any) -> int:
    return int(sdpa_flop_count(q, k, v)) * 5 // 2


def _convolution_backward(
    grad: Any, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, output_mask: Sequence[bool], **more: Any,
) -> int:  # fmt: skip
    # torch's own formula takes every convolution for one without groups, a hundred times too much for depthwise ones
    return 2 * math.prod(x if transposed else grad) * math.prod(weight[1:]) * sum(output_mask[:2])


for _formula in (_packed_attention, _packed_attention_backward):
    setattr(_formula, "_get_raw", True)  # noqa: B010  # the lengths are values, not shapes

_KERNELS: Any = torch.ops.llm2clip_kernels
_ATEN: Any = torch.ops.aten
OWN_OPS: dict[Any, Any] = {
    _KERNELS.adapter_block: _adapter_block,
    _KERNELS.adapter_block_backward: _adapter_block_backward,
    _KERNELS.layer_norm_linear: _layer_norm_linear,
    _KERNELS.layer_norm_linear_backward: _layer_norm_linear_backward,
    _KERNELS.lora_linear: _lora_linear,
    _KERNELS.lora_linear_backward: _lora_linear_backward,
    _KERNELS.lora_add: _lora_add,
    _KERNELS.packed_attention: _packed_attention,
    _KERNELS.packed_attention_backward: _packed_attention_backward,
    _ATEN.convolution_backward: _convolution_backward,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_on_cpu_backward,
}
