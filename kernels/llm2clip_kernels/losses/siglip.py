"""open_clip's `SigLipLoss` (3.3 and main): its names, signature, values and gradients, without the logits."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..autocast import follows_autocast
from ..checks import check_paired
from ..contrastive.sigmoid import local_sigmoid_terms
from ..contrastive.statistics import Transport

_GATHERED = ("reduce", "gather")
_RING = ("bidir", "shift")


class SigLipLoss(nn.Module):
    """open_clip's `SigLipLoss` (3.3 and main), without logits in memory.

    Every rank returns the loss of its own images against everybody's texts, divided by its own number of images;
    averaged over the ranks as DDP does, its gradients are those of the whole batch. All four ways of moving the
    texts give the same numbers. Two of them exist here: "bidir" and "shift" pass the texts round in a ring, so that
    no rank ever holds all of them; "reduce" and "gather" gather them. Ranks may hold different numbers of pairs.

    Args:
        cache_labels: accepted; there are no labels to cache.
        rank: this process in the default group.
        world_size: processes in the default group; 1 never communicates.
        dist_impl: "bidir" (None), "shift", "reduce" or "gather".
        chunk_size: accepted; the workspace is bounded whatever it is.

    Raises:
        ValueError: an unknown dist_impl.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in (*_RING, *_GATHERED):
            raise ValueError(
                f"SigLipLoss: dist_impl must be bidir, shift, reduce or gather, got {dist_impl!r}"
            )
        self.chunk_size = chunk_size

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """Returns (num_logits, num_logits) of -1, with 1 on the diagonal unless `negative_only`. For inspection."""
        labels = torch.full((num_logits, num_logits), -1, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """Returns this rank's (B, B) logits. Only for inspection: it stores them."""
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    @follows_autocast
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """
        Args:
            image_features: (B, D), unit norm.
            text_features: (B, D), unit norm, row i belongs to image i.
            logit_scale: already exponentiated.
            logit_bias: added to every logit; None for zero.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            0-dim sum over this rank's images and everybody's texts, over B.
        """
        check_paired(image_features, text_features, "SigLipLoss", "images and texts")
        if self.world_size > 1 and not dist.is_initialized():
            raise ValueError(
                f"SigLipLoss: world_size={self.world_size}, but torch.distributed is not initialised; launch "
                "with torchrun and call init_process_group first, or use world_size=1"
            )
        loss, _ = local_sigmoid_terms(
            image_features,
            text_features,
            logit_scale,
            0.0 if logit_bias is None else logit_bias,
            weight=1.0 / image_features.shape[0],
            transport=self._transport(),
        )
        return {"contrastive_loss": loss} if output_dict else loss

    def _transport(self) -> Transport:
        if self.world_size <= 1:
            return "local"
        return "ring" if self.dist_impl in _RING else "gather"
