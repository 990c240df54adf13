"""What caption retrieval is measured on: pairs of captions, and what was left out of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from llm2clip.errors import DataError
from llm2clip.evaluation.caption_retrieval import CaptionPairs
from llm2clip.settings import CaptionRetrievalSettings

UNREADABLE = "cannot be read"
"""Why an image is in no pairs of its set; the other reasons begin with the name of the pairs that lack it."""


@dataclass(frozen=True)
class Caption:
    """A caption and the name of what it is (a field, a number)."""

    text: str
    name: str = ""


@dataclass(frozen=True)
class ImageCaptions:
    """The captions of one image.

    Attributes:
        key: name of the image.
        own: captions in the data's own language, in order; one without text does not count.
        translations: language -> captions.
    """

    key: str
    own: tuple[Caption, ...]
    translations: dict[str, tuple[Caption, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class CaptionFile:
    """What a reader found.

    Attributes:
        images: every image of the split asked for.
        selected: what was chosen among more, in words; "" where everything is there.
        language: name of the data's own language; "" where there is one alone.
        unreadable: samples that could not be read, with the reason.
        credit: licence and attribution.
    """

    images: list[ImageCaptions]
    selected: str = ""
    language: str = ""
    unreadable: list[str] = field(default_factory=list)
    credit: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class CaptionData:
    """A data set of the evaluation.

    Attributes:
        name: as in the settings.
        images: images in the files.
        pairs: what is retrieved: an image's first two captions, and its translations.
        left_out: reason -> images that are in no pair for it. Nothing is left out for another reason.
        equal: name of the pairs -> images whose two captions are one text; they are kept.
        empty: captions without text, which do not count.
        selected, credit: as the reader found them.
    """

    name: str
    images: int
    pairs: list[CaptionPairs]
    left_out: dict[str, list[str]]
    equal: dict[str, int]
    empty: int = 0
    selected: str = ""
    credit: dict[str, list[str]] = field(default_factory=dict)

    def texts(self) -> list[str]:
        """Every caption of the pairs, once."""
        return list(dict.fromkeys(text for pair in self.pairs for text in (*pair.first, *pair.second)))


def make_data(name: str, found: CaptionFile, settings: CaptionRetrievalSettings) -> CaptionData:
    """The pairs of a data set: the first two captions of each image, and each translation with the original.

    Images with too few captions are left out and named; nothing else is.

    Raises:
        DataError: fewer than two images have two captions, and none has a translation.
    """
    selected = found.selected
    images = found.images
    if settings.limit is not None and settings.limit < len(images):
        images = images[: settings.limit]
        selected = f"{selected}; " if selected else ""
        selected += f"the first {settings.limit} of {len(found.images)} images"
    empty = sum(not caption.text for image in images for caption in image.own)
    if empty:
        images = [
            replace(image, own=tuple(caption for caption in image.own if caption.text)) for image in images
        ]
    left_out: dict[str, list[str]] = {}
    if found.unreadable:
        left_out[UNREADABLE] = list(found.unreadable)
    languages = list(dict.fromkeys(language for image in images for language in image.translations))
    own = f"captions, {found.language}" if languages and found.language else "captions"
    pairs = [_two_captions(own, images, left_out)]
    for language in languages:
        pairs.append(_translated(language, found.language or "original", images, left_out))
        several = [ImageCaptions(image.key, image.translations.get(language, ())) for image in images]
        if any(len(image.own) > 1 for image in several):
            pairs.append(_two_captions(f"captions, {language}", several, left_out))
    usable = [pair for pair in pairs if len(pair.first) > 1]
    for pair in pairs:
        if len(pair.first) == 1:
            left_out[f"{pair.name}: one pair alone, which always finds itself"] = [pair.first[0]]
    if not usable:
        counts = Counter(len(image.own) for image in images)
        listing = ", ".join(f"{number} with {count}" for count, number in sorted(counts.items())) or "none"
        raise DataError(
            f"sets.{name}: at least two images with two captions, or with a translation, are needed to retrieve from; "
            f"images by their number of captions: {listing}"
        )
    equal = {pair.name: sum(a == b for a, b in zip(pair.first, pair.second, strict=True)) for pair in usable}
    return CaptionData(name, len(images), usable, left_out, equal, empty, selected, found.credit)


def _two_captions(name: str, images: Sequence[ImageCaptions], left_out: dict[str, list[str]]) -> CaptionPairs:
    kept = [image for image in images if len(image.own) > 1]
    if kept:  # data of translations alone has no such pairs, which leaves nobody out
        lacking = [image.key for image in images if len(image.own) < 2]
        if lacking:
            left_out[f"{name}: fewer than two captions"] = lacking
    names = {(image.own[0].name, image.own[1].name) for image in kept}
    first, second = names.pop() if len(names) == 1 else ("", "")
    labels = (f"{first} → {second}", f"{second} → {first}")
    if not first or first == second:
        labels = ("first → second", "second → first")
    return CaptionPairs(
        name, [image.own[0].text for image in kept], [image.own[1].text for image in kept], labels
    )


def _translated(
    language: str, original: str, images: Sequence[ImageCaptions], left_out: dict[str, list[str]]
) -> CaptionPairs:
    name = f"{language} ↔ {original}"
    kept = [image for image in images if image.translations.get(language) and image.own]
    keys = {image.key for image in kept}
    if lacking := [image.key for image in images if image.key not in keys]:
        left_out[f"{name}: no caption in one of both"] = lacking
    return CaptionPairs(
        name,
        [image.translations[language][0].text for image in kept],
        [_original_of(image, language).text for image in kept],
        (f"{language} → {original}", f"{original} → {language}"),
    )


def _original_of(image: ImageCaptions, language: str) -> Caption:
    """The caption that a translation says again: the one of its name, else the first."""
    name = image.translations[language][0].name
    return next((caption for caption in image.own if caption.name == name), image.own[0])
