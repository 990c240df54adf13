"""The layers that `bench_lora` measures, and their inputs.

`peft`: its own `lora.Linear`. `compile`: peft's arithmetic under torch.compile. `unsloth` and `lorafusion`: the
autograd of these projects (unsloth/kernels; LoRAFusion, arXiv 2510.00206) in torch's products. The first makes x Aᵀ
again in the backward pass and has no dropout; the second cuts the graph at x Aᵀ, which it keeps with the dropout's
mask. LoRAFusion's own kernels are Triton for GPUs, in no package, and are not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.providers import Provider, Registry
from llm2clip_kernels import lora_linear

SCALING = 2.0

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """T rows through an N×K layer of rank R."""

    t: int
    k: int
    n: int
    r: int
    kind: str
    dropout: float = 0.0
    device: str = "cpu"


class Layer:
    """The tensors of one case: x (T, K), weight (N, K) frozen, a (R, K), b (N, R), and the upstream gradient."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        base = torch.bfloat16 if case.kind in ("bfloat16", "adapters") else torch.float32
        low = torch.bfloat16 if case.kind == "bfloat16" else torch.float32

        def make(rows: int, cols: int, scale: float, dtype: torch.dtype) -> Tensor:
            return (torch.randn(rows, cols, generator=generator) * scale).to(case.device, dtype)

        self.case = case
        self.x = make(case.t, case.k, 1.0, base).requires_grad_()
        self.weight = make(case.n, case.k, case.k**-0.5, base)
        self.a = make(case.r, case.k, case.k**-0.5, low).requires_grad_()
        self.b = make(case.n, case.r, 0.3 * case.r**-0.5, low).requires_grad_()
        self.upstream = make(case.t, case.n, 1.0, base if case.kind != "autocast" else torch.bfloat16)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.case.kind == "autocast":
            return torch.autocast(self.case.device, torch.bfloat16)
        return nullcontext()

    def forward(self, call: Call) -> Tensor:
        with torch.no_grad(), self.autocast():
            return call(self.x)

    def step(self, call: Call) -> list[Tensor]:
        self.x.grad = self.a.grad = self.b.grad = None
        with self.autocast():
            y = call(self.x)
        y.backward(self.upstream.to(y.dtype))
        return [y.detach(), *(t.grad for t in (self.x, self.a, self.b) if t.grad is not None)]


def peft_layer(layer: Layer) -> Call:
    """peft's own `lora.Linear` on the tensors of the case."""
    from peft import LoraConfig, get_peft_model

    case = layer.case
    base = nn.Linear(case.k, case.n, bias=False, device=case.device, dtype=layer.weight.dtype)
    config = LoraConfig(
        r=case.r, lora_alpha=SCALING * case.r, lora_dropout=case.dropout, target_modules=["0"]
    )
    model: Any = get_peft_model(nn.Sequential(base), config)
    adapted = model.base_model.model[0]
    base.weight.data = layer.weight
    # the leaves themselves, so that their gradients are those that are compared
    adapted.lora_A["default"]._parameters["weight"] = layer.a
    adapted.lora_B["default"]._parameters["weight"] = layer.b
    called: Call = adapted.train()
    return called


def compiled_layer(layer: Layer) -> Call:
    """peft's arithmetic under torch.compile, whole; compiled once, the sizes are dynamic."""
    p = layer.case.dropout

    def formula(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        dropped = F.dropout(x.to(a.dtype), p) if p else x.to(a.dtype)
        result = F.linear(x, weight)
        return (result + F.linear(F.linear(dropped, a), b) * SCALING).to(result.dtype)

    compiled = torch.compile(formula, fullgraph=True, dynamic=True)
    return lambda x: compiled(x, layer.weight, layer.a, layer.b)


class HandWritten(torch.autograd.Function):
    """unsloth's formulation: updates added by addmm, x Aᵀ made again in the backward pass, no dropout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x, weight, a, b = (t.to(dtype) for t in (x, weight, a, b))
        y = x @ weight.t()
        y.addmm_(x @ a.t(), b.t(), alpha=SCALING)
        ctx.save_for_backward(x, weight, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy,) = gradients
        x, weight, a, b = ctx.saved_tensors
        down = dy @ b
        da = (down.t() @ x).mul_(SCALING)
        db = (dy.t() @ (x @ a.t())).mul_(SCALING)
        dx = (dy @ weight).addmm_(down, a, alpha=SCALING)
        return dx, None, da, db


class SplitGraph(torch.autograd.Function):
    """LoRAFusion's split: dropout and x Aᵀ; x Wᵀ with the update added; backward through both with the mask kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, p: float) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x, weight, a, b = (t.to(dtype) for t in (x, weight, a, b))
        dropped, mask = torch.native_dropout(x, p, True) if p else (x, None)
        s = dropped @ a.t()
        y = x @ weight.t()
        y.addmm_(s, b.t(), alpha=SCALING)
        ctx.p = p
        ctx.save_for_backward(x, weight, a, b, s, mask)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy,) = gradients
        x, weight, a, b, s, mask = ctx.saved_tensors
        ds = (dy @ b).mul_(SCALING)
        db = (dy.t() @ s).mul_(SCALING)
        keep = None if mask is None else mask / (1 - ctx.p)
        da = ds.t() @ (x if keep is None else x * keep)
        dx = dy @ weight
        dx = dx.addmm_(ds, a) if keep is None else dx.add_((ds @ a).mul_(keep))
        return dx, None, da, db, None


def split_graph(layer: Layer) -> Call:
    return lambda x: SplitGraph.apply(x, layer.weight, layer.a, layer.b, layer.case.dropout)


def ours(layer: Layer) -> Call:
    return lambda x: lora_linear(
        x, layer.weight, None, layer.a, layer.b, SCALING, dropout_p=layer.case.dropout
    )


PROVIDERS = Registry()
PROVIDERS.add(Provider("base", lambda layer: lambda x: F.linear(x, layer.weight)))
PROVIDERS.add(Provider("peft", peft_layer, needs=("peft",)))
PROVIDERS.add(Provider("compile", compiled_layer))
PROVIDERS.add(
    Provider("unsloth", lambda layer: lambda x: HandWritten.apply(x, layer.weight, layer.a, layer.b))
)
PROVIDERS.add(Provider("lorafusion", split_graph))
PROVIDERS.add(Provider("ours", ours, ours=True))
