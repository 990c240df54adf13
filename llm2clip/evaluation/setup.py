"""What the report says about a run besides its scores: curves, durations, licence and attribution."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm2clip.data.sources import expand_braces
from llm2clip.errors import DataError, UserError
from llm2clip.evaluation.gallery import Item
from llm2clip.files import read_json
from llm2clip.settings import DataSettings, EvaluateSettings

_STAGES = {"LLM stage": "llm_adapter", "CLIP stage": "model"}
_CREDIT_FIELDS = ("license", "licence", "attribution", "source", "tileset", "book")


def find_metrics(settings: EvaluateSettings) -> dict[str, Path]:
    """metrics.jsonl of each stage, in the given directory or the run directory above its `result`."""
    return {
        name: path for name, root in _run_directories(settings) if (path := root / "metrics.jsonl").is_file()
    }


def stage_seconds(settings: EvaluateSettings) -> dict[str, float]:
    """Seconds that each stage took, as far as its directory says so."""
    found: dict[str, float] = {}
    for name, root in _run_directories(settings):
        _add_seconds(found, name, root / "summary.json")
    if settings.store:
        _add_seconds(found, "embedding", Path(settings.store) / "embed.json")
    return found


def _run_directories(settings: EvaluateSettings) -> list[tuple[str, Path]]:
    found = []
    for name, setting in _STAGES.items():
        if given := getattr(settings, setting):
            found += [
                (name, root)
                for root in (Path(given), Path(given).parent)
                if (root / "metrics.jsonl").is_file()
            ]
    return list(dict(reversed(found)).items())[::-1]


def _add_seconds(found: dict[str, float], name: str, path: Path) -> None:
    # a summary is a courtesy of the stage before: without it the report is merely shorter
    try:
        found[name] = round(float(read_json(path)["seconds"]), 1)
    except (UserError, KeyError, TypeError, ValueError):
        return


def attribution(data: DataSettings, items: Sequence[Item]) -> dict[str, list[str]]:
    """Licence and attribution that travel with the held-out data; see `attribution_of`."""
    return attribution_of(data.val, [item.meta for item in items])


def attribution_of(paths: Sequence[str], metas: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Licence and attribution that travel with sources.

    Args:
        paths: the sources.
        metas: what each sample carries besides captions.

    Returns:
        Field name -> its values: from `dataset.json` beside the shards, and from the items themselves
        (the most frequent first, at most twelve of each).
    """
    found: dict[str, list[str]] = {}
    for path in _dataset_files(paths):
        try:
            content = read_json(path, DataError)
        except DataError:
            continue
        if isinstance(content, dict):
            for name in ("name", "license", "licence", "attribution", "source", "sources", "homepage"):
                _add_values(found, name, content.get(name))
    for name in _CREDIT_FIELDS:
        counts = Counter(str(meta[name]) for meta in metas if meta.get(name))
        _add_values(found, name, [value for value, _ in counts.most_common(12)])
    return found


def _add_values(found: dict[str, list[str]], name: str, value: Any) -> None:
    if value is None or value == []:
        return
    values = value if isinstance(value, list) else [value]
    known = found.setdefault(name, [])
    known += [text for text in dict.fromkeys(map(str, values)) if text not in known]


def _dataset_files(paths: Sequence[str]) -> list[Path]:
    places: dict[Path, None] = {}
    for path in paths:
        for pattern in expand_braces(path):
            for match in glob.glob(pattern) or [pattern]:
                place = Path(match)
                places.setdefault((place if place.is_dir() else place.parent) / "dataset.json")
    return [place for place in places if place.is_file()]
