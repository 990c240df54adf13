"""`llm2clip evaluate caption-retrieval`: what text encoders know of captions, side by side.

Caption retrieval accuracy (CRA) after the corrected protocol of LLM2CLIP (arXiv 2411.04997v6, table A1): the first two
captions of every image look for each other among those of all images, in both directions. Beside it stand alignment and
uniformity, throughput, translated captions, prefixes and stored precisions, and the correlation with human scores.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip.data.store_format import bytes_per_caption
from llm2clip.errors import ConfigError
from llm2clip.evaluation.benchmark import write_captions, write_results
from llm2clip.evaluation.bootstrap import paired_difference
from llm2clip.evaluation.caption_benchmark_report import caption_page
from llm2clip.evaluation.caption_benchmark_tables import caption_tables
from llm2clip.evaluation.caption_measures import (
    Floats,
    PairRanks,
    alignment,
    cosine_of_pairs,
    percentile_interval,
    rank_pairs,
    spearman,
    spearman_intervals,
    through_store,
    uniformity,
)
from llm2clip.evaluation.caption_retrieval import CaptionPairs
from llm2clip.evaluation.caption_samples import sample_queries
from llm2clip.evaluation.captions import CaptionData, open_captions
from llm2clip.evaluation.captions.similarity import SentencePairs, read_sentence_pairs
from llm2clip.evaluation.ranks import summarise
from llm2clip.evaluation.text_encoder import Encoded
from llm2clip.evaluation.text_encoders import encode_all, encoder_openers
from llm2clip.settings import CaptionRetrievalSettings, StoreDtype
from llm2clip.training.world import resolve_device

_FULL: StoreDtype = "fp32"


@dataclass
class _Job:
    """Everything there is to measure, and what was found so far.

    Attributes:
        data: data set -> its captions.
        similar: name -> sentence pairs.
        place: text -> its row among the embeddings.
        hits: (set, pairs, direction) -> encoder -> (Q,) probability that a right answer comes first.
        cosines: sentence pairs -> encoder -> cosine similarities.
        rows: lists of the results by name.
    """

    settings: CaptionRetrievalSettings
    data: dict[str, CaptionData]
    similar: dict[str, SentencePairs]
    place: dict[str, int]
    hits: dict[tuple[str, str, str], dict[str, Floats]] = field(default_factory=dict)
    cosines: dict[str, dict[str, Floats]] = field(default_factory=dict)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, what: str, row: dict[str, Any]) -> None:
        self.rows.setdefault(what, []).append(row)

    def of(self, embeddings: Tensor, texts: list[str]) -> Tensor:
        """The embeddings (n, D) of some texts."""
        return embeddings[[self.place[text] for text in texts]]


def evaluate_captions(settings: CaptionRetrievalSettings) -> dict[str, Any]:
    """Measure every encoder on every set; print the tables and write the report.

    Returns:
        What results.json holds. Shares are of 1, intervals are 95 %: `caption_retrieval` (recall, chance), `geometry`
        (alignment, uniformity), `throughput`, `reduced` (prefixes and precisions), `similarity` (Spearman),
        `comparisons` with the baseline, `data` (with what was left out and why) and `setup`.

    Raises:
        ConfigError: no set, encoder or output directory is given.
        DataError: a file is missing, damaged or of no format known.
        ModelError, StoreError: an encoder cannot be used, or a store lacks captions.
    """
    begin = time.monotonic()
    if not settings.out and not settings.captions_out:
        raise ConfigError("out is empty; give the directory of results.json, the tables and report.html")
    if not settings.sets and not settings.sts:
        raise ConfigError(
            "nothing to retrieve: set sets, for example sets.coco=annotations/captions_val2017.json, or sts"
        )
    if settings.threads > 0:
        torch.set_num_threads(settings.threads)
    data = {name: open_captions(name, settings) for name in settings.sets}
    similar = {name: read_sentence_pairs(name, Path(path)) for name, path in settings.sts.items()}
    for name, one in data.items():
        for reason, keys in one.left_out.items():
            print(f"{name}: {len(keys)} of {one.images} images left out, {reason}", file=sys.stderr)
    texts = [text for one in data.values() for text in one.texts()]
    texts = list(
        dict.fromkeys([*texts, *(t for pairs in similar.values() for t in (*pairs.first, *pairs.second))])
    )
    if settings.captions_out:
        count = write_captions(settings.captions_out, texts)
        print(f"{count} different captions in {settings.captions_out}")
        return {"captions": count}
    openers = encoder_openers(settings, resolve_device(settings.device))
    if settings.baseline and settings.baseline not in openers:
        raise ConfigError(f"baseline: {settings.baseline!r} is none of the encoders: {', '.join(openers)}")
    job = _Job(settings, data, similar, {text: row for row, text in enumerate(texts)})
    models: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    for label, encoded, about in encode_all(openers, texts):
        models[label] = about | {"dimension": encoded.embeddings.shape[1]}
        _measure(job, label, encoded)
        if label == list(openers)[-1] and data:
            samples = sample_queries(job.data, partial(job.of, encoded.embeddings), settings)
    baseline = settings.baseline or next(iter(openers))
    _compare(job, baseline)
    results: dict[str, Any] = {
        **{name: job.rows.get(name, []) for name in _LISTS},
        "data": {name: _describe(one) for name, one in data.items()},
        "sentence pairs": {
            name: {"pairs": len(one.scores), "left out": one.left_out} for name, one in similar.items()
        },
        "setup": {
            "models": models,
            "baseline": baseline,
            "settings": asdict(settings),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "seconds": round(time.monotonic() - begin, 1),
        },
    }
    out = Path(settings.out)
    tables = caption_tables(results)
    write_results(out, results, tables, caption_page(results, tables, samples))
    return results


_LISTS = ("caption_retrieval", "geometry", "throughput", "reduced", "similarity", "comparisons")


def _measure(job: _Job, label: str, encoded: Encoded) -> None:
    values = encoded.embeddings
    rate = None if not encoded.seconds else len(values) / encoded.seconds
    job.add(
        "throughput",
        {
            "encoder": label,
            "captions": len(values),
            "seconds": encoded.seconds,
            "captions_per_second": rate,
            "tokens_per_second": encoded.tokens / encoded.seconds
            if encoded.tokens and encoded.seconds
            else None,
            "tokens": encoded.tokens,
            "truncated": encoded.truncated,
        },
    )
    for name, data in job.data.items():
        for pairs in data.pairs:
            first, second = job.of(values, pairs.first), job.of(values, pairs.second)
            where = {"set": name, "pairs": pairs.name, "encoder": label}
            ranks = rank_pairs(first, second, pairs, shared=job.settings.shared)
            for direction, own in zip(pairs.labels, (ranks.forward, ranks.backward), strict=True):
                scores = summarise(own, seed=job.settings.seed, resamples=job.settings.resamples)
                job.add("caption_retrieval", where | {"direction": direction, "scores": scores})
                job.hits.setdefault((name, pairs.name, direction), {})[label] = own.recall(1)
            job.add(
                "geometry",
                where | {"alignment": alignment(first, second), "uniformity": uniformity(second)},
            )
            _reduce(job, where, pairs, (first, second), ranks)
    for name, pairs_of in job.similar.items():
        first, second = job.of(values, pairs_of.first), job.of(values, pairs_of.second)
        job.cosines.setdefault(name, {})[label] = cosine_of_pairs(first, second)


def _reduce(
    job: _Job, where: Mapping[str, Any], pairs: CaptionPairs, sides: tuple[Tensor, Tensor], full: PairRanks
) -> None:
    """Prefixes of the embeddings, and what a store of lower precision makes of them."""
    settings, width = job.settings, sides[0].shape[1]
    for dim in settings.dims:
        if dim > width:
            job.add(
                "reduced",
                {**where, "dim": dim, "dtype": _FULL, "left out": f"the encoder gives {width} values"},
            )
    dims = [*(dim for dim in settings.dims if dim < width), width]
    dtypes = list(dict.fromkeys((_FULL, *settings.dtypes)))
    for dim in dims:
        for dtype in dtypes:
            if (dim, dtype) == (width, _FULL) and (len(dims), len(dtypes)) == (1, 1):
                continue
            first, second = (through_store(side[:, :dim].contiguous(), dtype) for side in sides)
            ranks = rank_pairs(first, second, pairs, shared=settings.shared)
            found: dict[str, Any] = {}
            for direction, own, whole in zip(
                pairs.labels, (ranks.forward, ranks.backward), (full.forward, full.backward), strict=True
            ):
                change = paired_difference(
                    own.recall(1), whole.recall(1), resamples=settings.resamples, seed=settings.seed
                )
                recall = {str(k): float(own.recall(k).mean()) for k in (1, 5, 10)}
                found[direction] = {
                    "recall": recall, "difference": change.mean, "interval": [change.low, change.high]
                }  # fmt: skip
            job.add(
                "reduced",
                {
                    **where,
                    "dim": dim,
                    "dtype": dtype,
                    "bytes": bytes_per_caption(dim, dtype),
                    "directions": found,
                },
            )


def _compare(job: _Job, baseline: str) -> None:
    settings = job.settings
    for (name, pairs, direction), by_encoder in job.hits.items():
        for label, values in by_encoder.items():
            if label != baseline:
                found = paired_difference(
                    values, by_encoder[baseline], resamples=settings.resamples, seed=settings.seed
                )
                job.add(
                    "comparisons",
                    {
                        "title": _title(name, pairs), "direction": direction, "model": label, "baseline": baseline,
                        "measure": "R@1", "difference": found.mean, "interval": [found.low, found.high],
                        "certain": found.certain,
                    },
                )  # fmt: skip
    for name, by_encoder in job.cosines.items():
        scores = job.similar[name].scores
        labels = list(by_encoder)
        drawn = spearman_intervals(
            list(by_encoder.values()), scores, resamples=settings.resamples, seed=settings.seed
        )
        for label, samples in zip(labels, drawn, strict=True):
            correlation = spearman(by_encoder[label], scores)
            job.add(
                "similarity",
                {"set": name, "encoder": label, "pairs": len(scores), "spearman": correlation,
                 "interval": percentile_interval(samples)},
            )  # fmt: skip
            if label != baseline:
                change = samples - drawn[labels.index(baseline)]
                low, high = percentile_interval(change)
                job.add(
                    "comparisons",
                    {
                        "title": name, "direction": "sentence pairs", "model": label, "baseline": baseline,
                        "measure": "Spearman",
                        "difference": correlation - spearman(by_encoder[baseline], scores),
                        "interval": [low, high], "certain": low > 0 or high < 0,
                    },
                )  # fmt: skip


def _title(name: str, pairs: str) -> str:
    return name if pairs == "captions" else f"{name}, {pairs}"


def _describe(data: CaptionData) -> dict[str, Any]:
    return {
        "images": data.images,
        "selected": data.selected,
        "pairs": {pairs.name: len(pairs.first) for pairs in data.pairs},
        "equal captions": data.equal,
        "empty captions": data.empty,
        "left out": {
            reason: {"images": len(keys), "first": keys[:20]} for reason, keys in data.left_out.items()
        },
        "credit": data.credit,
    }
