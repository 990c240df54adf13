"""What `packed_attention` means: one dense (T, T) mask over the whole pack. Tests compare against this."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Masked softmax attention over all T tokens; differentiable, O(Hq·T²) memory.

    Args:
        q: (T, Hq, Dh), any floating dtype; the result has its dtype.
        k: (T, Hk, Dh); query head h reads key head h // (Hq / Hk).
        v: (T, Hk, Dh).
        cu_seqlens: (B + 1,) integers; sequence b owns the tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1.
        causal: a token sees itself and the tokens before it.
        window: a token sees at most so many tokens before it (and after it, if not causal); None: all.
        scale: factor on the dot products; None: Dh ** -0.5.
        softcap: logits become softcap · tanh(logits / softcap); None: as they are.

    Returns:
        (T, Hq, Dh).
    """
    tokens, heads, width = q.shape
    group = heads // k.shape[1]
    keys, values = (t.repeat_interleave(group, dim=1) for t in (k, v))
    logits = torch.einsum("ihd,jhd->hij", q, keys) * (width**-0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    place = torch.arange(tokens, device=q.device)
    owner = torch.searchsorted(cu_seqlens.long(), place, right=True)
    distance = place[:, None] - place[None, :]
    visible = owner[:, None] == owner[None, :]
    if causal:
        visible &= distance >= 0
    if window is not None:
        visible &= distance.abs() <= window
    weights = logits.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hij,jhd->ihd", weights, values)
