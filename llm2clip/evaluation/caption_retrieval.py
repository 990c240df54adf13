"""Caption retrieval accuracy (CRA): does an encoder find the other caption of the same image?

Short and long captions of the held-out items are each other's queries and galleries, once with the base
LLM and once after the LLM stage. Where translations exist, the translated caption looks for the original.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llm2clip.data.store import EmbeddingStore
from llm2clip.errors import StoreError
from llm2clip.evaluation.gallery import Gallery
from llm2clip.evaluation.ranks import group_ids, rank_positives, summarise
from llm2clip.models.bidirectional import set_attention
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.lora import base_model, is_peft
from llm2clip.progress import Progress


@dataclass(frozen=True)
class CaptionPairs:
    """Two captions for each of some items.

    Attributes:
        name: `short ↔ long`, or a language and the original.
        first, second: the captions; the two of one place belong together.
        labels: names of the two directions.
    """

    name: str
    first: list[str]
    second: list[str]
    labels: tuple[str, str]


def caption_pairs(gallery: Gallery) -> list[CaptionPairs]:
    """Short with long captions, and each language with the original, where at least two items have both.

    Pairs of two equal captions are left out: they would be found by any encoder.
    """
    found = [
        CaptionPairs(
            "short ↔ long",
            *_columns(
                [(item.texts["short"], item.texts["long"]) for item in gallery.with_texts("short", "long")]
            ),
            ("short → long", "long → short"),
        )
    ]
    for language in gallery.languages():
        pairs = [
            (i.translations[language], i.original[language]) for i in gallery.items if language in i.original
        ]
        labels = (f"{language} → original", f"original → {language}")
        found.append(CaptionPairs(f"{language} ↔ original", *_columns(pairs), labels))
    return [pairs for pairs in found if len(pairs.first) >= 2]


def _columns(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    kept = [pair for pair in pairs if pair[0] != pair[1]]
    return [first for first, _ in kept], [second for _, second in kept]


def caption_texts(pairs: Sequence[CaptionPairs]) -> list[str]:
    """Every caption of the pairs, once."""
    return list(dict.fromkeys(text for pair in pairs for text in (*pair.first, *pair.second)))


def caption_rows(
    encoder: str, stage: str, pairs: Sequence[CaptionPairs], embeddings: dict[str, Tensor], *, seed: int = 0
) -> list[dict[str, Any]]:
    """Both directions of every kind of pair.

    Items that share a caption on either side are each other's right answers.

    Args:
        encoder: name of the encoder, shown in the tables.
        stage: `base` or `tuned`.
        pairs: what to retrieve.
        embeddings: caption -> (dim,).

    Returns:
        Rows `{encoder, stage, pairs, direction, scores}`.
    """
    import torch

    rows = []
    for pair in pairs:
        groups = group_ids(pair.first, pair.second)
        first = torch.stack([embeddings[text] for text in pair.first])
        second = torch.stack([embeddings[text] for text in pair.second])
        for direction, queries, answers in zip(pair.labels, (first, second), (second, first), strict=True):
            scores = summarise(rank_positives(queries, answers, groups, groups), seed=seed)
            rows.append(
                {
                    "encoder": encoder,
                    "stage": stage,
                    "pairs": pair.name,
                    "direction": direction,
                    "scores": scores,
                }
            )
    return rows


@contextmanager
def base_encoder(encoder: CaptionEncoder, *, bidirectional: bool) -> Iterator[None]:
    """Make `encoder` the base LLM for a while: its adapter off and its attention as asked.

    Saves loading the LLM a second time.
    """
    model: Any = encoder.model
    before = encoder.bidirectional
    encoder.bidirectional = bidirectional
    set_attention(base_model(model), bidirectional=bidirectional)
    try:
        if is_peft(model):
            with model.disable_adapter():
                yield
        else:
            yield
    finally:
        encoder.bidirectional = before
        set_attention(base_model(model), bidirectional=before)


class CaptionEmbedder:
    """LLM embeddings of captions: from the store where it holds them, else from the encoder.

    Args:
        store: embedding store, or None.
        encoder: the tuned encoder, or None. When both are given, a store made by another encoder is
            refused.
        token_budget: tokens per forward pass; 0: as `CaptionEncoder.encode` chooses.

    Raises:
        StoreError: the store was made by another encoder.
    """

    def __init__(
        self, store: EmbeddingStore | None, encoder: CaptionEncoder | None, *, token_budget: int = 0
    ) -> None:
        if store is not None and encoder is not None:
            store.check_fingerprint(encoder.fingerprint())
        self._store, self._encoder, self._budget = store, encoder, token_budget

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (len(texts), llm_dim) fp32.

        Raises:
            StoreError: captions are neither in the store nor can they be computed.
        """
        import torch

        if self._encoder is None:
            if self._store is None:
                raise StoreError("captions need an embedding store or an LLM; set store or llm.path")
            return self._store.get(texts)
        if self._store is None:
            return encode(self._encoder, texts, self._budget, "embedding captions")
        rows = self._store.find(texts)
        missing = list(dict.fromkeys(text for text, row in zip(texts, rows.tolist(), strict=True) if row < 0))
        out = torch.empty(len(texts), self._store.dim)
        known = torch.from_numpy(rows >= 0)
        out[known] = self._store.read(rows[rows >= 0])
        if missing:
            computed = encode(self._encoder, missing, self._budget, "embedding captions")
            place = {text: number for number, text in enumerate(missing)}
            wanted = [place[texts[position]] for position in (~known).nonzero()[:, 0].tolist()]
            out[~known] = computed[wanted]
        return out


def encode(encoder: CaptionEncoder, texts: Sequence[str], token_budget: int, title: str) -> Tensor:
    """`encoder.encode` with progress."""
    with Progress(len(texts), title, "captions") as progress:
        return encoder.encode(texts, token_budget=token_budget, progress=progress)
