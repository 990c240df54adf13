"""The text side: stored and online LLM embeddings are one path, and CLIP's own text tower may stand beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm2clip.data.store import EmbeddingStore, StoreWriter
from llm2clip.errors import ConfigError, ModelError
from llm2clip.export import export
from llm2clip.models import LLM2CLIP, CaptionEncoder, group_of
from llm2clip.settings import (
    ClipTextSettings,
    ExportSettings,
    LoraSettings,
    ModelSettings,
    TextSettings,
    VisionSettings,
)
from tests.clip_kit import CONTEXT, save_clip, tiny_llm2clip
from tests.tiny_models import save_tiny
from tests.vision_kit import vision_json

CAPTIONS = ["a dog", "two cats sleep on a mat", "the figure shows a cell", "x"]
LORA = LoraSettings(rank=2, dropout=0.5)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llm"))


def model_for(encoder: CaptionEncoder, folder: Path, **options: Any) -> LLM2CLIP:
    vision = VisionSettings(kind="transformers", path=str(vision_json(folder)))
    settings = ModelSettings(vision=vision, **{"embed_dim": 6, "adapter_depth": 2, **options})
    torch.manual_seed(0)
    return LLM2CLIP(settings, encoder.dim, encoder.fingerprint())


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_online_and_stored_embeddings_give_the_same_features(llm: Path, layout: Any, tmp_path: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(llm, layout=layout)
    with StoreWriter(
        tmp_path / "store", dim=encoder.dim, dtype="fp32", fingerprint=encoder.fingerprint()
    ) as writer:
        writer.add(CAPTIONS, encoder.encode(CAPTIONS))
        writer.finish()
    store = EmbeddingStore.open(tmp_path / "store")
    model = model_for(encoder, tmp_path)
    model.attach_llm(encoder)
    stored = model.eval().get_text_features(store.get(CAPTIONS))
    tokens = encoder.tokenize(CAPTIONS)
    assert torch.equal(model.get_text_features(tokens), stored)
    # other neighbours in the forward pass, one caption at a time: the same up to rounding
    for row, caption in enumerate(tokens):
        torch.testing.assert_close(model.get_text_features([caption])[0], stored[row], atol=1e-5, rtol=1e-5)
    # the adapter's definition on the store's content, as a third way
    torch.testing.assert_close(
        model.text_adapter.forward_plain(store.get(CAPTIONS)), stored, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(model.encode_text(CAPTIONS), stored)


def test_a_frozen_llm_is_not_touched_by_training(llm: Path, tmp_path: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(llm)
    encoder.add_lora(LORA)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    model = model_for(encoder, tmp_path)
    model.attach_llm(encoder)
    stored = encoder.encode(CAPTIONS)
    tokens = encoder.tokenize(CAPTIONS)
    model.train()
    assert not encoder.training and model.training
    # dropout of its adapters is off, and half precision around it does not reach it
    with torch.autocast("cpu", dtype=torch.bfloat16):
        online = model.embed_captions(tokens)
    assert online.dtype == torch.float32 and torch.equal(online, stored) and not online.requires_grad
    output = model(torch.randn(4, 3, 16, 16), tokens)
    sum(v.sum() for v in output.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not any(p.requires_grad for p in encoder.parameters())


def test_joint_training_reaches_the_adapters_and_is_saved_beside(llm: Path, tmp_path: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(llm)
    model = model_for(encoder, tmp_path)
    before = dict(model.fingerprint or {})
    model.attach_llm(encoder, lora=LORA, token_budget=64)
    tokens = encoder.tokenize(CAPTIONS)
    model.train()
    assert encoder.training
    output = model(torch.randn(4, 3, 16, 16), tokens)
    sum(v.square().sum() * (i + 1) for i, v in enumerate(output.values())).backward()
    ups = {n: p for n, p in model.named_parameters() if ".lora_B." in n}
    assert ups and all(group_of(n) == "lora" and p.grad is not None and p.grad.any() for n, p in ups.items())
    with torch.no_grad():
        for parameter in ups.values():
            parameter.normal_(std=0.1)
    expected = model.eval().encode_text(CAPTIONS)
    model.save_pretrained(tmp_path / "out")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert names and not any("caption_encoder" in name for name in names)
    hub = export(ExportSettings(model=str(tmp_path / "out"), out=str(tmp_path / "hub")))
    assert (hub / "llm_adapter" / "adapter_config.json").is_file()
    loaded = LLM2CLIP.from_pretrained(tmp_path / "out")
    assert loaded.fingerprint != before and loaded.fingerprint == encoder.fingerprint()
    again = CaptionEncoder.from_pretrained(llm, adapter=tmp_path / "out" / "llm_adapter")
    torch.testing.assert_close(
        loaded.get_text_features(again.encode(CAPTIONS)), expected, atol=1e-5, rtol=1e-5
    )
    loaded.attach_llm(again)
    with pytest.raises(ModelError, match=r"embeddings of another encoder \(adapter: .*now None"):
        loaded.attach_llm(CaptionEncoder.from_pretrained(llm))


def test_an_llm_of_another_width_or_none_is_refused(llm: Path, tmp_path: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(llm)
    model = tiny_llm2clip(tmp_path)
    with pytest.raises(ModelError, match="width 12, this LLM makes 32"):
        model.attach_llm(encoder)
    with pytest.raises(ModelError, match="captions came as tokens, and the model has no LLM"):
        model.get_text_features(encoder.tokenize(CAPTIONS))
    with pytest.raises(ModelError, match="encode_text needs the LLM"):
        model.encode_text(CAPTIONS)


def test_cliptext_is_the_models_own_and_begins_with_its_projection(tmp_path: Path) -> None:
    for kind in ("clip", "siglip"):
        clip = save_clip(tmp_path / kind, kind)
        options = ClipTextSettings(use="two_losses", path=str(tmp_path / kind))
        model = tiny_llm2clip(tmp_path / f"m{kind}", clip_text=options)
        assert model.clip_text is not None and model.clip_text.context == CONTEXT
        texts = ["a dog", "a caption that is far too long for ten tokens"]
        tokens = model.clip_text.tokenize(texts)
        end = model.clip_text.tokenizer.eos_token_id
        assert tokens.input_ids.shape == (2, CONTEXT) and tokens.input_ids[1, -1] == end
        kwargs = {"input_ids": tokens.input_ids}
        if kind == "clip":
            kwargs["attention_mask"] = tokens.attention_mask
        expected = clip.get_text_features(**kwargs)
        expected = getattr(expected, "pooler_output", expected)
        # files carry these names: they must not depend on transformers' version
        parts = {name.split(".")[0] for name in model.clip_text.model.state_dict()}
        assert parts - {"head"} == {"embeddings", "encoder", "final_layer_norm"}
        pooled = model.clip_text(tokens)
        assert not torch.allclose(pooled[0], pooled[1], atol=1e-2)  # the last token has seen the text
        if kind == "clip":
            # six dimensions on both sides: CLIP's own projection is kept
            torch.testing.assert_close(model.get_clip_text_features(tokens), expected, atol=1e-5, rtol=1e-5)
        else:
            torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.clip_text(tokens[0:1]), pooled[:1])


@pytest.mark.parametrize("use", ["two_losses", "three_losses", "concat"])
def test_uses_of_clips_text_tower(use: Any, tmp_path: Path) -> None:
    save_clip(tmp_path / "clip")
    model = tiny_llm2clip(tmp_path, clip_text=ClipTextSettings(use=use, path=str(tmp_path / "clip")))
    assert model.clip_text is not None
    pixels, embeddings = torch.randn(2, 3, 16, 16), torch.randn(2, 12)
    tokens = model.clip_text.tokenize(["a dog", "two cats"])
    output = model(pixels, embeddings, tokens)
    own = model.get_clip_text_features(tokens, normalize=True)
    alone = model.text_adapter(embeddings)
    if use == "concat":
        assert set(output) == {"image_features", "text_features", "logit_scale"}
        assert model.text_fusion is not None
        left, right = model.text_fusion.weight.chunk(2, dim=1)
        joined = own @ left.T + torch.nn.functional.normalize(alone, dim=-1) @ right.T
        expected = torch.nn.functional.normalize(joined, dim=-1)
        torch.testing.assert_close(output["text_features"], expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(
            ModelError, match="clip_text.use is concat: captions must come as CLIP tokens too"
        ):
            model.get_text_features(embeddings)
    else:
        torch.testing.assert_close(output["clip_text_features"], own)
        torch.testing.assert_close(output["text_features"], torch.nn.functional.normalize(alone, dim=-1))
    sum(v.square().sum() * (i + 1) for i, v in enumerate(output.values())).backward()
    unreached = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert unreached == set()
    assert {group_of(n) for n, _ in model.named_parameters()} >= {
        "vision",
        "projection",
        "adapter",
        "clip_text",
    }

    model.save_pretrained(tmp_path / "out")
    for file in (tmp_path / "clip").iterdir():
        file.unlink()  # the directory alone must do
    again = LLM2CLIP.from_pretrained(tmp_path / "out")
    assert again.clip_text is not None
    other = again(pixels, embeddings, again.clip_text.tokenize(["a dog", "two cats"]))
    assert all(torch.equal(output[name], other[name]) for name in output) and len(other) == len(output)
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def test_a_frozen_clip_text_tower(tmp_path: Path) -> None:
    save_clip(tmp_path / "clip")
    options = ClipTextSettings(use="two_losses", path=str(tmp_path / "clip"), freeze=True)
    model = tiny_llm2clip(tmp_path, clip_text=options).train()
    assert model.clip_text is not None and not any(p.requires_grad for p in model.clip_text.parameters())
    assert model.text_projection is not None and model.text_projection.weight.requires_grad


def test_bad_text_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"clip_text.use is concat: set model.clip_text.path"):
        ClipTextSettings(use="concat")
    with pytest.raises(ConfigError, match=r"text.source is joint: set text.llm.path"):
        TextSettings(source="joint")
    with pytest.raises(ConfigError, match=r"adapter_depth: expected 0 to 8 blocks, got 9"):
        ModelSettings(adapter_depth=9)
    absent = ClipTextSettings(use="concat", path=str(tmp_path / "absent"))
    with pytest.raises(ModelError, match="is not a transformers model directory"):
        tiny_llm2clip(tmp_path, clip_text=absent)
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match="model type 'vit' has no CLIP text tower"):
        tiny_llm2clip(tmp_path, clip_text=ClipTextSettings(use="concat", path=str(tmp_path / "vit")))
    save_clip(tmp_path / "clip")
    tokenizer = tmp_path / "clip" / "tokenizer.json"
    tokenizer.write_text("{")
    with pytest.raises(ModelError, match="cannot load the CLIP text tower"):
        tiny_llm2clip(tmp_path, clip_text=ClipTextSettings(use="concat", path=str(tmp_path / "clip")))
    with pytest.raises(ModelError, match="the model has no CLIP text tower"):
        tiny_llm2clip(tmp_path).get_clip_text_features(None)
