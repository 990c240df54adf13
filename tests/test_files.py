"""Nothing written is ever half-written: exceptions, kills at random instants, a full disk, leftovers."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from llm2clip import files
from llm2clip.errors import CheckpointError, UserError
from llm2clip.files import atomic_path, read_json, sha256_file, write_json, write_text
from llm2clip.training import checkpoint

FORK = multiprocessing.get_context("fork")


def fill(folder: Path, text: str, files: int = 3) -> None:
    folder.mkdir()
    for number in range(files):
        (folder / f"part{number}").write_text(text)


def contents(folder: Path) -> set[str]:
    return {p.read_text() for p in folder.iterdir()}


def test_files_and_directories_are_replaced(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "er" / "file", "one")
    write_text(tmp_path / "deep" / "er" / "file", "two")
    assert (tmp_path / "deep" / "er" / "file").read_text() == "two"
    for text in ("old", "new"):
        with atomic_path(tmp_path / "folder") as tmp:
            assert not tmp.exists()
            fill(tmp, text, 3 if text == "old" else 1)
    assert contents(tmp_path / "folder") == {"new"} and len(list((tmp_path / "folder").iterdir())) == 1
    assert sorted(os.listdir(tmp_path)) == ["deep", "folder"]
    assert os.listdir(tmp_path / "deep" / "er") == ["file"]


def test_an_exception_leaves_the_old_one(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with atomic_path(tmp_path / "folder") as tmp:
        fill(tmp, "old")
    for error in (RuntimeError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)), atomic_path(tmp_path / "file") as tmp:
            tmp.write_text("new")
            raise error
        with pytest.raises(type(error)), atomic_path(tmp_path / "folder") as tmp:
            fill(tmp, "new", 2)
            raise error
    assert (tmp_path / "file").read_text() == "old" and contents(tmp_path / "folder") == {"old"}
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_directory_is_replaced_in_one_instant_where_the_system_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    names: list[str] = []
    rename = os.rename

    def watched(source: Path, target: Path) -> None:
        names.append(Path(source).name)
        rename(source, target)

    monkeypatch.setattr(os, "rename", watched)
    if not exchange:
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    for text in ("old", "new"):
        with atomic_path(tmp_path / "folder") as tmp:
            fill(tmp, text)
    assert contents(tmp_path / "folder") == {"new"} and os.listdir(tmp_path) == ["folder"]
    # moved aside, the name is gone for a moment
    assert ("folder" in names) == (not exchange)


def _write_for_ever(root: Path) -> None:
    for number in range(10**6):
        text = f"{number} " * 20_000
        write_text(root / "file", text)
        with atomic_path(root / "folder") as tmp:
            fill(tmp, text)


def test_a_kill_leaves_one_complete_version(tmp_path: Path) -> None:
    rng = random.Random(0)
    write_text(tmp_path / "file", "0 " * 20_000)
    with atomic_path(tmp_path / "folder") as tmp:
        fill(tmp, "first")
    for _ in range(12):
        child = FORK.Process(target=_write_for_ever, args=(tmp_path,))
        child.start()
        time.sleep(rng.uniform(0.03, 0.12))
        child.kill()
        child.join()
        words = (tmp_path / "file").read_text().split()
        assert len(words) == 20_000 and len(set(words)) == 1
        complete = [tmp_path / name for name in ("folder", "folder.old") if (tmp_path / name).exists()]
        # between its two renames the old directory is complete under its other name
        assert any(len(contents(p)) == 1 and len(list(p.iterdir())) == 3 for p in complete)
    write_text(tmp_path / "file", "end")
    with atomic_path(tmp_path / "folder") as tmp:
        fill(tmp, "end")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    child = FORK.Process(target=_write_for_ever, args=(tmp_path,))
    child.start()
    versions: set[str] = set()
    end = time.monotonic() + 20
    while len(versions) < 40 and time.monotonic() < end:
        if (tmp_path / "file").exists():
            words = (tmp_path / "file").read_text().split()
            assert len(words) == 20_000 and len(set(words)) == 1
            versions.add(words[0])
    child.kill()
    child.join()
    assert len(versions) == 40  # it was replaced while it was read


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    child = FORK.Process(target=time.sleep, args=(30,))
    child.start()
    for owner in (os.getpid(), child.pid, 4_194_304):
        (tmp_path / f"file.partial.{owner}").mkdir()
        (tmp_path / f"file.partial.{owner}" / "half").write_text("x")
    (tmp_path / "file.partial.mine").write_text("a user's own file")
    try:
        write_text(tmp_path / "file", "whole")
    finally:
        child.kill()
    assert sorted(os.listdir(tmp_path)) == ["file", f"file.partial.{child.pid}", "file.partial.mine"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def _plain(path: Path) -> None:
    path.write_bytes(bytes(400_000))


def _safetensors(path: Path) -> None:
    save_file({"x": torch.zeros(100_000)}, path)


@pytest.mark.parametrize("write", [_plain, _safetensors])
def test_a_full_disk_is_named_and_spares_what_was_there(
    small_disk: Path, write: Callable[[Path], None]
) -> None:
    write_text(small_disk / "file", "old")
    message = rf"no space left on disk while writing {small_disk}/file \(\d+ MiB free\).*again"
    with pytest.raises(UserError, match=message), atomic_path(small_disk / "file") as tmp:
        write(tmp)
    assert (small_disk / "file").read_text() == "old" and os.listdir(small_disk) == ["file"]


@pytest.mark.parametrize("width", [30_000, 12_000])
def test_a_full_disk_spares_the_last_checkpoint(small_disk: Path, width: int) -> None:
    # the larger model does not fit at all, the smaller one's tensors fit and its optimizer state does not
    model = nn.Linear(1, 2_000)
    optimizer = torch.optim.AdamW(model.parameters())
    first = checkpoint.save(small_disk, model, optimizer, checkpoint.Progress(step=1), 2)
    large = nn.Linear(1, width)
    other = torch.optim.AdamW(large.parameters())
    large(torch.ones(1, 1)).sum().backward()
    other.step()
    with pytest.raises(UserError, match="no space left on disk while writing .*step_00000002"):
        checkpoint.save(small_disk, large, other, checkpoint.Progress(step=2), 2)
    assert checkpoint.latest(small_disk) == first
    assert checkpoint.load(first, model, optimizer).step == 1
    assert sorted(os.listdir(small_disk / "checkpoints")) == ["latest", "step_00000001"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file, not a directory"):
        write_text(tmp_path / "file" / "inside" / "more", "y")
    with pytest.raises(UserError, match="is a file, not a directory"):
        write_text(tmp_path / "file" / "inside", "y")


def test_a_read_only_place_is_named(small_disk: Path) -> None:
    write_text(small_disk / "file", "old")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=rf"cannot write {small_disk}/file: .*Choose a writable directory"):
        write_text(small_disk / "file", "new")
    assert (small_disk / "file").read_text() == "old"


def test_errors_of_the_writer_itself_pass_through(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="mine"), atomic_path(tmp_path / "a"):
        raise CheckpointError("mine")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a"):
        _ = 1 / 0
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        pass  # nothing was written


def test_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ä": [1, None]})
    assert read_json(tmp_path / "a.json") == {"ä": [1, None]} and "ä" in (tmp_path / "a.json").read_text()
    (tmp_path / "b.json").write_text('{"a": ')
    (tmp_path / "c.json").write_bytes(b"\xff\xfe\x00")
    for name in ("b", "c"):
        with pytest.raises(CheckpointError, match=f"{name}.json is not valid JSON"):
            read_json(tmp_path / f"{name}.json", CheckpointError)
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "d.json")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
