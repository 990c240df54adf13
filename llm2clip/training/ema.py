"""An exponential moving average of the trained weights, in their own precision and place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Average of the trainable parameters; buffers (batch-norm statistics) are those of the last step.

    Early steps count more, min(decay, (1 + n) / (10 + n)), so that the average forgets the random start.

    Args:
        module: what is averaged; its parameters may be sharded.
        decay: share of the old average that is kept each step.

    Attributes:
        averages: averaged parameters by name.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._current = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.averages: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._current.items()}

    def update(self, step: int) -> None:
        """Take in the parameters after optimizer step `step` (counted from 1)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        average = get_ema_multi_avg_fn(decay)
        # one list per dtype: torch's fused update takes one kind at a time
        for dtype in {p.dtype for p in self._current.values()}:
            names = [name for name, p in self._current.items() if p.dtype == dtype]
            average(
                [self.averages[name] for name in names],
                [self._current[name].detach() for name in names],
                step,
            )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module has the averaged parameters inside the block and its own ones after it."""
        own = {name: p.detach().clone() for name, p in self._current.items()}
        self._set(self.averages)
        try:
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._current.items():
            parameter.copy_(values[name])
