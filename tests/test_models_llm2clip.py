"""The adapter against its definition, and the CLIP model: features, saving, loading, files that do not "
"fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm2clip.errors import ModelError
from llm2clip.models import LLM2CLIP, TextAdapter, group_of, no_decay, parameter_groups
from llm2clip.models.model_card import ModelCard
from llm2clip.settings import ModelSettings, VisionSettings
from tests.clip_kit import save_clip, tiny_llm2clip

FINGERPRINT = {"model_type": "llama", "dim": 12, "weights": "abc"}


def settings(tmp_path: Path, **options: Any) -> ModelSettings:
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": 8,
    }
    path = tmp_path / "vision.json"
    path.write_text(json.dumps(config))
    vision = VisionSettings(kind="transformers", path=str(path), image_size=8)
    return ModelSettings(vision=vision, **{"embed_dim": 6, "adapter_depth": 2, **options})


@pytest.fixture
def model(tmp_path: Path) -> LLM2CLIP:
    torch.manual_seed(0)
    return LLM2CLIP(settings(tmp_path), 12, FINGERPRINT).eval()


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_adapter_follows_its_definition(depth: int) -> None:
    torch.manual_seed(0)
    adapter = TextAdapter(10, 7, depth=depth, expansion=3).double()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.5)
    state = adapter.state_dict()
    x = torch.randn(5, 10, dtype=torch.float64) * 30

    def norm(v: torch.Tensor, key: str) -> torch.Tensor:
        centred = v - v.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{key}.weight"] + state[f"{key}.bias"]

    def linear(v: torch.Tensor, key: str) -> torch.Tensor:
        return v @ state[f"{key}.weight"].t() + state[f"{key}.bias"]

    h = x / x.square().sum(-1, keepdim=True).sqrt()
    for i in range(depth):
        inner = linear(norm(h, f"adaptor.{i}.ln"), f"adaptor.{i}.fn.0")
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        h = h + linear(inner, f"adaptor.{i}.fn.3")
    expected = linear(norm(h, f"adaptor.{depth}"), f"adaptor.{depth + 1}")
    torch.testing.assert_close(adapter(x), expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(adapter(x * 7), expected, atol=1e-10, rtol=1e-10)  # length does not matter
    raw = TextAdapter(10, 7, depth=depth, expansion=3, normalize_input=False).double()
    raw.load_state_dict(state)
    assert not torch.allclose(raw(x), expected)


def test_adapter_names_and_size_are_the_published_ones() -> None:
    with torch.device("meta"):
        adapter = TextAdapter(4096, 1280)
    assert sum(p.numel() for p in adapter.parameters()) == 273_769_728
    names = set(adapter.state_dict())
    block = {f"adaptor.{i}.{part}" for i in range(4) for part in ("ln", "fn.0", "fn.3")}
    assert names == {
        f"{name}.{kind}" for name in block | {"adaptor.4", "adaptor.5"} for kind in ("weight", "bias")
    }
    assert adapter.adaptor[0].fn[0].weight.shape == (8192, 4096)


def test_adapter_dropout_acts_in_training_only() -> None:
    adapter = TextAdapter(10, 7, dropout=0.5)
    x = torch.randn(3, 10)
    assert not torch.equal(adapter.train()(x), adapter(x))
    assert torch.equal(adapter.eval()(x), adapter(x))


def test_adapter_refuses_another_width_and_bad_sizes() -> None:
    with pytest.raises(ModelError, match="width 10, got 11: they were made by another LLM"):
        TextAdapter(10, 7)(torch.randn(2, 11))
    with pytest.raises(ModelError, match="sizes must be positive"):
        TextAdapter(0, 7)
    for noise in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ModelError, match="noise: expected a finite share of at least 0"):
            TextAdapter(10, 7, noise=noise)


def test_forward_returns_unit_features_and_the_scale(model: LLM2CLIP) -> None:
    pixels, embeddings = torch.randn(3, 3, 8, 8), torch.randn(3, 12)
    output = model(pixels, embeddings)
    for name, features in (
        ("image_features", model.get_image_features(pixels)),
        ("text_features", model.get_text_features(embeddings)),
    ):
        assert features.shape == (3, 6)
        torch.testing.assert_close(output[name], features / features.norm(dim=1, keepdim=True))
    assert output["logit_scale"].shape == ()
    assert output["logit_scale"].item() == pytest.approx(1 / 0.07, rel=1e-5)
    sum(v.sum() for v in output.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    assert model(pixels, embeddings)["logit_scale"].item() == pytest.approx(100, rel=1e-4)
    model.clamp_logit_scale()
    assert model.logit_scale.item() == pytest.approx(4.6051702)


def test_groups_cover_every_trainable_parameter_once(model: LLM2CLIP) -> None:
    groups = parameter_groups(model)
    assert set(groups) == {"vision", "projection", "adapter", "logit_scale"}
    grouped = [id(p) for parameters in groups.values() for p in parameters]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert group_of("module.unknown") == "other"
    undecayed = {n for n, p in model.named_parameters() if no_decay(n, p)}
    assert any("layrnorm" in name for name in undecayed)
    assert any("class_embedding" in name for name in undecayed)
    assert (
        "visual_projection.weight" not in undecayed and "text_adapter.adaptor.0.fn.0.weight" not in undecayed
    )


def test_save_and_load(model: LLM2CLIP, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "out")
    (tmp_path / "vision.json").unlink()  # the directory alone must do
    again = LLM2CLIP.from_pretrained(tmp_path / "out")
    pixels, embeddings = torch.randn(2, 3, 8, 8), torch.randn(2, 12)
    one, two = model(pixels, embeddings), again(pixels, embeddings)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert again.fingerprint == FINGERPRINT
    assert again.vision_model.mean == model.vision_model.mean
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
        "README.md",
    }
    model.save_pretrained(tmp_path / "out")  # over an existing directory
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def test_a_run_directory_stands_for_its_result(model: LLM2CLIP, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "run" / "result")
    embeddings = torch.randn(2, 12)
    again = LLM2CLIP.from_pretrained(tmp_path / "run")
    assert torch.equal(again.get_text_features(embeddings), model.get_text_features(embeddings))


def test_failed_save_keeps_the_old_one(
    model: LLM2CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.logit_scale.fill_(1.0)
    monkeypatch.setattr(ModelCard, "render", lambda self, model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "vision.json"]


def test_weights_that_do_not_fit_are_listed(model: LLM2CLIP, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    del tensors["logit_scale"]
    tensors["surplus"] = torch.ones(1)
    tensors["visual_projection.weight"] = torch.ones(6, 15)
    save_file(tensors, file)
    with pytest.raises(ModelError) as error:
        LLM2CLIP.from_pretrained(tmp_path / "out")
    text = str(error.value)
    assert "1 missing (logit_scale)" in text and "1 unexpected (surplus)" in text
    assert "visual_projection.weight: file (6, 15), model (6, 16)" in text


def test_unusable_directories(model: LLM2CLIP, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no config.json"):
        LLM2CLIP.from_pretrained(tmp_path / "absent")
    out = tmp_path / "out"
    model.save_pretrained(out)
    file = out / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="damaged or half-copied"):
        LLM2CLIP.from_pretrained(out)
    file.unlink()
    with pytest.raises(ModelError, match="model directory is incomplete"):
        LLM2CLIP.from_pretrained(out)
    config = json.loads((out / "config.json").read_text())

    def rewritten(**changes: Any) -> None:
        (out / "config.json").write_text(json.dumps({**config, **changes}))

    rewritten(model_type="clip")
    with pytest.raises(ModelError, match="neither of model_type llm2clip nor of a published checkpoint"):
        LLM2CLIP.from_pretrained(out)
    rewritten(format=99)
    with pytest.raises(ModelError, match="format 99"):
        LLM2CLIP.from_pretrained(out)
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "embed_dim"}))
    with pytest.raises(ModelError, match="damaged: KeyError 'embed_dim'"):
        LLM2CLIP.from_pretrained(out)
    (out / "config.json").write_text('{"model_type": ')
    with pytest.raises(ModelError, match="not valid JSON"):
        LLM2CLIP.from_pretrained(out)


def test_training_goes_on_from_another_model_with_its_adapter(tmp_path: Path) -> None:
    old = tiny_llm2clip(tmp_path, adapter_depth=3)
    with torch.no_grad():
        old.logit_scale.fill_(3.5)
    old.save_pretrained(tmp_path / "old")
    pixels, embeddings = torch.randn(2, 3, 16, 16), torch.randn(2, 12)
    kept = ModelSettings(init=str(tmp_path / "old"))
    model = LLM2CLIP.from_settings(kept, 12, old.fingerprint)
    assert torch.equal(model.get_text_features(embeddings), old.get_text_features(embeddings))
    torch.testing.assert_close(model.eval().get_image_features(pixels), old.get_image_features(pixels))
    assert model.logit_scale.item() == 3.5 and model.settings.adapter_depth == 3
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, p in old.named_parameters() if p.requires_grad}

    # what the settings say of training holds for the loaded parts
    vision = VisionSettings(image_size=24, freeze=True, unlocked_groups=0, fit="crop")
    changed = LLM2CLIP.from_settings(
        ModelSettings(init=str(tmp_path / "old"), vision=vision, adapter_dropout=0.5, adapter_noise=0.25,
                      logit_bias_init=-10.0, logit_scale_init=2.0),
        12,
        {"model_type": "other"},
    )  # fmt: skip
    assert changed.vision_model.image_size == 24 and changed.vision_model.preprocessing.fit == "crop"
    assert changed.get_image_features(torch.randn(1, 3, 24, 24)).shape == (1, 6)
    assert not any(p.requires_grad for n, p in changed.named_parameters() if n.startswith("vis"))
    assert changed.logit_bias is not None and changed.logit_bias.item() == -10
    assert changed.text_adapter.noise == 0.25
    assert changed.logit_scale.item() == 2.0 and changed.fingerprint == {"model_type": "other"}
    assert not torch.equal(
        changed.train().get_text_features(embeddings), changed.get_text_features(embeddings)
    )
    assert torch.equal(changed.eval().get_text_features(embeddings), old.get_text_features(embeddings))
    changed.save_pretrained(tmp_path / "new")
    again = LLM2CLIP.from_pretrained(tmp_path / "new")
    pixels = torch.randn(1, 3, 24, 24)
    assert torch.equal(again.get_image_features(pixels), changed.get_image_features(pixels))

    with pytest.raises(ModelError, match="takes LLM embeddings of width 12, these have 13"):
        LLM2CLIP.from_settings(kept, 13)
    with pytest.raises(ModelError, match="takes images of 32 pixels|not a multiple"):
        LLM2CLIP.from_settings(
            ModelSettings(init=str(tmp_path / "old"), vision=VisionSettings(image_size=18)), 12
        )


def test_a_model_that_was_locked_can_be_trained_on(tmp_path: Path) -> None:
    locked = tiny_llm2clip(tmp_path, vision={"freeze": True})
    assert not any(p.requires_grad for p in locked.vision_model.parameters())
    locked.save_pretrained(tmp_path / "old")
    assert LLM2CLIP.from_pretrained(tmp_path / "old").vision_model.frozen
    model = LLM2CLIP.from_settings(ModelSettings(init=str(tmp_path / "old")), 12).train()
    output = model(torch.randn(2, 3, 16, 16), torch.randn(2, 12))
    sum(v.sum() for v in output.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert sum(p.requires_grad for p in model.vision_model.parameters()) > 10


def test_projections(tmp_path: Path) -> None:
    pixels = torch.randn(2, 3, 16, 16)
    none = tiny_llm2clip(tmp_path / "none", projection="none", embed_dim=16)
    assert torch.equal(none.get_image_features(pixels), none.vision_model(pixels))
    affine = tiny_llm2clip(tmp_path / "affine", projection="affine")
    assert affine.visual_projection.bias is not None
    for model in (none, affine):
        model.save_pretrained(tmp_path / "out")
        again = LLM2CLIP.from_pretrained(tmp_path / "out")
        assert torch.equal(again.get_image_features(pixels), model.get_image_features(pixels))
    with pytest.raises(ModelError, match="projection is none, but the tower's feature has 16 dimensions"):
        tiny_llm2clip(tmp_path / "bad", projection="none")


def test_a_checkpoints_own_projection_is_where_training_begins(tmp_path: Path) -> None:
    clip = save_clip(tmp_path / "clip", dim=6)
    vision = VisionSettings(kind="transformers", path=str(tmp_path / "clip"))
    model = LLM2CLIP(ModelSettings(vision=vision, embed_dim=6), 12).eval()
    assert torch.equal(model.visual_projection.weight, clip.visual_projection.weight)
    other = LLM2CLIP(ModelSettings(vision=vision, embed_dim=7), 12)
    assert other.visual_projection.weight.shape == (7, 16)


def test_locking_the_image_side_counts_the_projection(tmp_path: Path) -> None:
    def trained(model: LLM2CLIP) -> set[str]:
        return {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} & {
            "vision_model",
            "visual_projection",
        }

    expected = [set(), {"visual_projection"}, {"visual_projection", "vision_model"}]
    for unlocked, names in enumerate(expected):
        vision = {"freeze": True, "unlocked_groups": unlocked}
        assert trained(tiny_llm2clip(tmp_path / str(unlocked), vision=vision)) == names
        model = tiny_llm2clip(tmp_path / f"m{unlocked}")
        model.lock_image_tower(unlocked)
        assert trained(model) == names
