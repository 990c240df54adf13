"""The search page under fifty clients for two seconds: every request is answered, and uploads stay in memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from PIL import Image

pytest.importorskip("starlette", reason="the page needs llm2clip[app]")
pytest.importorskip("uvicorn", reason="the page needs llm2clip[app]")

from tests.reliability import hostile_files as make
from tests.reliability.search_load import load
from tests.reliability.watch import watched
from tests.search_kit import SHARD_ITEMS, Running, SearchKit, build_search_kit, running
from tests.training_kit import picture


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> SearchKit:
    return build_search_kit(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def server(kit: SearchKit) -> Iterator[Running]:
    with running(kit.settings()) as server:
        yield server


def test_fifty_clients_at_once(server: Running) -> None:
    result = load(server.port, 50, 2.0, [picture(number) for number in range(SHARD_ITEMS)])
    assert result["errors"] == {} and result["requests"] >= 50
    assert set(result["milliseconds"]) == {"all", "image", "similar", "text", "thumbnail"}


def test_the_load_counts_what_fails(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.service, "holds", lambda item: False)
    result = load(server.port, 4, 0.5, [picture(1)])
    assert set(result["errors"]) == {"similar: 404", "thumbnail: 404"}


UPLOADS = {
    "polyglot": (make.polyglot(), 200),
    "animated": (make.animation("GIF"), 200),
    "CMYK": (make.encoded(Image.new("CMYK", (16, 16)), "JPEG"), 200),
    "comment of 256 MiB": (make.text_bomb(256), 415),
    "bomb": (make.png(60_000, 60_000), 415),
    "archive": (b"PK\x05\x06" + bytes(18), 415),
    "pickle": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", 415),
}


def test_uploads_touch_nothing_but_memory(server: Running, kit: SearchKit) -> None:
    with watched(kit.root) as seen:
        statuses = {name: server.ask("/api/search/image", data).status for name, (data, _) in UPLOADS.items()}
        for path in ("/static/..%2f..%2fetc/passwd", "/thumbnail/..%2f1", "/image/%00"):
            assert server.ask(path).status == 404
    assert statuses == {name: status for name, (_, status) in UPLOADS.items()}
    assert seen.forbidden == [] and seen.grown_mib < 200
