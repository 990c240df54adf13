"""The builders on small packages and repositories written here, the check and the command."""

from __future__ import annotations

import argparse
import io
import json
import lzma
import shutil
import struct
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llm2clip.data import debian
from llm2clip.data.cataclysm import build_cataclysm
from llm2clip.data.check import check_source
from llm2clip.data.cli import add_data_parser, run_data
from llm2clip.data.cnxml import parse_module, split_credit
from llm2clip.data.openstax import Book, build_openstax
from llm2clip.data.sources import open_source
from llm2clip.errors import BadSampleError, DataError
from tests.data_files import image_bytes, members_of, write_tar

ROOT = "./usr/share/games/cataclysm-dda"


def catalogue(texts: dict[str, str]) -> bytes:
    """A .mo file; a NUL separates singular and plural."""
    head = "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=n!=1;\n"
    entries = sorted((key.encode(), value.encode()) for key, value in ({"": head} | texts).items())
    table, blob = [], b""
    start = 28 + 16 * len(entries)
    for column in (0, 1):
        for entry in entries:
            table.append(struct.pack("<II", len(entry[column]), start + len(blob)))
            blob += entry[column] + b"\0"
    start_block = struct.pack("<7I", 0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, 0)
    return start_block + b"".join(table) + blob


def sheet(colors: list[tuple[int, ...] | None], columns: int, side: int) -> bytes:
    image = Image.new("RGBA", (columns * side, -(-len(colors) // columns) * side))
    for number, color in enumerate(colors):
        if color is not None:
            row, column = divmod(number, columns)
            box = (column * side, row * side, (column + 1) * side, (row + 1) * side)
            image.paste((*color, 255), box)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def package(path: Path) -> Path:
    """A Debian package with ten monsters, some traps for the reader, and a German catalogue."""
    monsters: list[dict[str, Any]] = [
        {
            "type": "MONSTER",
            "id": f"mon_{n}",
            "name": {"str": f"beast {n}"},
            "description": f"<color_red>Beast</color>  {n}.",
        }
        for n in range(10)
    ]
    monsters[1] |= {"name": {"str_sp": "fish"}, "description": {"str": "It swims."}}
    # 2 takes its description from 3, 4 its name from an abstract entry: 2 and 3 become one group
    monsters[2] = {"type": "MONSTER", "id": "mon_2", "copy-from": "mon_3", "name": "other"}
    monsters[4] = {"type": "MONSTER", "id": "mon_4", "copy-from": "mon_base", "description": "Derived."}
    monsters.append({"type": "MONSTER", "abstract": "mon_base", "name": "base", "description": "abstract"})
    monsters.append({"type": "MONSTER", "id": "mon_loop", "copy-from": "mon_loop", "name": "loop"})
    parts = [{"type": "vehicle_part", "id": "door", "name": "door", "description": "Opens."}]
    tiles = [{"id": f"mon_{n}", "fg": n} for n in range(8)]
    tiles[0]["fg"] = [{"weight": 1, "sprite": 9}, {"weight": 5, "sprite": 0}]  # type: ignore[assignment]
    tiles += [
        {"id": ["overlay_mon_9"], "fg": 8},
        {"id": "mon_loop", "fg": 8},
        {"id": "vp_door_front", "fg": [10, 11]},
        {"id": "mon_0_season_winter", "fg": 12},
        # a placeholder for four ids, and a sprite that is empty
        {"id": ["mon_8", "a", "b", "c"], "fg": 9},
        {"id": "mon_9", "fg": 13},
    ]  # type: ignore[list-item]
    colors: list[tuple[int, ...] | None] = [(20 * n, 255 - 20 * n, 60) for n in range(13)]
    colors[6] = colors[5]  # the same picture: 5 and 6 become one group
    config = {
        "tile_info": [{"width": 4, "height": 4}],
        "tiles-new": [
            {"file": "one.png", "tiles": tiles},
            {"file": "two.png", "sprite_width": 8, "sprite_height": 8, "tiles": [{"id": "mon_9", "fg": 13}]},
        ],
    }
    german = catalogue({
        "beast 0\0beast 0s": "Bestie 0\0Bestien 0",
        "<color_red>Beast</color>  0.": "<color_red>Bestie</color> 0.",
        "fish\0fish": "Fisch\0Fische",
    })  # fmt: skip
    files = {
        f"{ROOT}/json/monsters.json": json.dumps(monsters),
        f"{ROOT}/json/broken.json": "{",
        f"{ROOT}/mods/M/parts.json": json.dumps(parts),
        f"{ROOT}/mods/M/override.json": json.dumps([monsters[0] | {"name": "impostor"}]),
        f"{ROOT}/gfx/Set/tile_config.json": json.dumps(config),
        f"{ROOT}/gfx/Set/one.png": sheet([*colors, None], 7, 4),
        f"{ROOT}/gfx/Set/two.png": sheet([(1, 2, 3)], 1, 8),
        "./usr/share/locale/de/LC_MESSAGES/cataclysm-dda.mo": german,
        "./usr/share/doc/cataclysm-dda-data/copyright": "Copyright: everyone",
        "./usr/share/../../../../escape.json": "{}",
    }
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = lzma.compress(inner.getvalue())

    def member(name: str, content: bytes) -> bytes:
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        return head + content + b"\n" * (len(content) % 2)

    path.write_bytes(b"!<arch>\n" + member("debian-binary", b"2.0\n\n") + member("data.tar.xz", data))
    return path


OPTIONS: dict[str, Any] = {
    "tilesets": ("Set",),
    "languages": ("de", "xx"),
    "val_share": 0.25,
    "shard_samples": 4,
}


def records(out: Path, split: str = "*") -> dict[str, dict[str, Any]]:
    found = {}
    for shard in sorted(out.glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    handle = tar.extractfile(member)
                    assert handle is not None
                    found[member.name.removesuffix(".json")] = json.load(handle)
    return found


def test_cataclysm_end_to_end(tmp_path: Path) -> None:
    deb = package(tmp_path / "p.deb")
    summary = build_cataclysm(tmp_path / "out", package=deb, **OPTIONS)
    found = records(tmp_path / "out")
    # mon_8 is a placeholder, mon_loop has no description
    expected = ["mon_0", "mon_0", *(f"mon_{n}" for n in range(1, 8)), "vp_door"]
    assert sorted(record["entity"] for record in found.values()) == expected
    first = found["mon_0--Set"]
    assert (first["name"], first["description"]) == ("beast 0", "Beast 0.")
    assert first["de"] == {"name": "Bestie 0", "description": "Bestie 0."}
    assert first["license"] == "CC-BY-SA-3.0" and "Set" in first["attribution"]
    assert found["mon_1--Set"]["de"] == {"name": "Fisch"}
    assert found["mon_2--Set"]["description"] == found["mon_3--Set"]["description"]
    assert found["mon_2--Set"]["group"] == found["mon_3--Set"]["group"] == "mon_2"
    assert found["mon_5--Set"]["group"] == found["mon_6--Set"]["group"] == "mon_5"
    assert found["mon_4--Set"]["name"] == "base" and found["mon_4--Set"]["description"] == "Derived."
    assert found["vp_door_front--Set"]["name"] == "door" and "xx" not in summary["translations"]
    source = open_source(str(tmp_path / "out" / "train-*.tar"))
    colors = {
        source[n].key.split("/")[1]: Image.open(io.BytesIO(source[n].image or b""))
        for n in range(len(source))
    }
    for key, image in colors.items():
        if key.startswith("mon_") and "season" not in key:
            number = 5 if key == "mon_6--Set" else int(key[4])
            assert image.size == (4, 4) and image.getpixel((1, 1)) == (
                20 * number,
                255 - 20 * number,
                60,
                255,
            )
    train = {record["group"] for record in records(tmp_path / "out", "train").values()}
    val = {record["group"] for record in records(tmp_path / "out", "val").values()}
    assert train and val and not train & val
    assert "Copyright: everyone" in (tmp_path / "out" / "LICENSE.txt").read_text()
    assert not list(tmp_path.rglob("escape.json")) and summary["counts"]["samples"]["val"] > 0


def test_cataclysm_bytes_repeat_and_a_finished_set_is_left_alone(tmp_path: Path) -> None:
    deb = package(tmp_path / "p.deb")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "train-000009.tar").write_bytes(b"left by an interrupted build")
    for name in ("a", "b"):
        build_cataclysm(tmp_path / name, package=deb, **OPTIONS)
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert contents[0] == contents[1]
    # no package is needed any more
    build_cataclysm(tmp_path / "a", package=tmp_path / "gone.deb", **OPTIONS)
    with pytest.raises(DataError, match="other options"):
        build_cataclysm(tmp_path / "a", package=deb, **(OPTIONS | {"val_share": 0.5}))


def test_cataclysm_refuses_what_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        build_cataclysm(tmp_path / "out", package=tmp_path / "none.deb")
    (tmp_path / "text.deb").write_text("hello")
    with pytest.raises(DataError, match="not a Debian package"):
        build_cataclysm(tmp_path / "out", package=tmp_path / "text.deb")
    whole = package(tmp_path / "p.deb").read_bytes()
    for cut in (70, len(whole) // 2, len(whole) - 300):
        (tmp_path / "cut.deb").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"damaged or cut short"):
            build_cataclysm(tmp_path / "out", package=tmp_path / "cut.deb", **OPTIONS)
    with pytest.raises(DataError, match="no tileset Nope; it has Set"):
        build_cataclysm(tmp_path / "out", package=tmp_path / "p.deb", tilesets=("Nope",))
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_no_apt_client_names_the_alternatives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"no apt client.*--package FILE\.deb.*own-data"):
        build_cataclysm(tmp_path / "out")


def test_failing_apt_download_names_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "apt-get"
    fake.write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(DataError, match=r"Unable to locate package.*apt-get update.*--package"):
        debian.download_package("cataclysm-dda-data", tmp_path)


MODULE = """<document xmlns="http://cnx.rice.edu/cnxml"><title>T</title><content>
<figure id="a"><title>Force</title><media alt="A  probe &amp; a surface."><image mime-type="image/jpeg"
 src="../../media/a.jpg"/></media><caption>The <emphasis>tip</emphasis> bends. (credit a: "X (2)"/Flickr) Seen
 twice (credit b: modification of work by Y).</caption></figure>
<para>text<figure id="b"><subfigure><media alt="left"><image src="../../media/b.png"/></media>
<caption>Left.</caption></subfigure><subfigure><media alt="right">
<image src="../../media/c.png"/></media></subfigure>
<caption>Both.</caption></figure></para>
<figure><media alt="out"><image src="../../../secret.png"/></media></figure>
<para><media alt="inline"><image src="../../media/icon.png"/></media></para>
</content></document>"""


def test_cnxml_figures() -> None:
    figures = {figure.source: figure for figure in parse_module(MODULE.encode(), "m1")}
    assert sorted(figures) == ["media/a.jpg", "media/b.png", "media/c.png"]
    first = figures["media/a.jpg"]
    assert first.caption == "The tip bends. Seen twice."
    assert first.credit == 'credit a: "X (2)"/Flickr; credit b: modification of work by Y'
    assert (first.alt, first.short) == ("A probe & a surface.", "Force")
    assert figures["media/b.png"].caption == "Left." and figures["media/c.png"].caption == "Both."


@pytest.mark.parametrize(
    ("caption", "text", "credit"),
    [
        ("A cat (credit: NASA).", "A cat.", "credit: NASA"),
        ("Un gato (créditos: NASA)", "Un gato", "créditos: NASA"),
        ("Kot (źródło: NASA (2001))", "Kot", "źródło: NASA (2001)"),
        ("A credit (of 5 points)", "A credit (of 5 points)", ""),
        ("Open (credit: never closed", "Open", "credit: never closed"),
    ],
)
def test_credits_are_separated(caption: str, text: str, credit: str) -> None:
    assert split_credit(caption) == (text, credit)


def test_damaged_and_hostile_modules() -> None:
    with pytest.raises(BadSampleError, match="well-formed"):
        parse_module(MODULE.encode()[:300], "m1")
    with pytest.raises(BadSampleError, match="entities"):
        parse_module(b'<!DOCTYPE x [<!ENTITY a "aaaa">]><document>&a;</document>', "m1")


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def repository(
    root: Path, module: str, licence: str = "Attribution 4.0 International", borrowed: Path | None = None
) -> str:
    (root / "modules" / "m1").mkdir(parents=True)
    (root / "media").mkdir()
    (root / "modules" / "m1" / "index.cnxml").write_text(module, encoding="utf-8")
    for number, name in enumerate(("a.jpg", "b.png")):
        color = (number, 80, sum(map(ord, root.name)) % 256)
        (root / "media" / name).write_bytes(image_bytes(color, size=(40, 20)))
    if borrowed is not None:
        shutil.copy(borrowed, root / "media" / borrowed.name)
    (root / "LICENSE").write_text(licence)
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    for step in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *step], check=True, capture_output=True)
    result = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return result.stdout.strip()


