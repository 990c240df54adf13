"""LLM embeddings of captions for the models under evaluation: from stores, else from the LLM itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm2clip.data.store import EmbeddingStore
from llm2clip.data.store_format import fingerprint_difference, preview
from llm2clip.data.store_lookup import digest_array
from llm2clip.errors import ModelError, StoreError
from llm2clip.evaluation.features import FeatureCache
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.fingerprint import json_digest
from llm2clip.models.llm2clip import LLM2CLIP

_NOTHING = "captions need an embedding store or an LLM; set stores or llm.path"


class OnlineLLM:
    """The LLM, whose embeddings are kept in the cache: several models and runs share them.

    Args:
        encoder: the caption encoder.
        cache: where its embeddings go; of this rank alone.
        token_budget: tokens per forward pass; 0: as `CaptionEncoder.encode` chooses.
    """

    def __init__(self, encoder: CaptionEncoder, cache: FeatureCache, token_budget: int = 0) -> None:
        self.dim = encoder.dim
        self.fingerprint = encoder.fingerprint()  # once: it hashes every weight
        self._encoder, self._cache, self._budget = encoder, cache, token_budget

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (len(texts), dim) fp32."""
        unique = list(dict.fromkeys(texts))

        def produce(rows: Sequence[int]) -> Iterator[Tensor]:
            yield self._encoder.encode([unique[row] for row in rows], token_budget=self._budget)

        identity = {"fingerprint": self.fingerprint, "texts": digest_of_texts(unique)}
        values = self._cache.array("llm", identity, len(unique), produce)
        place = {text: row for row, text in enumerate(unique)}
        return torch.from_numpy(values.gather(np.array([place[text] for text in texts], np.int64)))


class CaptionSource:
    """Embeddings of captions from the first store that holds them, else from the LLM.

    Args:
        stores: stores of one encoder; may be empty.
        llm: the same encoder, or None.

    Attributes:
        fingerprint: identity of the encoder; None where there is neither store nor LLM.
        dim: width of the embeddings, likewise.
    """

    def __init__(self, stores: Sequence[EmbeddingStore], llm: OnlineLLM | None) -> None:
        self.stores, self._llm = list(stores), llm
        first = self.stores[0] if self.stores else llm
        self.fingerprint: dict[str, Any] | None = None if first is None else first.fingerprint
        self.dim: int | None = None if first is None else first.dim

    def identity(self) -> dict[str, Any]:
        """What the embeddings depend on; the precision of a store is a part, since it rounds."""
        return {"fingerprint": self.fingerprint, "stored": [store.dtype for store in self.stores]}

    def describe(self) -> str:
        """Where embeddings come from."""
        places = [f"store {store.path}" for store in self.stores] + ["the LLM"] * (self._llm is not None)
        return ", then ".join(places) or "nowhere"

    def check(self, texts: Sequence[str], what: str) -> None:
        """Refuse captions that are neither stored nor can be computed.

        Args:
            texts: the captions.
            what: where they are from, for the message.

        Raises:
            StoreError: says how many, and shows the first ten.
        """
        if self._llm is not None:
            return
        if not self.stores:
            raise StoreError(_NOTHING)
        unique = list(dict.fromkeys(texts))
        found = np.zeros(len(unique), bool)
        for store in self.stores:
            found |= store.find(unique) >= 0
        if found.all():
            return
        missing = [text for text, there in zip(unique, found.tolist(), strict=True) if not there]
        held = f"only {len(unique) - len(missing)}" if found.any() else "none"
        named = ", ".join(f"{store.path} ({len(store)} captions)" for store in self.stores)
        raise StoreError(
            f"{named} holds {held} of the {len(unique)} captions of {what}: it was made from other data. Write them "
            "to a file (captions_out or prompts_out=FILE.jsonl), embed it (`llm2clip embed data.val=FILE.jsonl "
            f"out=STORE`) and give that store as well, or set llm.path. First missing:{preview(missing)}"
        )

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (len(texts), dim) fp32.

        Raises:
            StoreError: captions are neither stored nor can be computed.
        """
        if self.dim is None:
            raise StoreError(_NOTHING)
        out = torch.empty(len(texts), self.dim)
        open_rows = np.arange(len(texts))
        for store in self.stores:
            rows = store.find([texts[row] for row in open_rows.tolist()])
            out[torch.from_numpy(open_rows[rows >= 0])] = store.read(rows[rows >= 0])
            open_rows = open_rows[rows < 0]
        if len(open_rows):
            missing = [texts[row] for row in open_rows.tolist()]
            if self._llm is None:
                self.check(missing, "the data")
            else:
                out[torch.from_numpy(open_rows)] = self._llm(missing)
        return out


def choose_captions(
    label: str, model: LLM2CLIP, stores: Sequence[EmbeddingStore], llm: OnlineLLM | None
) -> CaptionSource:
    """The stores and the LLM that fit a model, by the fingerprint of the encoder it was trained with.

    A model without one (published checkpoints) takes what is given, which must be of one encoder.

    Raises:
        StoreError: no store fits, or the given ones are of several encoders.
        ModelError: the only source of captions is another LLM.
    """
    wanted = model.fingerprint
    if wanted is None:
        if any(store.fingerprint != stores[0].fingerprint for store in stores):
            raise StoreError(
                f"{label} does not say which LLM it was trained with, and the stores given are of several; evaluate it "
                "by itself, with the store of its LLM"
            )
        same = llm is not None and all(store.fingerprint == llm.fingerprint for store in stores)
        return CaptionSource(stores, llm if same else None)
    fitting = [store for store in stores if store.fingerprint == wanted]
    own = llm if llm is not None and llm.fingerprint == wanted else None
    if not fitting and own is None and stores:
        stores[0].check_fingerprint(wanted)
    if not fitting and own is None and llm is not None:
        raise ModelError(
            f"{label} was trained on embeddings of another caption encoder than llm.path and llm_adapter give. Use the "
            "LLM, adapter and llm settings of `llm2clip embed`, or set stores to its embeddings:\n  "
            + "\n  ".join(fingerprint_difference(llm.fingerprint, wanted))
        )
    return CaptionSource(fitting, own)


def digest_of_texts(texts: Sequence[str]) -> str:
    """Hash of captions in their order."""
    return json_digest(digest_array(texts).tobytes().hex())
