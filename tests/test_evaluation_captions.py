"""Caption files as they are published: what becomes a pair, and that nothing is left out in silence."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from llm2clip.errors import DataError
from llm2clip.evaluation.captions import CaptionData, open_captions
from llm2clip.evaluation.captions.similarity import read_sentence_pairs
from llm2clip.settings import CaptionRetrievalSettings, CaptionSettings
from tests.data_files import SHARED


def read(path: Path | str, **options: Any) -> CaptionData:
    return open_captions("set", CaptionRetrievalSettings(sets={"set": str(path)}, **options))


def coco(path: Path, captions: list[list[str]]) -> Path:
    """captions_val2017.json: annotations of all images in no particular order."""
    images = [
        {"id": 100 + row, "file_name": f"{100 + row:012d}.jpg", "license": 4} for row in range(len(captions))
    ]
    annotations = [
        {"image_id": 100 + row, "id": 7 * row + number, "caption": own[number]}
        for number in range(5)
        for row, own in enumerate(captions)
        if number < len(own)
    ]
    path.write_text(json.dumps({"info": {}, "licenses": [], "images": images, "annotations": annotations}))
    return path


def karpathy(path: Path, captions: list[list[str]], splits: list[str]) -> Path:
    images = [
        {
            "filename": f"{row}.jpg",
            "split": split,
            "sentences": [{"tokens": [], "raw": text, "sentid": 0} for text in own],
        }
        for row, (own, split) in enumerate(zip(captions, splits, strict=True))
    ]
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


CAPTIONS = [
    ["a dog", "one dog", "x"],
    ["two cats ", "some cats"],
    ["a lone caption"],
    ["equal", "equal"],
    [" ", "b", "c"],
]


def test_coco_gives_the_first_two_captions_of_each_image(tmp_path: Path) -> None:
    data = read(coco(tmp_path / "captions_val2017.json", CAPTIONS))
    (pairs,) = data.pairs
    assert pairs.first == ["a dog", "two cats", "equal", "b"]
    assert pairs.second == ["one dog", "some cats", "equal", "c"]
    assert pairs.labels == ("first → second", "second → first") and pairs.name == "captions"
    assert data.images == 5 and data.left_out == {"captions: fewer than two captions": ["000000000102.jpg"]}
    assert data.equal == {"captions": 1} and data.empty == 1 and data.selected == ""


def test_karpathy_takes_one_split_and_says_so(tmp_path: Path) -> None:
    path = karpathy(tmp_path / "dataset_coco.json", CAPTIONS, ["test", "train", "test", "test", "val"])
    data = read(path)
    assert data.pairs[0].first == ["a dog", "equal"]
    assert data.selected == "split test, 3 of 5 images" and data.images == 3
    assert list(data.left_out.values()) == [["2.jpg"]]
    with pytest.raises(DataError, match="splits found: test, train, val"):
        read(path, split="validation")


def test_a_limit_is_said(tmp_path: Path) -> None:
    path = karpathy(tmp_path / "a.json", CAPTIONS, ["test"] * 5)
    assert read(path, limit=2).selected == "the first 2 of 5 images"
    assert read(path, limit=2).pairs[0].first == ["a dog", "two cats"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected an object with 'images'"),
        ('{"annotations": []}', "no field 'images'; fields found: annotations"),
        ('{"images": [{"id": 1}, {"id": 1}], "annotations": []}', "two images with the id 1"),
        ('{"images": [{"id": 1}], "annotations": [{"image_id": 2, "caption": "a"}]}', "image 2 is not among"),
        ('{"images": [{"id": 1}], "annotations": [{"image_id": 1, "text": "a"}]}', "no field 'caption'"),
        ('{"images": [{"filename": "a"}]}', "no field 'split'"),
        ('{"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a"}]}', "captions: 1 with 1"),
    ],
)  # fmt: skip
def test_json_of_another_format(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.json")


def lines(path: Path, *texts: str) -> Path:
    data = "".join(f"{text}\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_multi30k_translations_of_one_description(tmp_path: Path) -> None:
    lines(tmp_path / "test_2016_flickr.en", "A dog.", "Two\u2028men.", "", "A tree.")
    lines(tmp_path / "test_2016_flickr.de", "Ein Hund.", "Zwei Männer.", "Leer.", "Ein Baum.")
    lines(tmp_path / "test_2016_flickr.fr.gz", "Un chien.", "Deux hommes.", "Vide.", "")
    data = read(tmp_path / "test_2016_flickr.{en,de,fr.gz}")
    assert [pairs.name for pairs in data.pairs] == ["de ↔ en", "fr ↔ en"]
    german, french = data.pairs
    assert german.labels == ("de → en", "en → de")
    assert german.first == ["Ein Hund.", "Zwei Männer.", "Ein Baum."]
    assert german.second == ["A dog.", "Two\u2028men.", "A tree."]
    assert french.first == ["Un chien.", "Deux hommes."]
    assert data.left_out == {
        "de ↔ en: no caption in one of both": ["line 3"],
        "fr ↔ en: no caption in one of both": ["line 3", "line 4"],
    }
    turned = read(tmp_path / "test_2016_flickr.{en,de}", original="de")
    assert turned.pairs[0].first == ["A dog.", "Two\u2028men.", "A tree."]
    with pytest.raises(DataError, match="no file of the language 'cs'; languages found: en, de"):
        read(tmp_path / "test_2016_flickr.{en,de}", original="cs")


def test_multi30k_independent_descriptions(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        for language in ("en", "de"):
            lines(
                tmp_path / f"test_2016.{number}.{language}",
                *(f"{language}{number} {row}" for row in range(3)),
            )
    data = read(tmp_path / "test_2016.{1..3}.{en,de}")
    assert [pairs.name for pairs in data.pairs] == ["captions, en", "de ↔ en", "captions, de"]
    assert (data.pairs[0].first[1], data.pairs[0].second[1]) == ("en1 1", "en2 1")
    assert (data.pairs[2].first[1], data.pairs[2].second[1]) == ("de1 1", "de2 1")
    assert (data.pairs[1].first[1], data.pairs[1].second[1]) == ("de1 1", "en1 1")
    assert data.pairs[0].labels == ("description 1 → description 2", "description 2 → description 1")
    assert data.left_out == {}
    lines(tmp_path / "test_2016.1.de", "nur", "zwei")
    with pytest.raises(DataError, match="lengths differ .*test_2016.1.de: 2"):
        read(tmp_path / "test_2016.{1..3}.{en,de}")
    (tmp_path / "bad.en").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        read(tmp_path / "bad.en")


def test_sources_take_short_before_long_and_name_the_fields(tmp_path: Path) -> None:
    records = [
        {"caption": f"short {n}", "alt": f"long {n}", "es": {"alt": f"largo {n}", "caption": f"corto {n}"}}
        for n in range(3)
    ]
    records += [{"caption": "alone"}, {"caption": "short 9", "alt": "long 9", "group": "g"}]
    records += [{"caption": "again", "alt": "again too", "group": "g"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + "no json\n")
    captions = CaptionSettings(translations={"es": "es.alt"})
    data = read(path, captions=captions, max_bad_share=0.2)
    own, spanish = data.pairs
    assert own.labels == ("caption → alt", "alt → caption")
    assert own.first == ["short 0", "short 1", "short 2", "short 9"]
    assert own.second == ["long 0", "long 1", "long 2", "long 9"]
    assert spanish.first == ["largo 0", "largo 1", "largo 2"]
    assert spanish.second == ["long 0", "long 1", "long 2"]  # the caption that it says again, not the first
    assert data.selected == "one sample of each group, 5 of 7"
    assert [len(keys) for keys in data.left_out.values()] == [1, 1, 2] and "cannot be read" in data.left_out
    with pytest.raises(DataError, match="1 of the 7 samples"):
        read(path)
    with pytest.raises(DataError, match="fields found: caption"):
        read(path, captions=CaptionSettings(short=("name",), long=("story",)), max_bad_share=1.0)


def test_several_captions_in_one_field_are_a_pair(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"caption": [f"a {n}", f"b {n}", "c"]}) + "\n" for n in range(3)))
    (pairs,) = read(path).pairs
    assert (pairs.first, pairs.second) == (["a 0", "a 1", "a 2"], ["b 0", "b 1", "b 2"])
    assert pairs.labels == ("first → second", "second → first")


def test_a_pair_without_others_is_left_out_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"caption": "a", "alt": "b"}, {"caption": "c", "alt": "d", "fr": {"caption": "seul"}}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = read(path, captions=CaptionSettings(translations={"fr": "fr.caption"}))
    assert [pairs.name for pairs in data.pairs] == ["captions"]
    assert data.left_out["fr ↔ original: one pair alone, which always finds itself"] == ["seul"]


def test_what_is_no_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is an address"):
        read("https://example.org/captions.json")
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "absent.tar")


@pytest.mark.skipif(not (SHARED / "openstax").is_dir(), reason="the OpenStax shards are not there")
def test_openstax_shards() -> None:
    data = read(
        SHARED / "openstax" / "openstax-val-*.tar", captions=CaptionSettings(translations={"pl": "pl.alt"})
    )
    own = data.pairs[0]
    assert own.labels == ("caption → alt", "alt → caption")
    assert data.images == len(own.first) + len(data.left_out["captions: fewer than two captions"]) == 945
    assert "license" in data.credit or "source" in data.credit or "book" in data.credit


STS = [
    ("5.000", "A girl is styling her hair.", "A girl is brushing her hair."),
    ("0.5", "A man plays.", 'The "dog" sat.'),
    ("2.6", "One.", "Two."),
]


def table(path: Path, rows: list[list[str]], separator: str) -> Path:
    path.write_text("".join(separator.join(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("layout", ["stsbenchmark", "glue", "csv header", "csv"])
def test_sentence_pairs_in_every_layout(tmp_path: Path, layout: str) -> None:
    if layout == "stsbenchmark":  # called .csv, and full of quotes that are never closed
        rows = [["main", "MSRvid", "2012", "0001", s, a, f"{b}", "extra"] for s, a, b in STS]
        rows[1][6] = STS[1][2] + ' 5" long'
        path = table(tmp_path / "sts-test.csv", rows, "\t")
    elif layout == "glue":
        rows = [
            [
                "index",
                "genre",
                "filename",
                "year",
                "old_index",
                "source1",
                "source2",
                "sentence1",
                "sentence2",
                "score",
            ]
        ]
        rows += [
            [str(n), "main", "f", "2012", "1", "none", "none", a, b, s] for n, (s, a, b) in enumerate(STS)
        ]
        path = table(tmp_path / "dev.tsv", rows, "\t")
    else:
        quoted = [[f'"{a}"', '"' + b.replace('"', '""') + '"', s] for s, a, b in STS]
        head = [["sentence1", "sentence2", "similarity_score"]] if layout == "csv header" else []
        path = table(tmp_path / "a.csv", head + quoted, ",")
    pairs = read_sentence_pairs("sts", path)
    assert pairs.scores.tolist() == [5.0, 0.5, 2.6] and pairs.left_out == []
    assert pairs.first == [a for _, a, _ in STS]
    assert pairs.second[1].startswith(STS[1][2]) and pairs.second[0] == STS[0][2]


def test_lines_without_score_are_counted(tmp_path: Path) -> None:
    rows = [[a, b, s] for s, a, b in STS[::2]] + [["a", "b", ""], ["a", "", "3"], ["a", "b", "1.5"]]
    pairs = read_sentence_pairs("sts", table(tmp_path / "a.csv", rows, ","))
    assert len(pairs.scores) == 3 and pairs.left_out == ["line 3", "line 4"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("a,b\nc,d\n", "no columns sentence1"),
        ("sentence1,sentence2,score\na,b,-\n", "0 of 1 lines .*scores are hidden"),
        ("a\tb\tc\td\te\tf\tg\n", "its first line has 7"),
    ],
)
def test_tables_without_pairs(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        read_sentence_pairs("sts", tmp_path / "a.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_sentence_pairs("sts", tmp_path / "absent.csv")
