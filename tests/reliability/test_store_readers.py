"""Eight processes read an embedding store while another one builds it."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import torch

from llm2clip.data.store import EmbeddingStore, verify_store
from tests.reliability.forks import start
from tests.test_store import texts, vectors, writer

READERS, CAPTIONS = 8, 600


def test_eight_readers_during_a_build(tmp_path: Path) -> None:
    names = texts(CAPTIONS)
    expected = vectors(names)
    path = tmp_path / "store"
    with writer(path, shard_rows=32, commit_rows=4) as out:
        out.add(names[:8], expected[:8])
        out.flush()

    def build() -> int:
        with writer(path, shard_rows=32, commit_rows=4) as out:
            for begin in range(0, CAPTIONS, 4):
                out.add(names[begin : begin + 4], expected[begin : begin + 4])
            out.finish()
        return 0

    def read(number: int) -> int:
        """Open it again and again; every caption it names has its own embedding, as in what was opened first."""
        rng = random.Random(number)
        first = EmbeddingStore.open(path)
        sizes: list[int] = []
        while not sizes or sizes[-1] < CAPTIONS:
            store = EmbeddingStore.open(path)
            sizes.append(len(store))
            some = [rng.randrange(len(store)) for _ in range(64)]
            assert torch.equal(store.get([names[n] for n in some]), expected[some])
            assert (store.find(names[len(store) :]) < 0).all()
            old = [rng.randrange(len(first)) for _ in range(8)]
            assert torch.equal(first.get([names[n] for n in old]), expected[old])
            time.sleep(0.01)
        assert sizes == sorted(sizes)
        (tmp_path / f"sizes-{number}.json").write_text(json.dumps(sizes))
        return 0

    readers = [
        start(lambda number=number: read(number), tmp_path / f"{number}.log") for number in range(READERS)
    ]
    building = start(build, tmp_path / "build.log")
    try:
        assert building.wait() == 0, building.shown()
        assert [child.wait(30) for child in readers] == [0] * READERS, [child.shown() for child in readers]
    finally:
        for child in (*readers, building):
            child.kill()
    report = verify_store(path)
    assert report.ok and report.complete and report.rows == CAPTIONS and not report.stray
    seen = [set(json.loads((tmp_path / f"sizes-{number}.json").read_text())) for number in range(READERS)]
    assert all(len(sizes) >= 3 for sizes in seen)  # they did read while it grew
