"""Native code with many threads, after a fork, in two Python threads, for leaks, and beyond 2**31."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llm2clip.data import shards
from llm2clip.data.store_format import ShardEntry
from llm2clip.data.store_rows import NativeRows
from llm2clip.data.tensorfile import TensorSpec
from llm2clip_kernels import native
from tests.reliability import leaks
from tests.reliability.hostile_files import tar_header
from tests.reliability.native_calls import Call, host_calls, op_calls

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="the native library is not built"),
    pytest.mark.skipif(shards._host is None, reason="llm2clip._host is not built"),
]
# torch's own matrix products sum in an order that depends on the number of threads
ORDERED_BY_THREADS = {"lora", "lora dropout", "adapter block", "adapter head"}


@pytest.fixture(scope="module")
def calls() -> dict[str, Call]:
    torch.manual_seed(0)
    return {**op_calls(), **host_calls()}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same(name: str, got: list[Tensor], want: list[Tensor]) -> bool:
    """Bitwise, or up to the order of the sums of torch's products."""
    if name in ORDERED_BY_THREADS:
        return all((g - w).abs().max() <= 1e-5 * w.abs().max() for g, w in zip(got, want, strict=True))
    return all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_every_native_op_is_called(calls: dict[str, Call]) -> None:
    from torch.profiler import profile

    with profile() as recorded:
        for call in calls.values():
            call()
    ran = {event.name for event in recorded.events()}
    every = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("llm2clip_native::")}
    asked = {"cpu_capability", "gemm_in_use", "use_gemm", "use_instruction_set"}  # questions and switches
    assert every - ran == {f"llm2clip_native::{name}" for name in asked}


@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_number_of_threads_changes_nothing(calls: dict[str, Call], count: int) -> None:
    torch.set_num_threads(1)
    want = {name: call() for name, call in calls.items()}
    torch.set_num_threads(count)
    assert [name for name, call in calls.items() if not same(name, call(), want[name])] == []


def test_python_threads_at_once(calls: dict[str, Call]) -> None:
    torch.set_num_threads(2)
    want = {name: call() for name, call in calls.items()}
    order = list(calls) * 3
    with ThreadPoolExecutor(2) as pool:
        # two lists of calls in opposite orders, so that the same op and different ones meet
        results = pool.map(
            lambda names: [name for name in names if not same(name, calls[name](), want[name])],
            [order, order[::-1]],
        )
    assert list(results) == [[], []]


def in_a_fork(act: Callable[[], Any], seconds: float = 60) -> bool:
    """Whether a forked process ends well within a time; torch warns there, a hang would be for good."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def test_a_fork_after_use(calls: dict[str, Call]) -> None:
    torch.set_num_threads(4)
    want = {name: call() for name, call in calls.items()}
    host = list(host_calls())

    def child() -> None:
        # the host module has threads of its own, which a fork does not hurt
        assert all(same(name, calls[name](), want[name]) for name in host)
        # OpenMP's do not survive one: torch itself hangs with several, so its loader's workers take one
        torch.set_num_threads(1)
        assert all(same(name, call(), want[name]) for name, call in calls.items())

    assert in_a_fork(child)


def test_workers_of_a_data_loader(calls: dict[str, Call]) -> None:
    want = {name: call() for name, call in calls.items()}
    names = list(calls)

    class Calls(torch.utils.data.Dataset[bool]):
        def __len__(self) -> int:
            return len(names)

        def __getitem__(self, index: int) -> bool:
            return same(names[index], calls[names[index]](), want[names[index]])

    loader = torch.utils.data.DataLoader(
        Calls(), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    assert list(loader) == [True] * len(names)


def test_no_block_is_lost(calls: dict[str, Call]) -> None:
    if leaks.malloc_bytes() is None:
        pytest.skip("this C library does not say what it has handed out")
    torch.set_num_threads(1)
    grown = {name: leaks.growth(call, 64, 50)["malloc_kib"] for name, call in calls.items()}
    # a block of 128 bytes, the least a tensor takes, in every call would be more
    assert [(name, kib) for name, kib in grown.items() if kib is None or kib >= 8] == []


def test_the_measure_of_leaks_sees_one() -> None:
    if leaks.malloc_bytes() is None:
        pytest.skip("this C library does not say what it has handed out")
    kept: list[Tensor] = []
    grown = leaks.growth(lambda: kept.append(torch.empty(1000)), 1000)
    assert grown["malloc_kib"] is not None and grown["malloc_kib"] > 3900
    assert grown["resident_kib"] is not None


def test_rows_beyond_four_gibibytes(tmp_path: Path) -> None:
    dim, rows = (
        512,
        (1 << 21) + (1 << 12),
    )  # 4.03 GiB, of which the file system keeps the two rows that are not zero
    specs = {
        "embeddings": TensorSpec("F32", (rows, dim)),
        "digests": TensorSpec("U8", (rows, 16)),
        "checks": TensorSpec("U32", (-(-rows // 1024),)),
    }
    path = tmp_path / "shard-000000.safetensors"
    size = _sparse_tensors(path, specs, {rows - 1: 3.0, 1 << 20: 2.0}, dim)
    reader = NativeRows(dim, "fp32")
    reader.add(path, ShardEntry(path.name, rows, size, ""))
    out = np.empty((3, dim), np.float32)
    reader.read(np.array([rows - 1, 0, 1 << 20]), out)
    assert (out[0] == 3).all() and (out[1] == 0).all() and (out[2] == 2).all()


def _sparse_tensors(path: Path, specs: dict[str, TensorSpec], rows: dict[int, float], dim: int) -> int:
    import json
    import struct

    header, end = {}, 0
    for name, spec in specs.items():
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        for row, value in rows.items():
            file.seek(start + row * dim * 4)
            file.write(np.full(dim, value, np.float32).tobytes())
        file.truncate(start + end)
    return path.stat().st_size


@pytest.mark.parametrize("size", [(1 << 31) + 5, 9 << 30])
def test_tar_members_beyond_32_bits(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        file.write(tar_header("large.png", size))
        file.seek((size + 511) // 512 * 512, os.SEEK_CUR)
        file.write(tar_header("last.txt", 4) + b"text" + bytes(508 + 1024))
    index = shards.index_tar(path)
    assert index == shards.index_tar_python(path)
    assert (index.names, index.sizes, index.damage) == (["large.png", "last.txt"], [size, 4], "")
    with open(path, "rb") as file:
        file.seek(index.offsets[1])
        assert file.read(4) == b"text"
