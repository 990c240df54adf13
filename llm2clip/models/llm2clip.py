"""The CLIP model: vision tower and projection on one side, adapter on LLM embeddings on the other."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm2clip.errors import ModelError
from llm2clip.models.adapter import TextAdapter
from llm2clip.models.clip_text import ClipText, ClipTokens, load_clip_text
from llm2clip.models.vision import VisionTower, build_vision_tower
from llm2clip.settings import LoraSettings, ModelSettings
from llm2clip_kernels import l2_normalize

if TYPE_CHECKING:
    from llm2clip.models.caption_encoder import CaptionEncoder
    from llm2clip.models.model_card import ModelCard
    from llm2clip.models.published import CheckpointOptions
    from llm2clip.models.tokens import Tokens

# CLIP's: ln(1 / 0.07)
_LOG_SCALE = 2.6592600


class LLM2CLIP(nn.Module):
    """Images and LLM caption embeddings in one space.

    The text path has one definition, `embed_captions` and then `get_text_features`: stored embeddings enter behind the
    first, and the LLM, where it is attached, makes in it exactly what `llm2clip embed` stores.

    Args:
        settings: sizes and the vision tower.
        llm_dim: width of the LLM embeddings.
        fingerprint: `CaptionEncoder.fingerprint()` of the encoder whose embeddings the model takes, as
            found in the embedding store; None when unknown.
        vision: a tower to use instead of the one that `settings.vision` describes.
        clip_text: CLIP's text tower to use instead of the one that `settings.clip_text` describes.

    Attributes:
        vision_model, visual_projection, text_adapter: the parts, named as in published checkpoints.
        clip_text, text_projection: CLIP's own text tower beside the adapter, and its projection to D; None without.
        text_fusion: joins both text features into one, for `clip_text.use` concat; None without.
        caption_encoder: the LLM (`attach_llm`); None: captions come as embeddings.
        llm_trained: whether the attached LLM's adapters are trained with the model.
        logit_scale: logarithm of the scale; `forward` returns it exponentiated and bounded.
        logit_bias: added to every logit by the sigmoid loss; None where `settings.logit_bias_init` is.
    """

    def __init__(
        self,
        settings: ModelSettings,
        llm_dim: int,
        fingerprint: dict[str, Any] | None = None,
        *,
        vision: VisionTower | None = None,
        clip_text: ClipText | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.llm_dim = llm_dim
        self.fingerprint = fingerprint
        self.vision_model = build_vision_tower(settings.vision) if vision is None else vision
        self.visual_projection = _projection(self.vision_model, settings)
        if settings.vision.freeze and settings.vision.unlocked_groups == 0:
            self.visual_projection.requires_grad_(False)
        self.text_adapter = TextAdapter(
            llm_dim,
            settings.embed_dim,
            settings.adapter_depth,
            settings.adapter_expansion,
            settings.adapter_dropout,
            settings.adapter_normalize,
            settings.adapter_noise,
        )
        self.clip_text: ClipText | None = None
        self.text_projection: nn.Linear | None = None
        self.text_fusion: nn.Linear | None = None
        if settings.clip_text.use != "none":
            self._add_clip_text(
                load_clip_text(settings.clip_text.path or "") if clip_text is None else clip_text
            )
        self.caption_encoder: CaptionEncoder | None = None
        self.llm_trained, self._token_budget = False, 0
        scale, bias = settings.logit_scale_init, settings.logit_bias_init
        self.logit_scale = nn.Parameter(torch.tensor(_LOG_SCALE if scale is None else float(scale)))
        self.logit_bias: nn.Parameter | None = None
        if bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(bias)))

    @classmethod
    def from_settings(
        cls, settings: ModelSettings, llm_dim: int, fingerprint: dict[str, Any] | None = None
    ) -> LLM2CLIP:
        """A model to train: new, or with `settings.init` one that goes on from another's weights, adapter included.

        Raises:
            ModelError: the parts cannot be built, or `settings.init` takes LLM embeddings of another width.
        """
        if settings.init is None:
            return cls(settings, llm_dim, fingerprint)
        from llm2clip.models.model_files import continue_from

        return continue_from(cls.from_pretrained(settings.init), settings, llm_dim, fingerprint)

    def train(self, mode: bool = True) -> LLM2CLIP:
        """Training mode; a frozen LLM stays in evaluation mode."""
        super().train(mode)
        if self.caption_encoder is not None and not self.llm_trained:
            self.caption_encoder.eval()
        return self

    def attach_llm(
        self,
        encoder: CaptionEncoder,
        *,
        lora: LoraSettings | None = None,
        token_budget: int = 0,
        check: bool = True,
    ) -> None:
        """Let the model embed captions itself, instead of taking embeddings from a store.

        Args:
            encoder: the LLM; a part of this module from now on, but not of its files.
            lora: train the LLM too: fresh adapters of this kind, or those that the encoder has; None: it is frozen.
            token_budget: tokens per forward pass, see `CaptionEncoder.encode`.
            check: compare a frozen encoder with the fingerprint of the model, which hashes all of its weights.

        Raises:
            ModelError: the encoder's embeddings are of another width, or of another encoder than the model's.
        """
        if encoder.dim != self.llm_dim:
            raise ModelError(
                f"the model takes LLM embeddings of width {self.llm_dim}, this LLM makes {encoder.dim}"
            )
        if lora is None:
            encoder.requires_grad_(False)
            if check:
                self._check_encoder(encoder.fingerprint())
        else:
            encoder.add_lora(lora)
        self.llm_trained, self._token_budget = lora is not None, token_budget
        self.caption_encoder = encoder
        self.train(self.training)

    def embed_captions(self, captions: Tensor | Sequence[Tokens]) -> Tensor:
        """LLM embeddings (B, llm_dim) of captions: as they come, or by the attached LLM from `encoder.tokenize`.

        A frozen LLM runs as `llm2clip embed` runs it, without autocast and dropout, so that its embeddings are those
        of the store, but for the store's rounding.

        Raises:
            ModelError: tokens, and no LLM is attached.
        """
        if isinstance(captions, Tensor):
            return captions
        encoder = self.caption_encoder
        if encoder is None:
            raise ModelError(
                "captions came as tokens, and the model has no LLM; call attach_llm, or embed them first"
            )
        budget = self._token_budget or None
        if self.llm_trained:
            return encoder.embed(captions, token_budget=budget)
        with torch.autocast(encoder.device.type, enabled=False):
            return encoder.encode_tokens(captions, token_budget=budget).to(self.logit_scale.device)

    def get_image_features(self, pixel_values: Tensor, normalize: bool = False) -> Tensor:
        """Normalised pixels (B, 3, S, S) -> (B, D), of unit norm with `normalize`."""
        features = self.visual_projection(self.vision_model(pixel_values))
        return _unit(features) if normalize else features

    def get_text_features(
        self,
        captions: Tensor | Sequence[Tokens],
        clip_tokens: ClipTokens | None = None,
        normalize: bool = False,
    ) -> Tensor:
        """Text features (B, D), of unit norm with `normalize`.

        Args:
            captions: LLM embeddings (B, llm_dim), not normalised (as an encoder gives them), or tokens for the
                attached LLM.
            clip_tokens: the same captions for CLIP's text tower, where `settings.clip_text.use` is concat.
            normalize: scale to unit length.
        """
        features = self.text_adapter(self.embed_captions(captions))
        if self.text_fusion is not None:
            # both of unit norm, so that neither drowns the other out
            both = torch.cat([_unit(self.get_clip_text_features(clip_tokens)), _unit(features)], dim=-1)
            features = self.text_fusion(both)
        return _unit(features) if normalize else features

    def get_clip_text_features(self, clip_tokens: ClipTokens | None, normalize: bool = False) -> Tensor:
        """Features (B, D) of CLIP's own text tower.

        Raises:
            ModelError: the model has no such tower, or no tokens came.
        """
        if self.clip_text is None or self.text_projection is None:
            raise ModelError(
                "the model has no CLIP text tower; set model.clip_text.use and model.clip_text.path"
            )
        if clip_tokens is None:
            raise ModelError(
                f"model.clip_text.use is {self.settings.clip_text.use}: captions must come as CLIP tokens too "
                "(model.clip_text.tokenize)"
            )
        features = self.text_projection(self.clip_text(clip_tokens))
        return _unit(features) if normalize else features

    def encode_text(self, texts: Sequence[str], normalize: bool = False) -> Tensor:
        """Captions -> (B, D), through the attached LLM.

        Raises:
            ModelError: no LLM is attached.
        """
        if self.caption_encoder is None:
            raise ModelError(
                "encode_text needs the LLM; call attach_llm, or use get_text_features on its embeddings"
            )
        tokens = self.caption_encoder.tokenize(texts)
        clip_tokens = None
        if self.text_fusion is not None and self.clip_text is not None:
            clip_tokens = self.clip_text.tokenize(texts).to(self.logit_scale.device)
        return self.get_text_features(tokens, clip_tokens, normalize)

    def forward(
        self,
        pixel_values: Tensor,
        captions: Tensor | Sequence[Tokens],
        clip_tokens: ClipTokens | None = None,
    ) -> dict[str, Tensor]:
        """Features for a contrastive loss.

        Args:
            pixel_values: normalised pixels (B, 3, S, S).
            captions: LLM embeddings (B, llm_dim), or tokens for the attached LLM.
            clip_tokens: the same captions for CLIP's own text tower, where there is one.

        Returns:
            image_features (B, D) and text_features (B, D) of unit norm, fp32 under autocast too, logit_scale (0-dim,
            a multiplier), and logit_bias (0-dim) where the model has one. With `clip_text.use` two_losses or
            three_losses also clip_text_features (B, D), of CLIP's own tower.
        """
        outputs = {
            "image_features": self.get_image_features(pixel_values, normalize=True),
            "text_features": self.get_text_features(captions, clip_tokens, normalize=True),
            "logit_scale": self.logit_scale.clamp(max=self.settings.logit_scale_max).exp(),
        }
        if self.logit_bias is not None:
            # not the parameter itself: an output may be changed in place
            outputs["logit_bias"] = self.logit_bias.clone()
        if self.clip_text is not None and self.text_fusion is None:
            outputs["clip_text_features"] = self.get_clip_text_features(clip_tokens, normalize=True)
        return outputs

    def lock_image_tower(self, unlocked_groups: int = 0) -> None:
        """Freeze the image side but for its last groups, counted as open_clip does: the projection is the first.

        Args:
            unlocked_groups: 0 locks everything; 1 trains the projection; 2 the last block and final norm too; ...
        """
        self.vision_model.lock(max(0, unlocked_groups - 1))
        self.visual_projection.requires_grad_(unlocked_groups > 0)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the parameter itself within [0, logit_scale_max]; call it after an optimizer step."""
        self.logit_scale.clamp_(0.0, self.settings.logit_scale_max)

    def save_pretrained(self, path: str | os.PathLike[str], card: ModelCard | None = None) -> None:
        """Write model.safetensors, config.json, preprocessor_config.json and a model card, atomically.

        Adapters on the vision tower are merged into its weights. An attached LLM is not written, but the adapter that
        was trained with the model is, into `llm_adapter`.

        Args:
            path: directory to create or replace.
            card: what the model card says of training and results.
        """
        from llm2clip.models.model_files import write_model

        write_model(self, path, card)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        *,
        dtype: torch.dtype = torch.float32,
        allow_missing: Sequence[str] = (),
        allow_unexpected: Sequence[str] = (),
        options: CheckpointOptions | None = None,
    ) -> LLM2CLIP:
        """Load a model: one of ours, or a published LLM2CLIP checkpoint of any layout; no code of it is run.

        Args:
            path: a model directory (ours, Hugging Face's, open_clip's), the directory of a run, or a file of weights
                (`.pt`, `.safetensors`).
            device: where the model goes.
            dtype: of the weights.
            allow_missing: patterns of names that a published checkpoint need not have (`text_adapter.*`); they keep
                their initial values.
            allow_unexpected: patterns of names in a published checkpoint that are left out (`text_model.*`).
            options: what neither weights nor config.json of a published checkpoint say.

        Raises:
            ModelError: the directory, config.json or the weights cannot be used; weights that are missing,
                unexpected or of another shape are listed.
        """
        from llm2clip.models.model_files import read_model

        model = read_model(
            path, allow_missing=allow_missing, allow_unexpected=allow_unexpected, options=options
        )
        return model.to(device=device, dtype=dtype).eval()

    def _add_clip_text(self, tower: ClipText) -> None:
        settings = self.settings
        self.clip_text = tower
        self.text_projection = nn.Linear(tower.dim, settings.embed_dim, bias=False)
        _begin(self.text_projection, tower.dim, tower.pretrained_projection)
        if settings.clip_text.use == "concat":
            self.text_fusion = nn.Linear(2 * settings.embed_dim, settings.embed_dim, bias=False)
            _begin(self.text_fusion, 2 * settings.embed_dim)
        if settings.clip_text.freeze:
            tower.requires_grad_(False)

    def _check_encoder(self, fingerprint: dict[str, Any]) -> None:
        if self.fingerprint is None:
            self.fingerprint = fingerprint
        other = sorted(
            name
            for name in self.fingerprint.keys() | fingerprint.keys()
            if self.fingerprint.get(name) != fingerprint.get(name)
        )
        if other:
            shown = "; ".join(
                f"{n}: {self.fingerprint.get(n)!r}, now {fingerprint.get(n)!r}" for n in other[:5]
            )
            raise ModelError(
                f"the model was trained with embeddings of another encoder ({shown}); attach that one"
            )


