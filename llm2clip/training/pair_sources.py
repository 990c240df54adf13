"""Which pairs a source brings: captions of one image, query/positive rows, or single texts paired with themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llm2clip.data.mixture import Mixture
from llm2clip.data.sample import Sample
from llm2clip.data.sources import Source, caption_fields, require_caption_fields
from llm2clip.errors import BadSampleError
from llm2clip.settings import FinetuneLLMSettings, PairSettings
from llm2clip.training.pairs import CaptionPairs, TextPair, owned

QUERY, POSITIVE, NEGATIVE = "query", "positive", "negative"


class _EverySample:
    """A source whose samples, all of them, become pairs; without their images."""

    def __init__(self, source: Source) -> None:
        self.name, self._source = source.name, source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        return owned(self._source.captions_of(index), self)

    def captions_of(self, index: int) -> Sample:
        """The sample, like `[]`."""
        return self[index]

    @property
    def blocks(self) -> Sequence[tuple[int, int]]:
        """As the source has them."""
        return self._source.blocks

    def pair(self, sample: Sample, rng: np.random.Generator) -> TextPair:
        """The pair of a sample; raises BadSampleError."""
        raise NotImplementedError


class QueryPairs(_EverySample):
    """Rows with the fields `query`, `positive` and perhaps `negative` (the E5 sets as LLM2Vec publishes them).

    Args:
        source: the rows; a field may hold several texts, one of which is drawn each time.
        settings: instructions, by the file's name without suffix, and hard negatives.
    """

    def __init__(self, source: Source, settings: PairSettings) -> None:
        super().__init__(source)
        self._settings = settings
        self.label = Path(source.name).stem

    def pair(self, sample: Sample, rng: np.random.Generator) -> TextPair:
        """The row's texts.

        Raises:
            BadSampleError: it has no query or no positive.
        """

        def draw(field: str) -> str:
            texts = sample.captions.get(field, ())
            return texts[rng.integers(len(texts))] if texts else ""

        query, positive, negative = draw(QUERY), draw(POSITIVE), draw(NEGATIVE)
        if not query or not positive:
            raise BadSampleError(sample.key, f"no text for {QUERY if not query else POSITIVE}")
        prompt = self._settings.instructions.get(self.label, "")
        return TextPair(
            sample.key, sample.group, query, positive, "" if self._settings.negatives == "none" else negative,
            query_prompt=prompt, document_prompt=prompt if self.label in self._settings.symmetric else "",
        )  # fmt: skip


class SingleTexts(_EverySample):
    """Every sample as a pair of one of its texts with itself; dropout makes the difference (SimCSE, arXiv 2104.08821).

    Args:
        source: samples with captions or plain text.
        fields: where a text may come from; one of those that have some is drawn each time.
    """

    def __init__(self, source: Source, fields: Sequence[str]) -> None:
        super().__init__(source)
        self._fields = tuple(dict.fromkeys(fields))

    def text(self, sample: Sample, rng: np.random.Generator) -> str:
        """One text of the sample.

        Raises:
            BadSampleError: it has none in these fields.
        """
        texts = [text for name in self._fields for text in sample.captions.get(name, ())]
        if not texts:
            raise BadSampleError(
                sample.key,
                f"no text in {', '.join(self._fields)}; it has {', '.join(sample.captions) or 'none'}",
            )
        return texts[rng.integers(len(texts))]

    def pair(self, sample: Sample, rng: np.random.Generator) -> TextPair:
        """One text, twice."""
        text = self.text(sample, rng)
        return TextPair(sample.key, sample.group, text, text)


def text_fields(settings: FinetuneLLMSettings) -> tuple[str, ...]:
    """Fields in which objectives on single texts look for one."""
    captions = settings.data.captions
    return (settings.text_field, *captions.short, *captions.long)


def _is_query_file(source: Source) -> bool:
    found = caption_fields(source)
    return QUERY in found and POSITIVE in found


def pair_source(source: Source, settings: FinetuneLLMSettings, *, show: bool = True) -> Source:
    """The pairs of the objective: one source, or a mixture that batches are to be cut from one by one.

    Query/positive files are sources of their own. Sources of captions are, where there are weights, else they count
    as one; a pair that two of them bring is taken from the first.

    Raises:
        DataError: a source of captions without a pair, or of single texts without a text.
    """
    weights = source.weights if isinstance(source, Mixture) else ()
    parts: Sequence[Source] = source.sources if isinstance(source, Mixture) else [source]
    if settings.objective != "contrastive":
        for part in parts:
            require_caption_fields(part, text_fields(settings), "text_field, data.captions.short or .long")
        texts = [SingleTexts(part, text_fields(settings)) for part in parts]
        return texts[0] if len(texts) == 1 else Mixture(texts, weights)
    captions, pairs, seen = settings.data.captions, settings.pairs, set[bytes]()
    query_files = [_is_query_file(part) for part in parts]
    made: list[Source] = []
    if not weights and (
        others := [p for p, is_query in zip(parts, query_files, strict=True) if not is_query]
    ):
        joined = others[0] if len(others) == 1 else Mixture(others)
        made.append(CaptionPairs(joined, captions, pairs, show=show))
    for part, is_query in zip(parts, query_files, strict=True):
        if is_query:
            made.append(QueryPairs(part, pairs))
        elif weights:
            made.append(CaptionPairs(part, captions, pairs, show=show, seen=seen))
    return made[0] if len(made) == 1 else Mixture(made, weights)


def brings_negatives(source: Source, settings: FinetuneLLMSettings) -> bool:
    """Whether pairs of what `pair_source` returned may come with a hard negative."""
    if settings.objective != "contrastive" or settings.pairs.negatives == "none":
        return False
    parts: Sequence[Source] = source.sources if isinstance(source, Mixture) else [source]
    return settings.pairs.negatives == "random" or any(isinstance(part, QueryPairs) for part in parts)
