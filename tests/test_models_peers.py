"""timm and open_clip, where they are installed: their towers in our models, and our exports in their hands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llm2clip.errors import ModelError
from llm2clip.export import export
from llm2clip.models import LLM2CLIP, VisionTower, build_vision_tower
from llm2clip.models.eva02 import EVA02, EVA02Config
from llm2clip.models.open_clip_names import eva02_to_timm
from llm2clip.models.vision import tower_from_config
from llm2clip.settings import ClipTextSettings, ExportSettings, ModelSettings, VisionSettings
from tests import published_kit as kit
from tests.clip_kit import LLM_DIM, save_clip, tiny_llm2clip

timm = pytest.importorskip("timm", reason="timm is not installed (it brings torchvision)")
open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed (it brings torchvision)")

TINY_VIT: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "patch_size": 8}
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def timm_directory(folder: Path, name: str = "vit_tiny_patch16_224", **changes: Any) -> Any:
    """A small timm model with classifier, in timm's own directory layout; returns the model."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, img_size=32, **TINY_VIT, **changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    values = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.875}
    config = {"architecture": name, "model_args": {**TINY_VIT, **changes}}
    config["pretrained_cfg"] = {**values, "interpolation": "bicubic", "classifier": "head"}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def timm_tower(folder: Path, **options: Any) -> VisionTower:
    return build_vision_tower(VisionSettings(kind="timm", path=str(folder), **options)).eval()


def test_timm_directory(tmp_path: Path) -> None:
    model = timm_directory(tmp_path / "timm")
    tower = timm_tower(tmp_path / "timm")
    expected = model.forward_head(model.forward_features(PIXELS), pre_logits=True)
    torch.testing.assert_close(tower(PIXELS), expected)
    made = tower.preprocessing
    assert (tower.dim, made.image_size, made.fit, made.resize, made.mean) == (32, 32, "crop", 36, (0.5,) * 3)
    again = tower_from_config(json.loads(json.dumps(tower.to_config()))).eval()
    again.load_state_dict(tower.state_dict())
    assert torch.equal(again(PIXELS), tower(PIXELS))
    larger = timm_tower(tmp_path / "timm", image_size=48)
    assert larger(torch.randn(1, 3, 48, 48)).shape == (1, 32) and larger.preprocessing.resize == 54
    old, new = tower.state_dict(), larger.state_dict()
    assert [n for n in old if old[n].shape != new[n].shape] == ["model.network.pos_embed"]


def test_timm_training(tmp_path: Path) -> None:
    timm_directory(tmp_path / "timm")
    groups = timm_tower(tmp_path / "timm").layer_groups()
    names = [name for group in groups for name in group.parameters]
    assert groups[0].name == "embeddings" and any("patch_embed" in name for name in groups[0].parameters)
    assert sorted(names) == sorted(n for n, _ in timm_tower(tmp_path / "timm").named_parameters())
    tower = timm_tower(tmp_path / "timm", patch_dropout=0.5, grad_checkpointing=True)
    plain = timm_tower(tmp_path / "timm")
    torch.testing.assert_close(tower(PIXELS), plain(PIXELS))
    assert not torch.allclose(tower.train()(PIXELS), plain(PIXELS), atol=1e-3)
    tower(PIXELS).sum().backward()
    assert all(p.grad is not None for p in tower.parameters() if p.requires_grad)
    from llm2clip.settings import VisionLoraSettings

    adapted = timm_tower(tmp_path / "timm", lora=VisionLoraSettings(rank=2))
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 4 and all(".qkv.lora_" in name for name in trained)
    locked = timm_tower(tmp_path / "timm", freeze=True, unlocked_groups=2)
    trained = {n for n, p in locked.named_parameters() if p.requires_grad}
    assert trained == set(groups[-1].parameters)


