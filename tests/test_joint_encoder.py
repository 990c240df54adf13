"""JointEncoder: what its two halves give, any kind of image, and halves that do not belong together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from llm2clip.errors import ModelError  # noqa: E402
from llm2clip.evaluation.joint_encoder import JointEncoder  # noqa: E402
from llm2clip.models import LLM2CLIP, CaptionEncoder  # noqa: E402
from tests.tiny_llm2clip import pictures, save_both, sentences  # noqa: E402


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return save_both(tmp_path_factory.mktemp("joint"))


def test_features_are_those_of_the_halves(saved: tuple[Path, Path, Path]) -> None:
    llm, adapter, clip = saved
    joint = JointEncoder.from_pretrained(clip, llm, adapter=adapter)
    texts, images = sentences(5), pictures(5)
    model, captions = (
        LLM2CLIP.from_pretrained(clip),
        CaptionEncoder.from_pretrained(llm, adapter=adapter),
    )
    with torch.no_grad():
        want = F.normalize(model.get_text_features(captions.encode(texts)), dim=-1)
        pixels = torch.stack([joint.transform(image) for image in images])
        want_images = F.normalize(model.get_image_features(pixels), dim=-1)
    torch.testing.assert_close(joint.encode_texts(texts), want)
    torch.testing.assert_close(joint.encode_images(images), want_images)
    torch.testing.assert_close(joint.encode_pixels(pixels), want_images)
    assert not joint.training and not joint.encode_texts(texts).requires_grad
    with pytest.raises(ValueError, match="caption 1 is empty"):
        joint.encode_texts(["a", " "])


def test_images_of_any_mode(saved: tuple[Path, Path, Path]) -> None:
    llm, adapter, clip = saved
    joint = JointEncoder.from_pretrained(clip, llm, adapter=adapter)
    image = pictures(1, size=20)[0]
    grey = image.convert("L")
    transparent = image.convert("RGBA")
    transparent.putalpha(Image.new("L", image.size, 255))
    features = joint.encode_images([image, transparent, grey, grey.convert("RGB"), image.convert("P")])
    torch.testing.assert_close(features[0], features[1])
    torch.testing.assert_close(features[2], features[3])
    assert features.isfinite().all() and not torch.allclose(features[0], features[2])


def test_halves_that_do_not_belong_together(saved: tuple[Path, Path, Path], tmp_path: Path) -> None:
    llm, _, clip = saved
    with pytest.raises(ModelError, match="not the one whose embeddings"):
        JointEncoder.from_pretrained(clip, llm)
    assert JointEncoder.from_pretrained(clip, llm, check=False).encode_texts(["a"]).shape == (1, 6)
    with pytest.raises(ModelError, match="is not a directory"):
        JointEncoder.from_pretrained(clip, tmp_path / "nothing")
    other = CaptionEncoder.from_pretrained(llm)
    other.dim = 7
    with pytest.raises(ModelError, match="width 32, this LLM makes 7"):
        JointEncoder(LLM2CLIP.from_pretrained(clip), other)
