"""One sample of any source: captions by field name, an encoded image, and where it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm2clip.errors import BadSampleError

# JSON names that describe a sample rather than caption it; everything else that holds text is a caption
META_FIELDS = frozenset(
    {
        "__key__", "__url__", "attribution", "author", "book", "commit", "credit", "entity", "error_message",
        "exif", "file", "file_name", "filename", "group", "height", "id", "image", "image_id", "image_path",
        "key", "kind", "license", "licence", "md5", "original_height", "original_width", "path", "sha256",
        "source", "split", "status", "tileset", "url", "width",
    }
)  # fmt: skip
_DEPTH = 32  # objects inside each other


@dataclass(frozen=True, slots=True)
class Sample:
    """An image with its captions.

    Attributes:
        key: name, unique within its source (`<shard>/<member>` in tar shards).
        captions: field name -> its texts. Nested fields are joined with dots (`es.caption`).
        image: encoded image bytes, or None where the source has none or only text was asked for.
        group: what the sample shows; samples of one group are never each other's negatives.
        meta: everything else (licence, attribution, numbers).
    """

    key: str
    captions: Mapping[str, tuple[str, ...]]
    image: bytes | None = None
    group: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


def caption_role(sample: Sample, fields: Sequence[str]) -> str | None:
    """First text of the first of `fields` that has text, or None."""
    for name in fields:
        texts = sample.captions.get(name)
        if texts:
            return texts[0]
    return None


def sample_from_record(key: str, record: Mapping[str, Any], image: bytes | None) -> Sample:
    """Sort the entries of a JSON object (or table row) into captions and meta data.

    Strings and lists of strings are captions unless their name is one of `META_FIELDS`; objects are
    flattened with dots; empty texts are dropped. The group is the entry `group`, else the key.

    Raises:
        BadSampleError: objects are nested too deep, or the group is no single value.
    """
    captions: dict[str, tuple[str, ...]] = {}
    meta: dict[str, Any] = {}
    for name, value in record.items():
        if name in META_FIELDS:
            meta[name] = value
        else:
            _sort_entry(key, name, value, captions, meta)
    group = record.get("group")
    if isinstance(group, (Mapping, list, tuple)):
        raise BadSampleError(key, f"its group is a {type(group).__name__}, expected text or a number")
    return Sample(key, captions, image, key if group in (None, "") else str(group), meta)


def _sort_entry(
    key: str,
    name: str,
    value: Any,
    captions: dict[str, tuple[str, ...]],
    meta: dict[str, Any],
    depth: int = 0,
) -> None:
    if isinstance(value, str):
        texts: tuple[str, ...] = (value,)
    elif isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        texts = tuple(value)
    elif isinstance(value, Mapping):
        if depth >= _DEPTH:
            raise BadSampleError(key, f"its fields are nested more than {_DEPTH} deep")
        for inner, item in value.items():
            _sort_entry(key, f"{name}.{inner}", item, captions, meta, depth + 1)
        return
    else:
        meta[name] = value
        return
    kept = tuple(text.strip() for text in texts if text.strip())
    if kept:
        captions[name] = kept


def parse_json_record(key: str, data: bytes | str) -> dict[str, Any]:
    """Parse one JSON object.

    Raises:
        BadSampleError: the text is not UTF-8, not JSON, or not an object.
    """
    try:
        record = json.loads(data)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadSampleError(key, f"its JSON cannot be read ({error})") from None
    if not isinstance(record, dict):
        raise BadSampleError(key, f"its JSON is a {type(record).__name__}, expected an object of fields")
    return record
