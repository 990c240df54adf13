"""A CLIP model and the caption encoder it was trained on as one thing: captions and images in, unit features out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.data.images import as_rgb
from llm2clip.errors import ModelError
from llm2clip.models import LLM2CLIP, CaptionEncoder
from llm2clip.models.tokens import Tokens


class JointEncoder(nn.Module):
    """Both halves of LLM2CLIP, for programs that know one model with text and images.

    Args:
        model: the CLIP model.
        captions: the LLM whose embeddings it was trained on, adapter included.
        check: compare the LLM with the fingerprint in the model, which hashes all of its weights.

    Attributes:
        transform: makes a PIL image (RGB) the model's input (3, S, S).

    Raises:
        ModelError: the LLM is not the one the model was trained on.
    """

    def __init__(self, model: LLM2CLIP, captions: CaptionEncoder, *, check: bool = True) -> None:
        super().__init__()
        if captions.dim != model.llm_dim:
            raise ModelError(
                f"the model takes LLM embeddings of width {model.llm_dim}, this LLM makes {captions.dim}"
            )
        if check and model.fingerprint is not None and model.fingerprint != captions.fingerprint():
            raise ModelError(
                "the caption encoder is not the one whose embeddings the model was trained on; give the LLM, the "
                "adapter, pooling and prompt of the embedding store, or check=False"
            )
        self.model = model
        self.captions = captions
        self.transform = model.vision_model.preprocessing.transform()
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        llm: str | os.PathLike[str],
        *,
        adapter: str | os.PathLike[str] | None = None,
        device: str | torch.device = "cpu",
        check: bool = True,
        **options: Any,
    ) -> JointEncoder:
        """Load both from directories.

        Args:
            model: directory of the CLIP model.
            llm: directory of the LLM.
            adapter: directory of its LoRA adapter.
            device: where both compute.
            check: as in the constructor.
            options: further arguments of `CaptionEncoder.from_pretrained`.

        Raises:
            ModelError: one of them cannot be used, or they do not belong together.
        """
        for path in (model, llm, adapter):
            if path is not None and not Path(path).is_dir():
                raise ModelError(f"{os.fspath(path)} is not a directory")
        captions = CaptionEncoder.from_pretrained(llm, adapter=adapter, device=device, **options)
        return cls(LLM2CLIP.from_pretrained(model, device), captions, check=check)

    @property
    def device(self) -> torch.device:
        """Where the CLIP model computes."""
        return next(self.model.parameters()).device

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Captions to (n, D) unit features, fp32 on the CPU; raises ValueError for an empty one."""
        return self.encode_tokens(self.captions.tokenize(texts))

    @torch.no_grad()
    def encode_tokens(self, tokens: Sequence[Tokens]) -> Tensor:
        """`encode_texts` for captions that `captions.tokenize` has prepared."""
        embeddings = self.captions.encode_tokens(tokens)
        return _unit(self.model.get_text_features(embeddings.to(self.device)))

    @torch.no_grad()
    def encode_images(self, images: Sequence[Any]) -> Tensor:
        """PIL images of any mode and size to (n, D) unit features, fp32 on the CPU."""
        return self.encode_pixels(torch.stack([self.transform(as_rgb(image)) for image in images]))

    @torch.no_grad()
    def encode_pixels(self, pixel_values: Tensor) -> Tensor:
        """What `transform` made, (n, 3, S, S), to (n, D) unit features, fp32 on the CPU."""
        return _unit(self.model.get_image_features(pixel_values.to(self.device)))


def _unit(features: Tensor) -> Tensor:
    return nn.functional.normalize(features.float(), dim=-1).cpu()
