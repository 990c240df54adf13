"""Order, batches, resume, ranks, workers and the limit on bad samples."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm2clip.data.images import ImageTransform, decode_image
from llm2clip.data.loader import Loader, Position
from llm2clip.data.mixture import Mixture
from llm2clip.data.order import EpochOrder, batch_indices
from llm2clip.data.sample import Sample
from llm2clip.data.sources import open_source
from llm2clip.errors import BadSampleError, DataError
from tests.data_files import image_bytes, members_of, write_shards, write_tar


def draw(sample: Sample, rng: np.random.Generator) -> tuple[str, float]:
    return sample.key, float(rng.random())


def pixels(sample: Sample, rng: np.random.Generator) -> torch.Tensor:
    assert sample.image is not None
    return ImageTransform(8, train=True)(decode_image(sample.image, key=sample.key), rng)


def picky(sample: Sample, rng: np.random.Generator) -> str:
    if sample.key.endswith("3"):
        raise BadSampleError(sample.key, "ends with 3")
    return sample.key


def broken(sample: Sample, rng: np.random.Generator) -> str:
    raise DataError("the disk is on fire")


@pytest.fixture
def shards(tmp_path: Path) -> str:
    write_shards(tmp_path, 5, 10)
    return str(tmp_path)


def test_epoch_is_a_permutation_by_windows_of_shards(shards: str) -> None:
    source = open_source(shards)
    order = EpochOrder(source, seed=3, window=2)
    first, second = order.indices(0), order.indices(1)
    assert sorted(first.tolist()) == list(range(50)) and first.dtype == np.int64
    assert first.tolist() == EpochOrder(source, seed=3, window=2).indices(0).tolist()
    assert first.tolist() != second.tolist()
    assert first.tolist() != EpochOrder(source, seed=4, window=2).indices(0).tolist()
    # 20 samples of a window come from 2 shards, mixed
    for start, blocks in ((0, 2), (20, 2), (40, 1)):
        assert len({index // 10 for index in first[start : start + 20]}) == blocks
    assert first[:20].tolist() != sorted(first[:20].tolist())
    assert EpochOrder(source, shuffle=False).indices(7).tolist() == list(range(50))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_same_global_batches(shards: str, world: int) -> None:
    order = EpochOrder(open_source(shards), seed=1)
    whole = batch_indices(order, 2, 8)
    parts = [batch_indices(order, 2, 8, rank, world) for rank in range(world)]
    assert len(whole) == 6
    for number, batch in enumerate(whole):
        assert np.concatenate([part[number] for part in parts]).tolist() == batch.tolist()
    sizes = [len(part[0]) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def run(source: Any, **options: Any) -> list[tuple[Position, Any]]:
    return list(Loader(source, 8, options.pop("transform", draw), seed=5, **options))


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_workers_change_nothing(shards: str, workers: int) -> None:
    # 7 workers are more than the 5 shards
    source = open_source(shards)
    assert run(source, epochs=2, workers=workers) == run(source, epochs=2)


def test_workers_leave_the_global_generator_alone(shards: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(open_source(shards), epochs=1, workers=1)
    assert torch.equal(before, torch.get_rng_state())


def test_resume_at_every_position(shards: str) -> None:
    source = open_source(shards)
    whole = run(source, epochs=3)
    assert len(whole) == 18 and whole[5][0] == Position(1, 0) and whole[-1][0] == Position(3, 0)
    for done in (0, 4, 5, 11, 16):
        assert run(source, epochs=3, start=whole[done][0]) == whole[done + 1 :]
    # the end of an epoch may also be given as its last batch
    assert run(source, epochs=3, start=(0, 6)) == whole[6:]
    assert run(source, epochs=3, start=whole[2][0], workers=2) == whole[3:]


def test_resume_on_another_number_of_ranks(shards: str) -> None:
    source = open_source(shards)
    whole = run(source, epochs=1)
    start = whole[1][0]
    parts = [run(source, epochs=1, start=start, rank=rank, world_size=2) for rank in range(2)]
    for (position, items), (_, left), (_, right) in zip(whole[2:], *parts, strict=True):
        assert items == left + right and position > start


@pytest.mark.parametrize("workers", [0, 2])
def test_tensors_and_collate(shards: str, workers: int) -> None:
    source = open_source(shards)
    plain = run(source, transform=pixels, epochs=1, workers=workers)
    joined = run(source, transform=pixels, collate=torch.stack, epochs=1, workers=workers)
    assert joined[0][1].shape == (8, 3, 8, 8)
    for (_, items), (_, batch) in zip(plain, joined, strict=True):
        assert torch.equal(torch.stack(items), batch)


def sizes_of(parts: list[torch.Tensor]) -> tuple[list[int], torch.Tensor]:
    return [len(part) for part in parts], torch.cat(parts)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("piece", [3, 8, 50])
def test_pieces_of_a_batch_are_joined_in_order(shards: str, workers: int, piece: int) -> None:
    source = open_source(shards)
    whole = run(source, transform=pixels, collate=torch.stack, epochs=2)
    cut = run(
        source, transform=pixels, collate=torch.stack, epochs=2, workers=workers, piece=piece, join=sizes_of
    )
    assert [position for position, _ in cut] == [position for position, _ in whole]
    for (_, (sizes, batch)), (_, expected) in zip(cut, whole, strict=True):
        assert torch.equal(batch, expected)
        assert sizes == {3: [3, 3, 2], 8: [8], 50: [8]}[piece]


def some_bad(sample: Sample, rng: np.random.Generator) -> torch.Tensor:
    if int(sample.key[-2:]) % 10 < 7:
        raise BadSampleError(sample.key, "ends badly")
    return torch.zeros(1)


def test_pieces_of_which_nothing_is_left(shards: str) -> None:
    batches = run(
        open_source(shards),
        transform=some_bad,
        collate=torch.stack,
        epochs=1,
        piece=2,
        join=sizes_of,
        max_bad_share=1.0,
    )
    lengths = [len(batch[1]) if batch else 0 for _, batch in batches]
    assert len(batches) == 6 and 12 <= sum(lengths) <= 15 and min(lengths) < 3
    nothing = run(
        open_source(shards),
        transform=picky,
        collate=lambda items: [],
        epochs=1,
        piece=2,
        join=sizes_of,
        max_bad_share=1,
    )
    assert [items for _, items in nothing] == [[]] * 6


def test_fewer_shards_than_workers_and_ranks(tmp_path: Path) -> None:
    # one shard, three ranks with two workers each: every sample of the epoch once
    write_shards(tmp_path, 1, 24)
    source = open_source(str(tmp_path))
    parts = [run(source, epochs=1, rank=rank, world_size=3, workers=2) for rank in range(3)]
    keys = [key for part in parts for _, items in part for key, _ in items]
    assert len(keys) == 24 == len(set(keys))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_leave_their_batch_and_are_named(
    shards: str, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    loader = Loader(open_source(shards), 8, picky, epochs=2, max_bad_share=0.2, workers=workers)
    with caplog.at_level(logging.WARNING, "llm2clip.data"):
        keys = [key for _, items in loader for key in items]
    assert not any(key.endswith("3") for key in keys)
    assert loader.bad.seen == 96 and loader.bad.bad == 96 - len(keys) > 0
    # named once, although two epochs met it
    named = Counter(record.getMessage().split(":")[0] for record in caplog.records)
    assert set(named.values()) == {1} and "train-000000/0x0003" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run(tmp_path: Path, workers: int) -> None:
    members = members_of([f"{number:03d}" for number in range(100)])
    for number in range(0, 100, 5):
        members[2 * number] = (f"{number:03d}.png", b"a JPEG that is a text file")
    source = open_source(str(write_tar(tmp_path / "a.tar", members)))
    with pytest.raises(DataError, match=r"of \d+ samples.*not JPEG") as caught:
        for _ in Loader(source, 10, pixels, workers=workers):
            pass
    assert str(caught.value).count("a/") == 10
    # the share is checked on the way, where it may lie above the final 20 %
    loader = Loader(source, 10, pixels, workers=workers, epochs=1, max_bad_share=0.4)
    assert sum(len(items) for _, items in loader) == 80 and loader.bad.bad == 20


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_arrive_as_themselves(shards: str, workers: int) -> None:
    with pytest.raises(DataError, match="the disk is on fire"):
        run(open_source(shards), transform=broken, workers=workers)


def test_text_only_reads_no_images(shards: str) -> None:
    loader = Loader(open_source(shards), 8, lambda sample, rng: sample.image, epochs=1, text_only=True)
    assert all(item is None for _, items in loader for item in items)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 51}, "fewer than one batch"),
        ({"batch_size": 8, "rank": 2, "world_size": 2}, "rank"),
        ({"batch_size": 1, "world_size": 2}, "smaller than the 2 ranks"),
        ({"batch_size": 8, "max_bad_share": 2.0}, "max_bad_share"),
        ({"batch_size": 8, "piece": 4}, "pieces of a batch need"),
        ({"batch_size": 8, "join": sizes_of}, "pieces of a batch need"),
    ],
)
def test_impossible_requests(shards: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        Loader(open_source(shards), transform=draw, **options)


def test_mixture_by_size_and_by_weight(tmp_path: Path) -> None:
    write_shards(tmp_path / "a", 3, 20)
    write_shards(tmp_path / "b", 1, 10)
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    plain = open_source(paths)
    assert len(plain) == 70 and sorted(EpochOrder(plain).indices(0).tolist()) == list(range(70))
    assert plain[60].image == open_source(paths[1])[0].image
    with pytest.raises(IndexError):
        plain[70]
    weighted = open_source(paths, weights=(1, 1))
    order = EpochOrder(weighted, seed=2)
    drawn = order.indices(0)
    assert len(drawn) == len(order) == 70
    assert (drawn < 60).sum() == 35
    # 35 of 10: three whole passes and a half
    assert set(Counter(drawn[drawn >= 60].tolist()).values()) == {3, 4}
    assert drawn.tolist() == EpochOrder(weighted, seed=2).indices(0).tolist()
    # the sources are spread over the epoch, not one after the other
    assert 10 <= (drawn[:35] < 60).sum() <= 25
    second = order.indices(1)
    assert set(drawn[drawn < 60].tolist()) != set(second[second < 60].tolist())


@pytest.mark.parametrize("weights", [(1.0,), (0.0, 0.0), (-1.0, 2.0), (float("nan"), 1.0)])
def test_impossible_weights(tmp_path: Path, weights: tuple[float, ...]) -> None:
    write_shards(tmp_path, 1, 2)
    with pytest.raises(DataError, match="weight"):
        open_source([str(tmp_path), str(tmp_path)], weights=weights)


def test_mixture_of_kinds(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1, 3)
    (tmp_path / "x.png").write_bytes(image_bytes())
    (tmp_path / "t.csv").write_text("image,caption\nx.png,hello\n")
    source = open_source([str(tmp_path / "tars"), str(tmp_path / "t.csv")])
    assert isinstance(source, Mixture)
    assert source[3].captions == {"caption": ("hello",)} and source.captions_of(3).image is None
    assert source.blocks == [(0, 3), (3, 4)]
