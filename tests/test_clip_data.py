"""What the CLIP stage draws from a sample, and the batches it makes of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from llm2clip.data.image_address import image_address, view_rng
from llm2clip.data.images import ImageTransform, decode_image
from llm2clip.data.sample import Sample
from llm2clip.errors import BadSampleError, StoreError
from llm2clip.settings import CaptionSettings
from llm2clip.training import clip_batch
from llm2clip.training.clip_batch import ImageTexts
from llm2clip.training.clip_reader import Reader, draw_captions, group_id
from tests.training_kit import Kit, make_kit, picture


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return make_kit(tmp_path_factory.mktemp("kit"))


def sample(**captions: str | tuple[str, ...]) -> Sample:
    texts = {name: (text,) if isinstance(text, str) else text for name, text in captions.items()}
    return Sample("key", texts, picture(1), "group")


def shares(settings: CaptionSettings, drawn_from: Sample, draws: int = 3000) -> dict[str, float]:
    rng = np.random.default_rng(0)
    drawn = [text for _ in range(draws) for text in draw_captions(drawn_from, settings, rng)]
    return {text: drawn.count(text) / draws for text in sorted(set(drawn))}


def test_a_dense_ratio_of_three_quarters_over_more_than_two_roles() -> None:
    settings = CaptionSettings(
        short=("none",),
        roles={"raw": ("raw",), "short_sv": ("a", "b"), "long_sv": ("c",)},
        probabilities={"raw": 0.25, "short_sv": 0.375, "long_sv": 0.375},
    )
    whole = sample(raw="real", b="dense short", c="dense long")
    assert shares(settings, whole) == pytest.approx(
        {"real": 0.25, "dense short": 0.375, "dense long": 0.375}, abs=0.03
    )
    # a role without text gives its share to the others, in their ratio
    assert shares(settings, sample(raw="real", c="dense long")) == pytest.approx(
        {"real": 0.4, "dense long": 0.6}, abs=0.03
    )
    with pytest.raises(BadSampleError, match="no caption in raw, a, b, c; it has other"):
        draw_captions(sample(other="x"), settings, np.random.default_rng(0))


def test_texts_of_a_field_are_drawn_anew() -> None:
    settings = CaptionSettings(short=("s",), long=("l",), probabilities={"short": 1})
    assert shares(settings, sample(s=("one", "two", "three"), l="long")) == pytest.approx(
        {"one": 1 / 3, "two": 1 / 3, "three": 1 / 3}, abs=0.03
    )


def test_several_captions_differ_and_end_with_the_texts() -> None:
    settings = CaptionSettings(short=("s",), long=("l",), per_image=3)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(50):
        drawn = draw_captions(sample(s=("one", "two"), l=("one", "long")), settings, rng)
        assert len(drawn) == len(set(drawn)) == 3
        seen.add(frozenset(drawn))
    assert seen == {frozenset({"one", "two", "long"})}
    assert len(draw_captions(sample(s="only"), settings, rng)) == 1
    two = CaptionSettings(short=("s",), long=("l",), per_image=2)
    pairs = {frozenset(draw_captions(sample(s=("a", "b"), l="c"), two, rng)) for _ in range(100)}
    assert pairs == {frozenset("ab"), frozenset("ac"), frozenset("bc")}


def batch(counts: list[int], groups: list[int]) -> ImageTexts:
    texts = [f"image {i} text {j}" for i, count in enumerate(counts) for j in range(count)]
    return ImageTexts(
        keys=[f"key{i}" for i in range(len(counts))],
        groups=torch.tensor(groups),
        counts=counts,
        texts=texts,
        embeddings=torch.arange(len(texts)).float()[:, None],
        images=(torch.arange(len(counts), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2),),
    )


def assert_consistent(part: ImageTexts) -> None:
    numbers = [int(key[3:]) for key in part.keys]
    assert part.pixels is not None and part.pixels[:, 0, 0, 0].tolist() == numbers
    owners = [i for i, count in zip(numbers, part.counts, strict=True) for _ in range(count)]
    assert [int(text.split()[1]) for text in part.texts] == owners
    assert part.embeddings is not None and len(part.embeddings) == len(part.texts) == sum(part.counts)


@pytest.mark.parametrize("edges", [(), (2, 3), (1, 2, 3, 4)])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 5])
def test_parts_of_a_batch_keep_what_belongs_together(size: int, edges: tuple[int, ...]) -> None:
    whole = batch([2, 0, 3, 1, 1], [5, 6, 5, 7, 8])
    pieces = [whole[start:stop] for start, stop in pairwise((0, *edges, 5))]
    parts = clip_batch.batch_of(pieces).split(size)
    assert [len(part) for part in parts][:-1] == [size or 5] * (len(parts) - 1)
    for part in parts:
        assert_consistent(part)
    joined = clip_batch.join(parts)
    assert_consistent(joined)
    assert joined.keys == whole.keys and joined.texts == whole.texts
    # owners are counted through the whole batch
    assert joined.owners is not None and joined.owners.tolist() == [0, 0, 2, 2, 2, 3, 4]
    assert joined.groups.tolist() == [5, 6, 5, 7, 8]


def test_pieces_of_a_batch_are_one_on_the_device() -> None:
    whole = batch([2, 1, 3, 1, 1], [5, 6, 5, 7, 6])
    pieces = clip_batch.batch_of([whole[:2], whole[2:3], whole[3:]])
    assert isinstance(pieces, clip_batch.Pieces) and clip_batch.batch_of([whole]) is whole
    assert len(pieces) == 5 and pieces.keys == whole.keys and torch.equal(pieces.groups, whole.groups)
    moved = pieces.to(torch.device("cpu"))
    for joined in (moved.whole(), pieces.whole(), clip_batch.join([pieces[:3], pieces[3:]])):
        assert_consistent(joined)
        assert joined.keys == whole.keys and joined.counts == whole.counts


def test_parts_within_a_piece_are_not_copied() -> None:
    pieces = [batch([2, 1, 3], [5, 6, 5]), batch([1, 1], [7, 6])]
    parts = clip_batch.Pieces(pieces).split(1)
    assert len(clip_batch.Pieces(pieces)[5:]) == 0 and clip_batch.Pieces(pieces)[1:1].keys == []
    for part, whole in zip(parts, [0, 0, 0, 1, 1], strict=True):
        for name in ("pixels", "embeddings"):
            storages = [getattr(of, name).untyped_storage().data_ptr() for of in (part, pieces[whole])]
            assert storages[0] == storages[1], name


def test_images_are_never_copied_into_parts_of_several_pieces() -> None:
    pieces = [batch([2, 1, 3], [5, 6, 5]), batch([1, 1], [7, 6])]
    storages = {piece.images[0].untyped_storage().data_ptr() for piece in pieces}
    joined = clip_batch.join(pieces)
    for part in (*clip_batch.Pieces(pieces).split(4), joined, joined[1:4], joined.to(torch.device("cpu"))):
        assert {image.untyped_storage().data_ptr() for image in part.images} <= storages
        assert part.pixels is not None and len(part.pixels) == len(part) == sum(map(len, part.images))
    assert [len(image) for image in joined[1:4].images] == [2, 1] and joined[5:].pixels is not None
    assert joined[5:].pixels.shape == (0, 3, 2, 2)
    assert clip_batch.join([replace(piece, images=()) for piece in pieces])[1:].pixels is None


def test_one_image_per_group() -> None:
    whole = batch([2, 1, 3, 1, 1], [5, 6, 5, 7, 6])
    assert clip_batch.has_repeats(whole.groups)
    kept = whole.one_per_group()
    assert kept.keys == ["key0", "key1", "key3"] and not clip_batch.has_repeats(kept.groups)
    assert_consistent(kept)
    assert kept.one_per_group() is kept


def test_groups_are_numbers_that_do_not_depend_on_the_process() -> None:
    assert group_id("tram-12") == 846834091060752545
    assert all(0 <= group_id(f"g{i}") < 1 << 63 for i in range(1000))
    assert len({group_id(f"g{i}") for i in range(1000)}) == 1000
    assert torch.tensor([group_id("a")]).item() == group_id("a")


def test_the_reader_decodes_draws_and_looks_up(kit: Kit) -> None:
    from llm2clip.data.sources import open_source
    from llm2clip.data.store import EmbeddingStore

    store = EmbeddingStore.open(kit.root / "store")
    source = open_source(kit.data()["train"])
    captions = CaptionSettings(short=("name",), long=("description",))
    reader = Reader(captions, ImageTransform(8, train=True), store=store)
    assert reader.reads_images
    items = [reader(source[i], np.random.default_rng(i)) for i in range(3)]
    made = reader.collate(items)
    assert made.pixels is not None and made.pixels.dtype == torch.uint8 and made.pixels.shape == (3, 3, 8, 8)
    assert made.embeddings is not None and torch.equal(made.embeddings, store.get(made.texts))
    assert made.groups.tolist() == [group_id(f"entity{i}") for i in range(3)]
    # the crop is that of the transform with what is left of the sample's random numbers
    rng = np.random.default_rng(2)
    draw_captions(source[2], captions, rng)
    image = decode_image(source[2].image or b"")
    assert torch.equal(made.pixels[2], ImageTransform(8, train=True).pixels(image, rng))
    with pytest.raises(BadSampleError, match="it has no image"):
        reader(source.captions_of(0), np.random.default_rng(0))
    blind = Reader(captions, store=store)
    assert not blind.reads_images
    assert blind.collate([blind(source.captions_of(0), np.random.default_rng(0))]).pixels is None
    foreign = Reader(CaptionSettings(short=("es.name",), long=("es.name",)), store=store)
    with pytest.raises(StoreError, match="cosa 0"):
        foreign.collate([foreign(source[0], np.random.default_rng(0))])


def test_views_are_the_same_crops_for_everyone(kit: Kit) -> None:
    captions = CaptionSettings(short=("s",), long=("l",))
    large, small = ImageTransform(16, train=True), ImageTransform(8, train=True)
    from llm2clip.data.store import EmbeddingStore

    store = EmbeddingStore.open(kit.root / "store")
    reader = Reader(captions, large, views=3, teacher_image=store)
    seen = {}
    for seed in range(20):
        item = reader(sample(s="text"), np.random.default_rng(seed))
        assert item.pixels is not None
        previous = seen.setdefault(item.address, item.pixels)
        assert torch.equal(previous, item.pixels)
    addresses = {image_address(picture(1), view) for view in range(3)}
    assert set(seen) == addresses and not torch.equal(*list(seen.values())[:2])
    # a teacher of another resolution sees the same part
    image = decode_image(picture(1))
    for address in addresses:
        one, other = large.pixels(image, view_rng(address)), small.pixels(image, view_rng(address))
        shrunk = torch.nn.functional.avg_pool2d(one.float(), 2)
        assert (shrunk - other.float()).abs().mean() < 12
    assert image_address(picture(1)) not in addresses and image_address(picture(2)) != image_address(
        picture(1)
    )
    with pytest.raises(StoreError, match="no features of 1 of 1 images, for example of key"):
        reader.collate([item])


def test_a_missing_store_of_many_names_ten(kit: Kit, tmp_path: Path) -> None:
    from llm2clip.data.store import EmbeddingStore

    reader = Reader(
        CaptionSettings(short=("s",), long=("l",)), features=EmbeddingStore.open(kit.root / "store")
    )
    items = [
        reader(Sample(f"shard/{i:03d}", {"s": ("t",)}, picture(i), "g"), np.random.default_rng(0))
        for i in range(12)
    ]
    with pytest.raises(StoreError) as caught:
        reader.collate(items)
    assert "12 of 12 images" in str(caught.value) and str(caught.value).count("shard/0") == 10
