"""Features on disk: computed once, resumed where a job stopped, shared by ranks, tried again where they failed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llm2clip.errors import ModelError, StoreError
from llm2clip.evaluation.features import FeatureCache, Joined
from llm2clip.training.world import World

sys.path.insert(0, str(Path(__file__).parent))
from gloo import run_on_ranks  # noqa: E402

ALONE = World(0, 1, torch.device("cpu"))
DIM = 5


def values_of(rows: Sequence[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)[:, None] + torch.arange(1, DIM + 1) / 8


def producer(
    asked: list[int], sizes: int = 3, stop_at: int = 10**9, bad: Sequence[int] = ()
) -> Callable[[Sequence[int]], Iterator[Tensor]]:
    """Yields a few rows at a time, remembers which, fails at a row."""

    def produce(rows: Sequence[int]) -> Iterator[Tensor]:
        for start in range(0, len(rows), sizes):
            part = list(rows[start : start + sizes])
            if stop_at in part:
                raise KeyboardInterrupt
            asked.extend(part)
            values = values_of(part)
            values[[number for number, row in enumerate(part) if row in bad]] = torch.nan
            yield values

    return produce


def test_rows_come_back_in_any_order(tmp_path: Path) -> None:
    features = FeatureCache(tmp_path, ALONE, block_rows=4).array("t", {"a": 1}, 11, producer([]))
    assert features.shape == (11, DIM) and features.valid().all()
    wanted = np.array([10, 0, 3, 4, 4, 9])
    assert np.array_equal(features.gather(wanted), values_of(wanted.tolist()).numpy())
    rows = features.rows(wanted)
    unit = torch.nn.functional.normalize(values_of(wanted.tolist()), dim=1)
    assert rows.shape == (6, DIM) and torch.equal(rows[1:4], unit[1:4]) and torch.equal(rows[[5]], unit[5:])
    everything = features.rows()
    assert torch.equal(everything[:], torch.nn.functional.normalize(values_of(range(11)), dim=1))
    joined = Joined(rows, everything)
    assert joined.shape == (17, DIM) and torch.equal(joined[4:9], torch.cat([unit[4:], everything[:3]]))
    assert torch.equal(joined[[16, 0]], torch.stack([everything[10:][0], unit[0]]))


def test_a_stopped_job_goes_on_and_a_finished_one_computes_nothing(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, ALONE, block_rows=4)
    with pytest.raises(KeyboardInterrupt):
        cache.array("t", {}, 11, producer([], stop_at=9))
    asked: list[int] = []
    features = cache.array("t", {}, 11, producer(asked))
    assert asked == [8, 9, 10]  # two blocks of four were kept
    assert np.array_equal(features.gather(np.arange(11)), values_of(range(11)).numpy())
    asked.clear()
    cache.array("t", {}, 11, producer(asked))
    assert asked == []


def test_another_identity_or_kind_is_computed_anew(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, ALONE)
    for kind, identity, rows in (
        ("t", {"w": 1}, 3),
        ("t", {"w": 2}, 3),
        ("t", {"w": 1}, 4),
        ("i", {"w": 1}, 3),
    ):
        asked: list[int] = []
        cache.array(kind, identity, rows, producer(asked))
        assert asked == list(range(rows))
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", ["cut", "text", "shape"])
def test_a_damaged_block_is_computed_again(tmp_path: Path, damage: str) -> None:
    cache = FeatureCache(tmp_path, ALONE, block_rows=4)
    cache.array("t", {}, 11, producer([]))
    blocks = sorted(tmp_path.rglob("block-*"))
    if damage == "shape":  # the last block has three rows
        blocks[1].write_bytes(blocks[2].read_bytes())
    else:
        blocks[1].write_bytes(blocks[1].read_bytes()[:-3] if damage == "cut" else b"not a block")
    asked: list[int] = []
    features = cache.array("t", {}, 11, producer(asked))
    assert asked == [4, 5, 6, 7]
    assert np.array_equal(features.gather(np.arange(11)), values_of(range(11)).numpy())


def test_what_failed_is_tried_again_and_nothing_else(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, ALONE, block_rows=4)
    features = cache.array("t", {}, 11, producer([], bad=(2, 9)))
    assert np.flatnonzero(~features.valid()).tolist() == [2, 9]
    asked: list[int] = []
    features = cache.array("t", {}, 11, producer(asked, bad=(9,)))  # 2 was repaired
    assert asked == [2, 9] and np.flatnonzero(~features.valid()).tolist() == [9]
    assert np.array_equal(features.gather(np.arange(8)), values_of(range(8)).numpy())


def test_features_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    def produce(rows: Sequence[int]) -> Iterator[Tensor]:
        values = values_of(rows)
        values[2, 3] = torch.inf
        yield values

    with pytest.raises(ModelError, match="item 2 are NaN or infinite"):
        FeatureCache(tmp_path, ALONE).array("t", {}, 4, produce)
    assert not list(tmp_path.rglob("block-*"))


def check_ranks(rank: int, world: int, root: str) -> None:
    here = World(rank, world, torch.device("cpu"))
    asked: list[int] = []
    features = FeatureCache(Path(root), here, block_rows=4).array("t", {}, 22, producer(asked))
    assert sorted({row // 4 for row in asked}) == list(range(rank, 6, world))
    assert np.array_equal(features.gather(np.arange(22)), values_of(range(22)).numpy())
    # each rank its own directory, as on machines that do not share one
    with pytest.raises(StoreError, match="directory that all ranks share"):
        FeatureCache(Path(root) / str(rank), here, block_rows=4).array("t", {}, 22, producer([]))


@pytest.mark.dist
def test_ranks_share_the_blocks(tmp_path: Path) -> None:
    run_on_ranks(2, check_ranks, str(tmp_path))
    # and one process goes on with what they have
    asked: list[int] = []
    FeatureCache(tmp_path, ALONE, block_rows=4).array("t", {}, 22, producer(asked))
    assert asked == []
