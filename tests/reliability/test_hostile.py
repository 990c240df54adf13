"""Files and settings of an attacker: refused or harmless, with nothing run, fetched, written outside or blown up."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llm2clip.config import load_settings
from llm2clip.data.images import decode_image
from llm2clip.data.sources import expand_path, open_source
from llm2clip.data.tensorfile import map_tensors
from llm2clip.errors import BadSampleError, UserError
from llm2clip.models import CaptionEncoder
from llm2clip.models.llm_files import load_llm
from llm2clip.models.weights import read_tensors
from llm2clip.settings import SearchSettings, TrainSettings
from tests.data_files import image_bytes
from tests.reliability import hostile_files as make
from tests.reliability.damage import edit_json
from tests.reliability.tiny_gguf import write_tiny_gguf
from tests.reliability.watch import Seen, watched
from tests.tiny_llm2clip import save_both

HUGE = 50 << 30


def harmless(place: Path, act: Callable[[], Any]) -> tuple[Any, str]:
    """Result and error of `act`, which must neither write outside `place` nor reach anything."""
    result, message = None, ""
    with watched(place) as seen:
        try:
            result = act()
        except UserError as error:
            message = str(error)
    assert seen.forbidden == [], seen.forbidden
    assert seen.grown_mib < 200, f"{seen.grown_mib} MiB"
    assert not list(place.parent.rglob("harmed"))
    return result, message


def bad_samples(file: Path) -> dict[str, str]:
    """Keys and reasons of what cannot be used; the good sample must be there."""
    source, bad, good = open_source(str(file)), {}, 0
    for index in range(len(source)):
        try:
            source[index]
            good += 1
        except BadSampleError as error:
            bad[error.key] = error.reason
    assert good == 1
    return bad


TARS: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "../ in a name": (lambda: make.member("../x.png", image_bytes()), "a/../x", "outside"),
    "../ in the middle": (lambda: make.member("a/../../x.png", image_bytes()), "a/a/../../x", "outside"),
    "absolute name": (lambda: make.member("/etc/x.png", image_bytes()), "a//etc/x", "outside"),
    "pax ../": (lambda: make.pax(b"path=../x.png") + make.member("y", image_bytes()), "a/../x", "outside"),
    "symbolic link": (lambda: make.tar_header("x.png", 0, b"2", "/etc/passwd"), "a/x.png", "symbolic link"),
    "hard link": (lambda: make.tar_header("x.png", 0, b"1", "/etc/passwd"), "a/x.png", "hard link"),
    "character device": (lambda: make.tar_header("x.png", 0, b"3"), "a/x.png", "device"),
    "block device": (lambda: make.tar_header("x.png", 0, b"4"), "a/x.png", "device"),
    "pipe": (lambda: make.tar_header("x.png", 0, b"6"), "a/x.png", "pipe"),
    "sparse file": (lambda: make.tar_header("x.png", 0, b"S"), "a/x.png", "regular"),
    "50 GB declared": (lambda: make.tar_header("x.png", HUGE), "a/(rest of the shard)", "cut inside member"),
    "50 GB in pax": (
        lambda: make.pax(b"size=%d" % HUGE) + make.member("x.png", image_bytes()),
        "a/(rest of the shard)", "cut inside member",
    ),
    "negative size": (
        lambda: make.tar_header("x.png", HUGE).replace(b"\x80" + bytes(6), b"\xff" * 7, 1),
        "a/(rest of the shard)", "damaged header",
    ),
    "1 GB of a long name": (lambda: make.tar_header("x", 1 << 30, b"L"), "a/(rest of the shard)", "header"),
}  # fmt: skip


@pytest.mark.parametrize("name", TARS)
def test_tar_members(name: str, tmp_path: Path) -> None:
    blocks, key, reason = TARS[name]
    (tmp_path / "a.tar").write_bytes(make.with_good_sample(blocks()))
    bad, message = harmless(tmp_path, lambda: bad_samples(tmp_path / "a.tar"))
    assert message == "" and list(bad) == [key] and reason in bad[key]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]


def test_a_tar_of_very_many_members(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(make.with_good_sample(*make.many_members(20_000)))
    source, _ = harmless(tmp_path, lambda: open_source(str(tmp_path / "a.tar")))
    assert len(source) == 1


def test_pickles_in_a_shard_are_not_read(tmp_path: Path) -> None:
    make.write_pickle(tmp_path / "p")
    blocks = [
        make.member(f"good.{end}", (tmp_path / "p").read_bytes())
        for end in ("pyd", "pickle", "pkl", "pt", "cls")
    ]
    (tmp_path / "a.tar").write_bytes(make.with_good_sample(*blocks))
    assert harmless(tmp_path, lambda: bad_samples(tmp_path / "a.tar")) == ({}, "")


IMAGES = {
    "3.6 billion pixels": (make.png(60_000, 60_000), "too large"),
    "144 million pixels": (make.png(12_000, 12_000), "more than the"),
    "2**31 wide": (make.png(2**31 - 1, 1), "pixels|too large|cannot be decoded"),
    "comment of 256 MiB": (make.text_bomb(256), "cannot be decoded"),
    "SVG": (
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "is not JPEG",
    ),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", "is not JPEG"),
    "PDF": (b"%PDF-1.4\n", "is not JPEG"),
    "polyglot": (make.polyglot(), ""),
    "animated GIF": (make.animation("GIF"), ""),
    "animated WebP": (make.animation("WEBP"), ""),
    "animated PNG": (make.animation("PNG"), ""),
    "CMYK": (make.encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), ""),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str, tmp_path: Path) -> None:
    data, expected = IMAGES[name]
    image, message = harmless(tmp_path, lambda: decode_image(data, key="k"))
    if expected:
        assert re.search(expected, message), message
    else:
        assert message == "" and image.mode == "RGB" and image.size in ((8, 6), (8, 8), (16, 16))
        if name.startswith("animated"):
            red, green, _ = image.getpixel((2, 2))
            assert red > green, "the first frame"


def _rows(tmp_path: Path, image: str) -> Path:
    rows = [{"image": image, "caption": "bad"}, {"image": "a.png", "caption": "good"}]
    (tmp_path / "a.png").write_bytes(image_bytes())
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path / "a.jsonl"


@pytest.mark.parametrize("image", ["/dev/zero", "pipe", "http://127.0.0.1:1/x.png", "a\0b", "x" * 5000, "."])
def test_image_paths_of_a_table(image: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    bad, message = harmless(tmp_path, lambda: bad_samples(_rows(tmp_path, image)))
    assert message == "" and list(bad) == ["a.jsonl:1"]


def test_objects_nested_too_deep(tmp_path: Path) -> None:
    deep = '{"caption": ' + '{"a": ' * 300 + '"x"' + "}" * 301
    (tmp_path / "a.jsonl").write_text(deep + '\n{"caption": "good"}\n' + '{"caption": "x", "group": [[1]]}\n')
    bad, _ = harmless(tmp_path, lambda: bad_samples(tmp_path / "a.jsonl"))
    assert "nested more than" in bad["a.jsonl:1"] and "its group is a list" in bad["a.jsonl:3"]


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = {
    "call": "run: !!python/object/apply:os.system ['touch harmed']\n",
    "object": "run: !!python/object/new:pathlib.Path [harmed]\n",
    "name": "run: !!python/name:os.system\n",
    "module": "run: !!python/module:os\n",
    "own tag": "run: !evil {a: b}\n",
    "a billion laughs": LAUGHS + "run: *i\n",
    "a billion laughs as a name": LAUGHS + "? *i\n: 3\n",
    "a billion laughs as a number": "optim: {lr: &z [x, x]}\n" + LAUGHS,
    "depth": "run: " + "[" * 2000,
    "impossible date": "run: {out: 2020-99-99}\n",
    "impossible number": "run: {steps: " + "9" * 5000 + "}\n",
    "number beyond floats": "optim: {lr: " + "9" * 400 + "}\n",
    "alias of itself": "run: &r {out: *r}\n",
}


@pytest.mark.parametrize("name", YAML)
def test_yaml(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(YAML[name])
    _, message = harmless(tmp_path, lambda: load_settings(TrainSettings, tmp_path / "a.yaml"))
    assert str(tmp_path / "a.yaml") in message and len(message) < 6000


TRICKS = ["$(touch harmed)", "`touch harmed`", "; touch harmed", "| touch harmed", "../../../../etc/passwd", "a\0b",
          "~nobody-here/x", "file:///etc/passwd", "http://127.0.0.1:1/a.tar", "pipe:touch harmed", "%s%n",
          "{0..99999999999}", "{a,b}" * 40, "{a,b}" * 2000, "{" * 3000, "[" * 3000]  # fmt: skip


@pytest.mark.parametrize("value", TRICKS, ids=lambda value: value[:24].replace("\0", "0"))
def test_shell_and_path_tricks_in_values(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    override = "data.train=" + json.dumps([value])
    settings, message = harmless(tmp_path, lambda: load_settings(TrainSettings, None, [override]))
    if not message:
        assert settings.data.train == (value,), "a value is never expanded"
        _, message = harmless(tmp_path, lambda: expand_path(value))
        assert "does not exist" in message or "names more files" in message or value.startswith("../")


LONG = 1 << 60
GGUFS = {
    "tensors": make.gguf(LONG, 0),
    "pairs": make.gguf(0, LONG),
    "length of a text": make.gguf(0, 1, make.gguf_text("general.architecture", LONG)),
    "length of an array": make.gguf(0, 1, make.gguf_array("tokenizer.ggml.tokens", LONG)),
    "version": b"GGUF" + bytes(40),
}


@pytest.mark.parametrize("name", GGUFS)
def test_gguf_headers_that_lie(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(GGUFS[name])
    _, message = harmless(tmp_path, lambda: load_llm(tmp_path, "a.gguf", torch.float32))
    assert str(tmp_path / "a.gguf") in message


def test_a_gguf_file_of_a_billion_layers(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "a.gguf", layers=10**9)
    _, message = harmless(tmp_path, lambda: load_llm(tmp_path, file.name, torch.float32))
    assert "num_hidden_layers=1000000000" in message


SAFETENSORS = {
    "header beyond the file": make.safetensors([4], [0, 16], length=1 << 40),
    "header of 2**64": make.safetensors([4], [0, 16], length=2**64 - 1),
    "tensor beyond the file": make.safetensors([1 << 40], [0, 4 << 40]),
    "product beyond 64 bits": make.safetensors([1 << 40, 1 << 40], [0, 16]),
    "negative sizes": make.safetensors([-2, -2], [0, 16]),
    "negative place": make.safetensors([4], [-16, 0]),
    "no bytes": b"",
}


@pytest.mark.parametrize("name", SAFETENSORS)
@pytest.mark.parametrize("read", [map_tensors, read_tensors])
def test_safetensors_that_lie(name: str, read: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(SAFETENSORS[name])
    _, message = harmless(tmp_path, lambda: read(tmp_path / "a.safetensors"))
    assert "a.safetensors" in message


def lying_archive() -> bytes:
    """A .pt file whose tensor says that its storage is larger than the archive's record."""
    good, bad = io.BytesIO(), io.BytesIO()
    torch.save({"weight": torch.ones(4)}, good)
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(bad, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                assert b"K\x04t" in data
                data = data.replace(b"K\x04t", b"J\xff\xff\xff\x7ft")  # the number of elements
            new.writestr(name, data)
    return bad.getvalue()


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "model.pth"])
def test_pickles_that_run_code_or_lie(name: str, tmp_path: Path) -> None:
    make.write_pickle(tmp_path / name)
    _, message = harmless(tmp_path, lambda: read_tensors(tmp_path / name))
    assert name in message
    torch.save({"state": make.Harm(tmp_path / "harmed")}, tmp_path / name)
    _, message = harmless(tmp_path, lambda: read_tensors(tmp_path / name))
    assert f"{name} is refused" in message
    (tmp_path / name).write_bytes(lying_archive())
    _, message = harmless(tmp_path, lambda: read_tensors(tmp_path / name))
    assert f"{name} is damaged" in message


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_both(root)
    CaptionEncoder.from_pretrained(root / "llm", adapter=root / "adapter")  # imports what it needs
    return root


ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "rank of a billion": ({"r": 10**9}, "says rank 1000000000"),
    "rank of one layer": ({"rank_pattern": {"q_proj": 10**9}}, "says rank 1000000000"),
    "rank that is no number": ({"r": "2"}, "says rank|cannot read"),
    "module to import": ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, ""),
    "code beside it": ({"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}}, ""),
    "base on a hub": ({"base_model_name_or_path": "http://127.0.0.1:1/evil"}, ""),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, expected = ADAPTERS[name]
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in (models / "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'harmed')!r}, 'w')")
    monkeypatch.syspath_prepend(folder)
    edit_json(folder / "adapter_config.json", lambda value: value.update(change))
    _, message = harmless(tmp_path, lambda: CaptionEncoder.from_pretrained(models / "llm", adapter=folder))
    assert re.search(expected, message) if expected else message == ""


@pytest.mark.parametrize("weights", ["none", "pickle"])
def test_an_adapter_is_neither_fetched_nor_unpickled(weights: str, models: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes((models / "adapter/adapter_config.json").read_bytes())
    if weights == "pickle":
        make.write_pickle(tmp_path / "adapter_model.bin")
    _, message = harmless(tmp_path, lambda: CaptionEncoder.from_pretrained(models / "llm", adapter=tmp_path))
    assert str(tmp_path) in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}, ""),
        ({"auto_map": {"AutoModel": "evil.M"}, "model_type": "evil"}, "does not know"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"vocab_size": 10**15}, "vocab_size=1000000000000000"),
        ({"hidden_size": 10**12}, "a width of 1000000000000"),
    ],
)
def test_model_directories(change: dict[str, Any], expected: str, models: Path, tmp_path: Path) -> None:
    for file in (models / "llm").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'harmed')!r}, 'w')\n")
    edit_json(tmp_path / "config.json", lambda value: value.update(change))
    _, message = harmless(tmp_path, lambda: CaptionEncoder.from_pretrained(tmp_path))
    assert expected in message if expected else message == ""


