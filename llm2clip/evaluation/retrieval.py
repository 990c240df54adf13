"""Image-text retrieval with short captions, long captions and translated captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llm2clip.evaluation.gallery import ROLES, Item, image_features, open_gallery, text_features
from llm2clip.evaluation.ranks import group_ids, rank_positives, summarise
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.settings import DataSettings


class Embeddings(Protocol):
    """Who has the LLM embeddings of captions."""

    def get(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (n, llm_dim)."""
        ...


Lookup = Callable[[Sequence[str]], Tensor]  # captions -> LLM embeddings (n, llm_dim)


@dataclass(frozen=True)
class TextSide:
    """Features of one kind of caption for the items that have it.

    Attributes:
        kind: `short`, `long` or a language.
        rows: which rows of the image features they belong to.
        texts: the captions.
        features: (len(rows), D), unit norm.
    """

    kind: str
    rows: list[int]
    texts: list[str]
    features: Tensor


def text_sides(model: LLM2CLIP, items: Sequence[Item], lookup: Lookup) -> list[TextSide]:
    """Every kind of caption that at least two items have, roles first and languages after."""
    chosen: list[tuple[str, list[int], list[str]]] = []
    for role in ROLES:
        rows = [row for row, item in enumerate(items) if role in item.texts]
        chosen.append((role, rows, [items[row].texts[role] for row in rows]))
    for language in dict.fromkeys(name for item in items for name in item.translations):
        rows = [row for row, item in enumerate(items) if language in item.translations]
        chosen.append((language, rows, [items[row].translations[language] for row in rows]))
    return [
        TextSide(kind, rows, texts, text_features(model, lookup(texts)))
        for kind, rows, texts in chosen
        if len(rows) >= 2
    ]


def image_text_rows(images: Tensor, side: TextSide, *, seed: int = 0) -> list[dict[str, Any]]:
    """Both directions for one kind of caption; the gallery is the items that have such a caption.

    Items with the same caption are each other's right answers.

    Returns:
        Two rows `{queries, direction, scores}`.
    """
    own = images[side.rows]
    groups = group_ids(side.texts)
    pairs = (("text → image", side.features, own), ("image → text", own, side.features))
    return [
        {
            "queries": side.kind,
            "direction": direction,
            "scores": summarise(rank_positives(queries, answers, groups, groups), seed=seed),
        }
        for direction, queries, answers in pairs
    ]


def quick_retrieval(
    model: LLM2CLIP,
    data: DataSettings,
    captions: Embeddings,
    *,
    gallery: int = 500,
    batch_size: int = 64,
) -> dict[str, float]:
    """Held-out recall for the log of a training run: `val/<kind>/<direction>_r<k>` and its chance.

    Captions are embedded by the store that the run reads, or by its LLM. The model is left in the mode it was in.
    """
    was_training = model.training
    try:
        chosen, images = image_features(model, open_gallery(data, gallery), batch_size=batch_size, show=False)
        values: dict[str, float] = {}
        items = [_without_translations(item) for item in chosen.items]
        for side in text_sides(model, items, captions.get):
            for row in image_text_rows(images, side):
                short = "t2i" if row["direction"].startswith("text") else "i2t"
                for k in ("1", "10"):
                    values[f"val/{side.kind}/{short}_r{k}"] = row["scores"]["recall"][k]
                values[f"val/{side.kind}/chance_r10"] = row["scores"]["chance"]["10"]
        return values
    finally:
        model.train(was_training)


def _without_translations(item: Item) -> Item:
    """The item without translations: they cost time and are not what a training log is for."""
    return Item(item.index, item.key, item.group, item.texts, meta=item.meta)


def similarity_block(images: Tensor, side: TextSide, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Cosine similarities (count, count) of the first texts (rows) and their images (columns)."""
    rows = side.rows[:count]
    block: Tensor = side.features[: len(rows)] @ images[rows].T
    return block.to(torch.float32).numpy()
