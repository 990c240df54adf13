"""The models under evaluation: ours, and other people's CLIP models beside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from llm2clip.data.store import EmbeddingStore
from llm2clip.errors import ConfigError
from llm2clip.evaluation.encoders.base import DualEncoder
from llm2clip.evaluation.encoders.captions import OnlineLLM, choose_captions
from llm2clip.evaluation.features import FeatureCache
from llm2clip.evaluation.run import result_directory
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.settings import BenchmarkSettings
from llm2clip.training.world import World

__all__ = ["DualEncoder", "EncoderOpener"]


class EncoderOpener:
    """Loads the models one after the other; stores and the LLM are opened once for all.

    Args:
        settings: models, stores and LLM.
        device: where models compute.
        cache: directory of the features.

    Raises:
        ConfigError: no model is given.
    """

    def __init__(self, settings: BenchmarkSettings, device: torch.device, cache: Path) -> None:
        if not settings.models:
            raise ConfigError(
                "models is empty; name what to evaluate, for example models.ours=runs/clip "
                "models.clip=transformers:/models/clip-vit-base-patch16"
            )
        self._settings, self._device, self._cache = settings, device, cache
        self._stores: list[EmbeddingStore] | None = None
        self._llm: OnlineLLM | None = None

    def open(self, label: str) -> DualEncoder:
        """Load one model.

        Raises:
            ConfigError, ModelError, StoreError: it cannot be loaded, or nothing gives its captions.
        """
        settings = self._settings
        kind, _, name = settings.models[label].partition(":")
        if name and kind in ("transformers", "open_clip"):
            from llm2clip.evaluation.encoders.baselines import OpenClipEncoder, TransformersEncoder

            baseline = TransformersEncoder if kind == "transformers" else OpenClipEncoder
            return baseline(label, name, self._device, settings.precision, download=settings.download)
        from llm2clip.evaluation.encoders.ours import LLM2CLIPEncoder

        place = result_directory(settings.models[label], "config.json")
        model = LLM2CLIP.from_pretrained(place, self._device)
        if self._stores is None:
            self._stores = [EmbeddingStore.open(path) for path in settings.stores]
            self._llm = self._open_llm()
        captions = choose_captions(label, model, self._stores, self._llm)
        return LLM2CLIPEncoder(label, model, captions, settings.precision)

    def _open_llm(self) -> OnlineLLM | None:
        settings = self._settings
        if not settings.llm.path:
            return None
        adapter = settings.llm_adapter or settings.llm.adapter or ""
        chosen = str(result_directory(adapter, "adapter_config.json")) if adapter else None
        encoder = CaptionEncoder.from_settings(replace(settings.llm, adapter=chosen), self._device)
        # every rank encodes the captions of its own blocks
        own = FeatureCache(self._cache, World(0, 1, self._device))
        return OnlineLLM(encoder, own, settings.token_budget)
