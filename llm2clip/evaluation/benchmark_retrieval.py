"""`llm2clip evaluate retrieval`: several models on several data sets, both directions, with intervals."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.errors import ConfigError, DataError
from llm2clip.evaluation.benchmark import (
    baseline_of,
    compare,
    places,
    setup_of,
    write_captions,
    write_results,
)
from llm2clip.evaluation.benchmark_report import retrieval_page
from llm2clip.evaluation.benchmark_samples import retrieval_samples
from llm2clip.evaluation.benchmark_tables import retrieval_tables
from llm2clip.evaluation.datasets import (
    ImageReader,
    Request,
    RetrievalData,
    open_dataset,
    open_own,
    open_strangers,
)
from llm2clip.evaluation.encoders import DualEncoder, EncoderOpener
from llm2clip.evaluation.encoding import check_images, encode_images, encode_texts
from llm2clip.evaluation.features import FeatureCache
from llm2clip.evaluation.measured import DIRECTIONS, Measured
from llm2clip.evaluation.ranking import pair_up, rank_directions, with_strangers
from llm2clip.evaluation.ranks import summarise
from llm2clip.settings import RetrievalSettings
from llm2clip.training.world import start_world


def evaluate_retrieval(settings: RetrievalSettings) -> dict[str, Any]:
    """Measure every model on every data set; print the tables and write the report.

    Features are kept in the cache: a job that was stopped goes on, and a model measured again costs only its ranks.
    Under torchrun the ranks share all work.

    Returns:
        What results.json holds: `retrieval` rows with recall, chance and 95 % intervals as shares of 1,
        `comparisons` of each model with the baseline, `datasets` and `setup`.

    Raises:
        ConfigError: no data set, model or output directory is given.
        DataError: files of a data set are missing or of another format than published.
        ModelError, StoreError: a model or its captions cannot be used.
    """
    begin = time.monotonic()
    data = open_all(settings)
    if settings.captions_out:
        count = write_captions(
            settings.captions_out, (t for one in data for c in one.captions for t in c.texts)
        )
        print(f"{count} different captions in {settings.captions_out}")
        return {"captions": count}
    out, place = places(settings)
    with start_world(settings.device, settings.threads) as world:
        cache = FeatureCache(place, world)
        opener = EncoderOpener(settings, world.device, place)
        strangers = open_strangers(settings.distractors) if settings.distractors else None
        measured = [
            Measured(one, captions, strangers=strangers, centred=settings.center)
            for one in data
            for captions in one.captions
        ]
        bad: dict[str, list[str]] = {}
        models: dict[str, Any] = {}
        for label in settings.models:
            encoder = opener.open(label)
            models[label] = encoder.describe()
            for one in data:
                encoder.check_texts([t for c in one.captions for t in c.texts], one.title)
            if strangers is not None:
                features, bad["distractors"] = encode_images(
                    encoder, strangers, cache, settings, what="distractors"
                )
                rows = features.rows(np.flatnonzero(features.valid()))
                for kind in measured:
                    kind.of_strangers[label] = rows
            for one in data:
                own = [kind for kind in measured if kind.data is one]
                bad[one.name] = _measure(encoder, one, own, cache, settings)
            del encoder
        results = _results(measured, settings) | {
            "datasets": {one.name: _describe(one, bad[one.name]) for one in data}
            | _describe_strangers(strangers, bad.get("distractors", [])),
            "setup": setup_of(settings, models, time.monotonic() - begin, world.size),
        }
        if world.is_main:
            _write(out, results, measured, settings)
        world.barrier()
    return results


def open_all(settings: RetrievalSettings) -> list[RetrievalData]:
    """Every data set, its captions read and its images looked for.

    Raises:
        ConfigError: none is given, or a setting names one that is not.
        DataError: files are missing or of another format.
    """
    if not settings.datasets and not settings.data.val:
        raise ConfigError(
            "nothing to retrieve from: set datasets, for example datasets.coco=/data/coco, or data.val"
        )
    for name, group in (("images", settings.images), ("splits", settings.splits)):
        if unknown := sorted(set(group) - set(settings.datasets)):
            raise ConfigError(f"{name}: {', '.join(unknown)} is not among the datasets given")
    found = []
    for name, root in settings.datasets.items():
        request = Request(
            root=Path(root).expanduser(),
            images=Path(settings.images[name]).expanduser() if name in settings.images else None,
            split=settings.splits.get(name, ""),
            per_image=settings.captions_per_image,
        )
        found.append(open_dataset(name, request))
    if settings.data.val:
        found.append(open_own(replace(settings.data, max_bad_share=settings.max_bad_share)))
    chosen = [one.head(settings.limit) for one in found]
    for one in chosen:
        check_images(one.images, settings, one.title)
    return chosen


def _measure(
    encoder: DualEncoder,
    data: RetrievalData,
    measured: list[Measured],
    cache: FeatureCache,
    settings: RetrievalSettings,
) -> list[str]:
    images, bad = encode_images(encoder, data.images, cache, settings, what=data.title)
    usable = images.valid()
    for kind in measured:
        texts = encode_texts(encoder, kind.captions.texts, cache, what=kind.title)
        if kind.pairing is None:
            kind.pairing = pair_up(kind.captions, usable, equal_match=data.equal_match)
            if encoder.label in kind.of_strangers:
                kind.pairing = with_strangers(kind.pairing, len(kind.of_strangers[encoder.label]))
        kind.texts[encoder.label], kind.images[encoder.label] = texts, images
        changed = len(kind.gallery(encoder.label)) != len(kind.pairing.image_groups)
        if changed or not usable[kind.pairing.image_rows].all():
            raise DataError(f"images of {data.title} changed while the models were measured; start again")
        kind.ranks[encoder.label] = rank_directions(
            kind.queries(encoder.label), kind.gallery(encoder.label), kind.pairing, cache.world
        )
    return bad


def _results(measured: list[Measured], settings: RetrievalSettings) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    comparisons: list[dict[str, Any]] = []
    baseline = baseline_of(settings)
    for kind in measured:
        assert kind.pairing is not None
        name = {"dataset": kind.data.name, "captions": kind.captions.kind, "title": kind.title}
        for direction in DIRECTIONS:
            clusters = kind.pairing.text_images if direction == "text → image" else None
            ranks = kind.of(direction)
            for label, own in ranks.items():
                scores = summarise(
                    own,
                    ks=settings.ks,
                    seed=settings.seed,
                    resamples=settings.resamples,
                    clusters=clusters,
                )
                rows.append({**name, "direction": direction, "model": label, "scores": scores})
            if baseline is not None:
                k = settings.ks[0]
                values = {label: own.recall(k) for label, own in ranks.items()}
                comparisons += [
                    {**name, "direction": direction, "measure": f"R@{k}", **row}
                    for row in compare(values, baseline, clusters, settings)
                ]
    return {"retrieval": rows, "comparisons": comparisons}


def _describe(data: RetrievalData, bad: list[str]) -> dict[str, Any]:
    return {
        "title": data.title,
        "images": len(data.images),
        "captions": {captions.kind: len(captions.texts) for captions in data.captions},
        "equal captions match": data.equal_match,
        "unusable images": bad,
        "credit": dict(data.meta),
    }


def _describe_strangers(images: ImageReader | None, bad: list[str]) -> dict[str, Any]:
    if images is None:
        return {}
    return {"distractors": {"title": "distractors", "images": len(images), "unusable images": bad}}


def _write(
    out: Path, results: Mapping[str, Any], measured: list[Measured], settings: RetrievalSettings
) -> None:
    shown = retrieval_samples(measured, settings)
    tables = retrieval_tables(results)
    write_results(out, results, tables, retrieval_page(results, tables, shown))
