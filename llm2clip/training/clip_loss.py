"""The loss of the CLIP stage, on named outputs: image against text, text towers, and a teacher.

| output | shape | meaning |
|---|---|---|
| `image` | (B, D) | image features, unit norm |
| `text` | (C, D) | caption features, unit norm; those of one image next to each other |
| `clip_text` | (C, D) | the same captions through CLIP's own text tower |
| `scale`, `bias` | () | multiplier of the logits; added to them by the sigmoid loss |
| `tower` | (B, F) | the vision tower's features, unit norm |
| `groups` | (B,) int64 | what an image shows; absent where all differ |
| `owners` | (C,) int64 | the row of `image` that a caption belongs to; absent where C = B and row i has caption i |
| `teacher_image`, `teacher_text`, `teacher_tower` | (B, E), (C, E), (B, F) | a teacher's, unit norm |

All but the pair that a loss is about may be absent.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llm2clip.settings.clip_loss import ClipLossSettings
from llm2clip.training.distill import feature_loss, mean_over_ranks
from llm2clip_kernels import distill_loss, infonce_loss, sigmoid_loss
from llm2clip_kernels.distributed import Group


class ClipLoss:
    """Named outputs of a batch to its loss and metrics.

    Args:
        settings: of the loss.
        several: whether an image may have several captions in a batch.
        texts: whether the two text towers learn from each other too (the third of the paper's three losses).
        group: ranks that share the batch; None: this process alone.
    """

    def __init__(
        self, settings: ClipLossSettings, *, several: bool = False, texts: bool = False, group: Group = None
    ) -> None:
        self.settings, self._texts, self._group = settings, texts, group
        self.duplicates = settings.duplicates
        if settings.duplicates == "auto":
            self.duplicates = "positive" if several or settings.kind == "sigmoid" else "mask"

    def __call__(self, outputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (0-dim) over the batch of all ranks, and 0-dim metrics."""
        distill, metrics = self.settings.distill, dict[str, Tensor]()
        parts = self._contrastive(outputs) if self.settings.kind != "none" else {}
        if distill.similarity:
            contrastive, similarity = self._similarity(outputs)
            parts["similarity"] = distill.similarity * similarity
            if self.settings.kind == "softmax" and self._plain(outputs):
                parts["contrastive"] = contrastive  # of the same sweep
        for name in ("image", "text", "tower"):
            weights = getattr(distill, name)
            if any(weights.values()):
                value = feature_loss(outputs[name], outputs[f"teacher_{name}"], weights, self._group)
                parts[f"distill_{name}"] = value
        if "image" in outputs and "text" in outputs:
            with torch.no_grad():
                pairs = _by_caption(outputs["image"], outputs) * outputs["text"]
                metrics["positive_similarity"] = pairs.sum(-1).float().mean()
        metrics |= {f"logit_{name}": outputs[name].detach() for name in ("scale", "bias") if name in outputs}
        if len(parts) > 1:
            metrics |= {f"loss_{name}": value.detach() for name, value in parts.items()}
        return torch.stack(list(parts.values())).sum(), metrics

    def _contrastive(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        image, text, weight = outputs["image"], outputs["text"], self.settings.clip_text
        image_ids, text_ids = self._ids(outputs)
        parts: dict[str, Tensor] = {}
        if not (
            self.settings.distill.similarity and self.settings.kind == "softmax" and self._plain(outputs)
        ):
            parts["contrastive"] = self._pair(image, text, image_ids, text_ids, outputs)
        if "clip_text" in outputs:
            parts["clip_text"] = weight * self._pair(
                image, outputs["clip_text"], image_ids, text_ids, outputs
            )
            if self._texts:
                parts["texts"] = weight * self._pair(text, outputs["clip_text"], text_ids, text_ids, outputs)
        return parts

    def _pair(
        self, x: Tensor, y: Tensor, x_ids: Tensor | None, y_ids: Tensor | None, outputs: Mapping[str, Tensor]
    ) -> Tensor:
        """The contrastive loss between (M, D) and (N, D): rows in pairs, or joined by their ids."""
        several = "owners" in outputs
        if self.settings.kind == "cosine":
            x = _by_caption(x, outputs) if len(x) != len(y) else x
            return mean_over_ranks(1.0 - (x * y).sum(-1), self._group)
        scale, bias = outputs["scale"], outputs.get("bias")
        if self.settings.kind == "sigmoid":
            assert bias is not None
            return sigmoid_loss(x, y, scale, bias, x_groups=x_ids, y_groups=y_ids, group=self._group)
        return infonce_loss(
            x,
            y,
            scale,
            groups=x_ids,
            y_groups=y_ids if several else None,
            same_group="positive" if self.duplicates == "positive" or several else "mask",
            label_smoothing=self.settings.label_smoothing,
            logit_bias=bias,
            group=self._group,
        )

    def _similarity(self, outputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Contrastive loss of pairs and the cross-entropy against the teacher's similarities, from one sweep."""
        return distill_loss(
            _by_caption(outputs["image"], outputs),
            outputs["text"],
            outputs["scale"],
            _by_caption(outputs["teacher_image"], outputs),
            outputs["teacher_text"],
            self.settings.distill.teacher_scale,
            group=self._group,
        )

    def _plain(self, outputs: Mapping[str, Tensor]) -> bool:
        """Whether the softmax loss is that of pairs without ids and smoothing."""
        return self._ids(outputs)[0] is None and not self.settings.label_smoothing

    def _ids(self, outputs: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Ids of images and of captions; None where every pair is for itself."""
        owners, groups = outputs.get("owners"), outputs.get("groups")
        if self.duplicates in ("drop", "keep"):
            groups = None
        if owners is None:
            return groups, groups
        if groups is None:
            # every image for itself, over all ranks
            rank = torch.distributed.get_rank(self._group) if self._group is not None else 0
            groups = torch.arange(len(outputs["image"]), device=owners.device) + (rank << 40)
        return groups, groups[owners]


def _by_caption(image_rows: Tensor, outputs: Mapping[str, Tensor]) -> Tensor:
    """(B, D) rows of images repeated for each of their captions, (C, D)."""
    owners = outputs.get("owners")
    return image_rows if owners is None else image_rows[owners]
