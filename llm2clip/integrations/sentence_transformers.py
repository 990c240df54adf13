"""sentence-transformers' ranking losses with the fused kernels: change the import, keep the trainer.

Both are subclasses of the originals: same constructors, configuration, model card and checks. Where a setting is
not covered (another similarity than the cosine, sparse embeddings, columns of different dtypes or lengths) they
compute as the original does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sentence_transformers.util import cos_sim
from torch import Tensor

from llm2clip_kernels import ranking_loss

try:
    from sentence_transformers.sentence_transformer import losses
except ImportError:
    # until 5.3
    from sentence_transformers import losses

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _covered(similarity_fct: object, embeddings: list[Tensor]) -> bool:
    """Whether the kernels compute what the original would."""
    if similarity_fct is not cos_sim or len(embeddings) < 2:
        return False
    first = embeddings[0]
    return all(
        t.layout == torch.strided
        and t.dim() == 2
        and t.shape == first.shape
        and t.numel() > 0
        and t.dtype == first.dtype
        and t.dtype in _FLOATS
        and t.device == first.device
        for t in embeddings
    )


def _fused(options: Any, embeddings: list[Tensor]) -> Tensor:
    """The loss of this rank's queries under the options of a loss of sentence-transformers.

    Args:
        options: the loss; before 5.3 it has neither directions nor hardness.
        embeddings: as in `compute_loss_from_embeddings`.
    """
    queries, docs, *negatives = (F.normalize(t, p=2, dim=-1) for t in embeddings)
    terms = ranking_loss(
        queries,
        docs,
        negatives,
        options.scale,
        directions=getattr(options, "directions", ("query_to_doc",)),
        partition_mode=getattr(options, "partition_mode", "joint"),
        hardness_mode=getattr(options, "hardness_mode", None),
        hardness_strength=getattr(options, "hardness_strength", 0.0),
        reduction="none",
        gather=options.gather_across_devices and dist.is_available() and dist.is_initialized(),
        grad_reduction="sum",
    )
    return terms.mean()


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """sentence-transformers' `MultipleNegativesRankingLoss` in O(N·D) memory, every option of it.

    The loss is returned in fp32 (fp64 for fp64) whatever the embeddings' dtype. With gather_across_devices ranks
    may hold batches of different sizes, and each returns its own mean as the original does.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """
        Args:
            embeddings: queries, positives, then columns of hard negatives, each (B, D), of any norm.
            labels: not used; row i of every column belongs to query i.

        Returns:
            0-dim loss of this rank's queries.
        """
        if not _covered(self.similarity_fct, embeddings):
            loss: Tensor = super().compute_loss_from_embeddings(embeddings, labels)
            return loss
        return _fused(self, embeddings)


class CachedMultipleNegativesRankingLoss(losses.CachedMultipleNegativesRankingLoss):
    """sentence-transformers' `CachedMultipleNegativesRankingLoss` with the fused loss.

    Embedding is cached in mini-batches as in the original; the loss over the whole batch needs no mini-batches
    of its own, since it never stores the scores.
    """

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """
        Args:
            reps: for every column, the embeddings of its mini-batches.
            labels: not used; before 6.0 not passed.
            with_backward: also put the gradients into `reps`, and return the loss detached.

        Returns:
            0-dim loss of this rank's queries.
        """
        embeddings = [torch.cat(column) for column in reps]
        if not _covered(self.similarity_fct, embeddings):
            passed = () if labels is None else (labels,)
            plain: Tensor = super().calculate_loss(reps, *passed, with_backward=with_backward)
            return plain
        loss = _fused(self, embeddings)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


__all__ = ["CachedMultipleNegativesRankingLoss", "MultipleNegativesRankingLoss"]