def test_timm_weights_and_names_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="knows no architecture .no_such."):
        build_vision_tower(VisionSettings(kind="timm", name="no_such"))
    for kind, name in (("timm", "resnet10t"), ("open_clip", "ViT-B-32")):
        with pytest.raises(ModelError, match="needs vision.path, the weights, for nothing is downloaded"):
            build_vision_tower(VisionSettings(kind=kind, name=name))  # type: ignore[arg-type]
    timm_directory(tmp_path / "timm")
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **TINY_VIT).state_dict()
    save_file({**state, "decoder": torch.ones(1)}, tmp_path / "timm" / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 unexpected \(decoder\)"):
        timm_tower(tmp_path / "timm")
    convolutional = build_vision_tower(
        VisionSettings(kind="timm", name="resnet10t", image_size=64, pretrained=False)
    )
    assert convolutional.eval()(torch.randn(1, 3, 64, 64)).shape == (1, convolutional.dim)
    with pytest.raises(ModelError, match="patch_dropout needs a vision transformer"):
        convolutional.model.set_patch_dropout(0.5)


def test_eva02_is_timms_eva02() -> None:
    config = EVA02Config(image_size=32, patch_size=8, width=32, depth=2, heads=2, hidden=48)
    torch.manual_seed(0)
    ours = EVA02(config).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs = timm.create_model(
        "eva02_base_patch16_clip_224", num_classes=0, img_size=32, patch_size=8, embed_dim=32, depth=2,
        num_heads=2, mlp_ratio=1.5,
    ).eval()  # fmt: skip
    theirs.load_state_dict(eva02_to_timm(ours.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(ours(PIXELS), theirs(PIXELS), atol=1e-4, rtol=1e-4)


def open_clip_model(**vision: Any) -> tuple[dict[str, Any], Any]:
    config = {
        "embed_dim": 10,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
            **vision,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    model = open_clip.model.CustomTextCLIP(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return config, model


def open_clip_directory(folder: Path, **vision: Any) -> Any:
    config, model = open_clip_model(**vision)
    folder.mkdir(parents=True)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash", "interpolation": "bicubic"}
    content = {"model_cfg": {**config, "custom_text": True}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


def test_open_clip_directory(tmp_path: Path) -> None:
    model = open_clip_directory(tmp_path / "oc")
    settings = VisionSettings(kind="open_clip", path=str(tmp_path / "oc"))
    tower = build_vision_tower(settings).eval()
    assert tower.dim == 32 and tower.preprocessing.fit == "squash" and tower.mean == (0.5,) * 3
    torch.testing.assert_close(tower(PIXELS) @ model.visual.proj, model.encode_image(PIXELS))
    # ten dimensions on both sides: the model's own projection is where training begins
    whole = LLM2CLIP(ModelSettings(vision=settings, embed_dim=10, adapter_depth=1), LLM_DIM).eval()
    torch.testing.assert_close(whole.get_image_features(PIXELS), model.encode_image(PIXELS))
    larger = build_vision_tower(
        VisionSettings(kind="open_clip", path=str(tmp_path / "oc"), image_size=48)
    ).eval()
    state = {f"visual.{n}": t.clone() for n, t in model.visual.state_dict().items()}
    other = open_clip.model.CustomTextCLIP(
        **{**open_clip_model()[0], "vision_cfg": {**open_clip_model()[0]["vision_cfg"], "image_size": 48}}
    ).eval()
    open_clip.model.resize_pos_embed(state, other)
    other.visual.load_state_dict({n.removeprefix("visual."): t for n, t in state.items()})
    pixels = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(larger(pixels) @ other.visual.proj, other.encode_image(pixels))


def test_open_clip_training(tmp_path: Path) -> None:
    model = open_clip_directory(tmp_path / "oc")
    options: dict[str, Any] = {"kind": "open_clip", "path": str(tmp_path / "oc")}
    tower = build_vision_tower(VisionSettings(**options, patch_dropout=0.5, grad_checkpointing=True))
    plain = build_vision_tower(VisionSettings(**options)).eval()
    torch.testing.assert_close(tower.eval()(PIXELS), plain(PIXELS))
    assert not torch.allclose(tower.train()(PIXELS), plain(PIXELS), atol=1e-3)
    tower(PIXELS).sum().backward()
    assert all(p.grad is not None for p in tower.parameters() if p.requires_grad)
    # the same parameters as open_clip's own lock leaves trainable, but for its projection
    for unlocked in (1, 2, 3, 4):
        model.requires_grad_(True)
        model.lock_image_tower(unlocked_groups=unlocked)
        theirs = {n for n, p in model.visual.named_parameters() if p.requires_grad} - {"proj"}
        ours = build_vision_tower(VisionSettings(**options, freeze=True, unlocked_groups=unlocked))
        trained = {n.removeprefix("model.visual.") for n, p in ours.named_parameters() if p.requires_grad}
        assert trained == theirs, unlocked
    with pytest.raises(ModelError, match="open_clip knows no model 'no-such'"):
        build_vision_tower(VisionSettings(kind="open_clip", name="no-such"))
    with torch.device("meta"):
        named = build_vision_tower(VisionSettings(kind="open_clip", name="ViT-B-32", pretrained=False))
    assert named.dim == 768 and named.image_size == 224


def loaded_by_open_clip(folder: Path) -> Any:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), preprocess


def test_open_clip_loads_our_export(tmp_path: Path) -> None:
    model = tiny_llm2clip(tmp_path, vision={"fit": "crop", "interpolation": "bicubic"})
    model.save_pretrained(tmp_path / "own")
    out = export(ExportSettings(model=str(tmp_path / "own"), layout="open_clip", out=str(tmp_path / "oc")))
    theirs, preprocess = loaded_by_open_clip(out)
    pixels = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.encode_image(pixels), model.get_image_features(pixels), atol=1e-5, rtol=1e-5
        )
        tokens = open_clip.get_tokenizer(f"local-dir:{out}")(["a dog"])
        assert torch.equal(theirs.encode_text(tokens), torch.zeros(1, 6))
    assert torch.equal(theirs.logit_scale, model.logit_scale)
    from PIL import Image

    picture = Image.effect_mandelbrot((50, 38), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    ours = model.vision_model.preprocessing.transform()(picture)
    torch.testing.assert_close(preprocess(picture), ours, atol=1e-5, rtol=1e-5)


def test_open_clip_loads_clips_own_text_tower(tmp_path: Path) -> None:
    # CLIP's tokens end with the highest id, which open_clip's pooling looks for
    clip = save_clip(tmp_path / "clip", hidden_act="quick_gelu")
    use = ClipTextSettings(use="two_losses", path=str(tmp_path / "clip"))
    vision = VisionSettings(kind="transformers", path=str(tmp_path / "clip"))
    model = LLM2CLIP(
        ModelSettings(vision=vision, embed_dim=6, adapter_depth=1, clip_text=use), LLM_DIM
    ).eval()
    model.save_pretrained(tmp_path / "own")
    out = export(ExportSettings(model=str(tmp_path / "own"), layout="open_clip", out=str(tmp_path / "oc")))
    theirs, _ = loaded_by_open_clip(out)
    ids = torch.tensor([[1, 7, 9, 299, 0, 0, 0, 0, 0, 0], [1, 4, 299, 0, 0, 0, 0, 0, 0, 0]])
    expected = clip.get_text_features(input_ids=ids)
    expected = getattr(expected, "pooler_output", expected)
    torch.testing.assert_close(theirs.encode_text(ids), expected, atol=1e-5, rtol=1e-5)
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(
        theirs.encode_image(pixels), model.get_image_features(pixels), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["timm", "open_clip"])
def test_their_own_towers_go_back_to_open_clip(kind: str, tmp_path: Path) -> None:
    if kind == "timm":
        vision = VisionSettings(kind="timm", name="vit_tiny_patch16_224", pretrained=False)
    else:
        open_clip_directory(tmp_path / "source")
        vision = VisionSettings(kind="open_clip", path=str(tmp_path / "source"))
    model = LLM2CLIP(ModelSettings(vision=vision, embed_dim=6, adapter_depth=1), LLM_DIM).eval()
    model.save_pretrained(tmp_path / "own")
    for layout in ("open_clip", "native"):
        out = export(ExportSettings(model=str(tmp_path / "own"), layout=layout, out=str(tmp_path / layout)))
        size = model.vision_model.image_size
        pixels = torch.randn(2, 3, size, size)
        again = LLM2CLIP.from_pretrained(out)
        torch.testing.assert_close(again.get_image_features(pixels), model.get_image_features(pixels))
    theirs, _ = loaded_by_open_clip(tmp_path / "open_clip")
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.encode_image(pixels), model.get_image_features(pixels), atol=1e-4, rtol=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eva02", "siglip"])
def test_open_clip_loads_towers_that_it_knows_by_name(kind: str, tmp_path: Path) -> None:
    if kind == "eva02":
        vision = VisionSettings(kind="eva02", name="eva02-b-16", pretrained=False)
    else:
        config = {"model_type": "siglip_vision_model", "hidden_act": "gelu"}
        (tmp_path / "config.json").write_text(json.dumps(config))  # the defaults are base, patch 16, 224
        vision = VisionSettings(kind="transformers", path=str(tmp_path / "config.json"))
    torch.manual_seed(0)
    model = LLM2CLIP(
        ModelSettings(vision=vision, embed_dim=64, adapter_depth=1, projection="affine"), LLM_DIM
    ).eval()
    with torch.no_grad():
        for parameter in model.vision_model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "own")
    out = export(ExportSettings(model=str(tmp_path / "own"), layout="open_clip", out=str(tmp_path / "oc")))
    theirs, _ = loaded_by_open_clip(out)
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.encode_image(pixels), model.get_image_features(pixels), atol=1e-3, rtol=1e-3
        )


@pytest.mark.parametrize("kind", ["openai", "siglip"])
def test_published_layouts_are_those_of_their_libraries(kind: str, tmp_path: Path) -> None:
    """The plain definitions that our reader is tested with, against the modules that the checkpoints come from."""
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randn(2, 3, kit.SIDE, kit.SIDE, generator=generator)
    if kind == "openai":
        state = kit.filled(kit.openai_shapes())
        visual = open_clip.transformer.VisionTransformer(
            kit.SIDE, kit.PATCH, kit.WIDTH, kit.DEPTH, kit.HEADS, kit.HIDDEN / kit.WIDTH,
            output_dim=kit.EMBED, act_layer=open_clip.transformer.QuickGELU,
        ).eval()  # fmt: skip
        visual.load_state_dict(
            {n.removeprefix("visual."): t for n, t in state.items() if n.startswith("visual.")}
        )
        expected = kit.plain_openai(state, pixels)
    else:
        state = kit.filled(kit.siglip_shapes())
        visual = timm.create_model(
            "vit_base_patch16_siglip_224", num_classes=0, img_size=kit.SIDE, patch_size=kit.PATCH,
            embed_dim=kit.WIDTH, depth=kit.DEPTH, num_heads=4, mlp_ratio=kit.HIDDEN / kit.WIDTH,
        ).eval()  # fmt: skip
        prefix = "visual.trunk."
        visual.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
        expected = kit.plain_siglip(state, pixels, 4)
    with torch.no_grad():
        torch.testing.assert_close(visual(pixels), expected, atol=1e-4, rtol=1e-4)
