"""Caption pairs for the LLM stage: two texts of one image, each pair once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm2clip.data.mixture import Mixture
from llm2clip.data.sample import Sample, caption_role
from llm2clip.data.sources import Source
from llm2clip.data.store import caption_digest
from llm2clip.errors import BadSampleError, DataError
from llm2clip.progress import Progress
from llm2clip.settings import CaptionSettings


@dataclass(frozen=True, slots=True)
class CaptionPair:
    """Two captions of one image.

    Attributes:
        key: sample key, for messages.
        group: identity of what is shown; two pairs of one group are no negatives of each other.
        short, long: the texts.
    """

    key: str
    group: str
    short: str
    long: str


def caption_pair(sample: Sample, captions: CaptionSettings) -> CaptionPair:
    """The pair of a sample.

    Raises:
        BadSampleError: one of the two roles has no text, or both have the same.
    """
    short, long = caption_role(sample, captions.short), caption_role(sample, captions.long)
    if not short or not long:
        lacking = " and ".join(
            f"{role} ({', '.join(fields)})"
            for role, fields, text in (("short", captions.short, short), ("long", captions.long, long))
            if not text
        )
        raise BadSampleError(
            sample.key, f"no text for {lacking}; it has {', '.join(sample.captions) or 'no captions'}"
        )
    if short == long:
        raise BadSampleError(sample.key, "short and long caption are equal")
    return CaptionPair(sample.key, sample.group, short, long)


class PairSource:
    """The samples of a source that bring a pair of captions not seen before (8 bytes of memory per pair).

    Images shown several times (one entity drawn in several styles) carry the same captions; one of them is kept.

    Args:
        source: the samples.
        captions: which fields make a pair.
        show: whether progress is shown.
        seen: digests of pairs that other sources brought; new ones are added.

    Raises:
        DataError: no sample has both captions; the fields that were found are named.
    """

    def __init__(
        self,
        source: Source,
        captions: CaptionSettings,
        *,
        show: bool = True,
        seen: set[bytes] | None = None,
    ) -> None:
        self.name = source.name
        self._source = source
        seen = set() if seen is None else seen
        kept: list[int] = []
        fields: dict[str, int] = {}
        with Progress(len(source), "reading captions", "samples", enabled=show) as bar:
            for index in bar.track(range(len(source))):
                try:
                    sample = source.captions_of(index)
                    for field in sample.captions:
                        fields[field] = fields.get(field, 0) + 1
                    pair = caption_pair(sample, captions)
                except BadSampleError:
                    continue  # loaders meet readable samples only; `llm2clip data check` lists the others
                digest = caption_digest(f"{pair.short}\x00{pair.long}")
                if digest not in seen:
                    seen.add(digest)
                    kept.append(index)
        if not kept:
            found = ", ".join(f"{name} ({count})" for name, count in sorted(fields.items())) or "none"
            raise DataError(
                f"{source.name}: no sample has two captions. Expected a short one in {', '.join(captions.short)} and a "
                f"long one in {', '.join(captions.long)}; the caption fields found are: {found}. "
                "Set data.captions.short and data.captions.long."
            )
        self._kept = np.asarray(kept, dtype=np.int64)
        self.captions = captions

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        return self._source.captions_of(int(self._kept[index]))

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


def pair_source(source: Source, captions: CaptionSettings, *, show: bool = True) -> Source:
    """A `PairSource`; of a weighted mixture a mixture of them, so that its weights still count."""
    if not isinstance(source, Mixture) or not source.weights:
        return PairSource(source, captions, show=show)
    seen: set[bytes] = set()
    parts = [PairSource(part, captions, show=show, seen=seen) for part in source.sources]
    return Mixture(parts, source.weights)


def without_duplicates(pairs: Sequence[CaptionPair]) -> list[CaptionPair]:
    """Drop pairs that would be false negatives of an earlier one: same group, or an equal text."""
    kept: list[CaptionPair] = []
    seen: set[str] = set()
    for pair in pairs:
        marks = {f"group\x00{pair.group}", f"text\x00{pair.short}", f"text\x00{pair.long}"}
        if seen.isdisjoint(marks):
            kept.append(pair)
            seen |= marks
    return kept
