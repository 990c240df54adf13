"""Where metrics go beside `metrics.jsonl`: TensorBoard and Weights & Biases, behind one small protocol."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from llm2clip.config import to_tree
from llm2clip.errors import CheckpointError, ConfigError
from llm2clip.files import read_json, write_json
from llm2clip.settings import RunSettings


class Tracker(Protocol):
    """A place for metrics."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the metrics of a step; steps never go back."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class TensorBoard:
    """Event files in `directory/tensorboard`; what an earlier process wrote after step `start` is hidden.

    Raises:
        ConfigError: the package is missing.
    """

    def __init__(self, directory: Path, start: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "run.tensorboard: the package tensorboard is missing; pip install 'llm2clip[tensorboard]'"
            ) from None
        self._writer: Any = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, named after the run directory; a resumed run goes on in it.

    Args:
        project: the project there.
        directory: run directory; its `wandb.json` keeps the run's id, its `wandb/` the package's files.
        config: the settings, shown with the run.

    Raises:
        ConfigError: the package is missing.
    """

    def __init__(self, project: str, directory: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "run.wandb: the package wandb is missing; pip install 'llm2clip[wandb]'"
            ) from None
        record = directory / "wandb.json"
        known = read_json(record, CheckpointError)["id"] if record.exists() else None
        self._run: Any = wandb.init(
            project=project,
            name=directory.name,
            dir=str(directory),
            config=dict(config),
            id=known,
            resume="allow",
        )
        if known is None:
            write_json(record, {"id": self._run.id})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def open_trackers(run: RunSettings, settings: Any, start: int) -> list[Tracker]:
    """The trackers that the run asks for.

    Args:
        run: its settings; `out` is its directory.
        settings: all settings, to be shown beside the metrics.
        start: steps done so far.
    """
    directory = Path(run.out)
    trackers: list[Tracker] = []
    if run.tensorboard:
        trackers.append(TensorBoard(directory, start))
    if run.wandb:
        trackers.append(WandB(run.wandb, directory, to_tree(settings)))
    return trackers
