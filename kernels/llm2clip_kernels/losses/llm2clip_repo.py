"""The loss of LLM2CLIP's own trainer (`eva_clip/loss.py`): its signature, value, gradients and accuracies."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..autocast import follows_autocast
from ..checks import check_paired
from ..contrastive.infonce import symmetric_terms
from ..similarity_rank import similarity_rank_counts
from . import open_clip


class ClipLoss(nn.Module):
    """LLM2CLIP's `ClipLoss`: the loss and the share of pairs found at rank 1, without the N×N logits.

    Exported as `LLM2CLIPLoss`, since open_clip's class has the same name. Flags, values and gradients over
    several processes are those of `losses.ClipLoss` (open_clip's); `local_loss=True, gather_with_grad=True` is
    what LLM2CLIP trains with.

    The accuracies come from exact ranks, one more pass over the products. Where scores tie, the original takes
    the first of them; here a tie counts by the chance of a random choice, so a collapsed model scores 1/N.

    Args:
        local_loss: score local rows only; loss and accuracies are then this rank's.
        gather_with_grad: let gradients flow to other ranks' features.
        cache_labels: accepted; there are no labels to cache.
        rank: this process in the default group.
        world_size: processes in the default group; 1 never communicates.
        use_horovod: not supported; raises ValueError when True.
        smoothing: label smoothing, in [0, 1], as timm's `LabelSmoothingCrossEntropy` and torch's
            `label_smoothing` define it: spread evenly over all candidates, the right one included.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0.0 <= smoothing <= 1.0:
            raise ValueError(f"ClipLoss: smoothing must lie in [0, 1], got {smoothing}")
        self._loss = open_clip.ClipLoss(
            local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod
        )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.smoothing = smoothing

    @follows_autocast
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            image_features: (B, D), unit norm.
            text_features: (B, D), unit norm, row i belongs to image i.
            logit_scale: already exponentiated.

        Returns:
            0-dim loss, and {"i2t": ..., "t2i": ...}: 0-dim fp32 shares of images whose text comes first, and of
            texts whose image does. Of all ranks, or of this one for `local_loss`.
        """
        check_paired(image_features, text_features, "ClipLoss", "images and texts")
        if self.world_size > 1:
            loss = self._loss._over_ranks(image_features, text_features, logit_scale, self.smoothing)
        else:
            terms, _ = symmetric_terms(
                image_features, text_features, logit_scale, label_smoothing=self.smoothing
            )
            loss = terms.mean()
        return loss, self._accuracies(image_features, text_features)

    @torch.no_grad()
    def _accuracies(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        over_ranks = self.world_size > 1
        i2t, t2i = similarity_rank_counts(image, text, gather=over_ranks)
        assert t2i is not None
        hits = torch.stack([i2t.accuracy().sum(), t2i.accuracy().sum()])
        if over_ranks and not self.local_loss:
            dist.all_reduce(hits)
            hits = hits / i2t.candidates
        else:
            hits = hits / image.shape[0]
        return {"i2t": hits[0], "t2i": hits[1]}
