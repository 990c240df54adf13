"""Full (bidirectional) attention in decoder LLMs, made explicit and proven for every layer.

transformers offers `config.is_causal = False`, but that flag alone is not enough: the SDPA path drops a
mask without padding and then falls back to the attention module's own `is_causal`, which most families
hard-code to True, so a single unpadded caption would silently be encoded causally. Three things are
therefore set: the configuration flag, the flag of every attention module, and an explicit mask. Whether a
layer really looks ahead is not believed but measured (`verify_attention`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.errors import ModelError

_PROBE_TOKENS = 4
_SHORT = 128  # tokens; the plain products keep (B, H, L, L) for the backward pass

Mask = Tensor | dict[str, Tensor]


def set_attention(model: nn.Module, *, bidirectional: bool) -> None:
    """Set the direction flags of a transformers model's configuration and attention modules, in place."""
    config: Any = model.config
    config.is_causal = not bidirectional
    if not bidirectional and getattr(config, "use_bidirectional_attention", None):
        config.use_bidirectional_attention = False
    for module in model.modules():
        if isinstance(getattr(module, "is_causal", None), bool):
            module.is_causal = not bidirectional  # type: ignore[assignment]


def attention_mask(model: nn.Module, padding: Tensor, *, bidirectional: bool) -> Mask:
    """The mask to hand to a transformers decoder as `attention_mask`.

    Args:
        model: transformers base model (without a language-model head).
        padding: (B, L), nonzero for real tokens; padded positions lie on the right.
        bidirectional: False returns `padding`, from which transformers builds its causal masks.

    Returns:
        `padding` where transformers must build the mask itself (causal, or a flash/flex attention
        implementation); else a (B, 1, L, L) mask, boolean for SDPA and additive for eager attention, or
        one mask per layer type for families that mix full and sliding-window layers. Sliding windows
        reach equally far both ways: |i - j| <= window, as in transformers' own bidirectional masks.
    """
    config: Any = model.config
    implementation = getattr(config, "_attn_implementation", "eager")
    if not bidirectional or implementation not in ("sdpa", "eager"):
        return padding
    length = padding.shape[1]
    # a padded query may see itself: a row without any key would become NaN and poison the batch
    own = torch.eye(length, dtype=torch.bool, device=padding.device)
    full = padding.bool()[:, None, None, :] | own  # (B, 1, L, L)

    def finish(mask: Tensor) -> Tensor:
        if implementation == "sdpa":
            return mask
        dtype = next(model.parameters()).dtype
        blocked = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return blocked.masked_fill_(~mask, torch.finfo(dtype).min)

    window = getattr(config, "sliding_window", None)
    windowed = full
    if window is not None and window < length:
        position = torch.arange(length, device=padding.device)
        windowed = full & ((position[:, None] - position[None, :]).abs() <= window)
    layer_types = set(getattr(config, "layer_types", None) or ())
    if not layer_types:
        return finish(windowed)
    unknown = layer_types - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelError(
            f"{type(model).__name__} has layers of type {', '.join(sorted(unknown))}; only full_attention "
            "and "
            "sliding_attention can be made bidirectional. Use bidirectional=False or another model."
        )
    return {"full_attention": finish(full), "sliding_attention": finish(windowed)}


def attention_kernel(ids: Tensor) -> AbstractContextManager[None]:
    """The attention products for a padded batch (B, L) of token ids: torch's choice, or plain ones where it is slow."""
    # torch's fused CPU attention has a slow bf16 backward: with short captions it takes a third of a LoRA
    # step, and plain matrix products save most of that. Both passes of a gradient cache must take the same.
    if ids.device.type == "cpu" and torch.is_autocast_enabled("cpu") and ids.shape[1] <= _SHORT:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the transformer layers: the longest list of modules of one type."""
    best: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) > len(best)
            and len({type(m) for m in module}) == 1
        ):
            best = [(f"{name}.{index}", layer) for index, layer in enumerate(module)]
    if not best:
        raise ModelError(f"{type(model).__name__} has no list of transformer layers; it is not a decoder LLM")
    return best


@torch.no_grad()
def verify_attention(model: nn.Module, *, bidirectional: bool) -> None:
    """Measure, layer by layer, whether a token's state depends on the tokens after it.

    Every layer gets the same four-token input twice, the second time with another last token; earlier
    outputs must change for a bidirectional layer and must not change for a causal one. It is run with one
    sequence without padding, the case in which transformers drops masks.

    Raises:
        ModelError: naming the first layer, its type and that of its attention, that has the other direction.
    """
    layers = decoder_layers(model)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    changed: list[bool] = []
    replay = False
    # a mixture of experts groups tokens by expert, so the last token decides how products of the others are rounded
    full = next(model.parameters()).dtype in (torch.float32, torch.float64)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if not replay:
            inputs.append(hidden.clone())
            return None
        hidden = inputs[len(changed)].clone()
        # mirrored: as far away as a state of the same norm can be, whatever normalisation follows
        hidden[:, -1] = -hidden[:, -1].flip(-1)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden: Tensor = (output if isinstance(output, Tensor) else output[0])[:, :-1]
        if replay:
            old, now = outputs[len(changed)].double(), hidden.double()
            moved = (now - old).norm(dim=-1) / old.norm(dim=-1).clamp_min(1e-30)
            changed.append(moved.max().item() > (1e-6 if full else 1e-3))
        else:
            outputs.append(hidden.clone())

    device = next(model.parameters()).device
    vocabulary = int(getattr(model.config, "vocab_size", _PROBE_TOKENS + 1))
    ids = (torch.arange(1, _PROBE_TOKENS + 1, device=device) * 7 % vocabulary)[None]
    padding = torch.ones_like(ids)
    training = model.training
    model.eval()
    handles: list[Any] = []
    for _, layer in layers:
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after))
    try:
        mask = attention_mask(model, padding, bidirectional=bidirectional)
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        replay = True
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    for (name, layer), looks_ahead in zip(layers, changed, strict=True):
        if looks_ahead != bidirectional:
            attention = next(
                (type(m).__name__ for n, m in layer.named_modules() if n.endswith(("attn", "attention"))), "?"
            )
            stays, wanted = ("causal", "bidirectional") if bidirectional else ("bidirectional", "causal")
            raise ModelError(
                f"layer {name} ({type(layer).__name__}, attention {attention}) of {type(model).__name__} "
                "stays "
                f"{stays} although {wanted} attention was asked for. This model family or this transformers "
                f"version is not supported; set llm.bidirectional={str(not bidirectional).lower()} or use "
                "another."
            )
