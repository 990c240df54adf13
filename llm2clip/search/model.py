"""From what the user names (a run, a demo, a model directory) to a model that reads images and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip.config import from_tree, read_yaml
from llm2clip.data.store import EmbeddingStore
from llm2clip.embed import SETTINGS_NAME
from llm2clip.errors import ConfigError, StoreError, UserError
from llm2clip.evaluation.encoders.base import DualEncoder
from llm2clip.evaluation.encoders.captions import OnlineLLM, choose_captions
from llm2clip.evaluation.run import result_directory
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.settings import LLMSettings, SearchSettings
from llm2clip.training.directory import CONFIG

DEMO_STAGE = "clip-stage"  # of the directory that `llm2clip demo` writes


@dataclass(frozen=True)
class SearchModel:
    """A model and what is known of its texts.

    Attributes:
        encoder: images and captions to features.
        home: directory of the model, for the default place of the index; None for a model by name alone.
        llm: the LLM behind it; None for a model with a text tower of its own.
    """

    encoder: DualEncoder
    home: Path | None
    llm: CaptionEncoder | None = None

    def count_tokens(self, text: str) -> tuple[int, bool] | None:
        """Tokens of a text that the model reads, and whether the rest is cut; None where it does not tell."""
        if self.llm is None:
            return None
        (tokens,) = self.llm.tokenize([text])
        return len(tokens.ids), bool(tokens.truncated)


class _LiveLLM(OnlineLLM):
    """The LLM for texts that come once: nothing of them is kept on disk."""

    def __init__(self, encoder: CaptionEncoder) -> None:
        self.dim, self.fingerprint = encoder.dim, encoder.fingerprint()
        self._encoder = encoder

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self._encoder.encode(texts)


def open_model(settings: SearchSettings, device: torch.device) -> SearchModel:
    """Load the model, and the LLM that its captions go through.

    Raises:
        ConfigError: no model is given, or nothing tells which LLM it was trained with.
        ModelError, StoreError: it cannot be loaded, or the LLM is another one than the model's.
    """
    if not settings.model:
        raise ConfigError("model is empty; name a run of `llm2clip train`, for example --model runs/clip")
    kind, _, name = settings.model.partition(":")
    if name and kind in ("transformers", "open_clip"):
        from llm2clip.evaluation.encoders.baselines import OpenClipEncoder, TransformersEncoder

        baseline = TransformersEncoder if kind == "transformers" else OpenClipEncoder
        home = Path(name.removeprefix("local-dir:"))
        return SearchModel(baseline(settings.model, name, device), home if home.is_dir() else None)
    from llm2clip.evaluation.encoders.ours import LLM2CLIPEncoder

    run = Path(settings.model).expanduser()
    if (run / DEMO_STAGE).is_dir():
        run = run / DEMO_STAGE
    place = result_directory(str(run), "config.json")
    model = LLM2CLIP.from_pretrained(place, device)
    place = place.parent if place.name == "result" else place
    stores = _stores(settings, place)
    if settings.llm.path:
        llm = _given_llm(settings, device)
    else:
        llm = CaptionEncoder.from_settings(_recorded_llm(place, stores), device)
    captions = choose_captions(settings.model, model, stores, _LiveLLM(llm))
    return SearchModel(LLM2CLIPEncoder(settings.model, model, captions), place, llm)


def _stores(settings: SearchSettings, run: Path) -> list[EmbeddingStore]:
    if settings.store:
        return [EmbeddingStore.open(settings.store)]
    given = _run_settings(run).get("store")
    found = find_again(str(given), run) if given else None
    if found is None:
        return []
    try:
        return [EmbeddingStore.open(found)]
    except StoreError:  # a convenience: the LLM embeds whatever is not stored
        return []


def _given_llm(settings: SearchSettings, device: torch.device) -> CaptionEncoder:
    """The LLM of the settings; what they leave at its default is taken from what the adapter or the model records."""
    llm, plain = settings.llm, LLMSettings()
    adapter = settings.llm_adapter or llm.adapter
    options: dict[str, Any] = {
        name: getattr(llm, name) if getattr(llm, name) != getattr(plain, name) else None
        for name in ("bidirectional", "pooling", "max_length", "prompt", "template")
    }
    return CaptionEncoder.from_pretrained(
        llm.path,
        gguf_file=llm.gguf_file,
        adapter=result_directory(adapter, "adapter_config.json") if adapter else None,
        merge=llm.merge,
        dim=llm.dim,
        layout=llm.layout,
        dtype=llm.dtype,
        quantization=llm.quantization,
        device=device,
        **options,
    )


def _recorded_llm(run: Path, stores: Sequence[EmbeddingStore]) -> LLMSettings:
    """The run's own LLM, else the one that made its store."""
    text = _run_settings(run).get("text")
    trees = [text.get("llm")] if isinstance(text, dict) and text.get("source") in ("online", "joint") else []
    trees += [
        read_yaml(store.path / SETTINGS_NAME).get("llm")
        for store in stores
        if (store.path / SETTINGS_NAME).is_file()
    ]
    for tree in trees:
        if isinstance(tree, dict) and tree.get("path"):
            return _moved(tree, run)
    raise ConfigError(
        f"nothing beside {run} tells which LLM its captions go through; give it with llm.path=DIR and, after the LLM "
        "stage, llm_adapter=RUN"
    )


def _moved(tree: dict[str, Any], run: Path) -> LLMSettings:
    """Recorded settings of an LLM, its directories looked for where they are now."""
    recorded = from_tree(LLMSettings, tree, where="the run's record of its LLM")
    changes: dict[str, Any] = {"path": _require(recorded.path, run, "llm.path")}
    if recorded.adapter:
        changes["adapter"] = _require(recorded.adapter, run, "llm.adapter")
    if recorded.merge:
        changes["merge"] = tuple(_require(path, run, "llm.merge") for path in recorded.merge)
    return replace(recorded, **changes)


def _require(path: str, run: Path, name: str) -> str:
    if (found := find_again(path, run)) is not None:
        return str(found)
    raise ConfigError(
        f"{name}: the run in {run} names {path}, which is not there; give its place, {name}=DIR"
    )


def find_again(path: str, run: Path) -> Path | None:
    """A path that a run recorded, perhaps relative to another working directory or before everything was moved.

    It is tried as it is, then its last parts beside the run and above it.
    """
    given = Path(path).expanduser()
    if given.exists():
        return given
    parts = given.parts[1:] if given.is_absolute() else given.parts
    for base in (run, *run.resolve().parents[:3]):
        for start in range(len(parts)):
            if (found := base.joinpath(*parts[start:])).exists():
                return found
    return None


def _run_settings(run: Path) -> dict[str, Any]:
    try:
        return read_yaml(run / CONFIG)
    except UserError:  # a model directory by itself
        return {}