@needs_git
def test_openstax_end_to_end(tmp_path: Path) -> None:
    spanish = MODULE.replace("The <emphasis>tip</emphasis> bends.", "La punta se dobla.").replace(
        "credit", "créditos"
    )
    commits = {
        "book": repository(tmp_path / "book", MODULE),
        "libro": repository(tmp_path / "libro", spanish),
    }
    # one of its two images is in the training book already
    borrowed = tmp_path / "book" / "media" / "a.jpg"
    commits["held"] = repository(tmp_path / "held", MODULE, borrowed=borrowed)
    books = [
        Book("held", commits["held"], "val"),
        Book("book", commits["book"], "train", (("es", "libro", commits["libro"]),)),
    ]
    summary = build_openstax(tmp_path / "out", books=books, side=10, base_url=f"file://{tmp_path}/")
    assert summary["counts"]["samples"] == {"book": 2, "held": 1}
    # c.png is named by the module but is not there
    assert summary["counts"]["left_out"] == 2
    found = {record["source"]: record for record in records(tmp_path / "out", "train").values()}
    first = found["media/a.jpg"]
    assert first["es"] == {"caption": "La punta se dobla. Seen twice."}
    assert (
        first["commit"] == commits["book"]
        and first["license"] == "CC-BY-4.0"
        and "NASA" not in first["credit"]
    )
    source = open_source(str(tmp_path / "out" / "train-*.tar"))
    assert Image.open(io.BytesIO(source[0].image or b"")).size == (20, 10)
    assert commits["libro"] not in first and build_openstax(
        tmp_path / "out", books=books, side=10, base_url="file:///nowhere/"
    ) == summary  # fmt: skip


