"""Export: every layout loads back to equal features, by us and by the libraries it is for."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from llm2clip.cli import main
from llm2clip.errors import ConfigError, ModelError, UserError
from llm2clip.export import export
from llm2clip.export import run as export_run
from llm2clip.export.card import run_card
from llm2clip.models import LLM2CLIP, CaptionEncoder
from llm2clip.models.model_card import ModelCard, command_line, licence_of
from llm2clip.settings import (
    ClipTextSettings,
    ExportSettings,
    LLMSettings,
    LoraSettings,
    ModelSettings,
    VisionSettings,
)
from tests.clip_kit import LLM_DIM, save_clip, tiny_llm2clip
from tests.test_models_eva02 import published, tiny_eva02
from tests.tiny_models import save_tiny

PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LLM = torch.randn(3, LLM_DIM, generator=torch.Generator().manual_seed(2))
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="needs the packages of the [onnx] extra")


def eva_model(folder: Path) -> LLM2CLIP:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(published(tiny_eva02(), "LLM2CLIP"), folder / "tower.safetensors")
    vision = VisionSettings(kind="eva02", path=str(folder / "tower.safetensors"))
    settings = ModelSettings(vision=vision, embed_dim=6, adapter_depth=1, projection="affine")
    torch.manual_seed(0)
    model = LLM2CLIP(settings, LLM_DIM, {"model_type": "llama"}).eval()
    with torch.no_grad():
        model.visual_projection.bias.normal_()
    return model


def any_model(folder: Path, kind: str, **options: Any) -> LLM2CLIP:
    return eva_model(folder) if kind == "eva02" else tiny_llm2clip(folder, kind, **options)


def exported(model: LLM2CLIP, folder: Path, layout: Any, **options: Any) -> Path:
    model.save_pretrained(folder / "own")
    settings = ExportSettings(model=str(folder / "own"), layout=layout, out=str(folder / layout), **options)
    return export(settings)


def same_features(one: Any, two: Any, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        for name, value in (("get_image_features", PIXELS), ("get_text_features", LLM)):
            torch.testing.assert_close(
                getattr(one, name)(value), getattr(two, name)(value), atol=tolerance, rtol=tolerance
            )


@pytest.mark.parametrize("layout", ["native", "huggingface"])
@pytest.mark.parametrize(
    "kind", ["clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "eva02"]
)
def test_layouts_of_our_own_towers(kind: str, layout: str, tmp_path: Path) -> None:
    model = any_model(tmp_path, kind)
    again = LLM2CLIP.from_pretrained(exported(model, tmp_path, layout))
    same_features(again, model)
    assert again.vision_model.preprocessing == model.vision_model.preprocessing
    assert again.fingerprint == model.fingerprint and again.settings.embed_dim == 6
    assert torch.equal(again.logit_scale, model.logit_scale)


@pytest.mark.parametrize("kind", ["clip_vision_model", "eva02"])
def test_hugging_face_layout_is_the_published_one(kind: str, tmp_path: Path) -> None:
    model = any_model(tmp_path, kind)
    folder = exported(model, tmp_path, "huggingface")
    names = set(load_file(folder / "model.safetensors"))
    assert {"logit_scale", "visual_projection.weight", "text_adapter.adaptor.0.fn.0.weight"} <= names
    assert "vision_model.embeddings.class_embedding" in names
    assert all(
        n.startswith(("vision_model.", "visual_proj", "text_adapter.adaptor.", "logit_scale")) for n in names
    )
    # without what only we know it is read as a checkpoint of somebody else's
    config = json.loads((folder / "config.json").read_text())
    del config["llm2clip"]
    (folder / "config.json").write_text(json.dumps(config))
    same_features(LLM2CLIP.from_pretrained(folder), model)


def test_transformers_loads_the_image_side(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

    vision = {"fit": "crop", "interpolation": "bicubic"}
    model = tiny_llm2clip(tmp_path, vision=vision)
    folder = exported(model, tmp_path, "huggingface")
    reference = CLIPVisionModelWithProjection.from_pretrained(folder, local_files_only=True).eval()
    images = reference(pixel_values=PIXELS).image_embeds
    torch.testing.assert_close(images, model.get_image_features(PIXELS), atol=1e-5, rtol=1e-5)
    from PIL import Image

    picture = Image.effect_mandelbrot((50, 37), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    theirs = torch.as_tensor(processor(picture, return_tensors="pt")["pixel_values"][0])
    torch.testing.assert_close(
        theirs, model.vision_model.preprocessing.transform()(picture), atol=1e-5, rtol=1e-5
    )


def test_clips_own_text_tower_goes_along(tmp_path: Path) -> None:
    save_clip(tmp_path / "clip")
    use = ClipTextSettings(use="concat", path=str(tmp_path / "clip"))
    model = tiny_llm2clip(tmp_path, clip_text=use)
    assert model.clip_text is not None
    tokens = model.clip_text.tokenize(["a dog", "x", "two cats"])
    for layout in ("huggingface", "open_clip"):
        again = LLM2CLIP.from_pretrained(exported(model, tmp_path, layout))
        assert again.clip_text is not None
        own = again.clip_text.tokenize(["a dog", "x", "two cats"])
        torch.testing.assert_close(again.get_text_features(LLM, own), model.get_text_features(LLM, tokens))
        torch.testing.assert_close(again.get_image_features(PIXELS), model.get_image_features(PIXELS))
    names = set(load_file(tmp_path / "huggingface" / "model.safetensors"))
    assert any(name.startswith("text_model.") for name in names) and "text_projection.weight" in names


def test_open_clip_layout_reads_back(tmp_path: Path) -> None:
    model = tiny_llm2clip(tmp_path, "clip_vision_model", projection="linear", logit_bias_init=-10.0)
    folder = exported(model, tmp_path, "open_clip")
    again = LLM2CLIP.from_pretrained(folder)
    same_features(again, model)
    assert again.logit_bias is not None and again.logit_bias.item() == -10
    config = json.loads((folder / "open_clip_config.json").read_text())
    vision = config["model_cfg"]["vision_cfg"]
    assert vision["layers"] == 2 and vision["head_width"] == 8 and vision["mlp_ratio"] == 1.5
    assert (
        config["preprocess_cfg"]["resize_mode"] == "longest" and config["preprocess_cfg"]["fill_color"] == 255
    )
    del config["llm2clip"]
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="an open_clip model without LLM2CLIP's adapter"):
        LLM2CLIP.from_pretrained(folder)


def test_towers_that_a_layout_has_no_place_for(tmp_path: Path) -> None:
    cases = {
        ("dinov2", "huggingface"): "no names for this transformers tower",
        ("dinov2", "open_clip"): "no tower like this transformers one",
        ("eva02", "open_clip"): "no EVA02 tower of patch size 4, width 24, 2 blocks",
        ("siglip_vision_model", "open_clip"): "exact GELU and this one has gelu_pytorch_tanh",
    }
    for (kind, layout), message in cases.items():
        with pytest.raises(ModelError, match=message):
            exported(any_model(tmp_path / kind / layout, kind), tmp_path / kind / layout, layout)
        assert not (tmp_path / kind / layout / layout).exists()


def test_adapters_on_the_tower_are_merged(tmp_path: Path) -> None:
    from llm2clip.settings import VisionLoraSettings

    model = tiny_llm2clip(tmp_path, vision={"lora": VisionLoraSettings(rank=2)})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.5)
    for layout in ("native", "huggingface", "open_clip"):
        again = LLM2CLIP.from_pretrained(exported(model, tmp_path / layout, layout))
        same_features(again, model, 1e-4)
        assert not any("lora" in name for name in again.state_dict())


@needs_onnx
@pytest.mark.parametrize("kind", ["clip_vision_model", "eva02"])
def test_onnx_gives_equal_features_for_any_batch(kind: str, tmp_path: Path) -> None:
    from llm2clip.export.onnx import OnnxModel

    model = any_model(tmp_path, kind)
    folder = exported(model, tmp_path, "onnx")
    session = OnnxModel(folder)
    same_features(session, model, 1e-4)
    for count in (1, 7):
        pixels, embeddings = torch.randn(count, 3, 16, 16), torch.randn(count, LLM_DIM)
        images, texts = session.get_image_features(pixels), session.get_text_features(embeddings)
        torch.testing.assert_close(images, model.get_image_features(pixels), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(texts, model.get_text_features(embeddings), atol=1e-4, rtol=1e-4)
    assert {p.name for p in folder.iterdir()} >= {
        "image.onnx",
        "text_adapter.onnx",
        "preprocessor_config.json",
    }
    with pytest.raises(ModelError, match="neither of model_type llm2clip"):
        LLM2CLIP.from_pretrained(folder)


def test_missing_onnx_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name.startswith("onnx") else real(name, *a)
    )
    with pytest.raises(
        ModelError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'llm2clip\[onnx\]'"
    ):
        exported(tiny_llm2clip(tmp_path), tmp_path, "onnx")
    with pytest.raises(ConfigError, match="the onnx layout is written in fp32"):
        ExportSettings(layout="onnx", dtype="fp16")


def test_lower_precision(tmp_path: Path) -> None:
    model = tiny_llm2clip(tmp_path)
    folder = exported(model, tmp_path, "huggingface", dtype="bf16")
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    same_features(LLM2CLIP.from_pretrained(folder), model, 0.1)


def test_merged_llm(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "llm")
    encoder = CaptionEncoder.from_pretrained(base, pooling="mean", prompt="say: ")
    encoder.add_lora(LoraSettings(rank=2))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    encoder.save_adapter(tmp_path / "adapter")
    llm = LLMSettings(path=str(base), adapter=str(tmp_path / "adapter"), prompt="say: ")
    out = export(ExportSettings(layout="llm", out=str(tmp_path / "merged"), llm=llm))
    again = CaptionEncoder.from_pretrained(out)
    captions = ["a dog", "two cats"]
    torch.testing.assert_close(again.encode(captions), encoder.encode(captions), atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name in load_file(out / "model.safetensors"))


def test_a_model_that_comes_back_different_is_not_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llm2clip(tmp_path)
    exported(model, tmp_path, "native")
    before = (tmp_path / "native" / "model.safetensors").read_bytes()

    def wrong(model: LLM2CLIP, folder: Path, card: Any) -> None:
        with torch.no_grad():
            model.visual_projection.weight.mul_(1.1)
        export_run.fill_native(model, folder, card)

    monkeypatch.setitem(export_run._FILLERS, "native", wrong)
    with pytest.raises(
        ModelError, match=r"image features of the exported model differ .* nothing was written"
    ):
        exported(model, tmp_path, "native")
    assert (tmp_path / "native" / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*partial*"))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llm2clip(tmp_path).save_pretrained(tmp_path / "run" / "result")
    arguments = [f"model={tmp_path / 'run'}", f"out={tmp_path / 'out'}", "layout=huggingface"]
    assert main(["export", *arguments]) == 0
    assert "loaded back with equal features" in capsys.readouterr().out
    assert main(["export", f"out={tmp_path / 'b'}"]) == 2
    assert "model is empty" in capsys.readouterr().err
    assert main(["export"]) == 2 and "out is empty" in capsys.readouterr().err
    assert main(["export", "layout=llm", f"out={tmp_path / 'b'}"]) == 2
    assert "llm.path is empty" in capsys.readouterr().err


def front_matter(text: str) -> dict[str, Any]:
    _, front, _ = text.split("---\n", 2)
    values: dict[str, Any] = yaml.safe_load(front)
    return values


def test_card_says_what_the_run_says(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "train-000000.tar").write_bytes(b"")
    (tmp_path / "shards" / "dataset.json").write_text(json.dumps({"name": "Figures", "license": "CC BY 4.0"}))
    tiny_llm2clip(tmp_path).save_pretrained(run / "result")
    shards = str(tmp_path / "shards" / "train-{000000..000000}.tar")
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"train": [shards]}, "store": "s"}))
    lines = [{"step": 1, "loss": 2.0, "val/long/t2i_r10": 0.1}, {"step": 2, "val/long/t2i_r10": 0.25}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "va')
    llm = tmp_path / "llm"
    llm.mkdir()
    (llm / "README.md").write_text("---\nlicense: llama3.1\ntags: [x]\n---\n# Base\nlicense: no\n")
    settings = ExportSettings(
        model=str(run),
        out=str(tmp_path / "out"),
        licence="cc-by-4.0",
        base_llm="org/base-llm",
        llm=LLMSettings(path=str(llm)),
    )
    export(settings)
    card = (tmp_path / "out" / "README.md").read_text()
    front = front_matter(card)
    assert front["license"] == "cc-by-4.0" and front["base_model"] == "org/base-llm"
    assert front["library_name"] == "llm2clip"
    metric = front["model-index"][0]["results"][0]["metrics"][0]
    assert metric == {"type": "val/long/t2i_r10", "value": 0.25}
    for part in (
        "## Intended use",
        "train-{000000..000000}.tar",
        "llm2clip train --config training.yaml",
        "| val/long/t2i_r10 | 0.25 |",
        "Base LLM: org/base-llm, licence: llama3.1",
        "license: CC BY 4.0",
        "torch ",
    ):
        assert part in card, part
    assert str(tmp_path) not in card
    assert yaml.safe_load((tmp_path / "out" / "training.yaml").read_text())["store"] == "s"

    results = tmp_path / "results.json"
    scores = {"recall": {"1": 0.5, "10": 0.75}}
    results.write_text(
        json.dumps({"retrieval": [{"queries": "long", "direction": "text → image", "scores": scores}]})
    )
    measured = run_card(run, ExportSettings(results=str(results)))
    assert measured.metrics == {"long text → image R@1": 0.5, "long text → image R@10": 0.75}
    results.write_text("{}")
    with pytest.raises(UserError, match="holds no retrieval results"):
        run_card(run, ExportSettings(results=str(results)))


def test_card_without_a_run_claims_nothing(tmp_path: Path) -> None:
    model = tiny_llm2clip(tmp_path)
    text = ModelCard().render(model)
    front = front_matter(text)
    assert "license" not in front and "model-index" not in front and "base_model" not in front
    assert "None recorded" in text and "licence: not recorded" in text
    count = sum(p.numel() for p in model.parameters())
    assert f"{count:,} parameters" in text
    assert licence_of(tmp_path) == ""
    (tmp_path / "README.md").write_text("# no front matter\nlicense: x\n")
    assert licence_of(tmp_path) == ""
    assert command_line(["/usr/bin/llm2clip", "train", "run.out=a b"]) == "llm2clip train 'run.out=a b'"
