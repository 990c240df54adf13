"""A FAISS index over features, for more images than an exact pass should read for every search.

It only proposes: what it proposes is scored again exactly from the stored features, and its recall beside the exact
search is measured when it is built.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm2clip.errors import ConfigError, StoreError
from llm2clip.files import atomic_path, read_json, sha256_file, write_json
from llm2clip.models.fingerprint import json_digest
from llm2clip.progress import Progress
from llm2clip.search.index import FeatureIndex, Found

_NAME, _RECORD = "faiss.index", "faiss.json"
_TRAINING_ROWS = 262_144
_CHUNK = 65_536
_PROPOSED = 8  # candidates that are scored again for each asked for
_PROBES, _SAMPLE, _DEPTH = 32, 256, 10


class ApproximateIndex:
    """`FeatureIndex` with the same answers most of the time, from a fraction of the reads.

    Args:
        exact: the features.
        faiss_index: inverted lists over them.
        recall: share of the exact first ten that it found for the sample of queries it was measured with.
    """

    def __init__(self, exact: FeatureIndex, faiss_index: Any, recall: float) -> None:
        self.exact, self.recall = exact, recall
        self._index = faiss_index

    def __len__(self) -> int:
        return len(self.exact)

    def feature_of(self, item: int) -> Tensor | None:
        """Feature (1, dim) of an item; None where it has none."""
        return self.exact.feature_of(item)

    def search(self, queries: Tensor, k: int) -> Found:
        """As `FeatureIndex.search`, over the items that the inverted lists propose."""
        queries = torch.nn.functional.normalize(queries.float(), dim=1)
        _, proposed = self._index.search(queries.numpy(), min(len(self), k * _PROPOSED))
        scores = torch.full((len(queries), k), -torch.inf)
        items = torch.full((len(queries), k), -1, dtype=torch.int64)
        for row, places in enumerate(proposed):
            places = np.sort(places[places >= 0])
            values = self.exact.features(places).double() @ queries[row].double()
            order = values.argsort(descending=True, stable=True)[:k]
            scores[row, : len(order)] = values[order].float()
            items[row, : len(order)] = torch.from_numpy(self.exact.items[places[order.numpy()]])
        return Found(scores, items)


def build_approximate(
    exact: FeatureIndex, path: Path, fingerprint: dict[str, Any], queries: Tensor | None = None
) -> ApproximateIndex:
    """The FAISS index in the directory `path`, built where there is none for exactly these features.

    Args:
        exact: the features.
        path: directory of the features' store.
        fingerprint: what the features depend on.
        queries: (n, dim) features to measure the recall with, of captions best: they lie elsewhere than images. None:
            a sample of the items themselves.

    Raises:
        ConfigError: FAISS is not installed.
        UserError: it cannot be written.
    """
    if importlib.util.find_spec("faiss") is None:
        raise ConfigError(
            "search.approximate_above: FAISS is not installed; pip install faiss-cpu, or leave it null for exact search"
        )
    identity = json_digest({"fingerprint": fingerprint, "rows": exact.digest(), "probes": _PROBES})
    if (ready := _load(exact, path, identity)) is not None:
        return ready
    index = _train(exact)
    found = ApproximateIndex(exact, index, 0.0)
    found.recall = _measure(exact, found, queries)
    import faiss

    with atomic_path(path / _NAME) as tmp:
        faiss.write_index(index, str(tmp))
    record = {"identity": identity, "sha256": sha256_file(path / _NAME), "recall": found.recall}
    write_json(path / _RECORD, record)
    return found


def _load(exact: FeatureIndex, path: Path, identity: str) -> ApproximateIndex | None:
    """What was built before; None where it is of other features, or damaged."""
    import faiss

    try:
        record = read_json(path / _RECORD, StoreError)
        if record["identity"] != identity or sha256_file(path / _NAME) != record["sha256"]:
            return None
        return ApproximateIndex(exact, faiss.read_index(str(path / _NAME)), float(record["recall"]))
    except (StoreError, OSError, KeyError, TypeError, RuntimeError):
        return None


def _train(exact: FeatureIndex) -> Any:
    import faiss

    rows = len(exact)
    lists = max(1, min(rows // 40, round(4 * math.sqrt(rows))))
    quantizer = faiss.IndexFlatIP(exact.dim)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, exact.dim, lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    index.nprobe = min(_PROBES, lists)
    sample = np.random.default_rng(0).permutation(rows)[: min(rows, _TRAINING_ROWS)]
    index.train(exact.features(np.sort(sample)).numpy())
    with Progress(rows, "building FAISS index", "images") as shown:
        for start in range(0, rows, _CHUNK):
            places = np.arange(start, min(start + _CHUNK, rows))
            index.add(exact.features(places).numpy())
            shown.update(len(places))
    return index


def _measure(exact: FeatureIndex, approximate: ApproximateIndex, queries: Tensor | None) -> float:
    """Share of the exact first ten that are found."""
    rows = len(exact)
    if queries is None:
        queries = exact.features(np.sort(np.random.default_rng(1).permutation(rows)[: min(rows, _SAMPLE)]))
    queries, depth = queries[:_SAMPLE], min(_DEPTH, rows)
    right, found = exact.search(queries, depth).items, approximate.search(queries, depth).items
    hits = (right[:, :, None] == found[:, None, :]).any(dim=2)
    return float(hits.float().mean())
