"""`adapter_block`: schema, checks, autograd.

    h = LN(x)     a = h W1ᵀ + b1     g = drop(gelu(a))     y = x + g W2ᵀ + b2          gelu(a) = a Φ(a), erf form
    dg = dy W2    da = drop(dg) (Φ(a) + a φ(a))            dh = da W1                   dx = dy + LN'(dh)
    dW2 = dyᵀ g   dW1 = daᵀ h

Six library GEMMs, and four sweeps over rows between them. Saved: x and h W1ᵀ, 3·D numbers a row where torch keeps 6·D
(x, h, a, g with a hidden width of 2·D); statistics, h and g are made again, each inside a sweep that reads the same
rows anyway. Dropout's mask is a function of a seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autocast import full_precision
from ..checks import FLOATS, accumulator
from ..dropout import new_seed
from . import rows

_PARAMETERS = ("ln_weight", "ln_bias", "w1", "b1", "w2", "b2")


def _no_seed(x: Tensor, seed: Tensor | None) -> Tensor:
    return x.new_empty(0, dtype=torch.int64) if seed is None else seed


def nothing(like: Tensor, count: int) -> list[Tensor]:
    """Returns empty fp32 (fp64) tensors for gradients that are not needed: an op may not return one tensor twice."""
    return [like.new_empty(0, dtype=accumulator(like.dtype)) for _ in range(count)]


def add_product(x: Tensor, bias: Tensor | None, g: Tensor, w: Tensor) -> Tensor:
    """Returns x + bias + g wᵀ in the dtype of x, where g and w may be of half precision."""
    y = x.clone() if bias is None else x + bias.to(x.dtype)
    return y.addmm_(g, w.T) if g.dtype == x.dtype else y.add_(g @ w.T)


@torch.library.custom_op("llm2clip_kernels::adapter_block", mutates_args=())
def _forward(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    with full_precision(x.device):
        h = rows.layer_norm(x, rows.parameter(ln_weight, x), rows.parameter(ln_bias, x), eps, w1.dtype)
        pre = h @ w1.T
        del h
        g = torch.empty_like(pre) if keep else pre
        rows.bias_gelu(pre, rows.parameter(b1, pre), _no_seed(x, seed), dropout_p, g)
        return add_product(x, b2, g, w2), pre if keep else pre.new_empty(0)


@_forward.register_fake
def _(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    pre = w1.new_empty(x.shape[0], w1.shape[0]) if keep else w1.new_empty(0)
    return x.new_empty(x.shape), pre


@torch.library.custom_op("llm2clip_kernels::adapter_block_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_x, need_lw, need_lb, need_w1, need_b1, need_w2, need_b2 = needs
    x, dy = x.contiguous(), dy.contiguous()
    weight, bias = rows.parameter(ln_weight, x), rows.parameter(ln_bias, x)
    bias1, seed = rows.parameter(b1, pre), _no_seed(x, seed)
    dx, dlw, dlb, dw1, db1, dw2, db2 = nothing(x, 7)
    before_norm = need_x or need_lw or need_lb
    with full_precision(x.device):
        narrow = dy.to(w2.dtype)
        if before_norm or need_w1 or need_b1:
            da = narrow @ w2
            g, db1 = rows.bias_gelu_backward(pre, bias1, seed, dropout_p, da, need_w2, need_b1)
        elif need_w2:
            g = torch.empty_like(pre)
            rows.bias_gelu(pre, bias1, seed, dropout_p, g)
        if need_w2:
            dw2 = narrow.T @ g
            del g
        if before_norm:
            h = da @ w1
            dx, dlw, dlb, db2 = rows.layer_norm_backward(
                x, weight, bias, eps, h, dy, need_w1, need_x, need_lw, need_lb, need_b2
            )
            # (0, D) otherwise, which differs between implementations
            dx = dx if need_x else nothing(x, 1)[0]
        elif need_w1:
            h = rows.layer_norm(x, weight, bias, eps, w1.dtype)
        if need_w1:
            dw1 = da.T @ h
        if need_b2 and not before_norm:
            db2 = dy.sum(0, dtype=bias1.dtype)
    return dx, dlw, dlb, dw1, db1, dw2, db2


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    width, hidden = x.shape[1], w1.shape[0]
    shapes = [tuple(x.shape), (width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,)]
    dtypes = {0: x.dtype, 3: w1.dtype, 5: w2.dtype}
    gradients = nothing(x, 7)
    for i, (need, shape) in enumerate(zip(needs, shapes, strict=True)):
        if need:
            gradients[i] = x.new_empty(shape, dtype=dtypes.get(i, accumulator(x.dtype)))
    dx, dlw, dlb, dw1, db1, dw2, db2 = gradients
    return dx, dlw, dlb, dw1, db1, dw2, db2


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ln_weight, ln_bias, w1, b1, w2, b2, seed, ctx.eps, ctx.dropout_p, _ = inputs
    _, pre = output
    ctx.dtypes = [None if t is None else t.dtype for t in (x, ln_weight, ln_bias, w1, b1, w2, b2)]
    ctx.save_for_backward(x, pre, ln_weight, ln_bias, w1, b1, w2, seed)
    ctx.mark_non_differentiable(pre)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 11
    needs = list(ctx.needs_input_grad[:7])
    gradients = torch.ops.llm2clip_kernels.adapter_block_backward(
        dy, *ctx.saved_tensors, ctx.eps, ctx.dropout_p, needs
    )
    wanted = [g.to(d) if need else None for g, need, d in zip(gradients, needs, ctx.dtypes, strict=True)]
    return (*wanted, None, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def check_operands(name: str, x: Tensor, matrices: dict[str, Tensor], vectors: dict[str, Any]) -> None:
    """Raises TypeError or ValueError unless x (..., D) and the parameters are floats that fit.

    Args:
        name: of the op, for messages.
        x: (..., D).
        matrices: weights by name, of one dtype: that of x, or half precision where x is fp32.
        vectors: name -> (tensor or None, its length).
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x must be a tensor, got {type(x).__name__}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: x must be (..., D) with D >= 1, got shape {tuple(x.shape)}")
    kind = next(iter(matrices.values())).dtype
    for label, t in {"x": x, **matrices, **{k: v for k, (v, _) in vectors.items() if v is not None}}.items():
        if t.dtype not in FLOATS:
            raise TypeError(f"{name}: {label} must be fp32, bf16, fp16 or fp64, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name}: {label} must be on the device of x, {x.device}, got {t.device}")
        if label in matrices and t.dtype != kind:
            raise TypeError(f"{name}: the weights must have one dtype, got {kind} and {t.dtype}")
    if kind != x.dtype and not (x.dtype == torch.float32 and kind in (torch.bfloat16, torch.float16)):
        raise TypeError(
            f"{name}: x is {x.dtype} and the weights are {kind}; expected one dtype, or weights of half precision "
            "under an fp32 x. Convert x, or use autocast"
        )
    for label, (t, size) in vectors.items():
        if t is not None and (t.dim() != 1 or t.shape[0] != size):
            raise ValueError(f"{name}: {label} must be ({size},), got shape {tuple(t.shape)}")


