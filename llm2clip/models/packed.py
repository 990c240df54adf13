"""Packed captions: many captions as one sequence without padding, through transformers' attention interface.

The model's own code runs unchanged. What makes a packed batch right is that positions restart with every
caption and that attention never leaves a caption (`llm2clip_kernels.packed_attention`); everything else in a
decoder works token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llm2clip.errors import ModelError
from llm2clip.models.bidirectional import attention_mask
from llm2clip.models.tokens import CaptionBatch, Tokens
from llm2clip.packing import pack
from llm2clip_kernels import packed_attention, segment_mean

IMPLEMENTATION = "llm2clip_packed"
# arguments by which models ask for more than softmax attention: sinks, biases, selected keys
_OTHER_ATTENTION = ("s_aux", "sinks", "position_bias", "indices", "block_indices")


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """B captions laid end to end, T tokens in all.

    Attributes:
        input_ids: (T,) int64.
        position_ids: (T,) int64, from 0 in every caption.
        cu_seqlens: (B + 1,) int32; caption b owns the tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1.
        pool_starts: (B,) int64, the first pooled token of each caption, counted from the start of the pack.
        max_seqlen: tokens of the longest caption.
        empty: whether a caption has no token to pool.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    pool_starts: Tensor
    max_seqlen: int
    empty: bool = False

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on `device`."""
        return PackedBatch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.cu_seqlens.to(device),
            self.pool_starts.to(device),
            self.max_seqlen,
            self.empty,
        )

    def __len__(self) -> int:
        return self.pool_starts.shape[0]


def flatten(tokens: Sequence[Tokens], device: torch.device | str | None = None) -> PackedBatch:
    """Lay captions end to end, in their given order. A caption without tokens stays a caption of length 0."""
    if not tokens:
        raise ValueError("a pack needs at least one caption")
    ids = torch.tensor([i for t in tokens for i in t.ids], dtype=torch.int64)
    lengths = torch.tensor([len(t.ids) for t in tokens])
    skipped = torch.tensor([t.pool_start for t in tokens])
    batch = _packed(ids, lengths, skipped)
    return batch if device is None else batch.to(device)


def unpad(batch: CaptionBatch) -> PackedBatch:
    """The captions of a padded batch laid end to end; reads the masks on the host."""
    real = batch.attention_mask.bool()
    lengths = real.sum(dim=1)
    skipped = torch.where(batch.pool_mask.any(dim=1), batch.pool_mask.int().argmax(dim=1), lengths)
    return _packed(batch.input_ids[real], lengths, skipped)


def _packed(ids: Tensor, lengths: Tensor, skipped: Tensor) -> PackedBatch:
    edges = nn.functional.pad(lengths.cumsum(0), (1, 0))
    positions = torch.arange(len(ids), device=ids.device) - edges[:-1].repeat_interleave(lengths)
    longest, empty = int(lengths.max()), bool((lengths <= skipped).any())
    return PackedBatch(ids, positions, edges.to(torch.int32), edges[:-1] + skipped, longest, empty)


def make_packs(
    lengths: Sequence[int], token_budget: int, alone_above: int | None = None
) -> list[NDArray[np.int64]]:
    """Put captions into packs of at most `token_budget` tokens, first-fit decreasing; deterministic.

    Args:
        lengths: tokens of each caption.
        token_budget: tokens of a pack, at least 1; a longer caption has a pack of its own.
        alone_above: longer captions share no pack (see `own_pack_above`); None: any may.

    Returns:
        For each pack the indices of its captions, longest first (neighbours in length are attended to
        together); packs with long captions come first, so that memory peaks at once.
    """
    sizes = np.asarray(lengths, dtype=np.int64).reshape(-1)
    counted = sizes if alone_above is None else np.where(sizes > alone_above, token_budget, sizes)
    return [part[np.argsort(-sizes[part], kind="stable")] for part in pack(counted, token_budget)]


def pool_packed(hidden: Tensor, batch: PackedBatch, kind: str) -> Tensor:
    """Pool token states (T, dim) into (B, dim) fp32 (fp64 for fp64), as `pooling.pool` does; without tokens zeros.

    Args:
        hidden: (T, dim) any float dtype.
        batch: the pack.
        kind: `mean`, `weighted_mean` (weights 1, 2, ..., n), `eos` or `last` (the last token), or `bos` (the first).
    """
    ends = batch.cu_seqlens[1:].long()
    wide = torch.promote_types(hidden.dtype, torch.float32)
    out = hidden.new_zeros(len(batch), hidden.shape[1], dtype=wide)
    if kind in ("eos", "last", "bos"):
        starts = batch.cu_seqlens[:-1].long()
        place = starts if kind == "bos" else ends - 1
        found = hidden[place.clamp(0, len(hidden) - 1)] if len(hidden) else out
        return torch.where((ends > starts)[:, None], found.to(wide), out)
    if batch.empty:
        whole = ends > batch.pool_starts
        return (
            out.index_copy(0, whole.nonzero()[:, 0], _means(hidden, batch, kind, whole))
            if whole.any()
            else out
        )
    return _means(hidden, batch, kind, None)


def _means(hidden: Tensor, batch: PackedBatch, kind: str, kept: Tensor | None) -> Tensor:
    """Plain or weighted means of the captions that `kept` (B,) marks, None for all; none of them empty."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    starts, ends, pooled = batch.cu_seqlens[:-1].long(), batch.cu_seqlens[1:].long(), batch.pool_starts
    edges = batch.cu_seqlens
    if kept is not None:
        # the tokens of what is left out fall to the sequence after it, outside of its span
        starts, ends, pooled = starts[kept], ends[kept], pooled[kept]
        edges = torch.cat([ends.new_zeros(1), ends])
        edges[-1] = len(hidden)
        starts = edges[:-1]
    spans = torch.stack([pooled - starts, ends - starts], dim=1)
    if kind == "weighted_mean":
        counts = ends - pooled
        place = torch.arange(len(hidden), device=hidden.device)
        owner = torch.searchsorted(edges[1:].long(), place, right=True)
        weights = 2 * (place - pooled[owner] + 1) / (counts[owner] + 1)
        hidden = hidden.to(wide) * weights[:, None]
    return segment_mean(hidden, edges, spans=spans).to(wide)


