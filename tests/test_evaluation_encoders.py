"""Baselines give the features of the libraries they come from; models that cannot be used say why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llm2clip.errors import ConfigError, ModelError
from llm2clip.evaluation.encoders import EncoderOpener
from llm2clip.evaluation.encoders.base import DualEncoder
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.settings import BenchmarkSettings, ClipTextSettings, LLMSettings
from tests import published_kit
from tests.clip_kit import CONTEXT
from tests.evaluation_kit import build_kit, save_baseline
from tests.test_models_published import hub_directory, repository_state
from tests.tiny_models import save_tiny

CPU = torch.device("cpu")
LONG = "a caption that is much longer than the ten tokens of this text tower"
TEXTS = ["a red square", LONG, "x"]
IMAGES = [
    Image.new("RGB", size, color) for size, color in (((9, 14), (200, 30, 30)), ((20, 8), (10, 90, 200)))
]


def opened(tmp_path: Path, model: str, **changes: object) -> DualEncoder:
    settings = BenchmarkSettings(models={"it": model}, **changes)  # type: ignore[arg-type]
    return EncoderOpener(settings, CPU, tmp_path / "cache").open("it")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_transformers_models_give_their_own_features(tmp_path: Path, kind: str) -> None:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    folder = save_baseline(tmp_path / kind, kind)
    encoder = opened(tmp_path, f"transformers:{folder}")
    model = AutoModel.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(images=IMAGES, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    masks = {} if kind == "siglip" else {"attention_mask": tokens["attention_mask"]}
    with torch.no_grad():
        images = model.get_image_features(**pixels).pooler_output
        texts = model.get_text_features(input_ids=tokens["input_ids"], **masks).pooler_output
        tower = model.vision_model(**pixels).pooler_output
    batch = [encoder.transform(image) for image in IMAGES]
    torch.testing.assert_close(encoder.encode_images(batch), images)
    torch.testing.assert_close(encoder.encode_images(batch, "tower"), tower)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), texts)
    assert encoder.describe()["captions"] == f"own text tower, {CONTEXT} tokens"
    # another model is another entry of the cache
    with torch.no_grad():
        model.logit_scale.add_(1)
    model.save_pretrained(folder)
    assert opened(tmp_path, f"transformers:{folder}").image_identity() != encoder.image_identity()


def test_open_clip_models_give_their_own_features(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms("RN50")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    encoder = opened(tmp_path, f"open_clip:RN50@{tmp_path / 'weights.pt'}")
    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([transform(image) for image in IMAGES]))
        texts = model.encode_text(open_clip.get_tokenizer("RN50")(TEXTS))
    torch.testing.assert_close(encoder.encode_images([encoder.transform(image) for image in IMAGES]), images)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), texts)
    with pytest.raises(ConfigError, match="gives no 'tower' features"):
        encoder.encode_images([], "tower")
    with pytest.raises(ModelError, match="open_clip cannot load"):
        opened(tmp_path, f"open_clip:NoSuch@{tmp_path / 'weights.pt'}")
    with pytest.raises(ModelError, match="openai is no file; set download=true"):
        opened(tmp_path, "open_clip:RN50@openai")
    with pytest.raises(ConfigError, match="names no weights"):
        opened(tmp_path, "open_clip:RN50")


def test_nothing_is_downloaded_unless_asked(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="openai/clip-vit-base-patch16 is no directory; set download=true"):
        opened(tmp_path, "transformers:openai/clip-vit-base-patch16")


def test_models_that_are_no_image_text_models(tmp_path: Path) -> None:
    llm = save_tiny(tmp_path / "llm")
    with pytest.raises(ModelError, match="it: .*llm cannot be loaded with transformers"):
        opened(tmp_path, f"transformers:{llm}")
    with pytest.raises(ModelError, match="is not an LLM2CLIP model directory"):
        opened(tmp_path, str(tmp_path / "nowhere"))


def test_layers_and_precision_of_our_models(tmp_path: Path) -> None:
    kit = build_kit(tmp_path)
    llm = LLMSettings(path=str(kit.llm))
    encoder = opened(tmp_path, str(kit.first), llm=llm)
    model = LLM2CLIP.from_pretrained(kit.first / "result")
    batch = [encoder.transform(image) for image in IMAGES]
    with torch.no_grad():
        tower = model.vision_model(torch.stack(batch))
        images = model.get_image_features(torch.stack(batch))
    torch.testing.assert_close(encoder.encode_images(batch, "tower"), tower)
    torch.testing.assert_close(encoder.encode_images(batch), images)
    half = opened(tmp_path, str(kit.first), llm=llm, precision="bf16")
    rounded = half.encode_images(batch)
    assert rounded.dtype == torch.float32 and 0 < (rounded - images).abs().max() < 0.05
    assert half.image_identity() != encoder.image_identity()
    assert half.text_identity() == encoder.text_identity()


@pytest.mark.parametrize("layout", ["hub directory", "repository file"])
def test_published_checkpoints_are_evaluated_as_they_are(tmp_path: Path, layout: str) -> None:
    """With embeddings of their LLM given by a store or the LLM, since they do not say which it was."""
    llm = save_tiny(tmp_path / "llm", hidden_size=published_kit.LLM, num_attention_heads=2)
    if layout == "hub directory":
        place = hub_directory(tmp_path / "model")
    else:
        place = tmp_path / "model.pt"
        torch.save(repository_state(published_kit.openai_shapes()), place)
    encoder = opened(tmp_path, str(place), llm=LLMSettings(path=str(llm)))
    model = LLM2CLIP.from_pretrained(place)
    batch = [encoder.transform(image) for image in IMAGES]
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_images(batch), model.get_image_features(torch.stack(batch)))
        embeddings = CaptionEncoder.from_pretrained(llm).encode(TEXTS)
        torch.testing.assert_close(encoder.encode_texts(TEXTS), model.get_text_features(embeddings))


def clip_text_of(model: LLM2CLIP, texts: list[str]) -> Any:
    assert model.clip_text is not None
    return model.clip_text.tokenize(texts)


def test_clips_own_text_tower_reads_the_captions_too(tmp_path: Path) -> None:
    kit = build_kit(tmp_path)
    clip_text = ClipTextSettings(use="concat", path=str(kit.clip))
    llm = CaptionEncoder.from_pretrained(kit.llm)
    model = LLM2CLIP(
        replace(LLM2CLIP.from_pretrained(kit.first / "result").settings, clip_text=clip_text),
        llm.dim,
        llm.fingerprint(),
        vision=LLM2CLIP.from_pretrained(kit.first / "result").vision_model,
    )
    assert model.text_fusion is not None
    torch.nn.init.normal_(model.text_fusion.weight)  # it begins without the tower
    model.save_pretrained(tmp_path / "both")
    encoder = opened(tmp_path, str(tmp_path / "both"), llm=LLMSettings(path=str(kit.llm)))
    model.eval().attach_llm(llm)
    with torch.no_grad():
        wanted = model.encode_text(TEXTS)
        without = model.get_text_features(llm.encode(TEXTS), clip_text_of(model, ["x"] * 3))
    torch.testing.assert_close(encoder.encode_texts(TEXTS), wanted)
    assert (wanted - without).abs().max() > 1e-3
