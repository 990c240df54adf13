"""The search page over HTTP: right answers, and everything that must be refused."""

from __future__ import annotations

import io
import json
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("starlette", reason="the page needs llm2clip[app]")
pytest.importorskip("uvicorn", reason="the page needs llm2clip[app]")

from llm2clip.search.app import MAX_TEXT_BYTES
from tests.search_kit import SHARD_ITEMS, Running, SearchKit, build_search_kit, running
from tests.training_kit import picture, records, wait_for

LIMIT = 1 << 20


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> SearchKit:
    return build_search_kit(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def server(kit: SearchKit) -> Iterator[Running]:
    with running(kit.settings(max_upload_mib=1)) as server:
        yield server


def test_the_page_and_its_files(server: Running) -> None:
    page = server.ask("/")
    assert page.status == 200 and b"<!DOCTYPE html>" in page.body
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for name, kind in (
        ("app.js", "text/javascript"),
        ("style.css", "text/css"),
        ("icon.svg", "image/svg+xml"),
    ):
        file = server.ask(f"/static/{name}")
        assert file.status == 200 and file.headers["content-type"].startswith(kind) and len(file.body) > 100
        assert f"/static/{name}".encode() in page.body
    for text in (page.body, server.ask("/static/app.js").body, server.ask("/static/style.css").body):
        assert b"//" not in text.replace(b"http://www.w3.org/2000/svg", b"").replace(b"// ", b""), (
            "the page must load nothing from elsewhere"
        )


def test_a_text_finds_the_images_nearest_to_it(server: Running, kit: SearchKit) -> None:
    text = records(SHARD_ITEMS)[3]["description"]
    reply = server.search(text, 5)
    assert reply.status == 200
    service = server.service
    feature = torch.nn.functional.normalize(service.model.encoder.encode_texts([text]).double(), dim=1)
    pixels = [service.pixels(service.collection.image(number)) for number in range(SHARD_ITEMS)]
    images = torch.nn.functional.normalize(service.model.encoder.encode_images(pixels).double(), dim=1)
    best = (images @ feature[0]).topk(5)
    found = reply.json["images"]
    assert [one["item"] for one in found] == best.indices.tolist()
    # the index holds fp16
    torch.testing.assert_close(
        torch.tensor([one["score"] for one in found]), best.values.float(), atol=2e-3, rtol=0
    )
    first = records(SHARD_ITEMS)[found[0]["item"]]
    assert found[0]["caption"] == min(first["name"], first["description"], key=len)
    query = reply.json["query"]
    # the tiny tokenizer has a token per byte
    assert query["words"] == len(text.split()) and query["tokens"] >= len(text) and query["cut"] is False
    assert reply.json["captions"] == [] and set(reply.json["seconds"]) == {"encode", "compare"}


def test_a_long_text_is_read_as_far_as_the_model_reads(server: Running) -> None:
    reply = server.search("a red stone " * 1000, 3)
    assert reply.status == 200 and reply.json["query"]["words"] == 3000
    assert reply.json["query"]["cut"] is True and reply.json["query"]["tokens"] <= 512


def test_an_image_finds_itself_and_captions(server: Running) -> None:
    reply = server.ask("/api/search/image?count=3", picture(5), Content_Type="image/png")
    assert reply.status == 200
    best = reply.json["images"][0]
    assert best["item"] == 5 and best["score"] > 0.999 and len(reply.json["images"]) == 3
    captions = reply.json["captions"]
    assert len(captions) == 12 and captions == sorted(captions, key=lambda one: -one["score"])
    known = {
        text for one in records(SHARD_ITEMS) for text in (one["name"], one["description"], one["es"]["name"])
    }
    assert {one["text"] for one in captions} <= known
    assert all(one["item"] in range(SHARD_ITEMS) for one in captions)


def test_similar_images_and_what_is_known_of_one(server: Running) -> None:
    reply = server.ask("/api/similar/7?count=4")
    assert reply.status == 200 and reply.json["images"][0]["item"] == 7
    about = server.ask("/api/item/7")
    assert about.status == 200
    record = records(SHARD_ITEMS)[7]
    assert about.json["captions"]["description"] == [record["description"]]
    assert about.json["captions"]["es.name"] == [record["es"]["name"]]
    assert about.json["key"].endswith("0007")


def test_pictures_are_encoded_anew(kit: SearchKit, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    big = Image.effect_noise((2400, 600), 60).convert("RGB")
    big.save(folder / "big.jpg", exif=exif)
    assert b"a secret place" in (folder / "big.jpg").read_bytes()
    with running(kit.settings(images=[str(folder)], index=str(tmp_path / "index"))) as server:
        small, large = server.ask("/thumbnail/0"), server.ask("/image/0")
        for reply, width in ((small, 320), (large, 1600)):
            assert reply.status == 200 and reply.headers["content-type"] == "image/jpeg"
            image = Image.open(io.BytesIO(reply.body))
            assert image.size == (width, width // 4) and b"a secret place" not in reply.body
        assert server.ask("/thumbnail/0").body == small.body
        (folder / "big.jpg").write_bytes(b"no image any more")
        assert server.ask("/thumbnail/0").body == small.body, "kept in memory"
        gone = server.ask("/image/0")
        assert gone.status == 404 and "not readable any more" in gone.json["error"]
        assert str(folder) not in gone.body.decode()


def test_what_the_page_says_of_the_model(server: Running, kit: SearchKit) -> None:
    info = server.ask("/api/info").json
    assert (info["images"], info["exact"], info["recall"], info["dim"]) == (SHARD_ITEMS, True, None, 6)
    assert info["captions"] == 3 * SHARD_ITEMS and info["max_tokens"] == 512 and info["most"] == 64
    assert info["max_upload_bytes"] == LIMIT
    assert 1 <= len(info["examples"]) <= 6
    assert all(len(one["short"]) < len(one["long"]) for one in info["examples"])


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "//etc/passwd",
        "/../../../etc/passwd",
        "/thumbnail/../../../etc/passwd",
        "/thumbnail/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/image/photo.jpg",
        "/image/-1",
        f"/image/{SHARD_ITEMS}",
        "/image/99999999999999999999999999",
        "/api/item/1%00",
        "/api/similar/x",
        "/docs",
        "/openapi.json",
        "/static/app.js%00.css",
    ],
)
def test_no_path_of_a_client_reaches_a_file(server: Running, path: str) -> None:
    reply = server.ask(path)
    assert reply.status == 404, reply.body
    assert b"root:" not in reply.body and b"import" not in reply.body
    assert reply.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost"}, 200),
        ({"Host": "LOCALHOST:7860"}, 200),
        ({"Host": "[::1]:7860"}, 200),
        ({"Host": "127.0.0.1."}, 200),
        ({"Host": "attacker.example"}, 421),
        ({"Host": "127.0.0.1.attacker.example:7860"}, 421),
        ({"Host": "attacker.example:127.0.0.1"}, 421),
        ({"Host": ""}, 421),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({"Sec_Fetch_Site": "none"}, 200),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}, 403),
        ({"Origin": "http://attacker.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
    ],
)
def test_requests_of_other_sites_are_refused(server: Running, headers: dict[str, str], status: int) -> None:
    replies = [
        server.search("a red stone", 1, **headers),
        server.ask("/api/search/image", picture(1), **headers),
        server.ask("/api/info", **headers),
        server.ask("/thumbnail/1", **headers),
    ]
    assert [reply.status for reply in replies] == [status] * 4


