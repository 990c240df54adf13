"""A tiny model behind `llm2clip search`, pictures to search, and the server on a free port."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llm2clip.config import from_tree
from llm2clip.embed import embed
from llm2clip.search.run import listen, make_server, open_service
from llm2clip.search.service import SearchService
from llm2clip.settings import EmbedSettings, SearchSettings
from tests.evaluation_kit import build_kit
from tests.training_kit import records, write_set

SHARD_ITEMS = 12


def photo(number: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture of its number: three bands of random colours."""
    colours = np.random.default_rng(number).integers(0, 255, (3, 1, 3))
    pixels = np.repeat(colours, size[1] // 3, axis=0).repeat(size[0], axis=1)
    return Image.fromarray(pixels.astype(np.uint8))


def write_photos(folder: Path, numbers: Sequence[int]) -> Path:
    """Photos as JPEG files, some of them in a folder below."""
    for number in numbers:
        place = folder / ("more" if number % 3 == 0 else ".") / f"photo-{number:03d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        photo(number).save(place, quality=95)
    return folder


@dataclass(frozen=True)
class SearchKit:
    """A run of the CLIP stage, the store it was trained with, photos, and a shard with captions."""

    root: Path
    run: Path
    photos: Path
    shard: Path
    clip: Path

    def settings(self, **more: Any) -> SearchSettings:
        """Settings of a search over the shard, in `root/index`."""
        tree = {"model": str(self.run), "images": [str(self.shard)], "port": 0, "device": "cpu"}
        return from_tree(SearchSettings, {**tree, "index": str(self.root / "index"), **more})


def build_search_kit(root: Path) -> SearchKit:
    """Everything a search needs, written to `root`."""
    kit = build_kit(root)
    shard = write_set(root / "shards" / "train-000000.tar", records(SHARD_ITEMS))
    captions = {"short": ["name"], "long": ["description"]}
    data = {"train": [str(shard)], "captions": captions}
    store = {"data": data, "llm": {"path": str(kit.llm)}, "out": str(root / "store"), "device": "cpu"}
    embed(from_tree(EmbedSettings, store))
    # what `llm2clip train` writes beside its result, seen from the directory above
    (kit.first / "config.yaml").write_text(f"store: {root.name}/store\n")
    return SearchKit(root, kit.first, write_photos(root / "photos", range(10)), shard, kit.clip)


@dataclass(frozen=True)
class Reply:
    """An answer of the server."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Running:
    """The server on a free port of loopback."""

    service: SearchService
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, path: str, body: bytes | None = None, *, method: str | None = None, **headers: str
    ) -> Reply:
        """One request, its headers named with underscores; a path is sent exactly as it is given."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            verb = method or ("GET" if body is None else "POST")
            connection.putrequest(verb, path, skip_host="Host" in headers)
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            if body is not None and "Content_Length" not in headers and "Transfer_Encoding" not in headers:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            reply = connection.getresponse()
            return Reply(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())
        finally:
            connection.close()

    def search(self, text: str, count: int = 5, **headers: str) -> Reply:
        """Search by a text."""
        body = json.dumps({"text": text, "count": count}).encode()
        return self.ask("/api/search", body, Content_Type="application/json", **headers)


@contextmanager
def running(settings: SearchSettings) -> Iterator[Running]:
    """The server of `settings`, stopped at the end."""
    service, info = open_service(settings)
    listener = listen(settings.host, 0)
    server = make_server(service, info, settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield Running(service, int(listener.getsockname()[1]))
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        listener.close()
        service.close()
        assert not thread.is_alive()
