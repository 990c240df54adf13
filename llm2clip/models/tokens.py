"""Captions to tokens: templates and instructions with an exact boundary, counted truncation, right padding."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm2clip.errors import ModelError
from llm2clip.models.templates import NONE, Template


@dataclass(frozen=True, slots=True)
class Tokens:
    """One caption: all token ids, where pooling starts, and whether the caption was cut."""

    ids: list[int]
    pool_start: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class CaptionBatch:
    """Right-padded captions: input_ids (B, L) int64, attention_mask (B, L) int64, pool_mask (B, L) bool."""

    input_ids: Tensor
    attention_mask: Tensor
    pool_mask: Tensor

    def to(self, device: torch.device | str) -> CaptionBatch:
        """The same batch on `device`."""
        return CaptionBatch(
            self.input_ids.to(device), self.attention_mask.to(device), self.pool_mask.to(device)
        )

    def __len__(self) -> int:
        return self.input_ids.shape[0]


class CaptionTokenizer:
    """Turns captions into `Tokens` of the form `[bos] header instruction caption [end]`.

    Instruction and caption are tokenised apart and joined as tokens, so the boundary of the pooled span is exact
    for every tokenizer. Text that looks like a special token ("<|im_end|>") is read as plain text.

    Args:
        tokenizer: a transformers fast tokenizer.
        max_length: longest result in tokens, instruction and special tokens included.
        prompt: instruction before every caption, left out of the pooling.
        needs_eos: every caption must end with the end-of-sequence token, or the end of its template's turn
            (`eos` pooling).
        needs_bos: every caption must begin with the beginning-of-sequence token (`bos` pooling).
        template: the turn of a chat around the caption; its header is left out of the pooling too.

    Raises:
        ModelError: a token is needed and missing, or the instruction leaves no room for captions.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        prompt: str = "",
        needs_eos: bool = False,
        needs_bos: bool = False,
        template: Template = NONE,
    ) -> None:
        self.tokenizer, self.prompt, self._max_length = tokenizer, prompt, max_length
        prefix, suffix = _special_tokens(tokenizer)
        eos: int | None = tokenizer.eos_token_id
        suffix = self._special(template.tail) + suffix
        if needs_eos and not suffix:
            if eos is None:
                raise ModelError(
                    "pooling `eos` needs a tokenizer with an end-of-sequence token and this one has none. "
                    "Use pooling `mean` or `last`, or set eos_token in tokenizer_config.json."
                )
            suffix = [eos]
        if needs_bos and not prefix:
            if tokenizer.bos_token_id is None:
                raise ModelError(
                    "pooling `bos` needs a tokenizer with a beginning-of-sequence token and this one has none. "
                    "Use pooling `mean`, or set bos_token in tokenizer_config.json."
                )
            prefix = [tokenizer.bos_token_id]
        self._prefix, self._tail = prefix + self._special(template.head), suffix
        self._heads: dict[str, list[int]] = {}
        self._head(prompt)  # raises now where the instruction leaves no room
        # padded positions are masked everywhere, so any valid id will do
        pad = tokenizer.pad_token_id
        self.pad_id = int(pad if pad is not None else eos if eos is not None else 0)

    def _head(self, prompt: str) -> list[int]:
        """Everything before a caption that has this instruction."""
        if prompt not in self._heads:
            head = self._prefix + (self._plain([prompt])[0] if prompt else [])
            if self._max_length - len(head) - len(self._tail) < 1:
                raise ModelError(
                    f"max_length {self._max_length} leaves no token for the caption: instruction {prompt!r} and "
                    f"special tokens take {len(head) + len(self._tail)}. Raise llm.max_length or shorten the "
                    "instruction (llm.prompt, pairs.instructions)."
                )
            self._heads[prompt] = head
        return self._heads[prompt]

    @functools.cached_property
    def max_chars(self) -> int:
        """Characters that surely give more tokens than there is room for; the rest need not be tokenised."""
        longest = max(map(len, self.tokenizer.get_vocab()))
        return int((self._max_length + 1) * longest)

    def __call__(
        self,
        texts: Sequence[str],
        prompts: Sequence[str] | None = None,
        windows: Sequence[float] | None = None,
    ) -> list[Tokens]:
        """Tokenise captions.

        Args:
            texts: the captions.
            prompts: the instruction of each; None: the tokenizer's `prompt` for all.
            windows: where the window of each text that is too long begins, as a share in [0, 1) of what does not
                fit; None: at its start.

        Raises:
            TypeError: an entry is not a string.
            ValueError: a caption is empty, or has no token; the message names its index.
            ModelError: an instruction leaves no room for its caption.
        """
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"caption {index} must be a string, got {type(text).__name__}")
            if not text.strip():
                raise ValueError(f"caption {index} is empty; drop empty captions before encoding")
        limit = self.max_chars if windows is None else max(map(len, texts), default=0)
        result = []
        encoded = self._plain([t[:limit] for t in texts])
        wanted = [self.prompt] * len(texts) if prompts is None else prompts
        for index, (text, ids, prompt) in enumerate(zip(texts, encoded, wanted, strict=True)):
            if not ids:
                raise ValueError(f"caption {index} ({text[:40]!r}) has no token; drop it before encoding")
            head = self._head(prompt)
            room = self._max_length - len(head) - len(self._tail)
            cut = len(text) > limit or len(ids) > room
            start = int(windows[index] * (len(ids) - room + 1)) if windows is not None and cut else 0
            result.append(Tokens(head + ids[start : start + room] + self._tail, len(head), cut))
        return result

    def _plain(self, texts: list[str]) -> list[list[int]]:
        return self._encode(texts, split_special_tokens=True)

    def _special(self, text: str) -> list[int]:
        """A piece of a template, whose special tokens are meant as such."""
        return self._encode([text], split_special_tokens=False)[0] if text else []

    def _encode(self, texts: list[str], *, split_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        # no truncation here: the tokenizer would keep that state and another user of it would be surprised
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return list(encoded["input_ids"])


def collate(tokens: Sequence[Tokens], pad_id: int, device: torch.device | str | None = None) -> CaptionBatch:
    """Pad on the right to the longest caption of the batch."""
    if not tokens:
        raise ValueError("a batch needs at least one caption")
    length = max(len(t.ids) for t in tokens)
    ids = torch.tensor([t.ids + [pad_id] * (length - len(t.ids)) for t in tokens], dtype=torch.int64)
    ends = torch.tensor([len(t.ids) for t in tokens])[:, None]
    starts = torch.tensor([t.pool_start for t in tokens])[:, None]
    position = torch.arange(length)[None]
    real = position < ends
    batch = CaptionBatch(ids, real.long(), real & (position >= starts))
    return batch if device is None else batch.to(device)


def token_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Group captions of similar length so that a padded batch holds at most `token_budget` tokens.

    Returns:
        Lists of indices into `lengths`, longest captions first (memory peaks at once, not at the end); a
        caption longer than the budget has a batch of its own.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, got {token_budget}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for index in order:
        # the first caption of a batch is its longest
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer itself puts before and after a text."""
    probe = "a"
    bare = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
    full = list(tokenizer(probe, add_special_tokens=True)["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []
