"""The web page over the search: routes, their limits, and the server that runs them."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from concurrent.futures import Future
from importlib import resources
from typing import Any

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llm2clip.data.images import decode_image
from llm2clip.errors import BadSampleError
from llm2clip.search.batching import BusyError
from llm2clip.search.collection import main_texts
from llm2clip.search.guard import Guard
from llm2clip.search.service import Answer, Query, SearchService
from llm2clip_kernels.similarity_topk.op import MAX_K

MAX_TEXT_BYTES = 256 << 10
_SECONDS_TO_SEND, _SECONDS_TO_ANSWER = 30.0, 120.0
_DECODERS, _PICTURES = 2, 4  # threads: an upload may take 270 MB while it is decoded
_FILES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_SHOWN_META = ("license", "licence", "attribution", "credit", "author", "book", "source", "tileset")


class SearchApp:
    """The routes; `asgi()` is the application.

    Nothing that a client sends is ever used as a path: images are asked for by number, the page's own files by names
    that are compared with a list.

    Args:
        service: the search.
        info: what the page says of model and images.
        hosts: names under which the server is reached.
        max_upload_bytes: largest image that may be sent.
    """

    def __init__(
        self, service: SearchService, info: dict[str, Any], *, hosts: set[str], max_upload_bytes: int
    ) -> None:
        self._service, self._hosts, self._max_upload = service, hosts, max_upload_bytes
        self._info = {**info, "max_upload_bytes": max_upload_bytes, "most": MAX_K}
        place = resources.files("llm2clip.search") / "static"
        self._decoding = anyio.CapacityLimiter(_DECODERS)
        self._picturing = anyio.CapacityLimiter(_PICTURES)
        self._static = {name: (place / name).read_bytes() for name in _FILES}

    def asgi(self) -> Guard:
        """The application, guarded on the outside, so that errors too carry the headers."""
        application = Starlette(
            routes=[
                Route("/", self._page),
                Route("/static/{name}", self._file),
                Route("/api/info", self._show_info),
                Route("/api/search", self._search_text, methods=["POST"]),
                Route("/api/search/image", self._search_image, methods=["POST"]),
                Route("/api/similar/{item:int}", self._similar),
                Route("/api/item/{item:int}", self._item),
                Route("/thumbnail/{item:int}", self._thumbnail),
                Route("/image/{item:int}", self._image),
            ],
            exception_handlers={HTTPException: _json_error, 500: _failed},
        )
        return Guard(application, self._hosts)

    async def _page(self, request: Request) -> Response:
        return Response(self._static["index.html"], media_type=_FILES["index.html"])

    async def _file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _FILES:
            raise HTTPException(404, "no such file")
        return Response(self._static[name], media_type=_FILES[name])

    async def _show_info(self, request: Request) -> Response:
        return JSONResponse(self._info)

    async def _search_text(self, request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise HTTPException(415, "expected application/json")
        body = await _body(request, MAX_TEXT_BYTES)
        try:
            asked = json.loads(body)
            text, count = asked["text"], asked.get("count", 24)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise HTTPException(400, 'expected {"text": "...", "count": 24}') from None
        if not isinstance(text, str) or not text.strip():
            raise HTTPException(400, "the text is empty")
        # half of a surrogate pair, which JSON may carry, is no text to a tokenizer
        text = text.encode("utf-8", "replace").decode("utf-8").strip()
        answer = await self._ask(Query("text", text, _count(count)))
        tokens = await anyio.to_thread.run_sync(self._service.model.count_tokens, text)
        read = {} if tokens is None else {"tokens": tokens[0], "cut": tokens[1]}
        return await self._answer(answer, {"words": len(text.split()), **read})

    async def _search_image(self, request: Request) -> Response:
        body = await _body(request, self._max_upload)

        def decode() -> Any:
            return self._service.pixels(decode_image(body, key="the image that was sent"))

        try:
            pixels = await anyio.to_thread.run_sync(decode, limiter=self._decoding)
        except BadSampleError as problem:
            raise HTTPException(415, f"not usable: {problem.reason}") from None
        answer = await self._ask(Query("pixels", pixels, _count(request.query_params.get("count", 24))))
        return await self._answer(answer, {})

    async def _similar(self, request: Request) -> Response:
        item = self._known_item(request)
        answer = await self._ask(Query("item", item, _count(request.query_params.get("count", 24))))
        return await self._answer(answer, {})

    async def _item(self, request: Request) -> Response:
        item = self._known_item(request)
        sample = await anyio.to_thread.run_sync(self._service.describe, item)
        meta = {name: str(sample.meta[name]) for name in _SHOWN_META if sample.meta.get(name)}
        captions = {name: list(texts) for name, texts in sample.captions.items()}
        return JSONResponse({"item": item, "key": sample.key, "captions": captions, "meta": meta})

    async def _thumbnail(self, request: Request) -> Response:
        return await self._picture(request, self._service.thumbnail)

    async def _image(self, request: Request) -> Response:
        return await self._picture(request, self._service.picture)

    async def _picture(self, request: Request, make: Callable[[int], bytes]) -> Response:
        item = self._known_item(request)
        try:
            data = await anyio.to_thread.run_sync(make, item, limiter=self._picturing)
        except BadSampleError as problem:
            raise HTTPException(404, f"not readable any more: {problem.reason}") from None
        kind = "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
        return Response(data, media_type=kind, headers={"Cache-Control": "private, max-age=3600"})

    def _known_item(self, request: Request) -> int:
        item = int(request.path_params["item"])
        if not self._service.holds(item):
            raise HTTPException(404, "no such image")
        return item

    async def _ask(self, query: Query) -> Answer:
        try:
            future: Future[Answer] = self._service.submit(query)
        except BusyError as problem:
            raise HTTPException(503, str(problem), headers={"Retry-After": "1"}) from None
        try:
            with anyio.fail_after(_SECONDS_TO_ANSWER):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise HTTPException(503, "the answer takes too long", headers={"Retry-After": "5"}) from None

    async def _answer(self, answer: Answer, query: dict[str, Any]) -> Response:
        service = self._service

        def content() -> dict[str, Any]:
            images = [
                {"item": item, "score": round(score, 4), **_title(service, item)}
                for item, score in answer.images
            ]
            captions = [
                {
                    "text": service.captions.texts[number],
                    "score": round(score, 4),
                    "item": int(service.captions.image[number]),
                }
                for number, score in answer.captions
            ]
            seconds = {
                "encode": round(answer.encode_seconds, 4),
                "compare": round(answer.compare_seconds, 4),
            }
            return {"query": query, "images": images, "captions": captions, "seconds": seconds}

        return JSONResponse(await anyio.to_thread.run_sync(content))


def _title(service: SearchService, item: int) -> dict[str, str]:
    """Name of an image and the shortest of its captions."""
    sample = service.describe(item)
    return {"key": sample.key, "caption": min(main_texts(sample), key=len, default="")}


def _count(value: object) -> int:
    try:
        count = int(str(value))
    except ValueError:
        count = 0
    if not 1 <= count <= MAX_K:
        raise HTTPException(400, f"count: expected 1 to {MAX_K}")
    return count


async def _body(request: Request, limit: int) -> bytes:
    """The whole body; refused as soon as it is known to be too large, or when it takes too long to come."""
    too_large = HTTPException(413, f"larger than the {limit} bytes allowed")
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > limit:
        raise too_large
    received = io.BytesIO()
    try:
        with anyio.fail_after(_SECONDS_TO_SEND):
            async for part in request.stream():
                if received.tell() + len(part) > limit:
                    raise too_large
                received.write(part)
    except TimeoutError:
        raise HTTPException(408, "the request came too slowly") from None
    except ClientDisconnect:
        raise HTTPException(400, "the request ended early") from None
    return received.getvalue()


async def _json_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    # the log has the traceback; a client learns nothing of paths and code
    return JSONResponse({"error": "the search failed; the server's log says why"}, 500)
