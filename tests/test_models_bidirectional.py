"""Attention direction, measured on hidden states for every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm2clip.errors import ModelError
from llm2clip.models.bidirectional import attention_mask, decoder_layers, set_attention, verify_attention
from tests.tiny_models import FAMILIES, tiny_model

# Gemma 2's soft-capped attention has no SDPA form
CASES = [(f, a) for f in FAMILIES for a in ("sdpa", "eager") if (f, a) != ("gemma2", "sdpa")]


def states(model: Any, ids: torch.Tensor, mask: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def reach(model: Any, ids: torch.Tensor, changed: int, *, bidirectional: bool) -> list[int]:
    """Positions whose state depends on the token at `changed`."""
    other = ids.clone()
    other[0, changed] = (other[0, changed] + 11) % 290 + 3
    padding = torch.ones_like(ids)
    mask = attention_mask(model, padding, bidirectional=bidirectional)
    difference = (states(model, ids, mask) - states(model, other, mask)).abs().amax(dim=-1)[0]
    return (difference > 1e-6).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(("family", "attn"), CASES)
def test_later_token_changes_earlier_state_in_one_unpadded_sequence(family: str, attn: str) -> None:
    model = tiny_model(family, attn=attn)
    set_attention(model, bidirectional=True)
    verify_attention(model, bidirectional=True)
    ids = torch.randint(3, 290, (1, 8), generator=torch.Generator().manual_seed(1))
    assert reach(model, ids, 7, bidirectional=True) == list(range(8))
    assert reach(model, ids, 0, bidirectional=True) == list(range(8))


@pytest.mark.parametrize("family", FAMILIES)
def test_default_attention_of_the_family_works(family: str) -> None:
    model = tiny_model(family)
    set_attention(model, bidirectional=True)
    verify_attention(model, bidirectional=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_stays_causal(family: str) -> None:
    model = tiny_model(family)
    set_attention(model, bidirectional=False)
    verify_attention(model, bidirectional=False)
    ids = torch.randint(3, 290, (1, 8), generator=torch.Generator().manual_seed(1))
    assert reach(model, ids, 5, bidirectional=False) == [5, 6, 7]


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "qwen2", "phi3"])
def test_sliding_window_reaches_equally_far_both_ways(family: str) -> None:
    layers: dict[str, Any] = {"num_hidden_layers": 1}
    if family not in ("mistral", "phi3"):
        layers["layer_types"] = ["sliding_attention"]
    model = tiny_model(family, **layers)
    set_attention(model, bidirectional=True)
    ids = torch.randint(3, 290, (1, 20), generator=torch.Generator().manual_seed(2))
    assert reach(model, ids, 10, bidirectional=True) == list(range(6, 15))  # window 4


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen2"])
def test_full_layers_of_a_mixed_family_see_everything(family: str) -> None:
    model = tiny_model(family, num_hidden_layers=1, layer_types=["full_attention"])
    set_attention(model, bidirectional=True)
    ids = torch.randint(3, 290, (1, 20), generator=torch.Generator().manual_seed(2))
    assert reach(model, ids, 10, bidirectional=True) == list(range(20))


@pytest.mark.parametrize(("family", "attn"), CASES)
def test_explicit_mask_equals_what_transformers_builds(family: str, attn: str) -> None:
    # an exported model runs without our masks, on the configuration flag alone, and must give the same
    model = tiny_model(family, attn=attn)
    set_attention(model, bidirectional=True)
    ids = torch.randint(3, 290, (2, 12), generator=torch.Generator().manual_seed(3))
    padding = torch.ones_like(ids)
    padding[1, 9:] = 0
    ours = states(model, ids, attention_mask(model, padding, bidirectional=True))
    theirs = states(model, ids, padding)
    real = padding.bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-5)


def test_flags_alone_cover_a_dropped_mask() -> None:
    model = tiny_model("llama", attn="sdpa")
    ids = torch.randint(3, 290, (1, 6), generator=torch.Generator().manual_seed(4))
    other = ids.clone()
    other[0, -1] = 7
    assert torch.equal(states(model, ids, None)[:, :-1], states(model, other, None)[:, :-1])
    set_attention(model, bidirectional=True)
    assert not torch.allclose(states(model, ids, None)[:, :-1], states(model, other, None)[:, :-1])


@pytest.mark.parametrize("mixed", [False, True])
def test_padded_states_are_finite(mixed: bool) -> None:
    # a window that holds no real token must not become NaN
    model = tiny_model("gemma2" if mixed else "mistral", sliding_window=2)
    set_attention(model, bidirectional=True)
    ids = torch.full((2, 20), 5)
    padding = torch.ones_like(ids)
    padding[1, 3:] = 0
    assert torch.isfinite(states(model, ids, attention_mask(model, padding, bidirectional=True))).all()


def test_probe_names_the_layer_that_stays_causal() -> None:
    model = tiny_model("llama", attn="sdpa")
    set_attention(model, bidirectional=True)
    stubborn = model.layers[1].self_attn
    original = stubborn.forward
    stubborn.forward = lambda *a, **k: original(*a, **{**k, "attention_mask": None, "is_causal": True})
    with pytest.raises(ModelError, match=r"layers\.1 .*LlamaAttention.*stays causal"):
        verify_attention(model, bidirectional=True)


def test_probe_refuses_a_causal_request_that_is_not_met() -> None:
    model = tiny_model("llama", attn="sdpa")
    set_attention(model, bidirectional=True)
    with pytest.raises(ModelError, match=r"layers\.0 .*stays bidirectional"):
        verify_attention(model, bidirectional=False)


def test_probe_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama").train()
    set_attention(model, bidirectional=True)
    verify_attention(model, bidirectional=True)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert len(decoder_layers(model)) == 3


def test_unknown_layer_type_is_refused() -> None:
    model = tiny_model("qwen2")
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ModelError, match="linear_attention"):
        attention_mask(model, torch.ones(1, 4), bidirectional=True)
