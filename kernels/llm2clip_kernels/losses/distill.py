"""open_clip's distillation loss (3.3 and main): its signature, values and gradients, without four N×N matrices."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from .. import distributed
from ..autocast import follows_autocast
from ..checks import check_paired, scale_tensor
from ..contrastive import distill_terms
from ..similarity_distill import similarity_distill_with_rounding
from .open_clip import ClipLoss


class DistillClipLoss(ClipLoss):
    """open_clip's `DistillClipLoss`: the contrastive loss, and the cross-entropy against a teacher's similarities.

    Constructor, flag combinations and gradients over ranks as in `ClipLoss`. The teacher's features and scale get no
    gradient (in open_clip they come from a frozen model and need none).
    """

    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """Returns the mean cross-entropy of rows of given logits, both (B, N); `forward` never makes them."""
        return -(teacher_logits.softmax(1) * student_logits.log_softmax(1)).sum(1).mean()

    @follows_autocast
    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """
        Args:
            image_features: (B, D), unit norm.
            text_features: (B, D), unit norm, row i belongs to image i.
            logit_scale: already exponentiated.
            dist_image_features: (B, E) of the teacher, unit norm.
            dist_text_features: (B, E) of the teacher, unit norm.
            dist_logit_scale: the teacher's, already exponentiated.
            output_dict: return {"contrastive_loss": ..., "distill_loss": ...}.

        Returns:
            Contrastive and distillation loss, 0-dim.
        """
        check_paired(image_features, text_features, "DistillClipLoss", "images and texts")
        check_paired(
            dist_image_features, dist_text_features, "DistillClipLoss", "the teacher's images and texts"
        )
        student = image_features, text_features, logit_scale
        teacher = dist_image_features, dist_text_features, dist_logit_scale
        if self.world_size > 1:
            contrastive, distill = self._both_over_ranks(student, teacher)
        else:
            first, second, _ = distill_terms(*student, *teacher)
            contrastive, distill = first.mean(), second.mean()
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill

    def _both_over_ranks(
        self, student: tuple[Tensor, Tensor, Tensor | float], teacher: tuple[Tensor, Tensor, Tensor | float]
    ) -> tuple[Tensor, Tensor]:
        if not dist.is_initialized():
            raise ValueError(
                f"DistillClipLoss: world_size={self.world_size}, but torch.distributed is not initialised; launch "
                "with torchrun and call init_process_group first, or use world_size=1"
            )
        image, text, logit_scale = student
        teacher_image, teacher_text, teacher_scale = teacher
        if self.local_loss and not self.gather_with_grad:
            by_image = self._both_against_constants(student, teacher)
            by_text = self._both_against_constants(
                (text, image, logit_scale), (teacher_text, teacher_image, teacher_scale)
            )
            return 0.5 * (by_image[0] + by_text[0]), 0.5 * (by_image[1] + by_text[1])
        scale = scale_tensor(logit_scale, image, "DistillClipLoss")
        if not self.gather_with_grad:
            # open_clip's default: each rank has the whole gradient of the scale, its part of the features'
            scale = distributed.scale_gradient(scale, float(self.world_size))
        *terms, total = distill_terms(image, text, scale, *teacher, distributed_=True)
        if self.local_loss:
            return terms[0].mean(), terms[1].mean()
        if self.gather_with_grad:
            terms = [distributed.scale_gradient(t, float(self.world_size)) for t in terms]
        contrastive, distill = (distributed.report_sum(t.sum(), None) / total for t in terms)
        return contrastive, distill

    def _both_against_constants(
        self, student: tuple[Tensor, Tensor, Tensor | float], teacher: tuple[Tensor, Tensor, Tensor | float]
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropies of this rank's rows against everybody's others, which get no gradient."""
        rows, others, scale = student
        p, q, teacher_scale = teacher
        counts = distributed.row_counts(rows.shape[0], None, rows.device)
        candidates = distributed.gather_rows(others.detach(), counts, None)
        teacher_candidates = distributed.gather_rows(q.detach(), counts, None)
        first = sum(counts[: dist.get_rank()])
        of, low = similarity_distill_with_rounding(
            rows, candidates, scale, p, teacher_candidates, teacher_scale, directions="rows", diagonal=first
        )
        assert of.positives is not None and low.positives is not None
        contrastive = (of.row_lse - of.positives) + (low.row_lse - low.positives)
        distill = (of.row_lse - of.cross_row) + (low.row_lse - low.cross_row)
        return contrastive.mean(), distill.mean()
