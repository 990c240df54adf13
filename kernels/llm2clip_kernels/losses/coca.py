"""open_clip's CoCa loss (3.3 and main): contrastive without the N×N logits, plus the captioning cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .open_clip import ClipLoss


class CoCaLoss(ClipLoss):
    """open_clip's `CoCaLoss`: both losses weighted; the contrastive one is `ClipLoss`, flags and all.

    Args:
        caption_loss_weight: multiplies the captioning loss.
        clip_loss_weight: multiplies the contrastive loss; 0 leaves it out.
        pad_id: label that the captioning loss ignores.
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: as in `ClipLoss`.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        self.caption_loss_weight = caption_loss_weight
        self.clip_loss_weight = clip_loss_weight
        # this rank's captions alone, as in open_clip
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """
        Args:
            image_features: (B, D), unit norm; not looked at where clip_loss_weight is 0.
            text_features: (B, D), unit norm, row i belongs to image i.
            logits: (B, T, V) of the captioning decoder.
            labels: (B, T) int64 token ids.
            logit_scale: already exponentiated.
            output_dict: return {"contrastive_loss": ..., "caption_loss": ...}.

        Returns:
            Contrastive and captioning loss, 0-dim, weighted.
        """
        if self.clip_loss_weight:
            loss = super().forward(image_features, text_features, logit_scale)
            assert isinstance(loss, Tensor)
            contrastive = self.clip_loss_weight * loss
        else:
            contrastive = torch.zeros((), device=logits.device)
        caption = self.caption_loss(logits.permute(0, 2, 1), labels) * self.caption_loss_weight
        if output_dict:
            return {"contrastive_loss": contrastive, "caption_loss": caption}
        return contrastive, caption
