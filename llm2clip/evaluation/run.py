"""`llm2clip evaluate`: tables, results.json and report.html for a pair of trained stages."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from llm2clip.data.store import EmbeddingStore
from llm2clip.errors import ConfigError, ModelError, StoreError
from llm2clip.evaluation import samples as pictures
from llm2clip.evaluation.caption_retrieval import (
    CaptionEmbedder,
    base_encoder,
    caption_pairs,
    caption_rows,
    caption_texts,
    encode,
)
from llm2clip.evaluation.gallery import Gallery, image_features, open_gallery
from llm2clip.evaluation.report import write_report
from llm2clip.evaluation.retrieval import image_text_rows, text_sides
from llm2clip.evaluation.setup import attribution, find_metrics, stage_seconds
from llm2clip.evaluation.tables import render_text, result_tables
from llm2clip.files import write_json
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.progress import format_seconds
from llm2clip.settings import EvaluateSettings
from llm2clip.training.world import resolve_device

RESULTS_NAME, REPORT_NAME = "results.json", "report.html"


def evaluate(settings: EvaluateSettings, *, metrics: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """Measure what the stages gained on `settings.data.val`; print the tables and write the report.

    Captions alone are measured when `model` is empty, images and captions alone when `llm.path` is empty
    (caption embeddings then come from the store).

    Args:
        settings: what to evaluate.
        metrics: curve name -> metrics.jsonl for the report; None looks beside the adapter and the model.

    Returns:
        What results.json holds: `caption_retrieval` and `retrieval` rows with recall, chance and 95 %
        intervals as shares of 1, and `setup`.

    Raises:
        ConfigError: no output directory, or nothing to evaluate is given.
        StoreError: the store was made by another encoder than the model or the LLM, or lacks captions.
    """
    if not settings.out:
        raise ConfigError("out is empty; give the directory of results.json and report.html")
    if not settings.model and not settings.llm.path and not settings.store:
        raise ConfigError("nothing to evaluate: set model (CLIP stage), llm.path (captions), or both")
    if settings.threads > 0:
        torch.set_num_threads(settings.threads)
    begin = time.monotonic()
    device = resolve_device(settings.device)
    gallery = open_gallery(settings.data, settings.gallery)
    model = _load_model(settings, device)
    store = EmbeddingStore.open(settings.store) if settings.store else None
    if model is not None and store is not None and model.fingerprint is not None:
        store.check_fingerprint(model.fingerprint)
    encoder = _load_encoder(settings, device)
    if model is not None and store is None and encoder is not None:
        _require_same_encoder(model, encoder)
    tuned_encoder = encoder if _adapter(settings) or store is None else None
    embedder = CaptionEmbedder(store, tuned_encoder, token_budget=settings.token_budget)
    tuned = bool(_adapter(settings)) or (store is not None and _differs(store, encoder))

    captions = _caption_retrieval(settings, gallery, encoder, embedder, tuned=tuned)
    images: list[dict[str, Any]] = []
    shown: pictures.ReportSamples | None = None
    if model is not None:
        gallery, features = image_features(model, gallery, batch_size=settings.batch_size)
        sides = text_sides(model, gallery.items, embedder)
        if not sides:
            raise ConfigError("no kind of caption has two items with an image; check data.captions")
        for side in sides:
            images += image_text_rows(features, side, seed=settings.seed)
        shown = pictures.collect_samples(gallery, features, sides, seed=settings.seed)
    results = {
        "caption_retrieval": captions,
        "retrieval": images,
        "setup": {
            "items": len(gallery.items),
            "bad_samples": len(gallery.bad),
            "bad_examples": gallery.bad[:10],
            "settings": asdict(settings),
            "model": _describe(model),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "seconds": stage_seconds(settings) | {"evaluation": round(time.monotonic() - begin, 1)},
        },
    }
    out = Path(settings.out)
    write_json(out / RESULTS_NAME, results)
    write_report(
        out / REPORT_NAME,
        title="LLM2CLIP report",
        results=results,
        metrics=find_metrics(settings) if metrics is None else metrics,
        samples=shown,
        attribution=attribution(settings.data, gallery.items),
    )
    for table in result_tables(results):
        print(f"\n{render_text(table)}")
    print(f"\n{format_seconds(time.monotonic() - begin)} for the evaluation. Report: {out / REPORT_NAME}")
    return results


def _load_model(settings: EvaluateSettings, device: torch.device) -> LLM2CLIP | None:
    if not settings.model:
        return None
    return LLM2CLIP.from_pretrained(result_directory(settings.model, "config.json"), device)


def _load_encoder(settings: EvaluateSettings, device: torch.device) -> CaptionEncoder | None:
    if not settings.llm.path:
        return None
    adapter = _adapter(settings)
    chosen = str(result_directory(adapter, "adapter_config.json")) if adapter else None
    return CaptionEncoder.from_settings(replace(settings.llm, adapter=chosen), device)


def result_directory(path: str, marker: str) -> Path:
    """`path` itself or the `result` of the run directory `path`: the one that holds `marker`."""
    given = Path(path)
    return (
        given / "result" if not (given / marker).exists() and (given / "result" / marker).exists() else given
    )


def _adapter(settings: EvaluateSettings) -> str:
    return settings.llm_adapter or settings.llm.adapter or ""


def _differs(store: EmbeddingStore, base: CaptionEncoder | None) -> bool:
    # the store of the base model itself holds nothing that was tuned
    return base is None or store.fingerprint != base.fingerprint()


def _require_same_encoder(model: LLM2CLIP, encoder: CaptionEncoder) -> None:
    if model.fingerprint is not None and model.fingerprint != encoder.fingerprint():
        raise ModelError(
            "the model was trained on embeddings of another caption encoder than llm.path and llm_adapter "
            "give. Use the LLM, adapter and llm settings of `llm2clip embed`, or set store to its embeddings."
        )


def _caption_retrieval(
    settings: EvaluateSettings,
    gallery: Gallery,
    encoder: CaptionEncoder | None,
    embedder: CaptionEmbedder,
    *,
    tuned: bool,
) -> list[dict[str, Any]]:
    pairs = caption_pairs(gallery)
    if not pairs:
        print("no item has two different captions: caption retrieval is left out", file=sys.stderr)
        return []
    texts = caption_texts(pairs)
    rows: list[dict[str, Any]] = []
    if encoder is not None:
        for name, bidirectional in (("base LLM, causal", False), ("base LLM, bidirectional", True)):
            with base_encoder(encoder, bidirectional=bidirectional):
                values = encode(encoder, texts, settings.token_budget, name)
            rows += caption_rows(
                name, "base", pairs, dict(zip(texts, values, strict=True)), seed=settings.seed
            )
    if tuned:
        try:
            values = embedder(texts)
        except StoreError as problem:
            # a caption that no table over images needs must not stop those tables
            if not settings.model:
                raise
            print(f"caption retrieval after tuning is left out: {problem}", file=sys.stderr)
            return rows
        name = "fine-tuned LLM"
        rows += caption_rows(name, "tuned", pairs, dict(zip(texts, values, strict=True)), seed=settings.seed)
    return rows


def _describe(model: LLM2CLIP | None) -> dict[str, Any] | None:
    if model is None:
        return None
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "embed_dim": model.settings.embed_dim,
        "adapter_depth": model.settings.adapter_depth,
        "image_size": model.vision_model.image_size,
        "llm_dim": model.llm_dim,
        "logit_scale": round(model.logit_scale.exp().item(), 3),
    }
