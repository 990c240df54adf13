"""What every change to somebody else's objects gives back: a way to take it back."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType


class Handle:
    """Undoes a change: with `undo()`, or by leaving a `with` block.

    Args:
        *steps: what to do, last first; each is done once.
    """

    def __init__(self, *steps: Callable[[], None]) -> None:
        self._steps = list(steps)

    def undo(self) -> None:
        """Puts everything back as it was; once more does nothing."""
        while self._steps:
            self._steps.pop()()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()
