"""preprocessor_config.json of every family against the libraries that wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llm2clip.data.images import CLIP_MEAN, CLIP_STD
from llm2clip.errors import ModelError
from llm2clip.models.preprocessing import (
    Preprocessing,
    preprocessing_from_config,
    read_preprocessor,
)
from llm2clip.settings import VisionSettings

OPENAI = {
    "crop_size": 24,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
    "resample": 3,
    "size": 24,
}
SIGLIP = {"size": {"height": 24, "width": 24}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
DINO = {
    "crop_size": {"height": 24, "width": 24},
    "do_center_crop": True,
    "size": {"shortest_edge": 28},
    "resample": 3,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def written(folder: Path, values: Any) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (OPENAI, Preprocessing(24, fit="crop", interpolation="bicubic")),
        (SIGLIP, Preprocessing(24, (0.5,) * 3, (0.5,) * 3, "squash", "bilinear")),
        (DINO, Preprocessing(24, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "crop", "bicubic", 28)),
        (
            {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]},
            Preprocessing(99, (0.1, 0.2, 0.3), (1.0,) * 3),
        ),
        ({"size": {"shortest_edge": 24}}, Preprocessing(24, fit="crop", interpolation="bicubic")),
    ],
)
def test_files_of_the_families(values: dict[str, Any], expected: Preprocessing, tmp_path: Path) -> None:
    assert read_preprocessor(written(tmp_path, values), 99) == expected
    # a file in the directory stands for it
    assert read_preprocessor(tmp_path / "config.json", 99) == expected


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    assert read_preprocessor(tmp_path, 32) == Preprocessing(32, CLIP_MEAN, CLIP_STD, "pad", "adaptive")


@pytest.mark.parametrize("size", [(50, 37), (37, 50), (333, 500), (24, 24), (9, 31)])
@pytest.mark.parametrize("kind", ["openai", "siglip", "dino"])
def test_pixels_are_those_of_transformers(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    family = "siglip" if kind == "siglip" else "clip"
    module = pytest.importorskip(f"transformers.models.{family}.image_processing_pil_{family}")
    values = {"openai": OPENAI, "siglip": SIGLIP, "dino": DINO}[kind]
    processor = getattr(module, f"{'Siglip' if kind == 'siglip' else 'CLIP'}ImageProcessorPil")(**values)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    expected = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
    ours = read_preprocessor(written(tmp_path, values), 24).transform()(image)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_round_trip_and_settings() -> None:
    for made in (
        Preprocessing(24, fit="crop", interpolation="bicubic", resize=28),
        Preprocessing(32, (0.5,) * 3, (0.5,) * 3, "squash", "bilinear"),
        Preprocessing(16),
    ):
        assert preprocessing_from_config(json.loads(json.dumps(made.to_config()))) == made
    crop = Preprocessing(24, fit="crop", interpolation="bicubic", resize=28)
    assert crop.at_size(48) == Preprocessing(48, fit="crop", interpolation="bicubic", resize=56)
    chosen = crop.chosen(VisionSettings(fit="pad", interpolation="nearest"))
    assert (chosen.fit, chosen.interpolation, chosen.resize) == ("pad", "nearest", 28)
    assert crop.chosen(VisionSettings()) == crop
    # models saved before there was a choice
    old = preprocessing_from_config({"image_size": 8, "mean": [0, 0, 0], "std": [1, 1, 1]})
    assert (old.fit, old.interpolation) == ("pad", "adaptive")


@pytest.mark.parametrize(
    "made",
    [
        Preprocessing(24, fit="crop", interpolation="lanczos", resize=28),
        Preprocessing(24, fit="squash", interpolation="bilinear"),
        Preprocessing(24),
    ],
)
def test_what_is_written_reads_back(made: Preprocessing, tmp_path: Path) -> None:
    assert read_preprocessor(written(tmp_path, made.to_preprocessor()), 99) == made


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": {"height": 4, "width": 8}}, "square images, the file asks for 4 x 8"),
        ({"size": 4, "resample": 9}, "resample 9 is none of 0, 1, 2, 3"),
        ({"image_mean": [1, 2]}, "three numbers per channel"),
        ({"llm2clip_fit": "stretch"}, "llm2clip_fit must be one of pad, crop, squash, got 'stretch'"),
        ([], "must hold a JSON object"),
    ],
)
def test_files_that_cannot_be_used(values: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        read_preprocessor(written(tmp_path, values), 24)


def test_a_long_strip_is_not_enlarged_as_a_whole() -> None:
    strip = Image.new("RGB", (60_000, 2), (10, 200, 30))
    pixels = Preprocessing(64, (0.0,) * 3, (1.0,) * 3, "crop", "bicubic").transform()(strip)
    expected = torch.tensor([10, 200, 30]).float()[:, None, None] / 255
    torch.testing.assert_close(pixels, expected.expand(3, 64, 64), atol=1e-6, rtol=0)