def test_the_page_listens_on_loopback_alone_by_default(tmp_path: Path) -> None:
    from llm2clip.search.run import listen

    with watched(tmp_path) as seen:
        listen(SearchSettings().host, 0).close()
    assert seen.bound == ["('127.0.0.1', 0)"] and seen.forbidden == []
    with watched(tmp_path) as seen:
        listen("0.0.0.0", 0).close()
    assert len(seen.forbidden) == 1, "the watch sees it"


def test_the_watch_sees_what_it_must(tmp_path: Path) -> None:
    import pickle
    import subprocess

    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.write_text("x")

    def forbidden(act: Callable[[], Any]) -> int:
        with watched(inside) as seen:
            act()
        return len(seen.forbidden)

    assert forbidden(lambda: (inside / "a").write_text("x")) == 0
    assert forbidden(lambda: outside.write_text("x")) == 1
    assert forbidden(lambda: outside.rename(tmp_path / "moved")) == 2
    assert forbidden(lambda: subprocess.run(["true"], check=True)) >= 1
    assert forbidden(lambda: pickle.loads(pickle.dumps(Seen("")))) >= 1
    with tarfile.open(inside / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("../escaped"))
    with tarfile.open(inside / "a.tar") as tar:
        # before Python 3.11.4 there are no filters, and every member is trusted
        tar.extraction_filter = getattr(tarfile, "fully_trusted_filter", lambda member, path: member)
        assert forbidden(lambda: tar.extractall(inside)) >= 1
