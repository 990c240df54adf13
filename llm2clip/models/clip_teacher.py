"""A whole CLIP or SigLIP model of transformers, frozen: image and caption features for a student to learn from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.data.images import ImageTransform, normalize_pixels
from llm2clip.errors import ModelError
from llm2clip.models.fingerprint import tensors_digest, tokenizer_digest
from llm2clip.models.preprocessing import read_preprocessor
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
        self.preprocessing = read_preprocessor(folder, self._size).at_size(self._size)
        self._folder, self._tokenizer = folder, None
        self._context = int(config.text_config.max_position_embeddings)
        # SigLIP was trained with its padding in sight
        self._padding = "max_length" if "siglip" in str(config.model_type) else True

    @property
    def transform(self) -> ImageTransform:
        """How evaluation cuts images for this model."""
        return self.preprocessing.transform()

    def train(self, mode: bool = True) -> ClipTeacher:
        """A teacher stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (n, 3, S, S) of any size, which are resized -> (n, dim)."""
        normal = normalize_pixels(pixels, self.preprocessing.mean, self.preprocessing.std)
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