def test_the_page_itself_may_be_opened_by_a_link(server: Running) -> None:
    link = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}
    assert server.ask("/", **link).status == 200
    assert server.ask("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors").status == 403
    assert server.ask("/", b"", **link).status == 403
    own = f"http://127.0.0.1:{server.port}"
    assert server.search("a", Origin=own, Sec_Fetch_Site="same-origin").status == 200


def test_every_answer_forbids_others_to_use_it(server: Running) -> None:
    for reply in (server.ask("/"), server.ask("/nothing"), server.ask("/", Host="attacker.example")):
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert "'unsafe" not in reply.headers["content-security-policy"]
        assert reply.headers["cross-origin-resource-policy"] == "same-origin"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in reply.headers and "server" not in reply.headers


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH"])
def test_other_methods_are_refused(server: Running, method: str) -> None:
    assert server.ask("/api/search", method=method).status in (400, 405)


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'"text"', "application/json", 400),
        (b"{}", "application/json", 400),
        (b'{"text": 5}', "application/json", 400),
        (b'{"text": "  \\n "}', "application/json", 400),
        (b'{"text": "a", "count": 0}', "application/json", 400),
        (b'{"text": "a", "count": 65}', "application/json", 400),
        (b'{"text": "a", "count": "many"}', "application/json", 400),
        (b'{"text": "a", "count": null}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"\xff\xfe\x00", "application/json", 400),
        (b'{"text": "a"}', "text/plain", 415),
        (b"text=a", "application/x-www-form-urlencoded", 415),
        (b'{"text": "' + b"a" * MAX_TEXT_BYTES + b'"}', "application/json", 413),
        (b'{"text": "half a pair \\ud800"}', "application/json", 200),
        (b'{"text": "<|endoftext|></s><pad>"}', "application/json", 200),
        (b'{"text": "\\u0000"}', "application/json", 200),
    ],
)
def test_bodies_that_are_no_query(server: Running, body: bytes, kind: str, status: int) -> None:
    reply = server.ask("/api/search", body, Content_Type=kind)
    assert reply.status == status, reply.body[:200]
    assert (status == 200) == ("images" in reply.json) and (status == 200 or reply.json["error"])


