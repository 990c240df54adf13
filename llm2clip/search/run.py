"""`llm2clip search`: load the model, build the index, serve the page."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm2clip.errors import BadSampleError, ConfigError, DataError
from llm2clip.models.fingerprint import json_digest
from llm2clip.search.building import caption_features, feature_width, image_features
from llm2clip.search.collection import (
    Captions,
    Collection,
    captions_of,
    main_texts,
    open_captions,
    open_collection,
)
from llm2clip.search.guard import is_loopback, known_hosts
from llm2clip.search.index import FeatureIndex, build_index
from llm2clip.search.model import SearchModel, open_model
from llm2clip.search.service import ImageSearch, SearchService
from llm2clip.settings import SearchSettings
from llm2clip.training.world import resolve_device

_CONNECTIONS = 512  # more at a time are told to come back
_EXAMPLES, _PROBED = 6, 200
_FAISS_QUERIES = 256


def run_search(settings: SearchSettings) -> None:
    """Build the index and, unless `settings.build_only`, serve the page until the process is stopped.

    Raises:
        ConfigError: a setting or a package is missing, or the port is taken.
        DataError: the images cannot be used.
        ModelError, StoreError: the model, its LLM or the index cannot be used.
    """
    if not settings.build_only:
        for package in ("starlette", "uvicorn"):
            if importlib.util.find_spec(package) is None:
                raise ConfigError(f"{package} is not installed; pip install 'llm2clip[app]'")
    listener = None if settings.build_only else listen(settings.host, settings.port)
    try:
        service, info = open_service(settings)
        if listener is None:
            print(f"{info['images']} images indexed in {info['index']}", file=sys.stderr)
            service.close()
        else:
            serve(service, info, settings, listener)
    finally:
        if listener is not None:
            listener.close()


def open_service(settings: SearchSettings) -> tuple[SearchService, dict[str, Any]]:
    """The search over the images of `settings`, its index built, and what the page says of both."""
    if settings.threads > 0:
        torch.set_num_threads(settings.threads)
    collection = open_collection(settings.images)
    model = open_model(settings, resolve_device(settings.device))
    place = index_directory(settings, model)
    dim = feature_width(model.encoder)
    limit = settings.caption_limit
    captions = (
        open_captions(settings.captions, settings.caption_fields, limit)
        if settings.captions
        else captions_of(collection, settings.caption_fields, limit)
    )
    images = _image_index(settings, model, collection, place / "images", dim)
    if not len(images):
        raise DataError(f"none of the {len(collection)} images of {collection.name} can be used")
    texts = _caption_index(settings, model, captions, place / "captions", dim)
    search, recall = _search(settings, model, images, texts, place / "images")
    service = SearchService(model, collection, search, captions, texts, waiting=settings.queue)
    info = {
        "model": "/".join(Path(settings.model).parts[-2:]),
        "images": len(images),
        "captions": len(captions),
        "collection": collection.name,
        "index": str(place),
        "dim": dim,
        "max_tokens": None if model.llm is None else model.llm.max_length,
        "exact": recall is None,
        "recall": recall,
        "examples": examples(collection),
    }
    return service, info


def index_directory(settings: SearchSettings, model: SearchModel) -> Path:
    """Where the index is: as set, else beside the model, under a name of its own for other images or weights.

    Raises:
        ConfigError: the model is no directory, and `index` is empty.
    """
    if settings.index:
        return Path(settings.index).expanduser()
    if model.home is None:
        raise ConfigError(
            f"index is empty, and {settings.model} is no directory; give a directory, index=DIR"
        )
    paths = [os.path.abspath(os.path.expanduser(path)) for path in settings.images]
    digest = json_digest([paths, settings.dtype, model.encoder.image_identity()])
    name = "".join(c if c.isalnum() else "-" for c in Path(paths[0]).name).strip("-")[:40]
    return model.home / "search" / f"{name or 'images'}-{digest[:8]}"


def _image_index(
    settings: SearchSettings, model: SearchModel, collection: Collection, place: Path, dim: int
) -> FeatureIndex:
    compute = image_features(
        model.encoder,
        collection,
        batch_size=settings.batch_size,
        max_bad_share=settings.max_bad_share,
        threads=max(1, torch.get_num_threads()),
    )
    return build_index(
        place,
        collection.addresses(),
        compute,
        dim=dim,
        fingerprint=model.encoder.image_identity(),
        title="images",
        dtype=settings.dtype,
        commit_rows=settings.commit_rows,
        resident_bytes=settings.resident_mib << 20,
    )


def _caption_index(
    settings: SearchSettings, model: SearchModel, captions: Captions, place: Path, dim: int
) -> FeatureIndex | None:
    if not len(captions):
        return None
    return build_index(
        place,
        captions.addresses(),
        caption_features(model.encoder, captions),
        dim=dim,
        fingerprint=model.encoder.text_identity(),
        title="captions",
        dtype=settings.dtype,
        commit_rows=settings.commit_rows,
        resident_bytes=settings.resident_mib << 20,
    )


def _search(
    settings: SearchSettings,
    model: SearchModel,
    images: FeatureIndex,
    texts: FeatureIndex | None,
    place: Path,
) -> tuple[ImageSearch, float | None]:
    """Exact search, or from `approximate_above` on FAISS and its recall."""
    least = settings.approximate_above
    if least is None or len(images) < least:
        return images, None
    from llm2clip.search.approximate import build_approximate

    queries = None
    if texts is not None:
        places = np.linspace(0, len(texts) - 1, min(len(texts), _FAISS_QUERIES)).astype(np.int64)
        queries = texts.features(places)
    index = build_approximate(images, place, model.encoder.image_identity(), queries)
    return index, index.recall


def examples(collection: Collection) -> list[dict[str, str]]:
    """Pairs of a short and a long text of the same image, which the page offers for a first try."""
    found: list[dict[str, str]] = []
    for number in range(0, len(collection), max(1, len(collection) // _PROBED)):
        try:
            texts = sorted(main_texts(collection.describe(number)), key=len)
        except BadSampleError:
            continue
        if len(texts) > 1 and len(texts[0]) < len(texts[-1]):
            found.append({"short": texts[0], "long": texts[-1]})
    return found[:: max(1, len(found) // _EXAMPLES)][:_EXAMPLES]


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, taken before anything is loaded.

    Raises:
        ConfigError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
        listener.listen(_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another with host=ADDRESS or port=NUMBER "
            "(0: any free one)"
        ) from None
    return listener


def serve(
    service: SearchService, info: dict[str, Any], settings: SearchSettings, listener: socket.socket
) -> None:
    """Serve the page on an open socket until SIGINT or SIGTERM."""
    host, port = settings.host, int(listener.getsockname()[1])
    shown = "127.0.0.1" if host in ("", "0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    print(f"{info['images']} images, {info['captions']} captions: http://{shown}:{port}", file=sys.stderr)
    if not is_loopback(host):
        print(
            "WARNING: anyone who reaches this address can search and see the images; there is no password. Names other "
            "than the address itself need allowed_hosts=[NAME]",
            file=sys.stderr,
        )
    server = make_server(service, info, settings)
    try:
        server.run(sockets=[listener])
    finally:
        service.close()


def make_server(service: SearchService, info: dict[str, Any], settings: SearchSettings) -> Any:
    """The web server (uvicorn's) over the application."""
    import uvicorn

    from llm2clip.search.app import SearchApp

    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    app = SearchApp(
        service,
        info,
        hosts=known_hosts(settings.host, settings.allowed_hosts),
        max_upload_bytes=settings.max_upload_mib << 20,
    )
    config = uvicorn.Config(
        app.asgi(),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=20,
        timeout_graceful_shutdown=5,
    )
    return uvicorn.Server(config)
