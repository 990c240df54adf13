"""Pooling against its definition in fp64, and captions to tokens."""

from __future__ import annotations

import pytest
import torch

from llm2clip.errors import ModelError
from llm2clip.models.pooling import pool
from llm2clip.models.tokens import CaptionTokenizer, Tokens, collate, token_batches
from tests.tiny_models import tiny_tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["mean", "weighted_mean", "eos", "last", "bos"])
def test_pooling_follows_its_definition(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 5).to(dtype)
    spans = [(0, 7), (2, 5), (3, 4)]
    mask = torch.zeros(3, 7, dtype=torch.bool)
    for row, (start, stop) in enumerate(spans):
        mask[row, start:stop] = True
        hidden[row, stop:] = float("nan")  # what lies in the padding must not matter
        if kind != "bos":
            hidden[row, :start] = float("inf")
    result = pool(hidden, mask, kind)  # type: ignore[arg-type]
    for row, (start, stop) in enumerate(spans):
        tokens = hidden[row, start:stop].double()
        count = stop - start
        weights = (
            torch.arange(1, count + 1).double() if kind == "weighted_mean" else torch.ones(count).double()
        )
        expected = (tokens * weights[:, None]).sum(0) / weights.sum()
        if kind in ("eos", "last", "bos"):
            expected = hidden[row, 0].double() if kind == "bos" else tokens[-1]
        torch.testing.assert_close(result[row].double(), expected, atol=1e-6, rtol=1e-6)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_prompt_boundary_is_exact() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    tokens = CaptionTokenizer(tokenizer, max_length=64, prompt="find: ")(["a dog"])[0]
    assert tokens.ids[0] == 1  # the tokenizer's own beginning-of-sequence token
    assert tokenizer.decode(tokens.ids[1 : tokens.pool_start]) == "find: "
    assert tokenizer.decode(tokens.ids[tokens.pool_start :]) == "a dog"
    batch = collate([tokens, Tokens([3, 4], 1, False)], pad_id=0)
    assert batch.pool_mask.sum(1).tolist() == [5, 1]
    assert batch.pool_mask[1].tolist() == [False, True] + [False] * (len(tokens.ids) - 2)
    assert batch.attention_mask[1].tolist() == [1, 1] + [0] * (len(tokens.ids) - 2)


def test_eos_is_appended_once_and_survives_truncation() -> None:
    tokens = CaptionTokenizer(tiny_tokenizer(), max_length=6, needs_eos=True)(["abcdefgh", "ab"])
    assert [t.ids[-1] for t in tokens] == [2, 2]
    assert [t.ids.count(2) for t in tokens] == [1, 1]
    assert [len(t.ids) for t in tokens] == [6, 3]
    assert [t.truncated for t in tokens] == [True, False]


def test_each_text_may_have_an_instruction_of_its_own() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    captions = CaptionTokenizer(tokenizer, max_length=12, prompt="own: ")
    texts, prompts = ["a dog", "a cat", "a cow"], ["find: ", "", "own: "]
    for tokens, text, prompt in zip(captions(texts, prompts), texts, prompts, strict=True):
        assert tokenizer.decode(tokens.ids[1 : tokens.pool_start]) == prompt
        assert tokenizer.decode(tokens.ids[tokens.pool_start :]) == text
    assert captions(texts)[0] == captions(texts, ["own: "] * 3)[0]
    (cut,) = captions(["a long caption"], ["find: "])
    assert cut.truncated and len(cut.ids) == 12 and cut.pool_start == 7
    with pytest.raises(ModelError, match="instruction 'a long instruction' and special tokens take 19"):
        captions(["a"], ["a long instruction"])


def test_the_beginning_of_sequence_is_there_for_its_pooling() -> None:
    for bos in (True, False):  # whether the tokenizer puts it by itself
        (tokens,) = CaptionTokenizer(tiny_tokenizer(bos=bos), max_length=8, needs_bos=True)(["ab"])
        assert tokens.ids.count(1) == 1 and tokens.ids[0] == 1 and tokens.pool_start == 1
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ModelError, match="beginning-of-sequence"):
        CaptionTokenizer(tokenizer, max_length=8, needs_bos=True)


def test_missing_special_tokens() -> None:
    with pytest.raises(ModelError, match="end-of-sequence"):
        CaptionTokenizer(tiny_tokenizer(eos=False), max_length=8, needs_eos=True)
    assert CaptionTokenizer(tiny_tokenizer(pad=False), max_length=8).pad_id == 2
    assert CaptionTokenizer(tiny_tokenizer(eos=False, pad=False), max_length=8).pad_id == 0


def test_prompt_longer_than_the_limit_is_refused() -> None:
    with pytest.raises(ModelError, match="leaves no token for the caption"):
        CaptionTokenizer(tiny_tokenizer(), max_length=4, prompt="describe")


@pytest.mark.parametrize("empty", ["", "  \n\t", "\u3000"])
def test_empty_caption_names_its_index(empty: str) -> None:
    with pytest.raises(ValueError, match="caption 2 is empty"):
        CaptionTokenizer(tiny_tokenizer(), max_length=8)(["a", "b", empty])


def test_a_caption_that_is_no_string_names_its_index() -> None:
    with pytest.raises(TypeError, match="caption 1 must be a string, got NoneType"):
        CaptionTokenizer(tiny_tokenizer(), max_length=8)(["a", None])  # type: ignore[list-item]


def test_text_that_looks_like_a_special_token_is_text() -> None:
    ids = CaptionTokenizer(tiny_tokenizer(), max_length=32)(["a </s> b"])[0].ids
    assert 2 not in ids and len(ids) == 8


def test_huge_caption_is_cut_before_tokenising(monkeypatch: pytest.MonkeyPatch) -> None:
    captions = CaptionTokenizer(tiny_tokenizer(), max_length=512)
    long = "".join(chr(97 + i % 26) for i in range(100_000))
    seen: list[int] = []
    plain = captions._plain

    def counting(texts: list[str]) -> list[list[int]]:
        seen.extend(map(len, texts))
        return plain(texts)

    monkeypatch.setattr(captions, "_plain", counting)
    tokens = captions([long] * 3)
    assert seen == [captions.max_chars] * 3 and captions.max_chars < 100_000 // 2
    assert all(t.truncated and len(t.ids) == 512 for t in tokens)
    # the cut changes nothing within the limit
    whole = captions.tokenizer(long, add_special_tokens=False)["input_ids"]
    assert tokens[0].ids == whole[:512]


def test_token_batches_keep_the_budget_and_every_caption() -> None:
    lengths = [3, 50, 7, 7, 100, 1, 12, 3]
    batches = token_batches(lengths, 24)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= 24 or len(batch) == 1
    assert len(batches) == 5  # 100 | 50 | 12 7 | 7 3 3 | 1
    assert token_batches([], 24) == []
    with pytest.raises(ValueError, match="token_budget"):
        token_batches([1], 0)
