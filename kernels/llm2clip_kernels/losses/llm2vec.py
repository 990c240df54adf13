"""LLM2Vec's loss: its signature, value and gradients, without the score matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import distributed
from ..autocast import follows_autocast
from ..checks import check_paired
from ..contrastive import nll_loss
from ..l2_normalize import l2_normalize


class HardNegativeNLLLoss:
    """LLM2Vec's loss for contrastive training with hard negatives, without the score matrix.

    Queries against [positives; negatives] of all ranks; normalises inside. Every rank returns the mean over
    all ranks' queries; gradients are meant for DDP's averaging, as in LLM2Vec.

    Args:
        scale: multiplier of the cosine similarities.
        similarity_fct: None for the cosine. Another function is called for the whole matrix, without kernels.
    """

    def __init__(
        self, scale: float = 20.0, similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        self.scale = scale
        self.similarity_fct = similarity_fct

    def __call__(self, q_reps: Tensor, d_reps_pos: Tensor, d_reps_neg: Tensor | None = None) -> Tensor:
        """
        Args:
            q_reps: (B, D) queries.
            d_reps_pos: (B, D) positives.
            d_reps_neg: (K, D) hard negatives, any K, or None.

        Returns:
            0-dim loss.
        """
        gather = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        # over ranks, one without hard negatives still takes part in gathering the others'
        if d_reps_neg is not None and d_reps_neg.shape[0] == 0 and not gather:
            d_reps_neg = None
        is_cosine = self.similarity_fct is None or getattr(self.similarity_fct, "__name__", "") == "cos_sim"
        if is_cosine:
            return self._fused(q_reps, d_reps_pos, d_reps_neg, gather)
        return self._plain(q_reps, d_reps_pos, d_reps_neg, gather)

    @follows_autocast
    def _fused(self, q: Tensor, pos: Tensor, neg: Tensor | None, gather: bool) -> Tensor:
        check_paired(q, pos, "HardNegativeNLLLoss", "queries and positives")
        negatives = None if neg is None else l2_normalize(neg)
        return nll_loss(l2_normalize(q), l2_normalize(pos), negatives, self.scale, gather=gather)

    def _plain(self, q: Tensor, pos: Tensor, neg: Tensor | None, gather: bool) -> Tensor:
        every: list[Any] = [q, pos] if neg is None else [q, pos, neg]
        if gather:
            every = [
                distributed.gather_rows(t, distributed.row_counts(t.shape[0], None, t.device), None)
                for t in every
            ]
        assert self.similarity_fct is not None
        scores = self.similarity_fct(every[0], torch.cat(every[1:])) * self.scale
        return F.cross_entropy(scores, torch.arange(scores.shape[0], device=scores.device))
