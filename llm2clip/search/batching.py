"""One thread that answers queries, many that ask: what waits together is computed together."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

log = logging.getLogger("llm2clip.search")

Query = TypeVar("Query")
Answer = TypeVar("Answer")


class BusyError(Exception):
    """So many queries wait that another one would wait too long."""


class Batcher(Generic[Query, Answer]):
    """Hands queries to `answer` in batches of those that wait, on one thread.

    A single query starts at once; under load batches grow by themselves, which costs no query a delay.

    Args:
        answer: queries to as many answers; may raise, which every one of them then does.
        largest: most queries in a batch.
        waiting: most queries that may wait.
    """

    def __init__(
        self, answer: Callable[[Sequence[Query]], Sequence[Answer]], *, largest: int = 32, waiting: int = 256
    ) -> None:
        self._answer, self._largest = answer, largest
        self._queue: queue.Queue[tuple[Query, Future[Answer]] | None] = queue.Queue(waiting)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="search", daemon=True)
        self._thread.start()

    def submit(self, query: Query) -> Future[Answer]:
        """Ask; a future that is cancelled before its turn costs nothing.

        Raises:
            BusyError: too many wait, or the batcher was closed.
        """
        future: Future[Answer] = Future()
        if self._closed:
            raise BusyError("the server is stopping")
        try:
            self._queue.put_nowait((query, future))
        except queue.Full:
            raise BusyError("too many searches are waiting; try again in a moment") from None
        return future

    def close(self) -> None:
        """Answer what waits, then stop."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, last = [first], False
            while len(batch) < self._largest:
                try:
                    following = self._queue.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    last = True
                    break
                batch.append(following)
            asked = [(query, future) for query, future in batch if future.set_running_or_notify_cancel()]
            if asked:
                self._settle(asked)
            if last:
                return

    def _settle(self, asked: Sequence[tuple[Query, Future[Answer]]]) -> None:
        try:
            answers = self._answer([query for query, _ in asked])
        except Exception as error:
            log.exception("a search failed")
            for _, future in asked:
                future.set_exception(error)
            return
        for (_, future), answer in zip(asked, answers, strict=True):
            future.set_result(answer)
