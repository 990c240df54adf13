"""open_clip's losses (3.3 and main): its names, signatures, values and gradients, without the logits."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import distributed
from ..autocast import follows_autocast
from ..checks import check_paired, scale_tensor
from ..contrastive import symmetric_terms, zero_of
from ..similarity_lse.op import similarity_lse_with_positives


class ClipLoss(nn.Module):
    """open_clip's `ClipLoss` (3.3 and main), without the N×N logits.

    The four flag combinations give open_clip's values and parameter gradients (after DDP's averaging), its
    biased ones included:

    | local_loss | gather_with_grad | value | gradient of the towers |
    |---|---|---|---|
    | False | False | global mean | 1/world_size of the true one (open_clip's default) |
    | False | True | global mean | exact |
    | True | False | this rank's mean | biased: gathered features are constants, its own too |
    | True | True | this rank's mean | exact |

    Args:
        local_loss: score local rows only, and return this rank's mean.
        gather_with_grad: let gradients flow to other ranks' features.
        cache_labels: accepted; there are no labels to cache.
        rank: this process in the default group.
        world_size: processes in the default group; 1 never communicates.
        use_horovod: not supported; raises ValueError when True.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("ClipLoss: Horovod is not supported; launch with torchrun and use_horovod=False")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """Returns the column of every row's positive, (num_logits,) int64, as open_clip defines it."""
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        return torch.arange(first, first + num_logits, device=device, dtype=torch.long)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns this rank's (B, B) logits per image and per text. Only for inspection: it stores them."""
        per_image = logit_scale * image_features @ text_features.T
        if logit_bias is not None:
            per_image = per_image + logit_bias
        return per_image, per_image.T

    @follows_autocast
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """
        Args:
            image_features: (B, D), unit norm.
            text_features: (B, D), unit norm, row i belongs to image i.
            logit_scale: already exponentiated.
            logit_bias: cancels; gets a zero gradient.
            output_dict: return {"contrastive_loss": loss}.
        """
        check_paired(image_features, text_features, "ClipLoss", "images and texts")
        if self.world_size > 1:
            loss = self._over_ranks(image_features, text_features, logit_scale)
        else:
            loss = symmetric_terms(image_features, text_features, logit_scale)[0].mean()
        loss = loss + zero_of(logit_bias, loss)
        return {"contrastive_loss": loss} if output_dict else loss

    def _over_ranks(
        self, image: Tensor, text: Tensor, logit_scale: Tensor | float, label_smoothing: float = 0.0
    ) -> Tensor:
        if not dist.is_initialized():
            raise ValueError(
                f"ClipLoss: world_size={self.world_size}, but torch.distributed is not initialised; launch "
                "with torchrun and call init_process_group first, or use world_size=1"
            )
        if self.local_loss and not self.gather_with_grad:
            return 0.5 * (
                self._against_constants(image, text, logit_scale, label_smoothing)
                + self._against_constants(text, image, logit_scale, label_smoothing)
            )
        scale = scale_tensor(logit_scale, image, "ClipLoss")
        if not self.gather_with_grad:
            # open_clip's default: each rank has the whole gradient of the scale, its part of the features'
            scale = distributed.scale_gradient(scale, float(self.world_size))
        terms, total = symmetric_terms(image, text, scale, label_smoothing=label_smoothing, distributed_=True)
        if self.local_loss:
            return terms.mean()
        if self.gather_with_grad:
            terms = distributed.scale_gradient(terms, float(self.world_size))
        return distributed.report_sum(terms.sum(), None) / total

    def _against_constants(
        self, rows: Tensor, others: Tensor, logit_scale: Tensor | float, label_smoothing: float = 0.0
    ) -> Tensor:
        """Mean cross-entropy of this rank's rows against everybody's others, which get no gradient."""
        counts = distributed.row_counts(rows.shape[0], None, rows.device)
        candidates = distributed.gather_rows(others.detach(), counts, None)
        first = sum(counts[: dist.get_rank()])
        row, _, pos, low = similarity_lse_with_positives(
            rows, candidates, logit_scale, directions="rows", diagonal=first
        )
        assert pos is not None
        terms = (row - pos) + (low[: rows.shape[0]] - low[rows.shape[0] :])
        if label_smoothing > 0.0:
            mean = scale_tensor(logit_scale, rows, "ClipLoss") * (
                rows.to(row.dtype) @ candidates.to(row.dtype).mean(0)
            )
            terms = terms + label_smoothing * (pos - mean)
        return terms.mean()
