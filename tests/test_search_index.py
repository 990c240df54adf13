"""The index of the search: exact, added to, resumed, repaired; and what it is built from."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from llm2clip.data.image_folder import ImageFolder
from llm2clip.data.store import EmbeddingStore, StoreWriter
from llm2clip.data.store_lookup import digest_array
from llm2clip.errors import BadSampleError, ConfigError, DataError, ModelError, StoreError
from llm2clip.search.approximate import build_approximate
from llm2clip.search.batching import Batcher, BusyError
from llm2clip.search.collection import captions_of, open_captions, open_collection
from llm2clip.search.index import FeatureIndex, build_index
from llm2clip.search.model import find_again, open_model
from llm2clip.search.run import examples, index_directory, listen, open_service, run_search
from tests.data_files import image_bytes, members_of, write_tar
from tests.search_kit import SearchKit, build_search_kit, write_photos

DIM = 24
FINGERPRINT = {"weights": "first"}


class Features:
    """Random features by number; counts what is computed."""

    def __init__(
        self, count: int, *, seed: int = 3, bad: Sequence[int] = (), stop_after: int | None = None
    ) -> None:
        self.values = torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))
        self.computed: list[int] = []
        self._bad, self._stop_after = set(bad), stop_after

    def __call__(self, numbers: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
        for start in range(0, len(numbers), 4):
            part = [number for number in numbers[start : start + 4] if number not in self._bad]
            if self._stop_after is not None and len(self.computed) >= self._stop_after:
                raise KeyboardInterrupt
            self.computed += part
            yield part, 7.0 * self.values[part]


def build(path: Path, names: Sequence[str], features: Features, **more: Any) -> FeatureIndex:
    options = {"dim": DIM, "fingerprint": FINGERPRINT, "title": "items", "dtype": "fp32", "commit_rows": 8}
    return build_index(path, digest_array(names), features, **{**options, **more})


def names(count: int) -> list[str]:
    return [f"item {number}" for number in range(count)]


@pytest.mark.parametrize("resident", [1 << 30, 0], ids=["in memory", "read for every search"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_search_is_exact(tmp_path: Path, resident: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm2clip.search.index._CHUNK_ROWS", 13)
    features = Features(100, bad=[5, 99])
    index = build(tmp_path / "index", names(100), features, dtype=dtype, resident_bytes=resident)
    assert len(index) == 98
    queries = torch.randn(7, DIM)
    found = index.search(queries, 12)
    unit = torch.nn.functional.normalize(features.values.to(torch.float32), dim=1)
    stored = unit.half() if dtype == "fp16" else unit
    stored = torch.nn.functional.normalize(stored.double(), dim=1)
    scores = torch.nn.functional.normalize(queries.double(), dim=1) @ stored.T
    scores[:, [5, 99]] = -2.0
    best = scores.topk(12)
    assert torch.equal(found.items, best.indices)
    torch.testing.assert_close(found.scores.double(), best.values, atol=1e-6, rtol=0)


def test_fewer_items_than_asked_for(tmp_path: Path) -> None:
    index = build(tmp_path / "index", names(3), Features(3))
    found = index.search(torch.randn(2, DIM), 5)
    assert found.items.shape == (2, 5) and found.items[:, 3:].eq(-1).all()
    assert found.scores[:, 3:].isinf().all() and sorted(found.items[0, :3].tolist()) == [0, 1, 2]
    empty = build(tmp_path / "empty", names(2), Features(2, bad=[0, 1]))
    assert len(empty) == 0 and empty.search(torch.randn(1, DIM), 2).items.tolist() == [[-1, -1]]
    assert index.feature_of(2) is not None and index.feature_of(3) is None and empty.feature_of(0) is None


def test_only_what_is_new_or_changed_is_computed(tmp_path: Path) -> None:
    first = Features(30)
    build(tmp_path / "index", names(30), first)
    assert sorted(first.computed) == list(range(30))
    again = Features(30)
    index = build(tmp_path / "index", names(30), again)
    assert again.computed == [] and len(index) == 30
    # item 3 changed, item 7 is gone, 30 and 31 are new and one of them comes twice
    now = [*names(3), "item 3, changed", *names(7)[4:], *names(30)[8:], "new", "newer", "new"]
    more = Features(40, seed=4)
    index = build(tmp_path / "index", now, more)
    assert more.computed == [3, 29, 30] and len(index) == len(now) == 32
    assert index.search(more.values[29:30], 2).items.tolist() == [[29, 31]], "the same item twice"
    assert index.search(first.values[7:8], 1).scores.item() < 0.99, "what is gone is not found"


def test_a_stopped_build_goes_on(tmp_path: Path) -> None:
    stopped = Features(50, stop_after=30)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "index", names(50), stopped)
    rest = Features(50)
    index = build(tmp_path / "index", names(50), rest)
    # at most a commit of 8 rows is lost
    assert len(index) == 50 and len(rest.computed) <= 50 - 30 + 8
    whole = build(tmp_path / "whole", names(50), Features(50))
    queries = torch.randn(5, DIM)
    for one, other in zip(
        vars(index.search(queries, 9)).values(), vars(whole.search(queries, 9)).values(), strict=True
    ):
        assert torch.equal(one, other)


def test_an_index_killed_after_its_last_commit_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: StoreWriter) -> None:
        self.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(StoreWriter, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, names(20), Features(20))
    monkeypatch.undo()
    assert not EmbeddingStore.open(tmp_path).complete
    again = Features(20)
    build(tmp_path, names(20), again)
    assert again.computed == [] and EmbeddingStore.open(tmp_path).complete
    assert not list(tmp_path.glob("part-*"))


def test_damage_is_found_and_computed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path / "index", names(20), Features(20))
    (shard,) = (tmp_path / "index").glob("shard-*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-900] ^= 0xFF
    shard.write_bytes(bytes(data))
    again = Features(20)
    index = build(tmp_path / "index", names(20), again)
    assert "is damaged" in capsys.readouterr().err and len(again.computed) == 20 == len(index)
    assert index.search(again.values[4:5], 1).items.item() == 4


def test_an_index_of_another_model_is_not_searched(tmp_path: Path) -> None:
    build(tmp_path / "index", names(4), Features(4))
    before = {file.name: file.read_bytes() for file in (tmp_path / "index").iterdir()}
    with pytest.raises(
        StoreError, match=r"made by another model.*\n  weights: stored 'first', expected 'second'"
    ):
        build(tmp_path / "index", names(4), Features(4), fingerprint={"weights": "second"})
    with pytest.raises(StoreError, match="dtype: stored 'fp32', expected 'int8'"):
        build(tmp_path / "index", names(4), Features(4), dtype="int8")
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "index").iterdir()}


def test_faiss_proposes_and_scores_stay_exact(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="FAISS is not installed")
    features = Features(2000)
    exact = build(tmp_path / "index", names(2000), features, commit_rows=2000)
    index = build_approximate(exact, tmp_path / "index", FINGERPRINT)
    assert 0.5 < index.recall <= 1.0 and len(index) == 2000
    queries = torch.randn(20, DIM)
    right, found = exact.search(queries, 10), index.search(queries, 10)
    hits = [len(set(a) & set(b)) for a, b in zip(right.items.tolist(), found.items.tolist(), strict=True)]
    assert sum(hits) / 200 > 0.5
    scores = {
        (q, i): s
        for q in range(20)
        for i, s in zip(right.items[q].tolist(), right.scores[q].tolist(), strict=True)
    }
    for query in range(20):
        assert (found.scores[query].diff() <= 0).all()
        for item, score in zip(found.items[query].tolist(), found.scores[query].tolist(), strict=True):
            assert abs(scores.get((query, item), score) - score) < 1e-6
    written = (tmp_path / "index" / "faiss.index").stat().st_mtime_ns
    assert build_approximate(exact, tmp_path / "index", FINGERPRINT).recall == index.recall
    assert (tmp_path / "index" / "faiss.index").stat().st_mtime_ns == written, "built once"
    # other features, or damage: built again
    for change in ("features", "damage"):
        if change == "damage":
            (tmp_path / "index" / "faiss.index").write_bytes(b"damaged")
        fingerprint = FINGERPRINT if change == "damage" else {"weights": "second"}
        again = build_approximate(exact, tmp_path / "index", fingerprint, queries)
        assert again.search(queries, 3).items.shape == (20, 3)
        now = (tmp_path / "index" / "faiss.index").stat().st_mtime_ns
        assert now > written
        written = now


def test_a_folder_of_images(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", range(4))
    for name in (".hidden.jpg", ".cache/a.png", "notes.txt", "more/UPPER.PNG"):
        (tmp_path / "photos" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(image_bytes())
    (tmp_path / "photos" / "loop").symlink_to(tmp_path / "photos", target_is_directory=True)
    source = ImageFolder(tmp_path / "photos")
    assert source._names == [
        "more/UPPER.PNG", "more/photo-000.jpg", "more/photo-003.jpg", "photo-001.jpg", "photo-002.jpg",
    ]  # fmt: skip
    assert source[3].key == "photo-001.jpg" and source[3].image and source.captions_of(3).image is None
    assert source.blocks == [(0, 5)]
    (tmp_path / "photos" / "photo-001.jpg").unlink()
    with pytest.raises(BadSampleError, match="cannot be read"):
        source[3]
    with pytest.raises(BadSampleError, match="more than the 10 allowed"):
        ImageFolder(tmp_path / "photos", max_bytes=10)[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no image: expected files"):
        ImageFolder(tmp_path / "empty")


def test_addresses_follow_the_files_and_nothing_else(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", range(4))
    write_tar(tmp_path / "a.tar", members_of(["x", "y"]))
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "one.png").write_bytes(image_bytes())
    (tmp_path / "table" / "captions.jsonl").write_text('{"image": "one.png", "caption": "one"}\n')
    paths = [str(tmp_path / name) for name in ("photos", "a.tar", "table")]

    def addresses() -> list[bytes]:
        return [row.tobytes() for row in open_collection(paths).addresses()]

    first = addresses()
    assert len(set(first)) == 7 and addresses() == first
    # a row more in the table leaves the others as they are
    with open(tmp_path / "table" / "captions.jsonl", "a") as table:
        table.write('{"image": "none.png", "caption": "two"}\n')
    assert addresses()[:7] == first
    # replaced under their names
    time.sleep(0.01)
    write_photos(tmp_path / "photos", [1])
    (tmp_path / "table" / "one.png").write_bytes(image_bytes((1, 2, 3)))
    write_tar(tmp_path / "a.tar", members_of(["x", "y"]))
    changed = [n for n, (a, b) in enumerate(zip(first, addresses(), strict=False)) if a != b]
    assert changed == [2, 4, 5, 6]
    # moved as a whole, they stay what they are
    shutil.move(tmp_path / "photos", tmp_path / "pictures")
    moved = [row.tobytes() for row in open_collection([str(tmp_path / "pictures")]).addresses()]
    assert moved[:2] == first[:2]


def test_captions_come_with_their_images(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        members_of(["x", "y"]) + members_of(["z"], {"caption": "caption of x", "extra": "e"}),
    )
    collection = open_collection([str(tmp_path / "a.tar")])
    everything = captions_of(collection, [], 100)
    assert everything.texts == [
        "caption of x", "a longer text about x", "caption of y", "a longer text about y", "e",
    ]  # fmt: skip
    assert everything.image.tolist() == [0, 0, 1, 1, 2]
    assert captions_of(collection, ["alt"], 100).texts == ["a longer text about x", "a longer text about y"]
    assert len(captions_of(collection, [], 3)) == 3 and len(captions_of(collection, [], 0)) == 0
    (tmp_path / "lines.txt").write_text("one line\nanother line\none line\n")
    texts = open_captions([str(tmp_path / "lines.txt")], [], 100)
    assert texts.texts == ["one line", "another line"] and texts.image.tolist() == [-1, -1]
    assert examples(collection) == [
        {"short": "caption of x", "long": "a longer text about x"},
        {"short": "caption of y", "long": "a longer text about y"},
        {"short": "e", "long": "caption of x"},
    ]


def test_queries_that_wait_are_answered_together() -> None:
    import threading

    gate, batches = threading.Event(), []

    def answer(queries: Sequence[int]) -> list[int]:
        batches.append(list(queries))
        gate.wait(10)
        if -1 in queries:
            raise ValueError("a bad query")
        return [query * 2 for query in queries]

    batcher: Batcher[int, int] = Batcher(answer, largest=3, waiting=5)
    first = batcher.submit(1)
    while not batches:
        time.sleep(0.001)
    futures = [batcher.submit(n) for n in (2, 3, 4, 5, -1)]
    with pytest.raises(BusyError, match="too many"):
        batcher.submit(6)
    assert futures[1].cancel()
    gate.set()
    assert first.result(10) == 2 and futures[0].result(10) == 4 and futures[2].result(10) == 8
    for future in futures[3:]:
        with pytest.raises(ValueError, match="a bad query"):
            future.result(10)
    assert batches == [[1], [2, 4], [5, -1]]
    assert batcher.submit(7).result(10) == 14, "an error ends nothing"
    last = batcher.submit(8)
    batcher.close()
    assert last.result(0) == 16
    with pytest.raises(BusyError, match="stopping"):
        batcher.submit(9)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> SearchKit:
    return build_search_kit(tmp_path_factory.mktemp("search"))


def test_a_folder_through_the_model(
    kit: SearchKit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = shutil.copytree(kit.photos, tmp_path / "photos")
    (photos / "broken.jpg").write_bytes(b"no image")
    settings = kit.settings(images=[str(photos)], index=str(tmp_path / "index"), batch_size=4)
    service, info = open_service(settings)
    assert (info["images"], info["captions"], info["examples"]) == (10, 0, [])
    shown = capsys.readouterr().err
    assert "left out sample 'broken.jpg'" in shown and "1 images of" in shown
    broken = next(n for n in range(11) if service.describe(n).key == "broken.jpg")
    assert not service.holds(broken) and sum(map(service.holds, range(-1, 12))) == 10
    service.close()
    (photos / "photo-001.jpg").unlink()
    service, info = open_service(settings)
    assert info["images"] == 9
    service.close()
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.png").write_bytes(b"text")
    with pytest.raises(DataError, match="none of the 1 images of .* can be used"):
        open_service(kit.settings(images=[str(tmp_path / "none")], index=str(tmp_path / "empty")))
    for number in range(60):
        (photos / f"text-{number}.png").write_bytes(b"text")
    with pytest.raises(
        DataError, match=r"of the first \d+ images of .* cannot be used, more than max_bad_share = 0.1"
    ):
        open_service(kit.settings(images=[str(photos)], index=str(tmp_path / "other"), max_bad_share=0.1))


def test_the_model_of_a_run_and_its_llm_are_found(
    kit: SearchKit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu")
    # the run names its store relative to the directory above; from anywhere else it is looked for beside the run
    for place in (kit.root.parent, tmp_path):
        monkeypatch.chdir(place)
        model = open_model(kit.settings(), device)
        assert model.llm is not None and model.home == kit.run
        assert model.count_tokens("four") == (4, False)
    demo = tmp_path / "demo"
    demo.mkdir()
    (demo / "clip-stage").symlink_to(kit.run, target_is_directory=True)
    assert open_model(kit.settings(model=str(demo), store=str(kit.root / "store")), device).home is not None
    alone = shutil.copytree(kit.run / "result", tmp_path / "alone" / "result")
    with pytest.raises(ConfigError, match="nothing beside .* tells which LLM"):
        open_model(kit.settings(model=str(alone)), device)
    given = {"llm": {"path": str(kit.root / "llm")}}
    assert open_model(kit.settings(model=str(alone), **given), device).home == tmp_path / "alone"
    with pytest.raises(ModelError, match="trained on embeddings of another caption encoder"):
        open_model(kit.settings(model=str(alone), llm={**given["llm"], "pooling": "last"}), device)
    clip = open_model(kit.settings(model=f"transformers:{kit.clip}"), device)
    assert clip.llm is None and clip.count_tokens("four") is None and clip.home == kit.clip
    with pytest.raises(ConfigError, match="model is empty"):
        open_model(kit.settings(model=""), device)


def test_a_moved_path_is_found_by_its_last_parts(tmp_path: Path) -> None:
    run, store = tmp_path / "new" / "runs" / "clip", tmp_path / "new" / "runs" / "store"
    run.mkdir(parents=True)
    store.mkdir()
    assert find_again("/somewhere/else/runs/store", run) == store
    assert find_again("runs/store", run) == store and find_again(str(store), run) == store
    assert find_again("/somewhere/else/nothing", run) is None


def test_another_models_captions_and_images(kit: SearchKit, tmp_path: Path) -> None:
    """CLIP itself, of transformers, on the same page."""
    settings = kit.settings(
        model=f"transformers:{kit.clip}", index=str(tmp_path / "index"), captions=[str(kit.shard)]
    )
    service, info = open_service(settings)
    try:
        assert info["images"] == 12 and info["max_tokens"] is None and info["captions"] == 36
    finally:
        service.close()


def test_where_the_index_is(kit: SearchKit, tmp_path: Path) -> None:
    model = open_model(kit.settings(), torch.device("cpu"))
    places = {
        index_directory(kit.settings(index="", **more), model)
        for more in ({}, {"images": [str(kit.photos)]}, {"dtype": "fp32"})
    }
    assert len(places) == 3 and all(place.parent == kit.run / "search" for place in places)
    assert index_directory(kit.settings(index="", images=[os.path.relpath(kit.shard)]), model) in places
    assert index_directory(kit.settings(index=str(tmp_path)), model) == tmp_path


def test_building_alone_needs_no_server(
    kit: SearchKit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_search(kit.settings(build_only=True, index=str(tmp_path / "index")))
    assert f"12 images indexed in {tmp_path / 'index'}" in capsys.readouterr().err
    assert (tmp_path / "index" / "images" / "index.json").exists()
    assert (tmp_path / "index" / "captions" / "index.json").exists()


def test_a_taken_port_is_said_before_anything_is_loaded(kit: SearchKit) -> None:
    taken = listen("127.0.0.1", 0)
    try:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1, port {port}: .* choose another"):
            run_search(kit.settings(port=port, model="missing"))
    finally:
        taken.close()
    with pytest.raises(ConfigError, match="cannot listen on 203.0.113.7"):
        listen("203.0.113.7", 0)


def test_approximate_search_is_named_with_its_recall(kit: SearchKit, tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="FAISS is not installed")
    service, info = open_service(kit.settings(approximate_above=5, index=str(tmp_path / "index")))
    service.close()
    assert info["exact"] is False and info["recall"] == pytest.approx(1.0)
    assert isinstance(np.asarray(info["images"]).item(), int) and Image.MAX_IMAGE_PIXELS
