"""Shards as img2dataset makes them of DreamLIP's tables: every caption field, mixtures, a dense ratio in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm2clip.data.caption_stream import CaptionStream
from llm2clip.data.order import EpochOrder
from llm2clip.data.sources import open_source
from llm2clip.errors import BadSampleError, DataError
from llm2clip.settings import CaptionSettings, DataSettings
from llm2clip.training.clip_reader import draw_captions
from tests.data_files import write_tar
from tests.training_kit import picture

# what img2dataset 1.47 adds to the columns that it was told to keep
META: dict[str, Any] = {
    "url": "http://x/1.jpg", "status": "success", "error_message": None, "width": 384, "height": 384,
    "original_width": 149, "original_height": 128, "exif": "{}", "sha256": "63cd",
}  # fmt: skip
DENSE = ("shortIB", "longIB", "shortSV", "longSV", "shortLLA", "longLLA")


def record(number: int) -> dict[str, Any]:
    captions: dict[str, Any] = {f"{kind}_captions": f"{kind} text of picture {number}" for kind in DENSE}
    captions["shortLLA_captions"] = None  # an empty cell of the table
    return captions | {"caption": f"raw text {number}", "key": f"{number:09d}", **META}


def write_dataset(folder: Path, count: int, start: int = 0) -> Path:
    """A folder as img2dataset leaves it: a tar with jpg, json and txt, and a parquet and statistics beside it."""
    folder.mkdir(parents=True)
    members: list[tuple[str, bytes]] = []
    for number in range(start, start + count):
        name = f"{number:09d}"
        members += [
            (f"{name}.jpg", picture(number)),
            (f"{name}.json", json.dumps(record(number), indent=4).encode()),
            (f"{name}.txt", f"raw text {number}".encode()),
        ]
    write_tar(folder / "00000.tar", members)
    (folder / "00000.parquet").write_bytes(b"PAR1 is not read")
    (folder / "00000_stats.json").write_text("{}")
    return folder


def test_every_caption_of_dreamlip_is_a_field(tmp_path: Path) -> None:
    source = open_source(str(write_dataset(tmp_path / "cc3m", 3)))
    assert len(source) == 3
    sample = source[1]
    assert set(sample.captions) == {"caption", *(f"{kind}_captions" for kind in DENSE if kind != "shortLLA")}
    assert sample.captions["longSV_captions"] == ("longSV text of picture 1",)
    assert sample.image == picture(1) and {"url", "exif", "sha256", "status"} <= set(sample.meta)


def test_captions_under_one_name_are_nested_fields(tmp_path: Path) -> None:
    nested = {"captions": {"raw": "as found", "longSV": ["one", "two"]}, **META}
    text = b"another text"
    members = [("0.jpg", picture(0)), ("0.json", json.dumps(nested).encode()), ("0.txt", text)]
    source = open_source(str(write_tar(tmp_path / "a.tar", members)))
    assert dict(source[0].captions) == {
        "captions.raw": ("as found",),
        "captions.longSV": ("one", "two"),
        "caption": ("another text",),
    }


def test_raw_and_dense_captions_are_mixed_as_asked(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "cc3m", 4)
    roles = {"raw": ("caption",), "short_sv": ("shortSV_captions",), "long_sv": ("longSV_captions",)}
    captions = CaptionSettings(
        short=(), long=(), roles=roles, probabilities={"raw": 0.25, "short_sv": 0.375, "long_sv": 0.375}
    )
    source = open_source(str(folder))
    drawn = [
        draw_captions(source.captions_of(index), captions, np.random.default_rng([0, epoch, index]))[0]
        for epoch in range(500)
        for index in range(4)
    ]
    share = sum(text.startswith("raw") for text in drawn) / len(drawn)
    assert share == pytest.approx(0.25, abs=0.03)
    # an image has all of its captions in turn
    assert {text for text in drawn if text.endswith(" 2")} == {
        "raw text 2", "shortSV text of picture 2", "longSV text of picture 2"
    }  # fmt: skip
    # and all of them are embedded
    found = set(CaptionStream(DataSettings(train=(str(folder),), captions=captions)).read())
    assert len(found) == 12 and "raw text 3" in found
    with pytest.raises(
        BadSampleError, match="no caption in raw_caption; it has shortIB_captions, longIB_captions"
    ):
        wrong = CaptionSettings(short=("raw_caption",), long=("raw_caption",))
        draw_captions(source.captions_of(0), wrong, np.random.default_rng(0))


def test_two_downloads_are_mixed_by_weight(tmp_path: Path) -> None:
    one, two = write_dataset(tmp_path / "cc3m", 30), write_dataset(tmp_path / "cc12m", 10, 100)
    source = open_source([str(one), str(two)], weights=(1.0, 3.0))
    drawn = EpochOrder(source, seed=1).indices(0)
    assert len(drawn) == 40 and (drawn >= 30).sum() == 30
    with pytest.raises(DataError, match="3 weights for 2 sources"):
        open_source([str(one), str(two)], weights=(1.0, 3.0, 1.0))