def model_inputs(batch: PackedBatch) -> dict[str, Any]:
    """Keyword arguments for a transformers decoder, itself or inside peft."""
    return {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        # four dimensions: transformers takes it for a finished mask and makes no (T, T) one
        "attention_mask": batch.input_ids.new_zeros(1, 1, 1, 1),
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
        "use_cache": False,
    }


def refusal(model: Any, max_length: int) -> str:
    """Why a model cannot run packed; empty if it can.

    Args:
        model: transformers base model.
        max_length: longest caption in tokens.
    """
    config = model.config
    if getattr(config, "attention_dropout", 0.0):
        return f"its attention_dropout is {config.attention_dropout}, packed attention has none"
    limit = original_length(model, "dynamic")
    if limit is not None and max_length > limit:
        return (
            f"its dynamic RoPE rescales with the longest caption beyond {limit} tokens, so an embedding would "
            f"depend on its neighbours; set max_length to at most {limit}, it is {max_length}"
        )
    if not getattr(model, "_supports_attention_backend", True):
        return f"{type(model).__name__} does not use transformers' attention interface"
    other = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if other:
        return f"it has layers of type {', '.join(other)}, in which captions of a pack would see each other"
    return ""


def original_length(model: Any, kind: str) -> int | None:
    """Longest sequence, in tokens, up to which a RoPE of this kind leaves frequencies alone; None without one."""
    for parameters in _rope_parameters(model.config):
        if parameters.get("rope_type") == kind:
            limit = parameters.get("original_max_position_embeddings")
            return int(limit or model.config.max_position_embeddings)
    return None


def own_pack_above(model: Any) -> int | None:
    """Captions with more tokens need a pack of their own: longrope picks its frequencies by the longest one."""
    return original_length(model, "longrope")


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    found = getattr(config, "rope_parameters", None) or {}
    # families with several kinds of layers have one dictionary for each
    nested = [value for value in found.values() if isinstance(value, dict)]
    return nested or [found]


