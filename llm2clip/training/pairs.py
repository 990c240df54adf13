"""Texts as training pairs of a query and a positive, and two captions of one image as such.

A source hands out samples that know it (`OwnedSample`), and makes the pair of one when the loader asks: the coin that
decides which caption is the query, and the draw of a hard negative, come from the loader's random numbers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llm2clip.data.sample import Sample
from llm2clip.data.sources import Source
from llm2clip.data.store import caption_digest
from llm2clip.errors import BadSampleError, DataError
from llm2clip.progress import Progress
from llm2clip.settings import CaptionSettings, PairSettings

_DRAWS = 16  # tries to find a hard negative of another image


@dataclass(frozen=True, slots=True)
class TextPair:
    """A query, a text that it should find, and perhaps one that it should not.

    Attributes:
        key: sample key, for messages.
        group: identity of what is shown; texts of one group are no negatives of each other.
        query, positive: the texts.
        negative: a hard negative; empty: none.
        negative_group: what the negative shows; empty: nothing known.
        query_prompt: instruction before the query.
        document_prompt: instruction before positive and negative.
    """

    key: str
    group: str
    query: str
    positive: str
    negative: str = ""
    negative_group: str = ""
    query_prompt: str = ""
    document_prompt: str = ""


class PairMaker(Protocol):
    """A source whose samples become pairs."""

    def pair(self, sample: Sample, rng: np.random.Generator) -> TextPair:
        """The pair of a sample of this source; raises BadSampleError."""
        ...


@dataclass(frozen=True, slots=True)
class OwnedSample(Sample):
    """A sample and the source that makes its pair."""

    owner: PairMaker | None = None


def to_pair(sample: Sample, rng: np.random.Generator) -> TextPair:
    """The loader's transform."""
    assert isinstance(sample, OwnedSample) and sample.owner is not None
    return sample.owner.pair(sample, rng)


def owned(sample: Sample, owner: PairMaker) -> OwnedSample:
    """The sample without its image, as one of `owner`."""
    return OwnedSample(sample.key, sample.captions, None, sample.group, sample.meta, owner)


def role_texts(sample: Sample, fields: Sequence[str]) -> tuple[str, ...]:
    """All texts of the first of `fields` that has any."""
    return next((texts for name in fields if (texts := sample.captions.get(name))), ())


def caption_sides(sample: Sample, captions: CaptionSettings) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The short and the long texts of a sample, one of each side can be paired.

    Raises:
        BadSampleError: one of the two roles has no text, or there are no two different ones.
    """
    short, long = role_texts(sample, captions.short), role_texts(sample, captions.long)
    if not short or not long:
        lacking = " and ".join(
            f"{role} ({', '.join(fields)})"
            for role, fields, texts in (("short", captions.short, short), ("long", captions.long, long))
            if not texts
        )
        raise BadSampleError(
            sample.key, f"no text for {lacking}; it has {', '.join(sample.captions) or 'no captions'}"
        )
    if len({*short, *long}) < 2:
        raise BadSampleError(sample.key, "short and long caption are equal")
    return short, long


class CaptionPairs:
    """The samples of a source that bring two captions not seen before (8 bytes of memory per pair).

    Images shown several times (one entity drawn in several styles) carry the same captions; one of them is kept.
    Which caption is the query, and which of several texts of a role is taken, is drawn each time.

    Args:
        source: the samples.
        captions: which fields make a pair; both roles may name one field that holds several texts.
        settings: instructions and hard negatives.
        show: whether progress is shown.
        seen: digests of pairs that other sources brought; new ones are added.

    Raises:
        DataError: no sample has two captions; the fields that were found are named.
    """

    def __init__(
        self,
        source: Source,
        captions: CaptionSettings,
        settings: PairSettings | None = None,
        *,
        show: bool = True,
        seen: set[bytes] | None = None,
    ) -> None:
        self.name = source.name
        self._source, self._captions, self._settings = source, captions, settings or PairSettings()
        seen = set() if seen is None else seen
        kept: list[int] = []
        fields: dict[str, int] = {}
        with Progress(len(source), "reading captions", "samples", enabled=show) as bar:
            for index in bar.track(range(len(source))):
                try:
                    sample = source.captions_of(index)
                    for field in sample.captions:
                        fields[field] = fields.get(field, 0) + 1
                    short, long = caption_sides(sample, captions)
                except BadSampleError:
                    continue  # loaders meet readable samples only; `llm2clip data check` lists the others
                digest = caption_digest("\x00".join((*short, *long)))
                if digest not in seen:
                    seen.add(digest)
                    kept.append(index)
        if not kept:
            found = ", ".join(f"{name} ({count})" for name, count in sorted(fields.items())) or "none"
            raise DataError(
                f"{source.name}: no sample has two captions. Expected a short one in {', '.join(captions.short)} and a "
                f"long one in {', '.join(captions.long)}; the caption fields found are: {found}. "
                "Set data.captions.short and data.captions.long, or train on single texts with objective=simcse."
            )
        self._kept = np.asarray(kept, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        return owned(self._source.captions_of(int(self._kept[index])), self)

    def captions_of(self, index: int) -> Sample:
        """The sample without its image, like `[]`."""
        return self[index]

    @property
    def blocks(self) -> Sequence[tuple[int, int]]:
        """Ranges of kept samples that lie together on disk."""
        bounds = [
            (int(np.searchsorted(self._kept, start)), int(np.searchsorted(self._kept, stop)))
            for start, stop in self._source.blocks
        ]
        return [(start, stop) for start, stop in bounds if stop > start]

    def pair(self, sample: Sample, rng: np.random.Generator) -> TextPair:
        """Two texts of the sample, in a random direction."""
        short, long = caption_sides(sample, self._captions)
        picked = {"short": short[rng.integers(len(short))]}
        rest = [text for text in long if text != picked["short"]]
        if not rest:  # the one long text was drawn as the short one
            picked["short"] = next(text for text in short if text != picked["short"])
            rest = list(long)
        picked["long"] = rest[rng.integers(len(rest))]
        query, positive = ("short", "long") if rng.random() < 0.5 else ("long", "short")
        prompt = self._settings.instructions.get(query, "")
        negative, group = "", ""
        if self._settings.negatives == "random":
            negative, group = self._other(sample, positive, rng)
        return TextPair(
            sample.key, sample.group, picked[query], picked[positive], negative, group,
            query_prompt=prompt, document_prompt=prompt if query in self._settings.symmetric else "",
        )  # fmt: skip

    def _other(self, sample: Sample, role: str, rng: np.random.Generator) -> tuple[str, str]:
        """A caption of the positive's role of another image, and its group; empty where none was found."""
        for _ in range(_DRAWS):
            other = self._source.captions_of(int(self._kept[rng.integers(len(self))]))
            if other.group != sample.group:
                texts = role_texts(other, getattr(self._captions, role))
                return texts[rng.integers(len(texts))], other.group
        return "", ""
