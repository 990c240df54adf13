"""`metrics.jsonl`: one line of plain numbers per logged step, passed on to trackers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm2clip.files import disk_errors, write_text
from llm2clip.training.trackers import Tracker


class MetricsLog:
    """Appends metrics of a run; on resume, lines of steps that will run again are dropped first.

    Args:
        directory: run directory; the file is `metrics.jsonl` in it.
        start: steps done so far; lines of later steps are removed.
        trackers: who gets the metrics too.
        enabled: False writes nothing (ranks other than 0).
    """

    def __init__(
        self, directory: Path, start: int = 0, *, trackers: Sequence[Tracker] = (), enabled: bool = True
    ) -> None:
        self.path = directory / "metrics.jsonl"
        self._enabled = enabled
        self._trackers = trackers
        self._known: list[tuple[int, set[str]]] = []
        if not enabled:
            return
        if self.path.exists():
            kept = [line for line in read_metrics(self.path) if line.get("step", 0) <= start]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            # an evaluation after the newest checkpoint is repeated when the run was killed before its end
            self._known = [(start, set(line)) for line in kept if line.get("step") == start]

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line; values that are not finite are written as null, since JSON has no NaN.

        What an earlier process of the run wrote for this step already is not written again.
        """
        if not self._enabled or not values or (step, {"step", *values}) in self._known:
            return
        line = {"step": step, **{k: v if math.isfinite(v) else None for k, v in values.items()}}
        with disk_errors(self.path), open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line cut by a kill is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines
