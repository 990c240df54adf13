"""Many clients of the search page at once: `python -m tests.reliability.search_load --clients 50 --seconds 60`.

The page runs in a process of its own with a tiny model; every client keeps asking one thing after the other: texts,
images, similar images, thumbnails. What is measured is the whole way over HTTP on loopback.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np


class Client(threading.Thread):
    """Asks until the time is over; keeps seconds by kind of request, and every answer that is none."""

    def __init__(self, port: int, end: float, seed: int, images: Sequence[bytes]) -> None:
        super().__init__(daemon=True)
        self.seconds: dict[str, list[float]] = {}
        self.errors: Counter[str] = Counter()
        self._port, self._end, self._chance, self._images = port, end, random.Random(seed), images

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        while time.monotonic() < self._end:
            kind = self._chance.choice(("text", "text", "image", "similar", "thumbnail"))
            start = time.perf_counter()
            try:
                status, body = self._ask(connection, kind)
            except OSError as problem:
                self.errors[f"{kind}: {type(problem).__name__}"] += 1
                connection.close()
                continue
            self.seconds.setdefault(kind, []).append(time.perf_counter() - start)
            if status != 200 or (kind != "thumbnail" and not json.loads(body)["images"]):
                self.errors[f"{kind}: {status}"] += 1
        connection.close()

    def _ask(self, connection: http.client.HTTPConnection, kind: str) -> tuple[int, bytes]:
        item = self._chance.randrange(len(self._images))
        if kind == "text":
            # another text every time: a known one would come from the page's memory
            text = f"a stone of colour {self._chance.randrange(10**6)} on grass"
            body = json.dumps({"text": text, "count": 5})
            connection.request("POST", "/api/search", body, {"Content-Type": "application/json"})
        elif kind == "image":
            connection.request("POST", "/api/search/image?count=5", self._images[item])
        elif kind == "similar":
            connection.request("GET", f"/api/similar/{item}?count=5")
        else:
            connection.request("GET", f"/thumbnail/{item}")
        answer = connection.getresponse()
        return answer.status, answer.read()


def load(port: int, clients: int, seconds: float, images: Sequence[bytes]) -> dict[str, Any]:
    """Let `clients` ask the page on `port` for so long.

    Returns:
        Requests, requests a second, errors by kind, and percentiles of seconds by kind, as JSON values.
    """
    end = time.monotonic() + seconds
    threads = [Client(port, end, seed, images) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 120)
    errors = sum((thread.errors for thread in threads), Counter())
    if stuck := sum(thread.is_alive() for thread in threads):
        errors["never answered"] = stuck
    kinds = sorted({kind for thread in threads for kind in thread.seconds})
    taken = {kind: [s for thread in threads for s in thread.seconds.get(kind, ())] for kind in kinds}
    taken["all"] = [s for values in taken.values() for s in values]
    return {
        "clients": clients,
        "seconds": seconds,
        "processors": os.cpu_count(),
        "requests": len(taken["all"]),
        "requests_per_second": round(len(taken["all"]) / seconds, 1),
        "errors": dict(errors),
        "milliseconds": {
            kind: {f"p{p}": round(1e3 * float(np.percentile(values, p)), 1) for p in (50, 90, 99)}
            for kind, values in taken.items()
        },
    }


def _serve(folder: str, pipe: Connection) -> None:
    """The page in a process of its own; says its port, and ends when it is told to."""
    import torch

    from tests.search_kit import build_search_kit, running

    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    with running(build_search_kit(Path(folder)).settings()) as server:
        pipe.send(server.port)
        pipe.recv()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the status is 1 where a request failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", default="", help="JSON file for the result")
    chosen = parser.parse_args(arguments)
    from tests.search_kit import SHARD_ITEMS
    from tests.training_kit import picture

    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        server = context.Process(target=_serve, args=(folder, there), daemon=True)
        server.start()
        port = here.recv()
        result = load(port, chosen.clients, chosen.seconds, [picture(n) for n in range(SHARD_ITEMS)])
        here.send(None)
        server.join(60)
    print(json.dumps(result, indent=2))
    if chosen.out:
        Path(chosen.out).write_text(json.dumps(result, indent=2) + "\n")
    return int(bool(result["errors"]))


if __name__ == "__main__":
    sys.exit(main())