def _projection(vision: VisionTower, settings: ModelSettings) -> nn.Module:
    if settings.projection == "none":
        if vision.dim != settings.embed_dim:
            raise ModelError(
                f"model.projection is none, but the tower's feature has {vision.dim} dimensions and model.embed_dim is "
                f"{settings.embed_dim}; set embed_dim to {vision.dim}, or projection to linear"
            )
        return nn.Identity()
    layer = nn.Linear(vision.dim, settings.embed_dim, bias=settings.projection == "affine")
    _begin(layer, vision.dim, vision.model.pretrained_projection)
    return layer


def _begin(layer: nn.Linear, width: int, pretrained: tuple[Tensor, Tensor | None] | None = None) -> None:
    """A checkpoint's own projection where it is such a layer, else one that keeps unit variance."""
    nn.init.normal_(layer.weight, std=width**-0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    weight, bias = pretrained or (None, None)
    if weight is None or weight.shape != layer.weight.shape or (bias is not None and layer.bias is None):
        return
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)


def _unit(features: Tensor) -> Tensor:
    # the loss stays fp32 where autocast rounds the towers
    return l2_normalize(features, dtype=torch.promote_types(features.dtype, torch.float32))


def settings_fields() -> list[str]:
    """Names of the model's settings that config.json carries as they are."""
    elsewhere = {"init", "vision", "clip_text"}
    return [field.name for field in dataclasses.fields(ModelSettings) if field.name not in elsewhere]