def autocast_weights(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Returns the weights in the autocast dtype where autocast is on and x is not fp64, else as they are."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return weights
    dtype = torch.get_autocast_dtype(device)
    return tuple(w.to(dtype) if w.dtype in FLOATS else w for w in weights)


def autocast_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x, in fp32 where autocast gave the weight another half precision than that of x."""
    halves = (torch.float16, torch.bfloat16)
    mixed = x.dtype in halves and weight.dtype in halves and x.dtype != weight.dtype
    return x.float() if mixed and torch.is_autocast_enabled(x.device.type) else x


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Returns whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def adapter_block(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x + W2 drop(gelu(W1 LN(x) + b1)) + b2, saving two activations for the backward instead of four.

    The residual block of LLM2CLIP's adapter (arXiv 2411.04997), GELU in its erf form as in `nn.GELU()`. LayerNorm,
    GELU and their gradients are computed in fp32 (fp64 for fp64) whatever the dtype. Differentiable, once, in x
    and every parameter; nothing is computed or kept for those that need no gradient. Parameter gradients are
    summed in a fixed order.

    Autocast: the weights, and with them the GEMMs and what is saved of them, take its dtype; x and the result
    keep theirs, as in torch's own composition. An x of the other half precision is taken to fp32, as torch's sum
    of the two is.

    Args:
        x: (..., D) fp32, bf16, fp16 or fp64.
        ln_weight: (D,) or None.
        ln_bias: (D,) or None.
        w1: (hidden, D); dtype of x, or half precision where x is fp32.
        b1: (hidden,) or None.
        w2: (D, hidden), dtype of w1.
        b2: (D,) or None.
        eps: of LayerNorm.
        dropout_p: share of the hidden activations set to zero; pass 0 outside training.
        seed: one int64 on the device of x, which decides dropout's mask; None draws one from torch's generator.
            The mask is another one than nn.Dropout's from the same generator state, and the same in every backend.

    Returns:
        (..., D), dtype of x.

    Raises:
        TypeError, ValueError: shapes, dtypes or options that do not fit, with what was expected.
    """
    name = "adapter_block"
    for label, w in (("w1", w1), ("w2", w2)):
        if not isinstance(w, Tensor) or w.dim() != 2:
            raise ValueError(f"{name}: {label} must be a matrix, got {getattr(w, 'shape', type(w).__name__)}")
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x must be a tensor, got {type(x).__name__}")
    w1, w2 = autocast_weights(x, w1, w2)
    x = autocast_rows(x, w1)
    hidden, width = w1.shape
    vectors = {
        "ln_weight": (ln_weight, width),
        "ln_bias": (ln_bias, width),
        "b1": (b1, hidden),
        "b2": (b2, width),
    }
    check_operands(name, x, {"w1": w1, "w2": w2}, vectors)
    if x.shape[-1] != width:
        raise ValueError(f"{name}: x must be (..., {width}) for w1 {tuple(w1.shape)}, got {tuple(x.shape)}")
    if tuple(w2.shape) != (width, hidden):
        raise ValueError(
            f"{name}: w2 must be ({width}, {hidden}) for w1 {tuple(w1.shape)}, got {tuple(w2.shape)}"
        )
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{name}: dropout_p must lie in [0, 1], got {dropout_p}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"{name}: seed must be one int64, got {seed.dtype} of shape {tuple(seed.shape)}")
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = new_seed(x.device)
    keep = needs_gradient(x, ln_weight, ln_bias, w1, b1, w2, b2)
    y, _ = _forward(
        x.reshape(-1, width), ln_weight, ln_bias, w1, b1, w2, b2, seed, float(eps), float(dropout_p), keep
    )
    return y.view(x.shape)


__all__ = ["adapter_block"]
