"""Texts to pairs: captions in both directions, query files, single texts, hard negatives, batches of one source."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm2clip.config import from_tree
from llm2clip.data.mixture import Mixture
from llm2clip.data.order import EpochOrder, SourceBatches
from llm2clip.data.sample import Sample
from llm2clip.data.sources import open_source
from llm2clip.errors import BadSampleError, ConfigError, DataError
from llm2clip.settings import CaptionSettings, FinetuneLLMSettings, PairSettings, RunSettings
from llm2clip.training.batches import epoch_samples, rank_batches
from llm2clip.training.pair_sources import brings_negatives, pair_source
from llm2clip.training.pairs import TextPair, caption_sides, to_pair
from tests.training_kit import ALONE, records, write_set

CAPTIONS = {"short": ["name"], "long": ["description"]}


def settings_of(*train: Path, **groups: Any) -> FinetuneLLMSettings:
    data = {"train": [str(path) for path in train], "captions": CAPTIONS} | groups.pop("data", {})
    return from_tree(FinetuneLLMSettings, {"data": data, **groups})


def source_of(settings: FinetuneLLMSettings) -> Any:
    return pair_source(open_source(settings.data.train, weights=settings.data.weights), settings, show=False)


def drawn(source: Any, index: int, times: int = 300) -> list[TextPair]:
    return [to_pair(source[index], np.random.default_rng(seed)) for seed in range(times)]


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_coin_decides_which_caption_asks_and_which_instruction_it_gets(tmp_path: Path) -> None:
    path = write_set(tmp_path / "a.tar", records(3))
    instructions = {"short": "find a long one: ", "long": "find a short one: "}
    pairs = {"instructions": instructions, "symmetric": ["long"]}
    found = Counter(drawn(source_of(settings_of(path, pairs=pairs)), 1))
    short, long = "old coat 1", "This is the old coat with number 1, of 1 kinds."
    one = TextPair("a.tar/0001", "entity1", short, long, query_prompt="find a long one: ")
    other = TextPair(
        "a.tar/0001",
        "entity1",
        long,
        short,
        query_prompt="find a short one: ",
        document_prompt="find a short one: ",
    )
    assert set(found) == {replace(one, key=next(iter(found)).key), replace(other, key=next(iter(found)).key)}
    assert 0.4 < found[replace(one, key=next(iter(found)).key)] / 300 < 0.6


def test_two_texts_of_one_field_are_a_pair_and_never_the_same_one(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "coco.jsonl", {"caption": ["a", "b", "c", "b"]}, {"caption": ["x"]}, {"caption": "y"}
    )
    settings = settings_of(path, data={"captions": {"short": ["caption"], "long": ["caption"]}})
    source = source_of(settings)
    assert len(source) == 1  # the others have one text only
    found = Counter((pair.query, pair.positive) for pair in drawn(source, 0))
    assert set(found) == {(a, b) for a in "abc" for b in "abc" if a != b}


def test_sides_of_a_sample() -> None:
    captions = CaptionSettings(short=("s", "t"), long=("l",))

    def sides(**texts: Any) -> Any:
        return caption_sides(Sample("key", {n: (v,) for n, v in texts.items()}, group="group"), captions)

    assert sides(t="a", l="b") == (("a",), ("b",))
    with pytest.raises(BadSampleError, match=r"no text for long \(l\); it has s"):
        sides(s="a")
    with pytest.raises(BadSampleError, match="equal"):
        sides(s="a", l="a")


def test_a_source_with_one_caption_per_image_says_what_is_needed(tmp_path: Path) -> None:
    path = lines(tmp_path / "one.jsonl", {"alt": "a"}, {"alt": "b"})
    with pytest.raises(DataError, match=r"no sample has two captions.*are: alt \(2\).*objective=simcse"):
        source_of(settings_of(path, data={"captions": {"short": ["caption"], "long": ["alt"]}}))


def test_hard_negatives_are_captions_of_other_images_in_the_positives_role(tmp_path: Path) -> None:
    twins = [*records(4), records(1)[0] | {"name": "another red stone", "description": "another text"}]
    source = source_of(settings_of(write_set(tmp_path / "a.tar", twins), pairs={"negatives": "random"}))
    names, seen = {r["name"] for r in twins}, set()
    for pair in drawn(source, 0):
        assert pair.group == "entity0" and pair.negative_group in {"entity1", "entity2", "entity3"}
        assert (pair.negative in names) == (pair.positive in names)  # a name for a name
        seen.add(pair.negative_group)
    assert len(seen) == 3
    alone = source_of(settings_of(write_set(tmp_path / "b.tar", records(1)), pairs={"negatives": "random"}))
    assert drawn(alone, 0, 1)[0].negative == ""


def test_query_files_bring_their_own_negatives_and_instruction(tmp_path: Path) -> None:
    rows = (
        {"query": "q", "positive": ["p1", "p2"], "negative": "n"},
        {"query": "q2", "positive": "p3"},
        {"query": "", "positive": "p4", "negative": "n"},
    )
    path = lines(tmp_path / "msmarco.jsonl", *rows)
    pairs = {"instructions": {"msmarco": "find: "}}
    source = source_of(settings_of(path, pairs=pairs))
    found = {(p.query, p.positive, p.negative, p.query_prompt, p.document_prompt) for p in drawn(source, 0)}
    assert found == {("q", "p1", "n", "find: ", ""), ("q", "p2", "n", "find: ", "")}
    assert drawn(source, 1, 1)[0].negative == ""
    with pytest.raises(BadSampleError, match="no text for query"):
        drawn(source, 2, 1)
    symmetric = source_of(settings_of(path, pairs=pairs | {"symmetric": ["msmarco"], "negatives": "none"}))
    (pair,) = drawn(symmetric, 0, 1)
    assert (pair.document_prompt, pair.negative) == ("find: ", "")


def test_who_brings_hard_negatives(tmp_path: Path) -> None:
    captions = settings_of(write_set(tmp_path / "a.tar", records(3)))
    both = mixed(tmp_path)
    for settings, kind, expected in (
        (captions, "given", False),
        (captions, "random", True),
        (both, "given", True),
        (both, "none", False),
        (replace(captions, objective="simcse"), "random", False),
    ):
        pairs: Any = replace(settings.pairs, negatives=kind)
        assert brings_negatives(source_of(settings), replace(settings, pairs=pairs)) is expected


def test_simcse_pairs_any_text_with_itself(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text("one line\n\n  another line \n")
    shard = write_set(tmp_path / "a.tar", records(2))
    source = source_of(settings_of(tmp_path / "wiki.txt", shard, objective="simcse"))
    assert len(source) == 4
    assert {(p.query, p.positive) for p in drawn(source, 1)} == {("another line", "another line")}
    found = {(p.query, p.positive) for p in drawn(source, 2)}
    assert found == {(text, text) for text in (records(1)[0]["name"], records(1)[0]["description"])}
    with pytest.raises(DataError, match=r"no text in .* body, name, description; fields found: text \(2\)"):
        source_of(settings_of(tmp_path / "wiki.txt", objective="simcse", text_field="body"))


def test_repeated_pairs_count_once_and_weights_still_count(tmp_path: Path) -> None:
    one = write_set(tmp_path / "a.tar", [*records(6), *records(6)])
    two = write_set(tmp_path / "b.tar", records(10, 3), 50)
    source = source_of(settings_of(one, two))
    assert len(source) == 13
    assert [b - a for a, b in source.blocks] == [6, 7]
    weighted = source_of(settings_of(one, two, data={"weights": [1, 0]}))
    assert isinstance(weighted, Mixture) and len(weighted) == 13
    assert set(EpochOrder(weighted).indices(0).tolist()) == set(range(6))


def mixed(tmp_path: Path, **groups: Any) -> FinetuneLLMSettings:
    """Captions in two shards and a query file."""
    shards = [write_set(tmp_path / f"{n}.tar", records(10, 10 * n), 10 * n) for n in range(2)]
    rows = [{"query": f"q{n}", "positive": f"p{n}", "negative": f"n{n}"} for n in range(14)]
    return settings_of(shards[0], lines(tmp_path / "e5.jsonl", *rows), shards[1], **groups)


@pytest.mark.parametrize("world", [1, 2])
def test_every_batch_comes_from_one_source(tmp_path: Path, world: int) -> None:
    settings = mixed(tmp_path)
    source, run = source_of(settings), RunSettings(batch_size=6)
    # all captions count as one source: 20 pairs make 3 batches and 14 queries make 2
    assert epoch_samples(source, run, one_source=True) == 30 and epoch_samples(source, run) == 34
    ranks = [replace(ALONE, rank=rank, size=world) for rank in range(world)]
    streams = [
        rank_batches(source, to_pair, settings.data, run, rank, (0, 0), one_source=True) for rank in ranks
    ]
    orders = []
    for epoch in range(3):
        kinds, keys = [], []
        for _ in range(5):
            batch = [pair for stream in streams for pair in next(stream)[1]]
            assert len(batch) == 6
            kinds.append({bool(pair.negative) for pair in batch})
            keys += [pair.key for pair in batch]
        assert all(len(kind) == 1 for kind in kinds) and len(set(keys)) == 30, epoch
        orders.append([kind.copy().pop() for kind in kinds])
        assert sorted(orders[-1]) == [False] * 3 + [True] * 2
    assert len({tuple(order) for order in orders}) > 1


def test_batches_of_one_source_go_on_from_any_position(tmp_path: Path) -> None:
    settings = mixed(tmp_path)
    source, run = source_of(settings), RunSettings(batch_size=6)

    def stream(start: tuple[int, int]) -> Any:
        return rank_batches(source, to_pair, settings.data, run, ALONE, start, one_source=True)

    whole = stream((0, 0))
    seen = [next(whole) for _ in range(8)]
    position = seen[3][0]
    assert next(stream((position.epoch, position.batch))) == seen[4]


def test_weights_share_out_the_batches(tmp_path: Path) -> None:
    source = source_of(mixed(tmp_path, data={"weights": [0, 3, 1]}))
    order = SourceBatches(source, 5, seed=1)
    assert len(order) == 30  # 2 + 2 + 2 batches of 10, 14 and 10 samples
    batches = order.indices(0).reshape(6, 5)
    starts = [np.searchsorted(source.starts, batch, side="right") - 1 for batch in batches]
    assert Counter(int(batch[0]) for batch in starts) == {1: 5, 2: 1}
    assert all(len(set(batch.tolist())) == 1 for batch in starts)
    # the second pass over a source begins with a batch of its own
    assert all(len(set(batch.tolist())) == 5 for batch in batches)
    assert order.indices(0).tolist() == order.indices(0).tolist() != order.indices(1).tolist()
    assert SourceBatches(source, 5, shuffle=False).indices(0).reshape(6, 5)[0].tolist() == list(range(10, 15))


def test_a_source_smaller_than_a_batch_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"e5.jsonl has 14 samples, fewer than one batch of 15"):
        SourceBatches(source_of(mixed(tmp_path)), 15)
    # but not where its weight is zero
    assert len(SourceBatches(source_of(mixed(tmp_path, data={"weights": [1, 0, 1]})), 10)) == 30


def test_an_instruction_that_is_not_there_cannot_be_symmetric() -> None:
    with pytest.raises(
        ConfigError, match="pairs.symmetric: quora has no instruction; pairs.instructions has short"
    ):
        PairSettings(instructions={"short": "a"}, symmetric=("quora",))


def test_plain_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b" = Title = \n\nfirst line\n\xff\xfe broken\nlast")
    source = open_source(tmp_path / "a.txt")
    assert len(source) == 4
    assert source[1].captions == {"text": ("first line",)} and source[3].captions["text"] == ("last",)
    assert source[1].key != source[3].key and source[1].image is None
    with pytest.raises(BadSampleError, match="not UTF-8"):
        source[2]
    assert len(open_source(tmp_path / "a.txt", limit=2)) == 2
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="no sample that can be used"):
        open_source(tmp_path / "empty.txt")
