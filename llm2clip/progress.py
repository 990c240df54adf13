"""Progress for long jobs: a bar with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def format_seconds(seconds: float) -> str:
    """`75` -> `1:15`, `3675` -> `1:01:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Counts finished units of a job and shows them.

    Args:
        total: number of units of the whole job, or None when unknown.
        title: short name shown before the figures.
        unit: what is counted, in the plural ("captions").
        initial: units already done before this process (a resumed job).
        every: seconds between lines where there is no terminal.
        enabled: False shows nothing (ranks other than 0).
    """

    def __init__(
        self,
        total: int | None,
        title: str,
        unit: str = "steps",
        *,
        initial: int = 0,
        every: float = 10.0,
        enabled: bool = True,
    ) -> None:
        self.total, self.title, self.unit = total, title, unit
        self.done = self._initial = initial
        self._every, self._enabled = every, enabled
        self._start = self._last_line = time.monotonic()
        self._note = ""
        self._bar: tqdm[Any] | None = None
        if enabled and sys.stderr.isatty():
            # a terminal that does not know its width (containers) says 0, which would hide the bar
            known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
            self._bar = tqdm(
                total=total,
                desc=title,
                unit=f" {unit}",
                initial=initial,
                ncols=None if known else 80,
                dynamic_ncols=known,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def update(self, count: int = 1, note: str = "") -> None:
        """Count `count` more units; `note` (for example the loss) is shown beside them."""
        self.done += count
        self._note = note or self._note
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self._enabled and self.done != self.total and time.monotonic() - self._last_line >= self._every:
            # the last unit has its line in close()
            self._last_line = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`, counting one unit after each."""
        for item in items:
            yield item
            self.update()

    def close(self, failed: bool = False) -> None:
        """End the bar, or print the closing line."""
        if self._bar is not None:
            self._bar.close()
        elif self._enabled and not failed:
            print(self._line(), file=sys.stderr, flush=True)
        self._enabled = False

    def _line(self) -> str:
        elapsed = time.monotonic() - self._start
        rate = (self.done - self._initial) / elapsed if elapsed > 0 else 0.0
        text = f"{self.title}: {self.done}"
        if self.total:
            text += f"/{self.total} {self.unit} ({100 * self.done / self.total:.0f} %)"
        else:
            text += f" {self.unit}"
        text += f", {rate:.1f}/s, {format_seconds(elapsed)} gone"
        if self.total and rate > 0 and self.done < self.total:
            text += f", {format_seconds((self.total - self.done) / rate)} left"
        return text + (f", {self._note}" if self._note else "")
