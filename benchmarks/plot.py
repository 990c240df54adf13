"""Draws results: time, memory and share of the GEMM over N, one figure per suite, log-log.

python -m benchmarks.plot                                # every suite of every machine, as SVG
python -m benchmarks.plot --format png --suite similarity_float32_random
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

Rows = list[dict[str, Any]]

# quantity -> (axis label, whether the axis is logarithmic)
PANELS = {
    "median_ms": ("forward and backward, ms", True),
    "ns_per_pair": ("ns per pair", True),
    "peak_mib": ("memory above inputs and gradients, MiB", True),
    "gemm_percent": ("% of the GEMM of this shape", False),
}


def panels(rows: Rows) -> list[str]:
    """Returns the quantities worth drawing: those that at least one provider has at two or more N."""
    return [key for key in PANELS if any(len(points) > 1 for points in curves(rows, key).values())]


def curves(rows: Rows, key: str) -> dict[str, list[tuple[float, float]]]:
    """Returns (n, value) points in order of n by provider, and by D where there are several."""
    several = len({row.get("d") for row in rows}) > 1
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        value = row.get(key)
        if "n" in row and isinstance(value, int | float) and value > 0:
            name = str(row.get("provider", row.get("op", ""))) + (f", D={row.get('d')}" if several else "")
            found.setdefault(name, {}).setdefault(row["n"], []).append(value)
    return {
        name: [(n, sum(values) / len(values)) for n, values in sorted(points.items())]
        for name, points in found.items()
    }


def draw(record: dict[str, Any], path: Path) -> bool:
    """Writes the figure of one suite to `path`; returns False where no provider has two values of N."""
    rows: Rows = record["rows"]
    keys = panels(rows)
    if not keys:
        return False
    import matplotlib

    matplotlib.use("Agg")
    # no random ids and no date: the same results give the same file
    matplotlib.rcParams["svg.hashsalt"] = record.get("suite", path.stem)
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(keys), figsize=(5 * len(keys), 4), squeeze=False, layout="constrained")
    names: dict[str, None] = {}
    for key in keys:
        names |= dict.fromkeys(curves(rows, key))
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    styles = {name: ("-", "--", ":", "-.")[i // 10 % 4] for i, name in enumerate(names)}
    for axis, key in zip(axes[0], keys, strict=True):
        label, logarithmic = PANELS[key]
        for name, points in curves(rows, key).items():
            n, values = zip(*points, strict=True)
            axis.plot(n, values, styles[name], color=colours[name], marker=".", label=name)
        axis.set_xscale("log", base=2)
        if logarithmic:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        ticks = sorted({row["n"] for row in rows if "n" in row})
        axis.set_xticks(ticks, [f"{n:,}" for n in ticks], rotation=45)
        axis.set_xlabel("N")
        axis.set_ylabel(label)
        axis.grid(True, which="major", alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize="small")
    figure.suptitle(
        f"{record.get('suite', path.stem)} · {path.parent.name} · commit {record['commit']}", fontsize=9
    )
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return True


def draw_all(folder: Path, suffix: str = "svg", suite: str | None = None) -> list[Path]:
    """Draws every suite whose JSON lies under `folder`, beside it; returns the files written."""
    written = []
    for path in sorted(folder.rglob("*.json")):
        record = json.loads(path.read_text())
        if not isinstance(record, dict) or "rows" not in record or suite not in (None, path.stem):
            continue
        if draw(record, path.with_suffix(f".{suffix}")):
            written.append(path.with_suffix(f".{suffix}"))
    return written


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the JSON files are")
    parser.add_argument("--format", default="svg", choices=["svg", "png"])
    parser.add_argument("--suite", help="only this one")
    options = parser.parse_args(arguments)
    for path in draw_all(options.folder, options.format, options.suite):
        print(path)


if __name__ == "__main__":
    main()
