"""The native tar indexer and caption packer against their Python twins and independent definitions."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm2clip import packing
from llm2clip.data import shards

HOST = pytest.param(
    "native", marks=pytest.mark.skipif(shards._host is None, reason="llm2clip._host is not built")
)
both = pytest.mark.parametrize("scanner", ["python", HOST])


def scan(scanner: str, path: Path) -> shards.TarIndex:
    return shards.index_tar(path) if scanner == "native" else shards.index_tar_python(path)


names = st.text(
    st.characters(codec="utf-8", exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=40
).filter(lambda name: name not in (".", ".."))
paths = st.lists(names, min_size=1, max_size=9).map("/".join)
members = st.lists(st.tuples(paths, st.binary(max_size=1200)), max_size=8)


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@both
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(members=members)
def test_index_gives_back_what_tarfile_wrote(
    scanner: str, layout: int, members: list[tuple[str, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    written = []
    with tarfile.open(path, "w", format=layout) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # ustar cannot hold every long name
                continue
            written.append((name, data))
    index = scan(scanner, path)
    content = path.read_bytes()
    found = [
        (name, content[offset : offset + size])
        for name, offset, size in zip(index.names, index.offsets, index.sizes, strict=True)
    ]
    assert found == written
    assert index.damage == "" and index.refused == []


@both
def test_links_devices_and_directories_are_not_members(scanner: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (
            ("d", tarfile.DIRTYPE),
            ("s", tarfile.SYMTYPE),
            ("h", tarfile.LNKTYPE),
            ("c", tarfile.CHRTYPE),
            ("f", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../../etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("real")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    index = scan(scanner, tmp_path / "a.tar")
    assert index.names == ["real"]
    assert [name for name, _ in index.refused] == ["s", "h", "c", "f"]


@pytest.mark.skipif(shards._host is None, reason="llm2clip._host is not built")
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_scanners_agree_on_damaged_files(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    layout = data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    with tarfile.open(path, "w", format=layout) as tar:
        for name in ("a.png", "ü" * 120 + ".json", "b.png"):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes(700)))
    content = bytearray(path.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    assert shards.index_tar(path) == shards.index_tar_python(path)


@both
def test_every_cut_keeps_the_members_before_it(scanner: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(3):
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = 600
            tar.addfile(info, io.BytesIO(bytes([number]) * 600))
    whole = path.read_bytes()
    # header 512 + content 600 padded to 1024: the members begin at 0, 1536 and 3072
    cuts = [(0, 0, False), (100, 0, True), (512, 0, True), (1111, 0, True), (1112, 1, True)]
    for cut, complete, damaged in [*cuts, (1536, 1, False), (2048, 1, True), (4608, 3, False)]:
        path.write_bytes(whole[:cut])
        index = scan(scanner, path)
        assert len(index.names) == complete, cut
        assert bool(index.damage) == damaged, cut


@both
def test_size_past_the_end_and_base_256(scanner: str, tmp_path: Path) -> None:
    info = tarfile.TarInfo("big.png")
    info.size = 1 << 40
    header = info.tobuf(tarfile.GNU_FORMAT)
    assert header[124] == 0x80  # base 256: octal text ends at 8 GiB
    (tmp_path / "a.tar").write_bytes(header + bytes(512))
    index = scan(scanner, tmp_path / "a.tar")
    assert index.names == [] and "big.png" in index.damage
    # a sparse file really of that size
    with open(tmp_path / "b.tar", "wb") as handle:
        handle.write(header)
        os.truncate(handle.fileno(), 512 + (1 << 40)) if _sparse(tmp_path) else pytest.skip(
            "no sparse files here"
        )
    index = scan(scanner, tmp_path / "b.tar")
    assert index.sizes == [1 << 40] and index.offsets == [512]


def _sparse(directory: Path) -> bool:
    probe = directory / "probe"
    probe.touch()
    try:
        os.truncate(probe, 1 << 41)
    except OSError:
        return False
    probe.unlink()
    return True


@both
def test_missing_file_and_directory_raise_os_errors(scanner: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        scan(scanner, tmp_path / "none.tar")
    with pytest.raises(IsADirectoryError):
        scan(scanner, tmp_path)


lengths = st.lists(st.integers(0, 60), max_size=120)


@settings(max_examples=200, deadline=None)
@given(lengths=lengths, budget=st.integers(1, 80))
def test_packing_is_a_partition_under_the_budget(lengths: list[int], budget: int) -> None:
    bins = packing.pack(lengths, budget)
    assert sorted(np.concatenate([np.empty(0, np.int64), *bins]).tolist()) == list(range(len(lengths)))
    for part in bins:
        assert sum(lengths[i] for i in part) <= budget or len(part) == 1 or sum(map(bool, lengths)) == 0 or (
            # a sequence over the budget shares its bin with empty ones at most
            sum(lengths[i] > 0 for i in part) == 1
        )  # fmt: skip
    # first fit: no two bins could be joined, except that of an over-long sequence
    loads = sorted(min(budget, sum(lengths[i] for i in part)) for part in bins)
    if len(loads) > 1 and loads[0] > 0:
        assert loads[0] + loads[1] > budget


@pytest.mark.skipif(packing._host is None, reason="llm2clip._host is not built")
@settings(max_examples=200, deadline=None)
@given(lengths=lengths, budget=st.integers(1, 80))
def test_native_packing_equals_python(lengths: list[int], budget: int) -> None:
    array = np.asarray(lengths, dtype=np.int64)
    assert (
        np.asarray(packing._host.pack(array, budget)).tolist() == packing.pack_python(array, budget).tolist()
    )


def test_packing_known_answer() -> None:
    # decreasing 7 6 5 4 3 into bins of 10: {7,3} {6,4} {5}
    assert [part.tolist() for part in packing.pack([3, 4, 5, 6, 7], 10)] == [[0, 4], [1, 3], [2]]


@pytest.mark.parametrize(
    "call", [packing.pack, lambda lengths, budget: packing.pack_python(np.asarray(lengths), budget)]
)
def test_packing_refuses_nonsense(call: object) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match="budget"):
        call([1, 2], 0)
    with pytest.raises(ValueError, match="negative"):
        call([1, -2], 5)