def install(model: Any) -> None:
    """Make a transformers base model attend through `packed_attention`, packed or not, from now on.

    It is a name in the model's configuration, not a context around a forward: gradient checkpointing runs
    layers again in the backward, and must meet the same attention there.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation(IMPLEMENTATION)


@torch.no_grad()
def install_tried(model: Any, *, bidirectional: bool) -> str:
    """Install packed attention if a pack then gives what the model gives for one caption at a time.

    Layers that mix tokens without attention (convolutions, recurrences) and attention of a kind that `attend`
    does not know would otherwise give other embeddings without an error. A short caption is embedded by itself
    with the model's own attention, and in two packs, behind two other captions.

    Args:
        model: transformers base model whose direction flags are set (`bidirectional.set_attention`).
        bidirectional: the direction of its attention.

    Returns:
        Why the model cannot run packed, which leaves its own attention in place; empty once installed.
    """
    own = model.config._attn_implementation
    weight = next(model.parameters())
    vocabulary = int(getattr(model.config, "vocab_size", 8))
    *before, last = ([i * 7 % vocabulary for i in part] for part in ((1, 2, 3, 4), (8, 9, 10, 11), (5, 6, 7)))

    def behind(first: list[int]) -> Tensor:
        pack = flatten([Tokens(ids, 0, False) for ids in (first, last)], weight.device)
        found: Tensor = model(**model_inputs(pack)).last_hidden_state[0, len(first) :]
        return found.double()

    training = model.training
    model.eval()
    try:
        row = torch.tensor([last], device=weight.device)
        mask = attention_mask(model, torch.ones_like(row), bidirectional=bidirectional)
        alone = model(input_ids=row, attention_mask=mask, use_cache=False).last_hidden_state[0].double()
        install(model)
        try:
            one, other = (behind(first) for first in before)
        except Exception as error:  # whatever a family's own code makes of arguments that it does not expect
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            # rounding of half precision grows to several percent through deep models, but hardly differs between
            # two packs of one shape
            full = weight.dtype in (torch.float32, torch.float64)
            seen, away = ((one - t).norm().item() / alone.norm().item() for t in (other, alone))
            reason = ""
            if not seen <= (1e-3 if full else 0.05):
                reason = "its layers let captions of a pack see each other"
            elif not away <= (1e-3 if full else 0.3):
                reason = "its own attention gives other states"
    finally:
        model.train(training)
    if reason:
        model.set_attn_implementation(own)
    return reason


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query (B, Hq, L, Dh), key and value (B, Hk, L, Dh) -> (B, L, Hq, Dh).

    With `cu_seq_lens_q` the one row is a pack. Without it every row is a caption of L tokens; rows with padding
    come with the mask that transformers made for them.

    Raises:
        ModelError: attention dropout, sinks or position biases, which packed attention does not have.
    """
    unknown = [name for name in _OTHER_ATTENTION if others.get(name) is not None]
    if unknown:
        raise ModelError(f"packed attention has no {', '.join(unknown)}, which {type(module).__name__} needs")
    if dropout:
        raise ModelError(f"packed attention has no dropout, the model asks for {dropout}; use layout=padded")
    batch, heads, length, width = query.shape
    if torch.is_autocast_enabled(query.device.type):
        # rotary embeddings leave queries and keys in fp32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(dtype) for t in (query, key, value))
    if cu_seq_lens_q is None and attention_mask is not None:
        return _masked(query, key, value, attention_mask, scaling, softcap), None
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(0, (batch + 1) * length, length, device=query.device)
        max_length_q = length
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    # transformers counts the token itself in causal windows, and not in windows to both sides
    window = None if sliding_window is None else sliding_window - 1 if causal else sliding_window
    q, k, v = (t.transpose(1, 2).reshape(batch * length, -1, width) for t in (query, key, value))
    out = packed_attention(
        q,
        k,
        v,
        cu_seq_lens_q,
        length if max_length_q is None else int(max_length_q),
        causal=causal,
        window=window,
        scale=scaling,
        softcap=softcap,
    )
    return out.view(batch, length, heads, width), None


def _masked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, softcap: float | None
) -> Tensor:
    """Dense attention under a finished mask (B, 1, L, L), boolean (True: visible) or additive."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    if softcap is None:
        sdpa = nn.functional.scaled_dot_product_attention
        return sdpa(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2).contiguous()
    logits = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    logits = softcap * torch.tanh(logits.float() / softcap)
    lowest = torch.finfo(logits.dtype).min
    logits = logits.masked_fill(~mask, lowest) if mask.dtype == torch.bool else logits + mask
    return (logits.softmax(dim=-1).to(value.dtype) @ value).transpose(1, 2).contiguous()
