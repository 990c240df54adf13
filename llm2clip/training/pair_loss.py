"""The contrastive loss of the LLM stage: symmetric or one-directional, hard negatives, masks, prefixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from llm2clip.errors import ConfigError
from llm2clip.settings import CaptionLossSettings
from llm2clip.training.false_negatives import shared_ids
from llm2clip.training.world import World
from llm2clip_kernels import infonce_loss, l2_normalize, nll_loss


def prefix_dims(dims: Sequence[int], width: int) -> tuple[int, ...]:
    """Widths over which the loss is averaged, the whole embedding always among them, widest first.

    Raises:
        ConfigError: a prefix is wider than the embedding.
    """
    if any(dim > width for dim in dims):
        raise ConfigError(
            f"loss.matryoshka: {max(dims)} dimensions are more than the {width} of the LLM's embeddings"
        )
    return tuple(sorted({*dims, width}, reverse=True))


class PairLoss:
    """Loss over the pairs of all ranks, each text normalised first.

    `symmetric`: InfoNCE in both directions; hard negatives are candidates of the queries only. `hard_negative`:
    queries against positives and hard negatives, LLM2Vec's loss. With Matryoshka prefixes (arXiv 2205.13147) the mean
    of the loss over them.

    Args:
        settings: kind, masks, prefixes.
        world: the ranks.
    """

    def __init__(self, settings: CaptionLossSettings, world: World) -> None:
        self._settings, self._world = settings, world

    def __call__(self, outputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (0-dim) and metrics (0-dim, detached).

        Args:
            outputs: `query` and `positive` (B, D); `negative` (K, D) or absent; `scale` 0-dim; `keys` (B, 3) and
                `negative_keys` (K, 3) int64 (`false_negatives.pair_keys`); `truncated` (B, 2).
        """
        query, positive = outputs["query"], outputs["positive"]
        negative = outputs.get("negative")
        keys = [outputs["keys"]] + ([outputs["negative_keys"]] if negative is not None else [])
        ids = shared_ids(keys, self._world) if self._settings.mask_duplicates else None
        dims = prefix_dims(self._settings.matryoshka, query.shape[1])
        terms = [self._at(dim, query, positive, negative, outputs["scale"], ids) for dim in dims]
        with torch.no_grad():
            similarity = nn.functional.cosine_similarity(query, positive, dim=-1).mean()
        metrics = {"positive_similarity": similarity, "truncated": outputs["truncated"].mean()}
        if self._settings.learn_scale:
            metrics["scale"] = outputs["scale"].detach()
        return terms[0] if len(terms) == 1 else torch.stack(terms).mean(), metrics

    def _at(
        self,
        dim: int,
        query: Tensor,
        positive: Tensor,
        negative: Tensor | None,
        scale: Tensor,
        ids: list[Tensor] | None,
    ) -> Tensor:
        """The loss of the first `dim` dimensions."""
        x, y = l2_normalize(query[:, :dim]), l2_normalize(positive[:, :dim])
        spread = self._world.size > 1
        groups, negative_groups = (None, None) if ids is None else (ids[0], ids[1] if len(ids) > 1 else None)
        if negative is not None and not spread and len(negative) == 0:
            negative, negative_groups = None, None
        if negative is None and self._settings.kind == "symmetric":
            return infonce_loss(x, y, scale, groups=groups, gather=spread)
        hard = None if negative is None else l2_normalize(negative[:, :dim])
        loss = nll_loss(x, y, hard, scale, groups=groups, negative_groups=negative_groups, gather=spread)
        if self._settings.kind == "symmetric":
            loss = 0.5 * (loss + nll_loss(y, x, None, scale, groups=groups, gather=spread))
        return loss
