"""`metrics.jsonl`: one line of plain numbers per logged step; TensorBoard beside it when asked for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from llm2clip.errors import ConfigError
from llm2clip.files import disk_errors, write_text


class MetricsLog:
    """Appends metrics of a run; on resume, lines of steps that will run again are dropped first.

    Args:
        directory: run directory; the file is `metrics.jsonl` in it.
        start: steps done so far; lines of later steps are removed.
        tensorboard: also write TensorBoard events to `directory/tensorboard`.
        enabled: False writes nothing (ranks other than 0).
    """

    def __init__(
        self, directory: Path, start: int = 0, *, tensorboard: bool = False, enabled: bool = True
    ) -> None:
        self.path = directory / "metrics.jsonl"
        self._enabled = enabled
        self._writer: Any = None
        self._known: list[tuple[int, set[str]]] = []
        if not enabled:
            return
        if self.path.exists():
            kept = [line for line in read_metrics(self.path) if line.get("step", 0) <= start]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            # an evaluation after the newest checkpoint is repeated when the run was killed before its end
            self._known = [(start, set(line)) for line in kept if line.get("step") == start]
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ConfigError(
                    "run.tensorboard: the package tensorboard is missing; pip install 'llm2clip[tensorboard]'"
                ) from None
            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line; values that are not finite are written as null, since JSON has no NaN.

        What an earlier process of the run wrote for this step already is not written again.
        """
        if not self._enabled or not values or (step, {"step", *values}) in self._known:
            return
        line = {"step": step, **{k: v if math.isfinite(v) else None for k, v in values.items()}}
        with disk_errors(self.path), open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def close(self) -> None:
        """Flush what is buffered."""
        if self._writer is not None:
            self._writer.close()


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
