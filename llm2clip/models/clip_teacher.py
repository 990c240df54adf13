"""A whole CLIP or SigLIP model of transformers, frozen: image and caption features for a student to learn from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llm2clip.data.images import CLIP_MEAN, CLIP_STD, ImageTransform, normalize_pixels
from llm2clip.errors import ModelError
from llm2clip.files import read_json
from llm2clip.models.fingerprint import tensors_digest, tokenizer_digest
from llm2clip_kernels import l2_normalize

_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


class ClipTeacher(nn.Module):
    """Features of unit norm, (n, dim) fp32, in the space that a model's own two towers share.

    Args:
        path: model directory with weights; captions need its tokenizer beside them.

    Attributes:
        dim: dimension of that space.

    Raises:
        ModelError: there is no such model, or it has not both towers.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} is no model directory of transformers: it has no config.json")
        from transformers import AutoModel

        try:
            model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        except Exception as error:  # transformers and safetensors raise a dozen unrelated types here
            raise ModelError(f"cannot load the model in {folder}: {type(error).__name__}: {error}") from error
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise ModelError(
                f"{folder} holds a {type(model).__name__}; expected a model with an image and a text tower, such as "
                "CLIPModel or SiglipModel"
            )
        self.model: Any = model.eval().requires_grad_(False)
        config: Any = model.config
        self.dim = int(getattr(config, "projection_dim", 0) or config.text_config.projection_size)
        self._size = int(config.vision_config.image_size)
        self._mean, self._std, self._fit = _preprocessing(folder, str(config.model_type))
        self._folder, self._tokenizer = folder, None
        self._context = int(config.text_config.max_position_embeddings)
        # SigLIP was trained with its padding in sight
        self._padding = "max_length" if "siglip" in str(config.model_type) else True

    @property
    def transform(self) -> ImageTransform:
        """How evaluation cuts images for this model."""
        return ImageTransform(self._size, self._mean, self._std, fit=self._fit)

    def train(self, mode: bool = True) -> ClipTeacher:
        """A teacher stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (n, 3, S, S) of any size, which are resized -> (n, dim)."""
        normal = normalize_pixels(pixels, self._mean, self._std)
        if normal.shape[-1] != self._size:
            normal = nn.functional.interpolate(normal, self._size, mode="bicubic", antialias=True)
        return _unit(self.model.get_image_features(pixel_values=normal))

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """Captions, cut to the model's context -> (n, dim)."""
        device = next(self.model.parameters()).device
        tokens = self.tokenizer(
            list(captions),
            padding=self._padding,
            truncation=True,
            max_length=self._context,
            return_tensors="pt",
        ).to(device)
        return _unit(self.model.get_text_features(**tokens))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer beside the model.

        Raises:
            ModelError: there is none.
        """
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            # without any of these transformers makes up an empty vocabulary
            if not any((self._folder / name).exists() for name in _VOCABULARIES):
                raise ModelError(
                    f"{self._folder} has no tokenizer: expected one of {', '.join(_VOCABULARIES)}"
                )
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
            except Exception as error:  # as above
                raise ModelError(f"the tokenizer in {self._folder} cannot be loaded: {error}") from error
        return self._tokenizer

    def fingerprint(self, side: str) -> dict[str, Any]:
        """Identity of the features of one side, `images` or `texts`."""
        found: dict[str, Any] = {
            "features": f"clip {side}",
            "model_type": self.model.config.model_type,
            "weights": tensors_digest(self.model.state_dict().items()),
        }
        if side == "texts":
            found |= {"tokenizer": tokenizer_digest(self.tokenizer), "max_length": self._context}
        return found


def _unit(output: Any) -> Tensor:
    # transformers 5 wraps the features
    features = output if isinstance(output, Tensor) else output.pooler_output
    return l2_normalize(features.float())


def _preprocessing(
    folder: Path, model_type: str
) -> tuple[tuple[float, float, float], tuple[float, float, float], Literal["pad", "crop"]]:
    """Mean, standard deviation and fit of preprocessor_config.json; the family's where there is none."""
    file = folder / "preprocessor_config.json"
    values = read_json(file, ModelError) if file.is_file() else {}
    if not isinstance(values, dict):
        raise ModelError(f"{file}: expected an object, got a {type(values).__name__}")
    siglip = "siglip" in model_type
    mean = values.get("image_mean") or ((0.5,) * 3 if siglip else CLIP_MEAN)
    std = values.get("image_std") or ((0.5,) * 3 if siglip else CLIP_STD)
    if len(mean) != 3 or len(std) != 3:
        raise ModelError(f"{file}: expected three numbers per channel, got {mean} and {std}")
    fit: Literal["pad", "crop"] = "crop" if values.get("do_center_crop", not siglip) else "pad"
    return (
        (float(mean[0]), float(mean[1]), float(mean[2])),
        (float(std[0]), float(std[1]), float(std[2])),
        fit,
    )
