"""The encoders that caption retrieval sets side by side: LLMs, adapters, baselines, embeddings from a store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llm2clip.data.store import EmbeddingStore
from llm2clip.data.store_format import INDEX_NAME
from llm2clip.errors import ConfigError, ModelError
from llm2clip.evaluation.caption_retrieval import base_encoder
from llm2clip.evaluation.run import result_directory
from llm2clip.evaluation.sentence_encoder import SentenceEncoder
from llm2clip.evaluation.text_encoder import WARM_UP, Encoded, TextEncoder
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.progress import Progress
from llm2clip.settings import CaptionRetrievalSettings, LLMSettings

_CLIP = ("transformers:", "open_clip:")


class LLMEncoder(TextEncoder):
    """A caption encoder, or the base LLM of one.

    Args:
        encoder: the caption encoder.
        token_budget: tokens per forward pass; 0: as it chooses.
        base_bidirectional: None takes it as it is; else its base LLM, in this direction.
    """

    def __init__(
        self, encoder: CaptionEncoder, token_budget: int, *, base_bidirectional: bool | None = None
    ) -> None:
        self._encoder, self._budget, self._base = encoder, token_budget, base_bidirectional

    def encode(self, texts: Sequence[str], progress: Progress) -> Encoded:
        context: AbstractContextManager[Any] = nullcontext()
        if self._base is not None:
            context = base_encoder(self._encoder, bidirectional=self._base)
        with context:
            self._encoder.encode(texts[:WARM_UP])
            start = time.perf_counter()
            tokens = self._encoder.tokenize(texts)
            values = self._encoder.encode_tokens(tokens, token_budget=self._budget, progress=progress)
            seconds = time.perf_counter() - start
        return Encoded(
            values, seconds, sum(len(one.ids) for one in tokens), sum(one.truncated for one in tokens)
        )

    def describe(self) -> dict[str, Any]:
        bidirectional = self._encoder.bidirectional if self._base is None else self._base
        return {
            "kind": "LLM" if self._base is None else "base LLM",
            "parameters": sum(parameter.numel() for parameter in self._encoder.parameters()),
            "attention": "bidirectional" if bidirectional else "causal",
            "pooling": self._encoder.pooling,
            "template": self._encoder.template,
            "prompt": self._encoder.prompt,
            "max_length": self._encoder.max_length,
        }


class StoreEncoder(TextEncoder):
    """Embeddings that `llm2clip embed` has made."""

    def __init__(self, path: str) -> None:
        self._store = EmbeddingStore.open(path)

    def encode(self, texts: Sequence[str], progress: Progress) -> Encoded:
        values = self._store.get(texts)
        progress.update(len(texts))
        return Encoded(values)

    def describe(self) -> dict[str, Any]:
        return {"kind": "embedding store", "dtype": self._store.dtype, "fingerprint": self._store.fingerprint}


class ClipTextEncoder(TextEncoder):
    """The text side of another CLIP model."""

    def __init__(self, label: str, name: str, device: torch.device) -> None:
        from llm2clip.evaluation.encoders.baselines import OpenClipEncoder, TransformersEncoder

        kind, _, rest = name.partition(":")
        made = TransformersEncoder if kind == "transformers" else OpenClipEncoder
        self._model = made(label, rest, device)

    def encode(self, texts: Sequence[str], progress: Progress) -> Encoded:
        self._model.encode_texts(texts[:WARM_UP])
        start = time.perf_counter()
        values = self._model.encode_texts(texts)
        seconds = time.perf_counter() - start
        progress.update(len(texts))
        return Encoded(values, seconds)

    def describe(self) -> dict[str, Any]:
        return self._model.describe()


Opener = Callable[[], TextEncoder]


def encoder_openers(settings: CaptionRetrievalSettings, device: torch.device) -> dict[str, Opener]:
    """Name in the tables -> what loads the encoder; called one after the other, so that one is in memory at a time.

    Raises:
        ConfigError: nothing is to be measured, or an encoder needs the base LLM and none is given.
        ModelError: a directory holds nothing that is an encoder.
    """
    found: dict[str, Opener] = {}
    llm, budget = settings.llm, settings.token_budget
    if llm.path and settings.base:
        bare = replace(llm, merge=(), adapter=None, bidirectional=True)
        shared: list[CaptionEncoder] = []

        def base(bidirectional: bool) -> TextEncoder:
            # both directions from one copy, which the second one lets go
            encoder = shared.pop() if shared else CaptionEncoder.from_settings(bare, device)
            if not bidirectional:
                shared.append(encoder)
            return LLMEncoder(encoder, budget, base_bidirectional=bidirectional)

        found["base, causal"] = lambda: base(False)
        found["base, bidirectional"] = lambda: base(True)
    if llm.merge:
        found["merged"] = _llm(replace(llm, adapter=None), device, budget)
    if llm.adapter:
        found["adapted"] = _adapted(settings, llm.adapter, device)
    for label, name in settings.encoders.items():
        found[label] = _opener(label, name, settings, device)
    if not found:
        raise ConfigError(
            "nothing to measure: set llm.path (base LLM), llm.adapter, or encoders, for example "
            "encoders.minilm=models/all-MiniLM-L6-v2"
        )
    return found


def _opener(label: str, name: str, settings: CaptionRetrievalSettings, device: torch.device) -> Opener:
    if name.startswith(_CLIP):
        return lambda: ClipTextEncoder(label, name, device)
    folder = Path(name)
    if not folder.is_dir():
        raise ModelError(f"encoders.{label}: {name} is no directory; nothing is downloaded")
    if (folder / INDEX_NAME).is_file():
        return lambda: StoreEncoder(name)
    if (result_directory(name, "adapter_config.json") / "adapter_config.json").is_file():
        return _adapted(settings, name, device)
    if (folder / "modules.json").is_file() or _reads_whole_text(folder):
        return lambda: SentenceEncoder(folder, device, settings.token_budget)
    if (folder / "config.json").is_file():
        # a merged export says itself how it is to be used; another LLM is used as the base is
        own = (folder / "llm2clip_config.json").is_file()
        return lambda: LLMEncoder(
            CaptionEncoder.from_pretrained(folder, dtype=settings.llm.dtype, device=device)
            if own
            else CaptionEncoder.from_settings(
                replace(settings.llm, path=name, gguf_file=None, merge=(), adapter=None), device
            ),
            settings.token_budget,
        )
    present = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise ModelError(
        f"encoders.{label}: {name} holds no encoder. Expected a peft adapter, a run directory of the LLM stage, a "
        f"transformers or sentence-transformers model, or an embedding store; found {present}"
    )


def _adapted(settings: CaptionRetrievalSettings, adapter: str, device: torch.device) -> Opener:
    if not settings.llm.path:
        raise ConfigError(f"{adapter} is an adapter; set llm.path to the LLM that it was trained on")
    folder = result_directory(adapter, "adapter_config.json")
    return _llm(replace(settings.llm, adapter=str(folder)), device, settings.token_budget)


def _llm(llm: LLMSettings, device: torch.device, budget: int) -> Opener:
    return lambda: LLMEncoder(CaptionEncoder.from_settings(llm, device), budget)


def _reads_whole_text(folder: Path) -> bool:
    """Whether a transformers directory is an encoder such as BERT, which was trained to fill in masks."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    from llm2clip.files import read_json

    if not (folder / "config.json").is_file():
        return False
    content = read_json(folder / "config.json", ModelError)
    return isinstance(content, dict) and content.get("model_type") in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def encode_all(
    openers: dict[str, Opener], texts: Sequence[str]
) -> Iterator[tuple[str, Encoded, dict[str, Any]]]:
    """Every encoder's embeddings of the captions, and what is said about it; one encoder at a time is loaded.

    Raises:
        ModelError: embeddings with NaN or infinite values, since every comparison with NaN would look lost.
    """
    for label, opener in openers.items():
        encoder = opener()
        with Progress(len(texts), label, "captions") as progress:
            encoded = encoder.encode(texts, progress)
        if not bool(torch.isfinite(encoded.embeddings).all()):
            raise ModelError(f"{label} gives embeddings with NaN or infinite values")
        about = encoder.describe()
        del encoder
        yield label, encoded, about
