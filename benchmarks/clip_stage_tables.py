"""What `benchmarks.clip_stage` has measured as tables: recall in %, mean and range over seeds."""

from __future__ import annotations

from statistics import mean
from typing import Any

TEACHERS = {"tuned": "CC-tuned LLM", "raw": "raw LLM", "minilm": "all-MiniLM-L6-v2"}
TOWERS = {"efficientnet-lite0": "EfficientNet-Lite0 (ImageNet)", "vit": "ViT, random weights"}
_PARTS = (("short", "r1"), ("long", "r1"), ("long", "r10"))
_QUERIES = (
    ("whole", "tuned long", "descriptions longer than 77 tokens"),
    ("first-77", "tuned long", "their first 77 tokens"),
    ("physics", "tuned long", "physics, English"),
    ("physics", "tuned es", "physics, Spanish"),
    ("physics", "tuned pl", "physics, Polish"),
    ("centred", "tuned long", "physics, English, centred"),
    ("centred", "tuned es", "physics, Spanish, centred"),
    ("centred", "tuned pl", "physics, Polish, centred"),
)


def cell(values: list[float]) -> str:
    """Mean over seeds, with the range where there are several."""
    shown = f"{mean(values):.1f}"
    return f"{shown} ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else shown


def tables(runs: list[dict[str, Any]]) -> str:
    """What is measured as Markdown; R@k in %, of both directions where not said otherwise."""
    lines = [
        "| tower | captions by | R@1, mean | caption R@1 | description R@1 | description R@10 | over raw |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]

    def of(tower: str, part: str, kind: str, measure: str) -> list[float]:
        rows = [run[part].get(kind) for run in runs if run["tower"] == tower and part in run]
        return [mean(row[measure]) for row in rows if row]

    for tower, title in TOWERS.items():
        means = {
            name: [
                (a + b) / 2
                for a, b in zip(
                    of(tower, "books", f"{name} short", "r1"),
                    of(tower, "books", f"{name} long", "r1"),
                    strict=True,
                )
            ]
            for name in TEACHERS
        }
        for name, teacher in TEACHERS.items():
            if means[name]:
                parts = [of(tower, "books", f"{name} {kind}", key) for kind, key in _PARTS]
                over = f"{mean(means[name]) / mean(means['raw']):.2f}" if means["raw"] else ""
                lines.append(
                    f"| {title} | {teacher} | {' | '.join(map(cell, [means[name], *parts]))} | {over} |"
                )
    lines += [
        "",
        "| tower | queries | R@1 | R@10 | text → image R@10 | chance R@10 | figures |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for tower, title in TOWERS.items():
        for part, kind, what in _QUERIES:
            row = next(
                (run[part][kind] for run in runs if run["tower"] == tower and kind in run.get(part, {})), None
            )
            if row:
                asked = [run[part][kind]["r10"][1] for run in runs if run["tower"] == tower and part in run]
                values = " | ".join(
                    cell(v) for v in (*(of(tower, part, kind, k) for k in ("r1", "r10")), asked)
                )
                lines.append(f"| {title} | {what} | {values} | {row['chance_r10']} | {row['gallery']} |")
    return "\n".join(lines)
