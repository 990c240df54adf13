"""Captions of any source: shards, folders, .jsonl, .csv, .parquet (docs/data-formats.md)."""

from __future__ import annotations

from llm2clip.data.sample import Sample
from llm2clip.data.sources import open_source, require_caption_fields
from llm2clip.errors import BadSampleError, DataError
from llm2clip.evaluation.captions.base import Caption, CaptionFile, ImageCaptions
from llm2clip.evaluation.setup import attribution_of
from llm2clip.settings import CaptionRetrievalSettings, CaptionSettings


def read_source(path: str, settings: CaptionRetrievalSettings) -> CaptionFile:
    """The captions of a source; one entry per group, as no two of a group could be told apart.

    Raises:
        DataError: no sample has text in the caption fields, or too many cannot be read.
    """
    source = open_source(path)
    captions = settings.captions
    require_caption_fields(source, (*captions.short, *captions.long), "captions.short and captions.long")
    images: list[ImageCaptions] = []
    unreadable: list[str] = []
    groups: set[str] = set()
    meta = []
    for index in range(len(source)):
        try:
            sample = source.captions_of(index)
        except BadSampleError as problem:
            unreadable.append(str(problem))
            continue
        if sample.group not in groups:
            groups.add(sample.group)
            images.append(_captions_of(sample, captions))
            meta.append(sample.meta)
    if len(unreadable) > settings.max_bad_share * len(source):
        raise DataError(
            f"{len(unreadable)} of the {len(source)} samples of {path} cannot be read, more than max_bad_share = "
            f"{settings.max_bad_share}. The first:\n  " + "\n  ".join(unreadable[:10])
        )
    again = len(source) - len(unreadable) - len(images)
    selected = f"one sample of each group, {len(images)} of {len(source)}" if again else ""
    return CaptionFile(images, selected, unreadable=unreadable, credit=attribution_of((path,), meta))


def _captions_of(sample: Sample, captions: CaptionSettings) -> ImageCaptions:
    own = tuple(
        Caption(text, field)
        for field in dict.fromkeys((*captions.short, *captions.long))
        for text in sample.captions.get(field, ())
    )
    translations = {
        # "es.caption" says "caption" again
        language: tuple(Caption(text, field.rsplit(".", 1)[-1]) for text in sample.captions.get(field, ()))
        for language, field in captions.translations.items()
    }
    return ImageCaptions(sample.key, own, {name: texts for name, texts in translations.items() if texts})
