"""ONNX: the image side and the text adapter for onnxruntime, with any batch size."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.errors import ModelError
from llm2clip.files import write_json, write_text
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_card import ModelCard
from llm2clip.models.model_files import plain_trunk
from llm2clip.models.preprocessing import PREPROCESSOR

IMAGE, TEXT = "image.onnx", "text_adapter.onnx"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_USAGE = (
    "from llm2clip.export.onnx import OnnxModel",
    "",
    "model = OnnxModel(path)  # or onnxruntime.InferenceSession on image.onnx and text_adapter.onnx",
    "images = model.get_image_features(pixel_values)",
    "texts = model.get_text_features(encoder.encode(captions))",
)
_LOGGERS = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")


class _Image(nn.Module):
    def __init__(self, model: LLM2CLIP) -> None:
        super().__init__()
        self.trunk, self.projection = plain_trunk(model.vision_model), model.visual_projection

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(self.trunk(pixel_values))


class _Text(nn.Module):
    def __init__(self, model: LLM2CLIP) -> None:
        super().__init__()
        self.adapter = model.text_adapter

    def forward(self, llm_embeddings: Tensor) -> Tensor:
        # the adapter's own forward is made of ops that only torch has
        return self.adapter.forward_plain(llm_embeddings)


def fill_onnx(model: LLM2CLIP, folder: Path, card: ModelCard | None = None) -> None:
    """Write `image.onnx` (pixel_values -> image_features) and `text_adapter.onnx` (llm_embeddings -> text_features).

    Features are not normalised, as those of `get_image_features`. A model that joins CLIP's own text features into its
    text side has the image side alone.

    Raises:
        ModelError: a package of the extra is missing, or the tower cannot be exported.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"layout=onnx needs {', '.join(missing)}: pip install 'llm2clip[onnx]'")
    size = model.vision_model.image_size
    _export(_Image(model), torch.randn(2, 3, size, size), "pixel_values", "image_features", folder / IMAGE)
    if model.text_fusion is None:
        _export(_Text(model), torch.randn(2, model.llm_dim), "llm_embeddings", "text_features", folder / TEXT)
    sizes = {"embed_dim": model.settings.embed_dim, "llm_dim": model.llm_dim, "image_size": size}
    write_json(
        folder / "config.json", {"model_type": "llm2clip_onnx", **sizes, "text_encoder": model.fingerprint}
    )
    write_json(folder / PREPROCESSOR, model.vision_model.preprocessing.to_preprocessor())
    write_text(folder / "README.md", (card or ModelCard()).render(model, _USAGE))


def _export(module: nn.Module, example: Tensor, name: str, output: str, file: Path) -> None:
    with _quiet():
        try:
            program: Any = torch.onnx.export(
                module.eval(),
                (example,),
                dynamo=True,
                input_names=[name],
                output_names=[output],
                dynamic_shapes={name: {0: torch.export.Dim("batch")}},
                verbose=False,
            )
            assert program is not None
            program.save(file)
        except Exception as error:  # the exporter raises types of its own, of torch.export and of onnxscript
            reason = " ".join(str(error).split())[:500]
            raise ModelError(f"it cannot be exported to ONNX: {type(error).__name__}: {reason}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own log: every op of torchvision that is not there, every rule applied."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class OnnxModel:
    """What `llm2clip export layout=onnx` wrote, through onnxruntime on the CPU.

    Args:
        path: its directory.

    Raises:
        ModelError: onnxruntime or a file is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if importlib.util.find_spec("onnxruntime") is None:
            raise ModelError("ONNX models need onnxruntime: pip install 'llm2clip[onnx]'")
        import onnxruntime

        folder = Path(path)
        if not (folder / IMAGE).is_file():
            raise ModelError(f"{folder} has no {IMAGE}; it is no result of `llm2clip export layout=onnx`")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()

        def session(file: Path) -> Any:
            return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

        self._image = session(folder / IMAGE)
        self._text = session(folder / TEXT) if (folder / TEXT).is_file() else None

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) -> (B, D)."""
        return torch.from_numpy(self._image.run(None, {"pixel_values": pixel_values.numpy()})[0])

    def get_text_features(self, llm_embeddings: Tensor) -> Tensor:
        """LLM embeddings (B, llm_dim) -> (B, D).

        Raises:
            ModelError: the model joins CLIP's text features, and was exported without its text side.
        """
        if self._text is None:
            raise ModelError("this model was exported without its text side")
        return torch.from_numpy(self._text.run(None, {"llm_embeddings": llm_embeddings.numpy()})[0])
