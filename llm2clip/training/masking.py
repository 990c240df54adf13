"""Which tokens of a text are to be predicted, and what stands in their place (BERT's recipe, LLM2Vec's masks)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llm2clip.errors import ModelError
from llm2clip.models.tokens import Tokens
from llm2clip.settings import MaskingSettings


@dataclass(frozen=True, slots=True)
class MaskedText:
    """A text with some of its tokens replaced.

    Attributes:
        tokens: what the LLM reads.
        places: positions of the tokens that are to be predicted, ascending, each at least 1: the state of the
            position before predicts (masked next-token prediction).
        targets: what stood there.
    """

    tokens: Tokens
    places: list[int]
    targets: list[int]


class Masker:
    """Draws masks.

    Args:
        tokenizer: whose tokens are masked; special ones never are.
        settings: share, mask token, and how masked tokens are replaced.

    Raises:
        ModelError: the tokenizer has no such mask token.
    """

    def __init__(self, tokenizer: Any, settings: MaskingSettings) -> None:
        self._settings = settings
        self._vocabulary = len(tokenizer)
        self._special = np.asarray(sorted(tokenizer.all_special_ids), dtype=np.int64)
        self.mask_id = _mask_id(tokenizer, settings.token)

    def __call__(self, tokens: Tokens, rng: np.random.Generator) -> MaskedText:
        """Mask a text.

        Args:
            tokens: its header and instruction (`pool_start`) are left alone.
            rng: the same state gives the same masks.
        """
        ids = np.asarray(tokens.ids, dtype=np.int64)
        places = np.arange(max(1, tokens.pool_start), len(ids))
        places = places[~np.isin(ids[places], self._special)]
        places = places[rng.random(len(places)) < self._settings.probability]
        targets = ids[places]
        masked = ids.copy()
        fate = rng.random(len(places))
        other = rng.integers(self._vocabulary, size=len(places))
        if self._settings.replace == "all":
            masked[places] = self.mask_id
        else:
            masked[places[fate < 0.8]] = self.mask_id
            masked[places[fate >= 0.9]] = other[fate >= 0.9]
        read = Tokens(masked.tolist(), tokens.pool_start, tokens.truncated)
        return MaskedText(read, places.tolist(), targets.tolist())


def _mask_id(tokenizer: Any, kind: str) -> int:
    if kind == "blank":
        ids = list(tokenizer("_", add_special_tokens=False)["input_ids"])
        known = tokenizer.get_vocab().get("_")
        if known is not None or len(ids) == 1:
            return int(known if known is not None else ids[0])
        raise ModelError(
            f"masking.token=blank: this tokenizer writes `_` as {len(ids)} tokens; use masking.token=eos"
        )
    found = tokenizer.eos_token_id if kind == "eos" else tokenizer.mask_token_id
    if found is None:
        other = "blank" if kind == "eos" else "blank or eos"
        raise ModelError(
            f"masking.token={kind}: this tokenizer has no {kind} token; use masking.token={other}"
        )
    return int(found)