@needs_git
def test_openstax_refuses_other_licences_and_missing_repositories(tmp_path: Path) -> None:
    commit = repository(tmp_path / "book", MODULE, "Attribution-NonCommercial-ShareAlike 4.0 International")
    with pytest.raises(DataError, match="not under CC BY"):
        build_openstax(tmp_path / "out", books=[Book("book", commit)], base_url=f"file://{tmp_path}/")
    for licence, url, reason in (
        ("", "http://creativecommons.org/licenses/by-nc-sa/4.0/", "not under CC BY"),
        ("", "", "does not say"),
        ("", "http://creativecommons.org/licenses/by/4.0/", ""),
    ):
        name = f"r{len(url)}"
        (tmp_path / name / "collections").mkdir(parents=True)
        collection = f'<col><md:license url="{url}">x</md:license></col>'
        (tmp_path / name / "collections" / "a.collection.xml").write_text(collection)
        book = Book(name, repository(tmp_path / name, MODULE, licence))
        options: dict[str, Any] = {"books": [book], "base_url": f"file://{tmp_path}/"}
        if reason:
            with pytest.raises(DataError, match=reason):
                build_openstax(tmp_path / "out", **options)
        else:
            assert build_openstax(tmp_path / "out", **options)["counts"]["samples"] == {name: 2}
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(DataError, match=r"cannot be fetched.*network.*own-data"):
        build_openstax(tmp_path / "out", books=[Book("none", commit)], base_url=f"file://{tmp_path}/")


