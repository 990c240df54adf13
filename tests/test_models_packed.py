"""Packed captions: the embeddings and gradients of one caption at a time, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llm2clip.errors import ModelError
from llm2clip.models import CaptionEncoder
from llm2clip.models.packed import flatten, make_packs, pool_packed, unpad
from llm2clip.models.pooling import pool
from llm2clip.models.tokens import Tokens, collate
from llm2clip.settings import LoraSettings
from tests.tiny_models import FAMILIES, SIZES, save_tiny, tiny_model, tiny_tokenizer

CAPTIONS = ["a dog", "two cats on a mat, sleeping", "x", "the quick brown fox jumps", "a dog", "y", "zz top"]
POOLINGS = ["mean", "weighted_mean", "eos", "last", "bos"]


def make(family: str = "llama", **options: Any) -> CaptionEncoder:
    model = {k: options.pop(k) for k in list(options) if k not in ENCODER}
    return CaptionEncoder(tiny_model(family, **model), tiny_tokenizer(), **options).eval()


ENCODER = {"bidirectional", "pooling", "max_length", "prompt", "layout"}


def lora(encoder: CaptionEncoder, **options: Any) -> CaptionEncoder:
    torch.manual_seed(5)
    encoder.add_lora(LoraSettings(rank=2, alpha=4.0, **options))
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide every mistake
            torch.nn.init.normal_(parameter, std=0.1)
    return encoder


def gradients(encoder: CaptionEncoder, embeddings: Tensor) -> dict[str, Tensor]:
    encoder.zero_grad()
    weights = torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings).to(embeddings.dtype)
    (embeddings * weights).sum().backward()
    return {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_equals_one_padded_caption_at_a_time(family: str, bidirectional: bool) -> None:
    options = {"prompt": "say: ", "max_length": 64, "bidirectional": bidirectional}
    packed, padded = (make(family, layout=layout, **options) for layout in ("packed", "padded"))
    assert (packed.layout, padded.layout) == ("packed", "padded")
    tokens = packed.tokenize(CAPTIONS)
    together = packed(flatten(tokens)).detach()
    alone = torch.cat([padded(padded.collate([t])) for t in tokens]).detach()
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert together.dtype == torch.float32 and not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_caption_sees_its_neighbour(family: str) -> None:
    encoder = make(family)
    tokens = encoder.tokenize(CAPTIONS)
    before = encoder(flatten(tokens)).detach()
    tokens[2] = encoder.tokenize(["q"])[0]
    after = encoder(flatten(tokens)).detach()
    changed = (before != after).any(dim=1).tolist()
    assert changed == [False, False, True, False, False, False, False]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_no_matrix_over_all_tokens_is_made(family: str) -> None:
    # 900 captions, 4500 tokens: a boolean (T, T) mask alone would take 20 MB
    encoder = make(family)
    tokens = [Tokens([5, 6, 7, 8, 9], 0, False)] * 900
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with torch.no_grad(), Watch():
        encoder(flatten(tokens))
    assert 4500 * 32 <= largest < 4500 * 4500 / 8


@pytest.mark.parametrize("pooling", POOLINGS)
def test_poolings_equal_the_padded_ones(pooling: Any) -> None:
    torch.manual_seed(2)
    tokens = [Tokens(list(range(3, 3 + n)), start, False) for n, start in ((5, 2), (1, 0), (7, 6), (4, 0))]
    padded = collate(tokens, pad_id=0)
    dense = torch.randn(4, 7, 6)
    flat = dense[padded.attention_mask.bool()]
    torch.testing.assert_close(
        pool_packed(flat, flatten(tokens), pooling), pool(dense, padded.pool_mask, pooling)
    )


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_encode_keeps_the_order(pooling: Any, bidirectional: bool) -> None:
    if pooling == "bos" and not bidirectional:
        pytest.skip("the first token has seen no other")
    packed, padded = (
        make("qwen3", layout=layout, pooling=pooling, bidirectional=bidirectional, prompt="p ")
        for layout in ("packed", "padded")
    )
    want = torch.cat([padded.encode([caption]) for caption in CAPTIONS])
    for budget in (None, 1, 7, 40):
        torch.testing.assert_close(packed.encode(CAPTIONS, token_budget=budget), want, atol=1e-5, rtol=1e-5)
    assert packed.encode([]).shape == (0, packed.dim)


def test_states_outside_of_the_pooled_span_may_hold_nan() -> None:
    tokens = [Tokens([3, 4, 5], 1, False), Tokens([6, 7], 0, False)]
    hidden = torch.ones(5, 2)
    hidden[0] = float("nan")
    for pooling in [kind for kind in POOLINGS if kind != "bos"]:
        torch.testing.assert_close(pool_packed(hidden, flatten(tokens), pooling), torch.ones(2, 2))


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean"])
def test_captions_of_a_prompt_alone_become_zeros(pooling: Any) -> None:
    tokens = [Tokens(ids, start, False) for ids, start in (([3, 4], 2), ([5, 6, 7], 1), ([], 0), ([8], 1))]
    torch.manual_seed(4)
    hidden = torch.randn(6, 3)
    out = pool_packed(hidden, flatten(tokens), pooling)
    weights = torch.tensor([0.5, 0.5] if pooling == "mean" else [1 / 3, 2 / 3])
    want = torch.zeros(4, 3)
    want[1] = weights @ hidden[3:5]
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_caption_without_tokens_becomes_zeros(pooling: Any) -> None:
    encoder = make(pooling=pooling)
    full = encoder.tokenize(["a dog", "x"])
    out = encoder.embed([full[0], Tokens([], 0, False), full[1]])
    assert torch.equal(out[1], torch.zeros(encoder.dim))
    torch.testing.assert_close(out[[0, 2]], encoder.embed(full))
    with pytest.raises(ValueError, match="caption 1 is empty"):
        encoder.encode(["a", " "])


def test_packs_lose_nothing_and_put_long_captions_alone() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 200).tolist() + [500]
    packs = make_packs(lengths, 100)
    assert sorted(i for part in packs for i in part.tolist()) == list(range(201))
    assert [200] in [part.tolist() for part in packs]
    for part in packs:
        sizes = [lengths[i] for i in part]
        assert sizes == sorted(sizes, reverse=True) and (sum(sizes) <= 100 or len(sizes) == 1)
    assert len(packs) <= 1.1 * (sum(lengths) - 500) / 100 + 2
    again = make_packs(lengths, 100)
    assert all(np.array_equal(a, b) for a, b in zip(packs, again, strict=True))
    for part in make_packs(lengths, 100, alone_above=30):
        assert len(part) == 1 or max(lengths[i] for i in part) <= 30


def test_a_caption_over_the_budget_is_embedded_whole() -> None:
    encoder, text = make(max_length=200), "long words " * 15
    assert len(encoder.tokenize([text])[0].ids) == 165
    want = encoder.encode([text], token_budget=1000)
    torch.testing.assert_close(encoder.encode(["a", text], token_budget=16)[1:], want, atol=1e-5, rtol=1e-5)


def test_positions_restart_with_every_caption() -> None:
    # rotary embeddings alone would hide an offset: they see differences of positions
    batch = flatten([Tokens([5, 6, 7], 1, False), Tokens([], 0, False), Tokens([8, 9], 0, False)])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9] and batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 3, 5] and batch.pool_starts.tolist() == [1, 3, 3]
    assert (batch.max_seqlen, batch.empty, len(batch)) == (3, True, 3)


def test_padded_batches_are_unpadded() -> None:
    encoder = make(prompt="say ")
    tokens = encoder.tokenize(CAPTIONS)
    batch, want = unpad(encoder.collate(tokens)), flatten(tokens)
    for name in ("input_ids", "position_ids", "cu_seqlens", "pool_starts"):
        assert torch.equal(getattr(batch, name), getattr(want, name)), name
    assert (batch.max_seqlen, len(batch)) == (want.max_seqlen, len(CAPTIONS))
    torch.testing.assert_close(encoder(encoder.collate(tokens)), encoder(want))


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_gradients_equal_the_padded_ones_in_fp64(family: str, checkpointing: bool) -> None:
    found = []
    for layout in ("packed", "padded"):
        encoder = lora(make(family, layout=layout), dropout=0.0).double().train()
        if checkpointing:
            encoder.model.enable_input_require_grads()
            encoder.model.gradient_checkpointing_enable({"use_reentrant": False})
        tokens = encoder.tokenize(CAPTIONS)
        batch = flatten(tokens) if layout == "packed" else encoder.collate(tokens)
        found.append(gradients(encoder, encoder(batch)))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, gradient in found[0].items():
        # pooling is fp32 in both
        torch.testing.assert_close(gradient, found[1][name], atol=1e-5, rtol=1e-5, msg=name)
        assert gradient.abs().max() > 0


def test_checkpointing_recomputes_packed_attention_and_not_another() -> None:
    plain, saved = (lora(make("mistral"), dropout=0.0).train() for _ in range(2))
    saved.model.enable_input_require_grads()
    saved.model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = plain.tokenize(CAPTIONS)
    first, second = (gradients(e, e(flatten(tokens))) for e in (plain, saved))
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, atol=1e-6, rtol=1e-6)


def test_several_packs_are_one_graph_in_the_order_of_the_captions() -> None:
    encoder = lora(make(), dropout=0.0)
    tokens = encoder.tokenize(CAPTIONS)
    one = gradients(encoder, encoder.embed(tokens, token_budget=1000))
    many = gradients(encoder, encoder.embed(tokens, token_budget=30))
    for name, gradient in one.items():
        torch.testing.assert_close(many[name], gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bf16_weights_and_autocast(family: str) -> None:
    exact = make(family)
    tokens = exact.tokenize(CAPTIONS)
    want = exact(flatten(tokens)).detach()
    half = make(family)
    half.model.to(torch.bfloat16)
    padded = make(family, layout="padded")
    padded.model.to(torch.bfloat16)
    bound = (padded(padded.collate(tokens)) - want).norm() / want.norm()
    error = (half(flatten(tokens)) - want).norm() / want.norm()
    assert error < 2 * bound + 1e-3 and half(flatten(tokens)).dtype == torch.float32
    tuned = lora(make(family), dropout=0.0).train()
    with torch.autocast("cpu", torch.bfloat16):
        cast = tuned(flatten(tokens))
    assert (cast - tuned(flatten(tokens))).norm() / want.norm() < 0.1
    assert all(g.isfinite().all() for g in gradients(tuned, cast).values())


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_the_bare_model_still_works_with_and_without_padding(family: str) -> None:
    for bidirectional in (True, False):
        packed, padded = (
            make(family, layout=layout, bidirectional=bidirectional) for layout in ("packed", "padded")
        )
        ids = torch.randint(3, 290, (2, 12), generator=torch.Generator().manual_seed(3))
        mask = torch.ones_like(ids)
        for shorter in (False, True):
            if shorter:
                mask[1, 7:] = 0
            ours, theirs = (
                e.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                for e in (packed, padded)
            )
            torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=1e-5, rtol=1e-5)


def test_export_does_not_carry_our_attention(tmp_path: Path) -> None:
    from transformers import AutoModel

    encoder = CaptionEncoder.from_pretrained(save_tiny(tmp_path / "base"), layout="packed")
    encoder.save_pretrained(tmp_path / "out")
    assert "llm2clip_packed" not in (tmp_path / "out" / "config.json").read_text()
    assert AutoModel.from_pretrained(tmp_path / "out").config._attn_implementation == "sdpa"


def test_layouts_that_cannot_be() -> None:
    with pytest.raises(ModelError, match="layout must be"):
        make(layout="dense")
    with pytest.raises(ModelError, match="attention_dropout is 0.1"):
        make(layout="packed", attention_dropout=0.1)
    assert make(attention_dropout=0.1).layout == "padded"
    padded = make(layout="padded")
    with pytest.raises(ModelError, match="needs an encoder with layout=packed"):
        padded(flatten(padded.tokenize(["a"])))
    with pytest.raises(ValueError, match="at least one caption"):
        flatten([])


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        # attention sinks, which only the try-out finds
        (
            "gpt_oss",
            {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "sliding_window": 64},
            "has no s_aux",
        ),
        # a recurrence and a convolution, which carry one caption into the next; the former says so nowhere
        ("recurrent_gemma", {}, "see each other"),
        ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, "layers of type conv"),
        # a decoder whose own code does not take a finished mask
        ("nemotron", {}, "attn_mask"),
    ],
)
def test_models_that_a_pack_would_change_are_padded(family: str, options: Any, reason: str) -> None:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(family, **{**SIZES, **options})

    def build(layout: Any) -> CaptionEncoder:
        torch.manual_seed(0)
        model = AutoModel.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        return CaptionEncoder(
            model.eval(), tiny_tokenizer(), bidirectional=False, max_length=64, layout=layout
        ).eval()

    with pytest.raises(ModelError, match=f"layout=packed is not possible for .*{reason}"):
        build("packed")
    auto, padded = build("auto"), build("padded")
    assert auto.layout == "padded"
    assert torch.equal(auto.encode(CAPTIONS), padded.encode(CAPTIONS))


def test_dynamic_rope_is_refused_where_neighbours_would_matter() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ModelError, match="set max_length to at most 256, it is 512"):
        make(rope_parameters=rope, layout="packed")
    assert make(rope_parameters=rope).layout == "padded"
    assert make(rope_parameters=rope, max_length=256).layout == "packed"


def test_longrope_captions_beyond_the_original_length_are_alone() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16,
    }
    encoder = make("phi3", rope_parameters=rope, original_max_position_embeddings=16, sliding_window=None)
    texts = ["short one", "a text of more than sixteen bytes", "tiny", "another text of more than sixteen"]
    together = encoder.encode(texts, token_budget=1000)
    alone = torch.cat([encoder.encode([text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    mixed = encoder(flatten(encoder.tokenize(texts))).detach()
    assert not torch.allclose(mixed[0], alone[0], atol=1e-4)  # why they must be alone
