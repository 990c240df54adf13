"""`llm2clip export`: write a model in a layout, load it back, compare, and only then put it in its place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llm2clip.errors import ConfigError, ModelError
from llm2clip.export.card import TRAINING, find_run, run_card
from llm2clip.export.onnx import OnnxModel, fill_onnx
from llm2clip.files import atomic_path
from llm2clip.models.hf_layout import fill_hugging_face
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_card import ModelCard
from llm2clip.models.model_files import LLM_ADAPTER, RESULT, fill_native
from llm2clip.models.open_clip_layout import fill_open_clip
from llm2clip.settings import ExportSettings

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# of the largest feature: rounding of the written weights' precision through a deep tower
_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}
_FILLERS: dict[str, Callable[[LLM2CLIP, Path, ModelCard | None], None]] = {
    "native": fill_native,
    "huggingface": fill_hugging_face,
    "open_clip": fill_open_clip,
    "onnx": fill_onnx,
}
_CAPTIONS = ("a dog runs over a field", "the figure shows the parts of a cell, each with its name", "x")


def export(settings: ExportSettings) -> Path:
    """Write what the settings ask for; returns the directory.

    Raises:
        ConfigError: no output directory or no model is given.
        ModelError: the model cannot be read, has no place in the layout, or comes back with other features.
    """
    if not settings.out:
        raise ConfigError("out is empty; give the directory to export to, for example out=exports/model")
    out = Path(settings.out)
    if settings.layout == "llm":
        return _export_llm(settings, out)
    if not settings.model:
        raise ConfigError("model is empty; give the run or model directory, or the checkpoint, to export")
    model = LLM2CLIP.from_pretrained(
        settings.model, allow_missing=settings.allow_missing, allow_unexpected=settings.allow_unexpected
    )
    run = find_run(Path(settings.model))
    card = run_card(run, settings)
    with torch.no_grad(), atomic_path(out) as folder:
        folder.mkdir()
        expected = _features(model)
        model.to(_DTYPES[settings.dtype])
        _FILLERS[settings.layout](model, folder, card)
        if run is not None:
            shutil.copyfile(run / "config.yaml", folder / TRAINING)
        for place in (Path(settings.model), Path(settings.model) / RESULT):
            if (place / LLM_ADAPTER).is_dir():  # of an LLM that was trained with the model
                shutil.copytree(place / LLM_ADAPTER, folder / LLM_ADAPTER)
        back = OnnxModel(folder) if settings.layout == "onnx" else LLM2CLIP.from_pretrained(folder)
        for side, wanted, found in zip(("image", "text"), expected, _features(back, model), strict=True):
            _compare(side, wanted, found, settings, f"nothing was written to {out}")
    return out


def _features(model: LLM2CLIP | OnnxModel, like: LLM2CLIP | None = None) -> tuple[Tensor, Tensor]:
    """Features of fixed random pixels and embeddings, fp32; without its text side zeros for texts."""
    shape = like or model
    assert isinstance(shape, LLM2CLIP)
    generator = torch.Generator().manual_seed(0)
    size = shape.vision_model.image_size
    pixels = torch.randn(3, 3, size, size, generator=generator)
    embeddings = torch.randn(3, shape.llm_dim, generator=generator)
    images = model.get_image_features(pixels)
    if shape.text_fusion is None:
        return images, model.get_text_features(embeddings)
    adapted = model.text_adapter(embeddings) if isinstance(model, LLM2CLIP) else torch.zeros(0)
    return images, adapted


def _compare(side: str, wanted: Tensor, found: Tensor, settings: ExportSettings, consequence: str) -> None:
    if not found.numel():
        return
    away = (found - wanted).abs().max().item() / max(wanted.abs().max().item(), 1e-12)
    if not away <= _TOLERANCE[settings.dtype]:
        raise ModelError(
            f"{side} features of the exported model differ from the original's by {away:.2g} of their largest, more "
            f"than rounding explains; {consequence}"
        )


def _export_llm(settings: ExportSettings, out: Path) -> Path:
    """The caption encoder as one plain transformers directory."""
    from llm2clip.models.caption_encoder import CaptionEncoder

    if not settings.llm.path:
        raise ConfigError("llm.path is empty; give the LLM, and llm.adapter its adapter, to merge")
    encoder = CaptionEncoder.from_settings(settings.llm)
    expected = encoder.encode(_CAPTIONS)
    encoder.save_pretrained(out)
    found = CaptionEncoder.from_pretrained(out).encode(_CAPTIONS)
    _compare("caption", expected, found, settings, f"do not use {out}")
    return out
