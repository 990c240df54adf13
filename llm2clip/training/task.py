"""What a stage brings to the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from llm2clip.data.loader import Position
from llm2clip.training.optim import NamedParameters


class Task(Protocol):
    """What a stage brings to the loop.

    Attributes:
        title: name shown beside the progress.
        settings: the resolved settings, saved with the run.
        module: maps a chunk to named outputs (gradient_cache.backward); moved to the device by the task.
        samples: training samples of one epoch.
        token_budget: tokens of a chunk; 0: `run.micro_batch` cuts the batch by samples.
        additive: the loss of a batch is the sum of its chunks' losses, so no gradient cache is needed.
        sharded: the task has spread its module over the ranks itself (training.sharding): every forward needs all of
            them, and what is trained is whole on each.
    """

    title: str
    token_budget: int
    additive: bool
    sharded: bool
    settings: Any
    module: nn.Module
    samples: int

    def groups(self) -> Mapping[str, NamedParameters]:
        """Parameter groups by name, in a fixed order."""
        ...

    def batches(self, epoch: int, batch: int) -> Iterator[tuple[Position, Sequence[Any]]]:
        """Endless `(position after the batch, samples of this rank)` from a position on."""
        ...

    def chunks(self, samples: Sequence[Any], size: int) -> Sequence[Any]:
        """The samples as inputs of `module`: at most `size` each (0: one chunk), or by `token_budget`."""
        ...

    def loss(self, outputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (0-dim) over the batch of all ranks, and 0-dim metrics."""
        ...

    def after_step(self) -> None:
        """Called after each optimizer step (clamping the logit scale)."""
        ...

    def names(self, samples: Sequence[Any]) -> list[str]:
        """Keys of the samples, for error messages."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Metrics on held-out data; empty when there is none."""
        ...

    def export(self, path: Path) -> None:
        """Write the result for users; called once, on the main rank, at the end."""
        ...
