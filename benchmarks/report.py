"""Writes the tables of docs/performance.md from the committed results, and checks that they still agree.

python -m benchmarks.report            # rewrite the part between the markers
python -m benchmarks.report --check    # fail if it is not what the results say

Every figure of that part is copied from a file under benchmarks/results/; nothing is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
BEGIN = "<!-- results: begin (python -m benchmarks.report) -->"
END = "<!-- results: end -->"

# column of the table -> key of the row, in order; a suite shows those that any of its rows has
COLUMNS = {
    "op": "op",
    "case": "case",
    "provider": "provider",
    "N": "n",
    "D": "d",
    "median ms": "median_ms",
    "p20": "p20_ms",
    "p80": "p80_ms",
    "seconds": "seconds",
    "ns per pair": "ns_per_pair",
    "over first N": "per_pair_over_first",
    "passes": "passes",
    "% of GEMM": "gemm_percent",
    "over eager": "speedup_over_eager",
    "time / recompute": "time_over_recompute",
    "time / cached": "time_over_cached",
    "time / auto": "time_over_auto",
    "MiB": "peak_mib",
    "MiB of N×N": "mib_of_one_matrix",
    "loss error": "error_loss",
    "gradient error": "error_gradients",
    "error": "error_vs_fp64",
    "not timed": "not_timed",
}
# columns of the command line or the heading, not of the table
_HEADING = {"dtype", "inputs", "cache", "rounds", "effective_gflops", "error_scale"}


def _columns(rows: list[dict[str, Any]]) -> dict[str, str]:
    present = dict.fromkeys(key for row in rows for key in row)
    known = {title: key for title, key in COLUMNS.items() if key in present}
    # other suites bring columns of their own: shown as they are
    rest = {
        key.replace("_", " "): key for key in present if key not in COLUMNS.values() and key not in _HEADING
    }
    return known | rest


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int) or float(value).is_integer() and abs(value) >= 1000:
        return f"{int(value):,}"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.10g}"


def table(rows: list[dict[str, Any]], columns: dict[str, str] | None = None) -> str:
    """Returns a Markdown table of rows; `columns` maps titles to keys, by default what a suite's rows have."""
    columns = columns or _columns(rows)
    numeric = {
        title: all(not isinstance(row.get(key), str) for row in rows) for title, key in columns.items()
    }
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("---:" if numeric[title] else "---" for title in columns) + "|",
    ]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(key)) for key in columns.values()) + " |")
    return "\n".join(lines)


def section(path: Path, record: dict[str, Any]) -> str:
    """Returns the heading, origin and table of one suite."""
    environment = record.get("environment", {})
    build = record.get("build", {})
    origin = [f"commit {record.get('commit', 'unknown')}", f"{record.get('threads', '?')} threads"]
    named = environment.get("versions") or {"torch": build.get("torch"), "triton": build.get("triton")}
    origin += [f"{name} {version}" for name, version in named.items() if version]
    if environment.get("load_average"):
        origin.append(f"load {environment['load_average'][0]}")
    if environment.get("date"):
        origin.append(environment["date"])
    parts = [f"### {record.get('suite', path.stem)}", ", ".join(origin) + "."]
    if record.get("command"):
        parts.append(f"`{record['command']}`")
    plot = path.with_suffix(".svg")
    if plot.exists():
        parts.append(f"![{path.stem}](../benchmarks/results/{path.parent.name}/{plot.name})")
    parts.append(table(record["rows"]))
    absent = record.get("not_measured") or {}
    if absent:
        parts.append(
            "Not measured: " + "; ".join(f"{name} ({reason})" for name, reason in absent.items()) + "."
        )
    return "\n\n".join(parts)


def proof(path: Path) -> str:
    """Returns what became of each section of `benchmarks.gpu_proof` on a machine."""
    record = json.loads(path.read_text())
    rows = [
        {
            "section": s["section"],
            "outcome": s["status"],
            "seconds": s["seconds"],
            "reason": s["reason"].split("\n")[0][:200],
        }
        for s in record["sections"]
    ]
    return "\n\n".join(
        [
            "### Proof",
            f"commit {record['commit']}. `{record['command']}`",
            table(rows, {key: key for key in rows[0]}),
        ]
    )


def generate(results: Path) -> str:
    """Returns the generated part for all machines and suites under `results`."""
    parts = []
    for folder in sorted(p for p in results.iterdir() if p.is_dir()):
        suites = [proof(path) for path in folder.glob("proof/proof.json")]
        for path in sorted(folder.glob("*.json")):
            record = json.loads(path.read_text())
            if isinstance(record, dict) and record.get("rows"):
                suites.append(section(path, record))
        if suites:
            parts += [f"## {folder.name}", *suites]
    return "\n\n".join(parts)


def rewrite(page: str, generated: str) -> str:
    """Returns the page with the part between the markers replaced; raises ValueError without markers."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page needs one line {BEGIN!r} and, below it, one line {END!r}")
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n\n{generated}\n\n{END}{tail}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, fail if the page differs")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    page = options.page.read_text()
    wanted = rewrite(page, generate(options.results))
    if options.check:
        if page != wanted:
            sys.exit(f"{options.page.name} is not what the results say; run python -m benchmarks.report")
        return
    options.page.write_text(wanted)


if __name__ == "__main__":
    main()
