"""Any transformers vision model (CLIP, SigLIP, SigLIP 2, DINOv2, DINOv3, ViT, ...) as a feature extractor."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm2clip.errors import ModelError
from llm2clip.models.patch_dropout import keep_rotations, keep_tokens, kept_patches
from llm2clip.models.trunk import VisionTrunk, freeze_unused
from llm2clip.settings import VisionPooling


class HFVision(VisionTrunk):
    """Pooled feature of a transformers vision model.

    Args:
        model: transformers vision model.
        image_size: side of the square input; position embeddings are interpolated in every forward where it
            differs from the configuration's (loading resizes them for good, `hf_files.load_hf_vision`).
        pooling: `pooler` (the model's own: CLIP's normed class token, SigLIP's attention pooling), `cls`
            (first token), `mean` (over patch tokens), `auto` (pooler where there is one, else cls).

    Raises:
        ModelError: the model lacks that pooling or cannot take the image size.
    """

    kind = "transformers"

    def __init__(self, model: nn.Module, image_size: int, pooling: VisionPooling = "auto") -> None:
        super().__init__()
        self.model: Any = model
        self.image_size = image_size
        config: Any = model.config
        patch = getattr(config, "patch_size", 1)
        self._patch = int(patch[0] if isinstance(patch, (list, tuple)) else patch)
        accepted = inspect.signature(model.forward).parameters
        self._patchify = "spatial_shapes" in accepted
        self._adopt(model)
        own = getattr(config, "image_size", image_size)
        resized = (int(own[0]) if isinstance(own, (list, tuple)) else int(own)) != image_size
        # a convolution leaves the rest of its own size out, as SigLIP so400m/14 does at 384
        self._whole_patches = resized or self._patchify
        self._extra = (
            {"interpolate_pos_encoding": True} if resized and "interpolate_pos_encoding" in accepted else {}
        )
        self.pooling: VisionPooling = pooling
        self._prefix, self._tokens = 0, 0
        self._kept: Tensor | None = None
        self._hooked = False
        self.dim = self._probe()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) -> features (B, dim)."""
        return self._pool(self.model(**self._inputs(pixel_values)))

    def _pool(self, output: Any) -> Tensor:
        if self.pooling == "pooler":
            return output.pooler_output.flatten(1)
        hidden: Tensor = output.last_hidden_state
        if hidden.ndim == 4:  # convolutional: (B, C, H, W)
            return hidden.mean(dim=(2, 3))
        if self.pooling == "cls":
            return hidden[:, 0]
        return hidden[:, self._prefix :].mean(dim=1)

    def config(self) -> dict[str, Any]:
        """Pooling and the model's configuration."""
        return {"pooling": self.pooling, "config": config_to_dict(self.model.config)}

    def unfreeze(self) -> None:
        """Train every parameter that the feature depends on."""
        self.requires_grad_(True)
        self._probe()

    def resized(self, image_size: int) -> HFVision:
        """The network for images of another size, its position embeddings interpolated."""
        from llm2clip.models.hf_files import at_size

        if image_size == self.image_size:
            return self
        return HFVision(at_size(self.model, image_size), image_size, self.pooling)

    def set_patch_dropout(self, rate: float) -> None:
        """Leave out a share of the patches, between the embeddings and the first block.

        Raises:
            ModelError: the model is no vision transformer whose blocks take any number of tokens.
        """
        if rate and not self._hooked:
            if not self._tokens or self._part("embeddings") is None:
                super().set_patch_dropout(rate)
            self._try_patch_dropout()
            self._hook()
        self.patch_dropout = rate

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each block in the backward, by transformers' own means."""
        if not enabled:
            self.model.gradient_checkpointing_disable()
            return
        try:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise ModelError(f"vision.grad_checkpointing: {error}") from error

    def native_state(self) -> dict[str, Tensor]:
        """The weights under the names of published files, which stay while transformers renames its modules."""
        from llm2clip.models.hf_files import published_names

        return {f"model.{name}": tensor for name, tensor in published_names(self.model).items()}

    def load_native_state(self, state: dict[str, Tensor], source: str) -> None:
        """Load weights under published names or those of any version of transformers."""
        from llm2clip.models.hf_files import load_named

        strange = [name for name in state if not name.startswith("model.")]
        if strange:
            raise ModelError(f"{source} does not fit the model: unexpected {', '.join(sorted(strange)[:10])}")
        load_named(self.model, {name[len("model.") :]: tensor for name, tensor in state.items()}, source)

    def _inputs(self, pixel_values: Tensor) -> dict[str, Any]:
        if not self._patchify:
            return {"pixel_values": pixel_values, **self._extra}
        # SigLIP 2 (NaFlex) takes flattened patches, rows of (row, column, channel)
        batch, channels, side, p = (
            pixel_values.shape[0],
            pixel_values.shape[1],
            self.image_size // self._patch,
            self._patch,
        )
        patches = pixel_values.reshape(batch, channels, side, p, side, p).permute(0, 2, 4, 3, 5, 1)
        shapes = torch.full((batch, 2), side, dtype=torch.int64, device=pixel_values.device)
        return {
            "pixel_values": patches.reshape(batch, side * side, p * p * channels),
            # no patch is padding, and without a mask attention takes its fast path
            "pixel_attention_mask": None,
            "spatial_shapes": shapes,
        }

    def _positions(self, table: Tensor, shapes: Tensor, max_length: int) -> Tensor:
        """SigLIP 2's position embeddings (1, N, width) for images of one size, which it would resize one by one."""
        side = self.image_size // self._patch
        grid = table.float().permute(2, 0, 1)[None]
        resized = F.interpolate(grid, (side, side), mode="bilinear", align_corners=False, antialias=True)
        return resized.flatten(2).transpose(1, 2).to(table.dtype)

    def _adopt(self, model: Any) -> nn.Module:
        if self._patchify:
            getattr(model, "vision_model", model).embeddings.resize_positional_embeddings = self._positions
        return model

    def _probe(self) -> int:
        """Settle the pooling, find the width, freeze what the feature ignores."""
        if self._whole_patches and self.image_size % self._patch:
            raise ModelError(
                f"image size {self.image_size} is not a multiple of the patch size {self._patch}"
            )
        model = self.model
        return freeze_unused(model, lambda: self._adopt(type(model)(model.config)), self._feature_of)

    def _feature_of(self, model: nn.Module) -> Tensor:
        weight = next(model.parameters())
        blank = torch.zeros(1, 3, self.image_size, self.image_size, device=weight.device, dtype=weight.dtype)
        try:
            output = model(**self._inputs(blank))
        except (ValueError, RuntimeError, TypeError) as error:
            raise ModelError(
                f"{type(model).__name__} cannot take images of {self.image_size} pixels: {error}. "
                "Use its own vision.image_size."
            ) from error
        hidden = output.last_hidden_state
        flat = hidden.ndim == 3
        patches = (self.image_size // self._patch) ** 2
        if flat and hidden.shape[1] >= patches:
            self._tokens, self._prefix = patches, hidden.shape[1] - patches
        has_pooler = getattr(output, "pooler_output", None) is not None
        if self.pooling == "auto":
            self.pooling = "pooler" if has_pooler else "cls"
            if flat and not has_pooler and self._prefix == 0:
                self.pooling = "mean"
        if self.pooling == "pooler" and not has_pooler:
            raise ModelError(f"{type(model).__name__} has no pooler; use vision.pooling cls or mean")
        if self.pooling == "cls" and flat and self._prefix == 0:
            raise ModelError(f"{type(model).__name__} has no class token; use pooling mean or pooler")
        return self._pool(output)

    def _part(self, name: str) -> Any:
        return getattr(getattr(self.model, "vision_model", self.model), name, None)

    def _hook(self) -> None:
        self._part("embeddings").register_forward_hook(self._drop)
        if (rope := self._part("rope_embeddings")) is not None:
            rope.register_forward_hook(self._rotations)
        self._hooked = True

    def _try_patch_dropout(self) -> None:
        """Run a twin without values on half of the patches."""
        try:
            with torch.device("meta"):
                twin = HFVision(type(self.model)(self.model.config), self.image_size, self.pooling)
                twin._hook()
                twin.patch_dropout = 0.5
                twin.train()(torch.zeros(2, 3, self.image_size, self.image_size))
        except NotImplementedError:  # its code needs values
            return
        except Exception as error:  # whatever a family's own code makes of tokens that are missing
            raise ModelError(
                f"vision.patch_dropout: {type(self.model).__name__} needs all of its patches "
                f"({type(error).__name__}: {error})"
            ) from error

    def _drop(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self._kept = None
        if not (self.training and self.patch_dropout):
            return output
        self._kept = kept_patches(output.shape[0], self._tokens, self.patch_dropout, output.device)
        return keep_tokens(output, self._kept, self._prefix)

    def _rotations(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._kept is None:
            return output
        return tuple(keep_rotations(table, self._kept) for table in output)


def config_to_dict(config: Any) -> dict[str, Any]:
    """A configuration as JSON, complete with its model_type and free of machine paths."""
    values: dict[str, Any] = config.to_dict()
    values.pop("_name_or_path", None)
    values["model_type"] = config.model_type
    return values
