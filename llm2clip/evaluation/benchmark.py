"""What the benchmarks share: where things go, captions for `llm2clip embed`, comparing models, writing results."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm2clip.errors import ConfigError
from llm2clip.evaluation.bootstrap import paired_difference
from llm2clip.evaluation.latex import render_latex
from llm2clip.evaluation.tables import Table, render_markdown, render_text
from llm2clip.files import write_json, write_text
from llm2clip.settings import BenchmarkSettings

_TERMINAL = 160  # characters: a wider table is in the files alone
RESULTS, MARKDOWN, LATEX, REPORT = "results.json", "tables.md", "tables.tex", "report.html"


def places(settings: BenchmarkSettings) -> tuple[Path, Path]:
    """Directory of the results and directory of the features.

    Raises:
        ConfigError: no output directory is given.
    """
    if not settings.out:
        raise ConfigError("out is empty; give the directory of results.json, the tables and report.html")
    out = Path(settings.out)
    return out, Path(settings.cache) if settings.cache else out / "features"


def write_captions(path: str, texts: Iterable[str]) -> int:
    """Write every different text as a line {"caption": ...}, a source for `llm2clip embed`.

    Returns:
        How many there are.
    """
    unique = list(dict.fromkeys(texts))
    lines = [json.dumps({"caption": text}, ensure_ascii=False) for text in unique]
    write_text(path, "".join(f"{line}\n" for line in lines))
    return len(unique)


def baseline_of(settings: BenchmarkSettings) -> str | None:
    """The model that others are compared with; None where there is nothing to compare."""
    if len(settings.models) < 2:
        return None
    return settings.baseline or next(iter(settings.models))


def shown_model(models: Iterable[str]) -> str:
    """The model whose samples the report shows: the last, as the one compared with comes first by default."""
    return list(models)[-1]


def compare(
    values: Mapping[str, npt.NDArray[np.float64]],
    baseline: str,
    clusters: npt.NDArray[np.int64] | None,
    settings: BenchmarkSettings,
) -> list[dict[str, Any]]:
    """Every model against the baseline on the same queries, paired.

    Args:
        values: model -> (Q,) one measure per query.
        baseline: the model compared with.
        clusters: (Q,) what each query belongs to, or None.
        settings: resamples and seed.

    Returns:
        Rows `{model, baseline, difference, interval, certain}`.
    """
    rows = []
    for label, own in values.items():
        if label == baseline:
            continue
        found = paired_difference(
            own, values[baseline], clusters, resamples=settings.resamples, seed=settings.seed
        )
        rows.append(
            {
                "model": label,
                "baseline": baseline,
                "difference": found.mean,
                "interval": [found.low, found.high],
                "certain": found.certain,
            }
        )
    return rows


def setup_of(
    settings: BenchmarkSettings, models: Mapping[str, Any], seconds: float, ranks: int
) -> dict[str, Any]:
    """What the results say about how they were made."""
    return {
        "models": dict(models),
        "settings": asdict(settings),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seconds": round(seconds, 1),
        "ranks": ranks,
    }


def write_results(out: Path, results: Mapping[str, Any], tables: Sequence[Table], page: str) -> None:
    """Write results.json, tables.md, tables.tex and report.html, each atomically, and print the tables."""
    write_json(out / RESULTS, results)
    write_text(out / MARKDOWN, "\n\n".join(map(render_markdown, tables)) + "\n")
    write_text(out / LATEX, "\n\n".join(map(render_latex, tables)) + "\n")
    write_text(out / REPORT, page)
    for table in reversed(tables):  # the overview last: that is where the eye is
        text = render_text(table)
        if max(map(len, text.splitlines())) <= _TERMINAL:
            print(f"\n{text}")
    print(f"\nTables: {out / MARKDOWN}, {out / LATEX}. Report: {out / REPORT}")