def test_openstax_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="git is needed"):
        build_openstax(tmp_path / "out")


def test_check_reports_everything(tmp_path: Path) -> None:
    members = members_of(
        ["1", "2", "3"], {"caption": "same text", "alt": "four words are here", "license": "CC0"}
    )
    members[0] = ("1.png", members[2][1])
    members += [("4.png", b"a text file"), ("4.json", b'{"caption": "x"}'), ("5.txt", b"no image")]
    report = check_source(open_source(str(write_tar(tmp_path / "a.tar", members))), progress=False)
    assert (report.samples, report.groups, report.without_image) == (5, 4, 1)
    assert [key for key, _ in report.bad] == ["a/4"]
    assert report.duplicate_images == 1 and report.duplicate_captions == {"caption": 1, "alt": 1}
    assert report.widths is not None and (report.widths.min, report.widths.max) == (8, 8)
    assert report.modes == {"RGB": 3} and report.licenses == {"CC0": 3, "none named": 1}
    assert report.words["caption"].samples == 4 and report.words["alt"].median == 4
    text = report.render()
    assert "5: 4 usable, 1 bad" in text and "a/4" in text and "not JPEG" in text
    assert json.loads(report.to_json())["bad"][0][0] == "a/4"


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_data_parser(parser.add_subparsers())

    def call(*words: object) -> int:
        return run_data(parser.parse_args(["data", *map(str, words)]))

    deb = package(tmp_path / "p.deb")
    out = tmp_path / "out"
    assert call("cataclysm", out, "--package", deb, "--tilesets", "Set", "--languages", "de") == 0
    assert "CC-BY-SA-3.0" in capsys.readouterr().out
    assert call("check", out, "--json", tmp_path / "report.json") == 0
    assert "name" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["bad"] == []
    bad = write_tar(
        tmp_path / "bad.tar", [*members_of(["1"]), ("2.png", b""), ("2.json", b'{"caption": "x"}')]
    )
    assert call("check", bad, "--json", "-") == 1
    assert json.loads(capsys.readouterr().out)["samples"] == 2
    with pytest.raises(DataError, match="unknown book nothing"):
        call("openstax", out, "--books", "nothing")
