"""Reads every sample of a source and reports what is in it."""

from __future__ import annotations

import hashlib
import io
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

from llm2clip.data.images import FORMATS, decode_image
from llm2clip.data.sources import Source
from llm2clip.errors import BadSampleError
from llm2clip.progress import Progress

SHOWN_BAD = 20


@dataclass(frozen=True)
class Spread:
    """Distribution of a count."""

    samples: int
    min: int
    median: float
    p95: int
    max: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Spread:
        """The distribution of at least one value."""
        ordered = sorted(values)
        return cls(
            len(ordered),
            ordered[0],
            statistics.median(ordered),
            ordered[int(0.95 * (len(ordered) - 1))],
            ordered[-1],
        )


@dataclass
class CheckReport:
    """What `check_source` found.

    Attributes:
        source: the source's name.
        samples: samples read, bad ones included.
        groups: different things shown.
        blocks: shards, files or row groups.
        without_image: usable samples that have captions only.
        widths: image widths in pixels.
        heights: image heights in pixels.
        modes: colour modes as stored (`RGB`, `P`, ...) and how many images have them.
        formats: image formats and how many images have them.
        words: words per caption, by field.
        duplicate_captions: by field, how many texts belong to more than one group.
        duplicate_images: images (by content) that appear more than once.
        licenses: licences named by the samples.
        bad: (key, reason) of every sample that cannot be used.
    """

    source: str
    samples: int = 0
    groups: int = 0
    blocks: int = 0
    without_image: int = 0
    widths: Spread | None = None
    heights: Spread | None = None
    modes: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    words: dict[str, Spread] = field(default_factory=dict)
    duplicate_captions: dict[str, int] = field(default_factory=dict)
    duplicate_images: int = 0
    licenses: dict[str, int] = field(default_factory=dict)
    bad: list[tuple[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def render(self) -> str:
        """The report as text for the terminal."""
        usable = self.samples - len(self.bad)
        lines = [
            f"{self.source}",
            f"  samples     {self.samples}: {usable} usable, {len(self.bad)} bad; "
            f"{self.groups} groups in {self.blocks} blocks",
        ]
        if self.widths is not None and self.heights is not None:
            lines.append(f"  width       {_spread(self.widths)} px")
            lines.append(f"  height      {_spread(self.heights)} px")
            lines.append(f"  stored as   {_counted(self.formats)}; modes {_counted(self.modes)}")
        if self.without_image:
            lines.append(f"  no image    {self.without_image} samples")
        lines.append(f"  repeated    {self.duplicate_images} images by content")
        lines.append(f"  licence     {_counted(self.licenses) or 'none named'}")
        lines.append(
            "  captions    field: samples; words min / median / 95 % / max; texts shared by several groups"
        )
        width = max(map(len, self.words), default=0)
        for name, spread in sorted(self.words.items(), key=lambda item: (-item[1].samples, item[0])):
            shared = self.duplicate_captions.get(name, 0)
            lines.append(f"    {name:<{width}}  {spread.samples:>8};  {_spread(spread)};  {shared}")
        for key, reason in self.bad[:SHOWN_BAD]:
            lines.append(f"  bad         {key}: {reason}")
        if len(self.bad) > SHOWN_BAD:
            lines.append(f"  bad         ... and {len(self.bad) - SHOWN_BAD} more (all of them with --json)")
        return "\n".join(lines)


def _spread(spread: Spread) -> str:
    return f"{spread.min} / {spread.median:g} / {spread.p95} / {spread.max}"


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def check_source(source: Source, *, limit: int | None = None, progress: bool = True) -> CheckReport:
    """Read and decode every sample (or the first `limit`) of `source`.

    Only digests of captions and images are kept in memory.
    """
    count = len(source) if limit is None else min(limit, len(source))
    report = CheckReport(source.name, samples=count, blocks=sum(start < count for start, _ in source.blocks))
    widths: list[int] = []
    heights: list[int] = []
    modes: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    licenses: Counter[str] = Counter()
    images: Counter[bytes] = Counter()
    words: dict[str, list[int]] = {}
    owners: dict[tuple[str, bytes], str | None] = {}
    groups: set[str] = set()
    with Progress(count, "checking", "samples", enabled=progress) as bar:
        for index in bar.track(range(count)):
            try:
                sample = source[index]
                if sample.image is not None:
                    decode_image(sample.image, key=sample.key)
            except BadSampleError as error:
                report.bad.append((error.key, error.reason))
                continue
            groups.add(sample.group)
            licenses[str(sample.meta.get("license") or sample.meta.get("licence") or "none named")] += 1
            if sample.image is None:
                report.without_image += 1
            else:
                with Image.open(io.BytesIO(sample.image), formats=FORMATS) as image:
                    widths.append(image.width)
                    heights.append(image.height)
                    modes[image.mode] += 1
                    formats[str(image.format)] += 1
                images[_digest(sample.image)] += 1
            for name, texts in sample.captions.items():
                for text in texts:
                    words.setdefault(name, []).append(len(text.split()))
                    mark = (name, _digest(text.encode("utf-8", "surrogatepass")))
                    # None: more than one group has this text
                    if owners.setdefault(mark, sample.group) != sample.group:
                        owners[mark] = None
    report.groups = len(groups)
    if widths:
        report.widths, report.heights = Spread.of(widths), Spread.of(heights)
    report.modes, report.formats = dict(modes.most_common()), dict(formats.most_common())
    report.licenses = dict(licenses.most_common(5))
    report.words = {name: Spread.of(lengths) for name, lengths in words.items()}
    report.duplicate_captions = dict(Counter(name for (name, _), owner in owners.items() if owner is None))
    report.duplicate_images = sum(number - 1 for number in images.values())
    return report


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
