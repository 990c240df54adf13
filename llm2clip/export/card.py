"""What a run directory and an evaluation have to say on a model card."""

from __future__ import annotations

import dataclasses
import glob
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm2clip.config import from_tree, read_yaml
from llm2clip.data.sources import expand_braces
from llm2clip.environment import environment
from llm2clip.errors import DataError, UserError
from llm2clip.files import read_json
from llm2clip.models.model_card import ModelCard, licence_of
from llm2clip.models.model_files import RESULT
from llm2clip.settings import DataSettings, ExportSettings

_CONFIG, _METRICS = "config.yaml", "metrics.jsonl"
TRAINING = "training.yaml"
"""The run's resolved settings, beside the exported model."""
_CREDIT = ("name", "license", "licence", "attribution", "homepage")


def find_run(model: Path) -> Path | None:
    """The run directory that a path is, or whose result it is; None where there is none."""
    places = (model, model.parent) if model.name == RESULT else (model,)
    return next(
        (place for place in places if (place / _CONFIG).is_file() and (place / RESULT).is_dir()), None
    )


def run_card(run: Path | None, settings: ExportSettings | None = None) -> ModelCard:
    """A card with what the run and the settings say.

    Raises:
        UserError: `settings.results` is not results.json of an evaluation.
    """
    settings = settings or ExportSettings()
    packages = environment()["packages"]
    versions = {name: packages[name] for name in ("llm2clip", "torch", "transformers") if packages.get(name)}
    card = ModelCard(
        licence=settings.licence,
        base_llm=settings.base_llm,
        base_licence=settings.base_licence or (licence_of(settings.llm.path) if settings.llm.path else ""),
        metrics=result_metrics(Path(settings.results)) if settings.results else {},
        versions=versions,
    )
    if run is None or not (run / _CONFIG).is_file():
        return card
    data = from_tree(DataSettings, read_yaml(run / _CONFIG).get("data") or {})
    return dataclasses.replace(
        card,
        # names, not places: where data lay on one machine helps nobody
        data=[Path(place).name for place in data.train],
        command=f"llm2clip train --config {TRAINING if settings.out else _CONFIG}",
        metrics=card.metrics or last_metrics(run / _METRICS),
        attribution=credits_of(data),
    )


def last_metrics(path: Path) -> dict[str, float]:
    """The last held-out figures of a run's log: `val/...` -> value."""
    if not path.is_file():
        return {}
    found: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:  # a run that was killed leaves half a line
            continue
        found.update({name: float(v) for name, v in values.items() if name.startswith("val/")})
    return found


def result_metrics(path: Path) -> dict[str, float]:
    """Recall of an evaluation's results.json: `long text → image R@1` or `COCO text → image R@1` -> share.

    Raises:
        UserError: the file holds no retrieval results.
    """
    content = read_json(path)
    rows = content.get("retrieval") if isinstance(content, dict) else None
    if not rows:
        raise UserError(f"{path} holds no retrieval results; give results.json of `llm2clip evaluate`")
    # benchmarks of several models: the last is the one that the report shows
    shown = list((content.get("setup") or {}).get("models") or {})[-1:]
    return {
        f"{row.get('queries') or row['title']} {row['direction']} R@{k}": float(value)
        for row in rows
        if not shown or row["model"] == shown[0]
        for k, value in row["scores"]["recall"].items()
    }


def credits_of(data: DataSettings) -> Mapping[str, list[str]]:
    """Name, licence and attribution in the dataset.json beside training shards."""
    found: dict[str, list[str]] = {}
    for pattern in (part for path in data.train for part in expand_braces(path)):
        for match in sorted(glob.glob(pattern))[:1]:
            place = Path(match)
            file = (place if place.is_dir() else place.parent) / "dataset.json"
            if file.is_file():
                _add(found, read_json(file, DataError))
    return found


def _add(found: dict[str, list[str]], content: Any) -> None:
    for name in _CREDIT:
        value = content.get(name) if isinstance(content, dict) else None
        for text in value if isinstance(value, list) else [value]:
            if text and str(text) not in found.setdefault(name, []):
                found[name].append(str(text))
