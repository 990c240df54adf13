"""Builder of the `openstax` data set: textbook figures with captions and long descriptions."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from llm2clip.data.cnxml import Figure, read_book
from llm2clip.data.images import decode_image
from llm2clip.data.shards import ShardWriter
from llm2clip.errors import BadSampleError, DataError
from llm2clip.files import make_directory, read_json, temporary_directory, write_json, write_text
from llm2clip.progress import Progress

BASE_URL = "https://github.com/openstax/"
LICENSE = "CC-BY-4.0"
# a licence file that says any of these is another licence than the one promised here
OTHER_LICENCE = re.compile(r"non-?commercial|share-?alike|no-?deriv|licenses/by-", re.IGNORECASE)
CC_BY = re.compile(r"attribution 4|licenses/by/", re.IGNORECASE)
LICENCE_URL = re.compile(r'<md:license url="([^"]*)"')
LICENSE_TEXT = """\
These shards hold figures, captions and descriptions of books by OpenStax, Rice University
(https://openstax.org), taken from these public repositories at these commits:

{books}

Licence: Creative Commons Attribution 4.0 International, https://creativecommons.org/licenses/by/4.0/
Third-party images carry their own credits, in the field `credit` of each sample: keep it with the image.
Changes made: images were scaled down; credits were separated from captions.
"""


@dataclass(frozen=True)
class Book:
    """A repository at the commit that is used.

    Later commits of some repositories are under a non-commercial licence, hence the pins.
    """

    repository: str
    commit: str
    split: str = "train"
    translations: tuple[tuple[str, str, str], ...] = ()  # language, repository, commit


BOOKS: tuple[Book, ...] = (
    Book("osbooks-university-physics-bundle", "db44eb99e9aa1d918fd8cf182f82ccdece9c7b11", translations=(
        ("es", "osbooks-fisica-universitaria-bundle", "c1127089ec3e7417c9f881517c077351cafe5c95"),
        ("pl", "osbooks-fizyka-bundle", "c83cd2b06e6d019601d4cd91980ba14ca026367e"),
    )),
    Book("osbooks-anatomy-physiology", "b0058a743bdd2cc08196abaaa7d5469970c0d80c"),
    Book("osbooks-microbiology", "ecf34dad129d686703780e87ab5aa2e59c577a6a"),
    Book("osbooks-life-liberty-and-pursuit-happiness", "acb6fbe2744dd112187b6aff5946cfe969410fca"),
    Book("osbooks-introduction-anthropology", "418eedd9bef21ec1a6fa1b472c0d82c084e35c70"),
    Book("osbooks-american-government", "5c90dd7907dbf25f42266417e63ca3bb0012f031"),
    Book("osbooks-introduction-sociology", "d35d5f3bdac40f93607d600134865d4f13ce1f9b"),
    Book("osbooks-introduction-political-science", "4391e659b98eec43b71e8b3f08241215fb4dd4c4"),
    Book("osbooks-entrepreneurship", "c1fa2c872ba07dc864c3aeb5a510b08b4f657288"),
    Book("osbooks-introduction-philosophy", "d7bd4f0f520529b3ad83272448a9c2be25c9040a"),
    Book("osbooks-us-history", "046331cfcea0ac1b1a8fd461b3e6aae638845af3", "val"),
    Book("osbooks-psychology", "e061043bf2f9e86ace51c4e8dc9555160f60a99d", "val", (
        ("pl", "osbooks-psychologia", "59dc3d03c1238843d3d12663ef6761d0eb1c87d3"),
    )),
)  # fmt: skip


def build_openstax(
    out: str | Path,
    *,
    books: Sequence[Book] = BOOKS,
    side: int = 256,
    shard_samples: int = 1000,
    base_url: str = BASE_URL,
) -> dict[str, Any]:
    """Build `train-*.tar`, `val-*.tar` and `dataset.json` in `out` and return the content of the latter.

    Clones each book at its pinned commit, one after the other, into a temporary directory. Whole books
    are held out; an image that a training book has too is left out of `val`. A finished `out` is left
    alone.

    Args:
        out: directory of the shards.
        books: what to use.
        side: short side of the images in pixels; smaller images keep their size.
        shard_samples: samples per shard.
        base_url: where the repositories are.

    Raises:
        DataError: git is missing, a repository cannot be fetched, or a pinned commit is not CC BY.
    """
    out = Path(out)
    options = {"books": [f"{book.repository}@{book.commit}" for book in books], "side": side,
               "shard_samples": shard_samples}  # fmt: skip
    if (out / "dataset.json").exists():
        finished: dict[str, Any] = read_json(out / "dataset.json", DataError)
        if finished.get("options") != options:
            raise DataError(
                f"{out} already holds a data set built with other options; "
                "choose another directory or remove it"
            )
        return finished
    make_directory(out)
    for stale in [*out.glob("train-*.tar"), *out.glob("val-*.tar")]:
        stale.unlink()
    writers = {split: ShardWriter(out, split, shard_samples) for split in ("train", "val")}
    counts: dict[str, int] = {}
    bad: list[str] = []
    seen: set[str] = set()
    # training books first: what they show cannot be held out
    for book in sorted(books, key=lambda book: book.split != "train"):
        counts[book.repository] = _add_book(book, writers[book.split], side, base_url, seen, bad)
    shards = {split: [path.name for path in writer.close()] for split, writer in writers.items()}
    listing = "\n".join(f"  {base_url}{book.repository} at {book.commit}" for book in books)
    write_text(out / "LICENSE.txt", LICENSE_TEXT.format(books=listing))
    summary = {
        "name": "openstax",
        "license": LICENSE,
        "attribution": "OpenStax, Rice University; third-party credits per sample",
        "captions": {"short": ["caption"], "long": ["alt"]},
        "translations": {"es": "es.alt", "pl": "pl.alt"},
        "shards": shards,
        "counts": {"samples": counts, "left_out": len(bad), "first_left_out": bad[:10]},
        "options": options,
    }
    # written last: its presence says that everything before it is complete
    write_json(out / "dataset.json", summary)
    return summary


def _add_book(
    book: Book, writer: ShardWriter, side: int, base_url: str, seen: set[str], bad: list[str]
) -> int:
    with temporary_directory() as work:
        root = work / book.repository
        clone(base_url + book.repository, book.commit, root)
        figures, problems = read_book(root)
        bad += problems
        editions: dict[str, dict[str, Figure]] = {}
        for language, repository, commit in book.translations:
            edition = work / repository
            clone(base_url + repository, commit, edition)
            translated, problems = read_book(edition)
            bad += problems
            # editions share the names of the media files
            editions[language] = {figure.source: figure for figure in translated}
        count = 0
        with Progress(len(figures), book.repository, "figures") as progress:
            for figure in progress.track(figures):
                try:
                    key, image = _encode(root / figure.source, side)
                except BadSampleError as error:
                    bad.append(str(error))
                    continue
                if key in seen or not (figure.caption or figure.alt):
                    continue
                seen.add(key)
                writer.add(key, image, "jpg", figure_record(figure, book, editions))
                count += 1
    return count


def figure_record(figure: Figure, book: Book, editions: Mapping[str, Mapping[str, Figure]]) -> dict[str, Any]:
    """The JSON of one sample: texts, translations of the same figure, and attribution."""
    record: dict[str, Any] = {
        "short": figure.short,
        "caption": figure.caption,
        "alt": figure.alt,
        "credit": figure.credit,
        "book": book.repository,
        "commit": book.commit,
        "source": figure.source,
        "license": LICENSE,
        "attribution": "OpenStax, Rice University",
    }
    for language, edition in editions.items():
        twin = edition.get(figure.source)
        if twin is not None:
            # an edition that left a text untranslated says nothing in its language
            same = (figure.caption, figure.alt)
            twin = replace(
                twin,
                caption="" if twin.caption in same else twin.caption,
                alt="" if twin.alt in same else twin.alt,
            )
            texts = {name: text for name, text in (("caption", twin.caption), ("alt", twin.alt)) if text}
            if texts:
                record[language] = texts
    return record


def _encode(path: Path, side: int) -> tuple[str, bytes]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadSampleError(path.name, f"its image cannot be read ({error.strerror})") from None
    image = decode_image(data, key=path.name, min_side=side)
    scale = side / min(image.size)
    if scale < 1:
        size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return hashlib.blake2b(data, digest_size=8).hexdigest(), buffer.getvalue()


def clone(url: str, commit: str, target: Path) -> None:
    """Check out one commit of a repository, without history, and check that it is under CC BY.

    Raises:
        DataError: git is missing, the network or the commit is not there, or the licence is another.
    """
    instead = "Without them, use your own images (docs/own-data.md) or the `cataclysm` data set."
    git = shutil.which("git")
    if git is None:
        raise DataError(
            f"git is needed to fetch {url}, but there is none on this machine; install git. {instead}"
        )
    print(f"fetching {url} at {commit[:12]}", file=sys.stderr, flush=True)
    make_directory(target)
    steps = (
        ["init", "--quiet"],
        ["fetch", "--quiet", "--depth", "1", url, commit],
        ["checkout", "--quiet", "FETCH_HEAD"],
    )
    for step in steps:
        # a question for a password would wait for ever
        result = subprocess.run(
            [git, "-C", str(target), *step],
            capture_output=True, text=True, errors="replace", check=False,
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0", "GIT_LFS_SKIP_SMUDGE": "1"},
        )  # fmt: skip
        if result.returncode != 0:
            lines = [line for line in result.stderr.splitlines() if line.strip()]
            reason = lines[-1].strip() if lines else f"exit status {result.returncode}"
            raise DataError(
                f"{url} at commit {commit} cannot be fetched: `git {step[0]}` says {reason!r}. "
                f"The books come from public repositories and need a network connection. {instead}"
            )
    _require_cc_by(target, f"{url} at commit {commit}")


def _require_cc_by(root: Path, name: str) -> None:
    # older commits have no LICENSE file and say it in their collections alone
    named = [path.read_text(encoding="utf-8", errors="replace")[:400] for path in root.glob("LICENSE*")]
    for path in sorted((root / "collections").glob("*.xml")):
        named += LICENCE_URL.findall(path.read_text(encoding="utf-8", errors="replace"))
    other = next((text for text in named if OTHER_LICENCE.search(text)), None)
    if other is not None:
        raise DataError(
            f"{name} is not under CC BY (it says {' '.join(other.split())[:60]!r}); do not use it"
        )
    if not any(CC_BY.search(text) for text in named):
        raise DataError(f"{name} does not say that it is under CC BY; do not use it")
