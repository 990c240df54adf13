"""Sources: what they read, what they refuse, and what they say."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest

from llm2clip.data.sample import META_FIELDS, caption_role, sample_from_record
from llm2clip.data.sources import Source, expand_braces, open_source, require_caption_fields
from llm2clip.errors import BadSampleError, DataError
from tests.data_files import SHARED, image_bytes, members_of, write_shards, write_tar


def bad_of(source: Source) -> dict[str, str]:
    found = {}
    for index in range(len(source)):
        try:
            source[index]
        except BadSampleError as error:
            found[error.key] = error.reason
    return found


def test_record_becomes_captions_and_meta() -> None:
    record = {
        "caption": " a cat ", "alt": ["one", "", "two"], "es": {"caption": "un gato", "alt": ""}, "empty": "",
        "group": "cat-7", "license": "CC0", "width": 3, "tags": [1, 2],
    }  # fmt: skip
    sample = sample_from_record("k", record, None)
    assert sample.captions == {"caption": ("a cat",), "alt": ("one", "two"), "es.caption": ("un gato",)}
    assert sample.group == "cat-7"
    assert sample.meta == {"group": "cat-7", "license": "CC0", "width": 3, "tags": [1, 2]}
    assert caption_role(sample, ("empty", "es.caption", "caption")) == "un gato"
    assert caption_role(sample, ("pl.caption",)) is None
    assert not {"caption", "alt", "name", "description", "txt", "text", "short"} & META_FIELDS


def test_tar_source_reads_all_kinds_of_members(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        [
            ("x/1.jpg", image_bytes(kind="JPEG")),
            ("x/1.json", b'{"alt": "first"}'),
            ("2.PNG", image_bytes()),
            ("2.txt", "zwölf".encode()),
            ("2.fr.txt", b"douze"),
            ("2.cls", b"7"),
            ("._2.png", b"junk"),
            ("3.json", b'{"caption": "no image"}'),
        ],
    )
    source = open_source(str(tmp_path / "a.tar"))
    assert [source[index].key for index in range(len(source))] == ["a/x/1", "a/2", "a/3"]
    assert source[0].image == image_bytes(kind="JPEG")
    assert source[1].captions == {"caption": ("zwölf",), "fr": ("douze",)}
    assert source[2].image is None
    assert source.captions_of(0).image is None
    assert source.captions_of(0).captions == source[0].captions
    assert source.blocks == [(0, 3)]


def test_paths_braces_globs_directories_and_limit(tmp_path: Path) -> None:
    write_shards(tmp_path, 3, 4)
    assert expand_braces("a-{08..10}.{x,y}") == ["a-08.x", "a-08.y", "a-09.x", "a-09.y", "a-10.x", "a-10.y"]
    assert expand_braces("{a}b{1..2}") == ["{a}b1", "{a}b2"]
    whole = open_source(str(tmp_path))
    assert len(whole) == 12 and whole.blocks == [(0, 4), (4, 8), (8, 12)]
    assert len(open_source(str(tmp_path / "train-{000000..000001}.tar"))) == 8
    assert len(open_source(str(tmp_path / "*-000002.tar"))) == 4
    assert len(open_source([str(tmp_path), str(tmp_path / "train-000000.tar")])) == 16
    limited = open_source(str(tmp_path), limit=6)
    assert len(limited) == 6 and limited.blocks == [(0, 4), (4, 6)]
    assert len({whole[index].key for index in range(12)}) == 12


def test_source_can_be_pickled_while_open(tmp_path: Path) -> None:
    write_shards(tmp_path, 2, 3)
    source = open_source([str(tmp_path / "train-000000.tar"), str(tmp_path / "train-000001.tar")])
    before = source[4]
    assert pickle.loads(pickle.dumps(source))[4] == before


def test_shard_cut_in_the_middle(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, 1, 5)
    whole = open_source(str(shard))
    expected = [whole[index] for index in range(3)]
    # the cut falls into the fourth sample's image
    with tarfile.open(shard) as tar:
        cut = tar.getmember("0x0003.png").offset_data + 10
    os.truncate(shard, cut)
    source = open_source(str(shard))
    assert [source[index] for index in range(3)] == expected
    bad = bad_of(source)
    assert len(source) == 4 and len(bad) == 1
    assert "cut" in next(iter(bad.values())) and str(shard) in next(iter(bad.values()))


def test_links_and_names_outside_are_bad_samples(tmp_path: Path) -> None:
    link = tarfile.TarInfo("5.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    path = write_tar(
        tmp_path / "a.tar",
        [*members_of(["1"]), ("../2.png", image_bytes()), ("../2.json", b'{"caption": "x"}'),
         ("/3.png", image_bytes()), ("/3.json", b'{"caption": "x"}')],
        [link],
    )  # fmt: skip
    source = open_source(str(path))
    assert source[0].key == "a/1"
    bad = bad_of(source)
    assert sorted(bad) == ["a/../2", "a//3", "a/5.png"]
    assert "link" in bad["a/5.png"] and "outside" in bad["a/../2"]


def test_huge_member_is_refused_unread(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar", [*members_of(["1"]), ("2.png", bytes(5000)), ("2.json", b'{"caption": "x"}')]
    )
    bad = bad_of(open_source(str(path), max_member_bytes=4000))
    assert list(bad) == ["a/2"] and "5000" in bad["a/2"]


def test_zero_length_shard_among_others(tmp_path: Path) -> None:
    write_shards(tmp_path, 1, 4)
    (tmp_path / "train-000001.tar").touch()
    assert len(open_source(str(tmp_path))) == 4
    with pytest.raises(DataError, match="no sample that can be used"):
        open_source(str(tmp_path / "train-000001.tar"))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b'{"caption": ""}', "no caption"),
        (b'{"caption": ', "JSON"),
        (b'["a"]', "list"),
        (b"\xff\xfe", "JSON"),
    ],
)
def test_samples_without_usable_captions(tmp_path: Path, record: bytes, reason: str) -> None:
    path = write_tar(tmp_path / "a.tar", [*members_of(["1"]), ("2.png", image_bytes()), ("2.json", record)])
    bad = bad_of(open_source(str(path)))
    assert list(bad) == ["a/2"] and reason in bad["a/2"]


def test_image_without_captions_is_bad(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*members_of(["1"]), ("2.png", image_bytes())])
    assert "no json or txt" in bad_of(open_source(str(path)))["a/2"]


def test_caption_of_100000_characters_survives(tmp_path: Path) -> None:
    text = "long " * 20000
    path = write_tar(tmp_path / "a.tar", members_of(["1"], {"caption": text}))
    assert open_source(str(path))[0].captions["caption"] == (text.strip(),)
    (tmp_path / "captions.csv").write_text(f"image,caption\nx.png,{text}\n")
    assert open_source(str(tmp_path / "captions.csv")).captions_of(0).captions["caption"] == (text.strip(),)


def test_missing_path_names_the_nearest(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", 1, 1)
    with pytest.raises(DataError, match=r"does not exist.*train-000000\.tar"):
        open_source(str(tmp_path / "shards" / "trian-000000.tar"))
    with pytest.raises(DataError, match=r"does not exist.*shards"):
        open_source(str(tmp_path / "shard" / "train-*.tar"))
    with pytest.raises(DataError, match="000001"):
        open_source(str(tmp_path / "shards" / "train-{000000..000003}.tar"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_path(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, 1, 1)
    shard.chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        open_source(str(shard))


def test_path_without_samples_lists_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"found 1 \.md"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match=r"got \.md"):
        open_source(str(tmp_path / "notes.md"))
    path = write_tar(tmp_path / "a.tar", [("1.mp3", b"x"), ("1.cls", b"3")])
    with pytest.raises(DataError, match=r"1 \.mp3, 1 \.cls"):
        open_source(str(path))
    (tmp_path / "t.csv").write_text("image,width\na.png,3\n")
    with pytest.raises(DataError, match="fields found: image, width"):
        open_source(str(tmp_path / "t.csv"))


def test_wrong_caption_field_lists_those_found(tmp_path: Path) -> None:
    source = open_source(str(write_shards(tmp_path, 1, 3)[0]))
    require_caption_fields(source, ("title", "alt"))
    with pytest.raises(DataError, match=r"title.*caption \(3\).*alt \(3\)"):
        require_caption_fields(source, ("title",))


def test_directory_with_both_splits_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, 1, 2)
    write_shards(tmp_path, 1, 2, prefix="val")
    with pytest.raises(DataError, match=r"splits train, val together.*train-\*\.tar"):
        open_source(str(tmp_path))
    assert len(open_source(str(tmp_path), mixed_splits=True)) == 4


def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(image_bytes((1, 2, 3)))
    return tmp_path


def test_folder_with_jsonl(tmp_path: Path) -> None:
    rows = [
        {"image": "images/a.png", "caption": "größer", "es": {"caption": "más"}},
        {"image": "images/none.png", "caption": "missing"},
        {"caption": "text alone"},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder(tmp_path) / "captions.jsonl").write_text(
        "\n".join([lines[0], "", "{broken", *lines[1:]]), encoding="utf-8"
    )
    source = open_source(str(tmp_path))
    assert len(source) == 4
    assert source[0].image == image_bytes((1, 2, 3)) and source[0].group == "images/a.png"
    assert source[0].captions == {"caption": ("größer",), "es.caption": ("más",)}
    assert source[3].image is None
    bad = bad_of(source)
    assert sorted(bad) == ["captions.jsonl:3", "captions.jsonl:4"]
    assert "none.png" in bad["captions.jsonl:4"] and "No such file" in bad["captions.jsonl:4"]
    assert source.captions_of(2).captions["caption"] == ("missing",)


def test_folder_with_csv(tmp_path: Path) -> None:
    text = 'file_name,caption,long\nimages/a.png,"a, b","two\nlines"\nimages/a.png,,x\n'
    (folder(tmp_path) / "captions.csv").write_text(text)
    source = open_source(str(tmp_path))
    assert source[0].captions == {"caption": ("a, b",), "long": ("two\nlines",)}
    assert source[1].captions == {"long": ("x",)}
    assert source[0].group == source[1].group
    assert len({source[index].key for index in range(2)}) == 2


@pytest.mark.parametrize("form", ["bytes", "struct", "path"])
def test_parquet(tmp_path: Path, form: str) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    folder(tmp_path)
    data = image_bytes((1, 2, 3))
    cell = {"bytes": data, "struct": {"bytes": data, "path": "a.png"}, "path": "images/a.png"}[form]
    table = pa.table(
        {"image": [cell] * 5, "caption": [f"c{n}" for n in range(4)] + [""], "n": list(range(5))}
    )
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    source = open_source(str(tmp_path / "a.parquet"))
    assert source.blocks == [(0, 2), (2, 4), (4, 5)]
    assert [source[index].captions["caption"] for index in range(4)] == [("c0",), ("c1",), ("c2",), ("c3",)]
    assert source[3].image == data and source[3].meta["n"] == 3
    assert source.captions_of(3).image is None
    assert len(bad_of(source)) == 1
    assert pickle.loads(pickle.dumps(source))[2].captions == source[2].captions
    assert len(open_source(str(tmp_path / "a.parquet"), limit=3)) == 3


def test_parquet_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a readable parquet"):
        open_source(str(tmp_path / "a.parquet"))


@pytest.mark.skipif(not (SHARED / "openstax").is_dir(), reason="../shared/data/openstax is not here")
def test_real_shards() -> None:
    train = open_source(str(SHARED / "openstax" / "openstax-train-{000000..000005}.tar"))
    val = open_source(str(SHARED / "openstax" / "openstax-val-*.tar"))
    assert (len(train), len(val)) == (5730, 945)
    sample = train[0]
    assert sample.image is not None and sample.image[:2] == b"\xff\xd8"
    assert sample.meta["commit"] and caption_role(sample, ("es.alt",))
    require_caption_fields(val, ("pl.alt",))
