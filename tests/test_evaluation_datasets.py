"""Every benchmark's reader on a few samples in exactly the published layout, and on damaged ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llm2clip.data.images import decode_image
from llm2clip.errors import BadSampleError, ConfigError, DataError
from llm2clip.evaluation.datasets import READERS, Request, RetrievalData, open_dataset, open_own, text_files
from llm2clip.evaluation.datasets.text_files import head_of_json_array
from llm2clip.settings import CaptionSettings, DataSettings
from tests.benchmark_files import WRITERS, write_chinese_clip, write_json, write_lines
from tests.data_files import SHARED, image_bytes, write_tar


def opened(tmp_path: Path, name: str, count: int = 9, **options: object) -> RetrievalData:
    root = tmp_path / name
    if not root.exists():
        WRITERS[name](root, count)
    return open_dataset(name, Request(root, **options))  # type: ignore[arg-type]


def pairs(data: RetrievalData, kind: str = "captions") -> dict[str, list[str]]:
    """Key of every image -> its captions of one kind."""
    (captions,) = [captions for captions in data.captions if captions.kind == kind]
    found: dict[str, list[str]] = {data.images.key(row): [] for row in range(len(data.images))}
    for text, row in zip(captions.texts, captions.image.tolist(), strict=True):
        found[data.images.key(row)].append(text)
    return found


@pytest.mark.parametrize("name", sorted(READERS))
def test_images_can_be_read_and_captions_belong_to_them(tmp_path: Path, name: str) -> None:
    data = opened(tmp_path, name)
    assert data.name == name and data.images.missing() == [] and len(data.images) >= 6
    for row in range(len(data.images)):
        assert decode_image(data.images.read(row)).size == (14, 10)
    for captions in data.captions:
        assert len(captions.texts) == len(captions.image) and captions.image.dtype == np.int64
        assert captions.image.min() >= 0 and captions.image.max() < len(data.images)
        assert (np.diff(captions.image) >= 0).all()


def test_flickr30k_and_coco_keep_five_captions_of_the_test_split(tmp_path: Path) -> None:
    flickr = pairs(opened(tmp_path, "flickr30k"))
    assert list(flickr) == [f"{1007129816 + n}.jpg" for n in (1, 2, 3, 5, 6, 7)]
    assert flickr["1007129817.jpg"] == [f"Caption {c} of picture 1." for c in range(5)]
    coco = opened(tmp_path, "coco")
    assert coco.images.key(0) == "val2014/COCO_val2014_000000000001.jpg"
    assert len(coco.captions[0].texts) == 30
    assert len(opened(tmp_path, "coco", per_image=2).captions[0].texts) == 12
    with pytest.raises(DataError, match=r"no split 'dev'; splits found: restval, test, train"):
        opened(tmp_path, "coco", split="dev")


def test_sharegpt4v_reads_its_head_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm2clip.evaluation.datasets.sharegpt4v.COUNT", 4)
    data = opened(tmp_path, "sharegpt4v")
    assert list(pairs(data)) == [f"coco/train2017/{n:012d}.jpg" for n in range(4)]
    assert data.captions[0].texts[3] == "In picture 3, a man. Behind him, [a wall]."


def test_the_head_of_an_array_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"a": [1, "]"]}, "x, y", 17, [], {"b": {"c": "ü"}}]
    (tmp_path / "a.json").write_text(json.dumps(values, indent=1))
    for chunk in (1, 3, 1000):  # a chunk may end anywhere
        monkeypatch.setattr(text_files, "_CHUNK", chunk)
        assert [head_of_json_array(tmp_path / "a.json", count) for count in (0, 2, 3, 9)] == [
            [], values[:2], values[:3], values
        ]  # fmt: skip
    (tmp_path / "cut.json").write_text(json.dumps(values)[:-9])
    assert head_of_json_array(tmp_path / "cut.json", 4) == values[:4]
    with pytest.raises(DataError, match="after entry 4; it is damaged"):
        head_of_json_array(tmp_path / "cut.json", 5)
    (tmp_path / "object.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="does not hold a JSON array"):
        head_of_json_array(tmp_path / "object.json", 5)


def test_urban1k_goes_by_number_and_takes_the_first_line(tmp_path: Path) -> None:
    data = opened(tmp_path, "urban1k", 12)
    assert [data.images.key(row) for row in (0, 1, 11)] == ["1.jpg", "2.jpg", "12.jpg"]
    assert pairs(data)["10.jpg"] == ["Street 10, with a café."]


def test_docci_and_dci_splits(tmp_path: Path) -> None:
    assert list(pairs(opened(tmp_path, "docci")))[:3] == [f"test_{n:05d}.jpg" for n in (0, 1, 3)]
    assert list(pairs(opened(tmp_path, "docci", split="qual_dev")))[0] == "qual_dev_00002.jpg"
    every = pairs(opened(tmp_path, "dci"))
    assert len(every) == 9 and every["sa_3.jpg"] == ["Thing 3.\nIt is the 3th thing."]
    assert every["sa_1.jpg"] == ["Thing 1."]
    assert list(pairs(opened(tmp_path, "dci", split="test"))) == ["sa_2.jpg", "sa_5.jpg", "sa_8.jpg"]


def test_chinese_captions_in_every_form(tmp_path: Path) -> None:
    flickr = pairs(opened(tmp_path, "flickr30k-cn"))
    assert len(flickr) == 9 and flickr["1007129820.jpg"] == [f"第4张图片,{c}" for c in range(5)]
    # the older release: the suffix in the name, and a blank before the caption
    root = tmp_path / "older"
    WRITERS["flickr30k-cn"](root, 2)
    write_lines(root / "test.txt", ["1007129816.jpg#zhc#0 一只 狗", "1007129817.jpg#zhc#0 两只猫"])
    assert pairs(open_dataset("flickr30k-cn", Request(root)))["1007129816.jpg"] == ["一只 狗"]
    write_lines(root / "test.txt", ["1007129816"])
    with pytest.raises(DataError, match=r"test\.txt:1: expected .*a caption, got '1007129816'"):
        open_dataset("flickr30k-cn", Request(root))
    coco = pairs(opened(tmp_path, "coco-cn"))
    assert list(coco)[0] == "train2014/COCO_train2014_000000000001.jpg" and len(coco) == 8
    assert coco["val2014/COCO_val2014_000000000002.jpg"][1] == "图片 COCO_val2014_000000000002 1"
    write_lines(
        tmp_path / "coco-cn" / "coco-cn-version1805v1.1" / "coco-cn_test.txt", ["COCO_val2014_000000000099"]
    )
    with pytest.raises(DataError, match="no caption for 1 of 1 images .*COCO_val2014_000000000099"):
        opened(tmp_path, "coco-cn")


@pytest.mark.parametrize("name", ["flickr30k-cn", "coco-cn"])
def test_chinese_clips_conversion(tmp_path: Path, name: str) -> None:
    write_chinese_clip(tmp_path / name, 5)
    data = open_dataset(name, Request(tmp_path / name))
    assert list(pairs(data)) == [str(1000 + n) for n in range(5)]
    assert pairs(data)["1003"] == ["第3张图片,0", "第3张图片,1"]
    assert [decode_image(data.images.read(row)).size for row in range(5)] == [(14, 10)] * 5
    path = tmp_path / name / "test_imgs.tsv"
    path.write_text(path.read_text().replace("1001\t", "1001\t*"))
    with pytest.raises(BadSampleError, match="1001.*not base64"):
        open_dataset(name, Request(tmp_path / name)).images.read(1)
    write_lines(tmp_path / name / "test_texts.jsonl", ['{"text_id": 1, "text": "a", "image_ids": [7]}'])
    with pytest.raises(DataError, match="no image 7 in test_imgs.tsv"):
        open_dataset(name, Request(tmp_path / name))


def test_xm3600_has_a_set_of_captions_per_language(tmp_path: Path) -> None:
    data = opened(tmp_path, "xm3600")
    assert [captions.kind for captions in data.captions] == ["de", "en", "quz"]
    assert pairs(data, "quz")[f"{1:016x}.jpg"] == [f"quz caption {c} of 1" for c in range(3)]
    chosen = opened(tmp_path, "xm3600", split="quz,en")
    assert [captions.kind for captions in chosen.captions] == ["quz", "en"]
    with pytest.raises(DataError, match="no captions in xx; languages found: de, en, quz"):
        opened(tmp_path, "xm3600", split="xx")


def test_xm3600_with_a_language_that_some_images_lack(tmp_path: Path) -> None:
    WRITERS["xm3600"](tmp_path / "xm3600", 4)
    path = tmp_path / "xm3600" / "captions.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    del records[0]["quz"], records[2]["quz"]
    write_lines(path, [json.dumps(record) for record in records])
    data = opened(tmp_path, "xm3600", split="quz")
    assert [len(texts) for texts in pairs(data, "quz").values()] == [0, 3, 0, 2]


def test_openstax_and_own_sources(tmp_path: Path) -> None:
    data = opened(tmp_path, "openstax")
    assert [captions.kind for captions in data.captions] == ["short", "long", "pl"]
    assert data.equal_match and data.meta["book"] == ["osbooks-psychology"]
    assert pairs(data, "pl")["openstax-val-000000/0003"] == ["Opis rysunku 3."]
    assert pairs(data, "pl")["openstax-val-000000/0002"] == []
    shards = (str(tmp_path / "openstax" / "openstax-val-000000.tar"),)
    wanted = CaptionSettings(short=("alt",), long=(), translations={"polski": "pl.caption"})
    own = open_own(DataSettings(val=shards, captions=wanted))
    assert [(c.kind, len(c.texts)) for c in own.captions] == [("short", 9), ("polski", 4)]
    with pytest.raises(
        DataError, match=r"caption fields title; fields found: .*caption \(9\).*data\.captions"
    ):
        open_own(DataSettings(val=shards, captions=CaptionSettings(short=("title",), long=())))
    with pytest.raises(DataError, match="no shards test-"):
        opened(tmp_path, "openstax", split="test")


def test_one_sample_of_each_group(tmp_path: Path) -> None:
    members = [
        (f"{number}.{kind}", content)
        for number in range(6)
        for kind, content in (
            ("png", image_bytes((number, 9, 9))),
            ("json", json.dumps({"caption": f"text {number}", "group": f"g{number // 2}"}).encode()),
        )
    ]
    write_tar(tmp_path / "a.tar", [*members, ("9.png", b"no caption")])
    data = DataSettings(val=(str(tmp_path / "a.tar"),), max_bad_share=0.5)
    assert open_own(data).captions[0].texts == ["text 0", "text 2", "text 4"]
    with pytest.raises(DataError, match=r"(?s)1 of the first 7 held-out samples cannot be read.*a/9"):
        open_own(DataSettings(val=data.val, max_bad_share=0.0))


def test_a_limit_keeps_the_first_images_with_their_captions(tmp_path: Path) -> None:
    data = opened(tmp_path, "xm3600")
    first = data.head(3)
    assert len(first.images) == 3 and pairs(first, "en") == dict(list(pairs(data, "en").items())[:3])
    assert first.images.identity() != data.images.identity() and data.head(None) is data
    assert first.images.read(2) == data.images.read(2)


def test_missing_files_are_named(tmp_path: Path) -> None:
    data = opened(tmp_path, "docci")
    before = data.images.identity()
    (tmp_path / "docci" / "images" / "test_00003.jpg").unlink()
    again = opened(tmp_path, "docci")
    assert again.images.missing() == ["test_00003.jpg"] and again.images.identity() != before
    with pytest.raises(BadSampleError, match=r"test_00003\.jpg.*No such file"):
        again.images.read(2)
    (tmp_path / "docci" / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"none of the images was found.*test_00000\.jpg.*images\.<data set>"):
        opened(tmp_path, "docci")
    moved = opened(tmp_path, "docci", images=tmp_path / "elsewhere")
    assert len(moved.images) == 6
    with pytest.raises(DataError, match=r"lacks docci_descriptions\.jsonlines; it holds nothing"):
        (tmp_path / "empty").mkdir()
        open_dataset("docci", Request(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="unknown data set 'doci'; did you mean docci"):
        open_dataset("doci", Request(tmp_path))


def test_wrong_formats_say_what_was_found(tmp_path: Path) -> None:
    root = tmp_path / "docci"
    WRITERS["docci"](root, 3)
    write_lines(root / "docci_descriptions.jsonlines", ['{"split": "test", "text": "a"}'])
    with pytest.raises(DataError, match="no field 'image_file'; fields found: split, text"):
        open_dataset("docci", Request(root))
    write_lines(root / "docci_descriptions.jsonlines", ['{"split": "test"'])
    with pytest.raises(DataError, match=r"jsonlines:1 is not JSON"):
        open_dataset("docci", Request(root))
    (root / "docci_descriptions.jsonlines").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        open_dataset("docci", Request(root))
    write_json(tmp_path / "coco" / "dataset_coco.json", {"images": [{"split": "test", "filename": 3}]})
    with pytest.raises(DataError, match="'filename' must be str, got a int"):
        open_dataset("coco", Request(tmp_path / "coco"))
    write_json(tmp_path / "coco" / "dataset_coco.json", [])
    with pytest.raises(DataError, match="expected an object with 'images', got a list"):
        open_dataset("coco", Request(tmp_path / "coco"))


@pytest.mark.skipif(not (SHARED / "openstax").is_dir(), reason="the OpenStax shards are not here")
def test_the_real_openstax_shards() -> None:
    data = open_dataset("openstax", Request(SHARED / "openstax"))
    counts = {captions.kind: len(captions.texts) for captions in data.captions}
    assert counts["long"] == 945 and counts["short"] == 909 and counts["pl"] > 200
    assert decode_image(data.images.read(944)).size[0] > 50