def bomb(side: int) -> bytes:
    """A PNG of a few hundred bytes that says it has side x side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 415, "empty"),
        (b"not an image", 415, "is not JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", 415, "is not JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", 415, "is not JPEG"),
        (picture(1)[:60], 415, "cannot be decoded"),
        (bomb(12_000), 415, "pixels, more than"),
        (bomb(40_000), 415, "too large"),
        (bytes(LIMIT + 1), 413, "larger than"),
    ],
    ids=["empty", "text", "svg", "postscript", "cut", "bomb", "larger bomb", "too many bytes"],
)
def test_uploads_that_are_no_image(server: Running, body: bytes, status: int, words: str) -> None:
    reply = server.ask("/api/search/image", body, Content_Type="image/png")
    assert reply.status == status and words in reply.json["error"]


def test_the_size_is_limited_whatever_the_header_says(server: Running) -> None:
    for length in ("-1", "1e3", str(LIMIT + 1)):
        assert server.ask("/api/search/image", b"", Content_Length=length).status in (400, 413)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(
            b"POST /api/search/image HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        part = b"10000\r\n" + bytes(0x10000) + b"\r\n"
        received = b""
        try:
            for _ in range(LIMIT // 0x10000 + 4):
                connection.sendall(part)
            received = connection.recv(1 << 16)
        except OSError:  # it need not take what it has refused
            received = received or b"HTTP/1.1 413"
    assert received.startswith(b"HTTP/1.1 413")


def test_many_clients_at_once_get_their_own_answers(server: Running) -> None:
    texts = [f"{record['description']} {turn}" for turn in range(3) for record in records(SHARD_ITEMS)]
    alone = {text: server.search(text, 4).json["images"] for text in texts}
    server.service._known.clear()

    def one(text: str) -> bool:
        reply = server.search(text, 4)
        return reply.status == 200 and [i["item"] for i in reply.json["images"]] == [
            i["item"] for i in alone[text]
        ]

    with ThreadPoolExecutor(30) as pool:
        assert all(pool.map(one, texts * 3))


def test_when_too_many_wait_the_rest_is_told_to_come_back(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, entered = threading.Event(), threading.Event()
    encode = server.service.model.encoder.encode_texts

    def slow(texts: list[str]) -> torch.Tensor:
        entered.set()
        gate.wait(30)
        return encode(texts)

    monkeypatch.setattr(server.service.model.encoder, "encode_texts", slow)
    monkeypatch.setattr(server.service._batcher._queue, "maxsize", 2)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(server.search, "the first one")
        assert entered.wait(30)
        waiting = [pool.submit(server.search, f"waiting {n}") for n in range(5)]
        wait_for(lambda: sum(future.done() for future in waiting) == 3)
        refused = [future.result() for future in waiting if future.done()]
        assert [reply.status for reply in refused] == [503] * 3
        assert all(reply.headers["retry-after"] == "1" for reply in refused)
        gate.set()
        assert first.result().status == 200
        assert sum(future.result().status == 200 for future in waiting) == 2


def test_a_bug_is_one_plain_answer(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(texts: list[str]) -> torch.Tensor:
        raise RuntimeError("secret of /home/user")

    monkeypatch.setattr(server.service.model.encoder, "encode_texts", broken)
    reply = server.search("a text nobody knows")
    assert reply.status == 500 and "secret" not in reply.body.decode()
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    monkeypatch.undo()
    assert server.search("a text nobody knows").status == 200


def test_a_line_without_end_does_not_fill_memory(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        try:
            for _ in range(64):
                connection.sendall(b"GET /" + b"a" * 65536)
            received = connection.recv(1 << 12)
        except OSError:
            received = b"HTTP/1.1 400"
    assert received.startswith(b"HTTP/1.1 400")
    assert server.ask("/").status == 200


def test_json_of_the_page_is_no_script(server: Running) -> None:
    """Captions come as JSON and are set as text: a caption that is markup stays text."""
    source = server.ask("/static/app.js").body.decode()
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in source
    assert json.loads(server.search("a", 1).body)["images"][0]["caption"]
