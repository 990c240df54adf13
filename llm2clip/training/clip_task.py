"""The CLIP stage: a vision tower and a small text adapter learn one space, with the LLM's stored embeddings.

The LLM is frozen and absent: captions enter as the embeddings that `llm2clip embed` stored (LLM2CLIP, arXiv
2411.04997, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from llm2clip.data.images import ImageTransform, decode_image
from llm2clip.data.loader import Position
from llm2clip.data.sample import Sample, caption_role
from llm2clip.data.sources import Source, open_source
from llm2clip.data.store import EmbeddingStore
from llm2clip.errors import BadSampleError, CheckpointError, ConfigError, DataError
from llm2clip.files import read_json, write_json
from llm2clip.models.groups import group_of
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.settings import CaptionSettings, ModelSettings, TrainSettings
from llm2clip.training import checkpoint
from llm2clip.training.batches import rank_batches
from llm2clip.training.optim import NamedParameters
from llm2clip.training.world import World
from llm2clip_kernels import infonce_loss, sigmoid_loss


@dataclass(frozen=True, slots=True)
class ImageText:
    """One training sample: an image and the caption picked for it this time.

    Attributes:
        key: sample key, for messages.
        group: identity of what is shown.
        pixels: (3, S, S) float32, normalised.
        text: caption, looked up in the embedding store.
    """

    key: str
    group: str
    pixels: Tensor
    text: str


@dataclass(frozen=True)
class ImageTextChunk:
    """Images (b, 3, S, S) and LLM embeddings (b, D_llm) on the device."""

    pixels: Tensor
    embeddings: Tensor

    def __len__(self) -> int:
        return len(self.pixels)


class TwoTowers(nn.Module):
    """`ImageTextChunk` -> unit-norm `image` and `text` (b, D), the 0-dim multiplier `scale`, and `bias` if any."""

    def __init__(self, model: LLM2CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, chunk: ImageTextChunk) -> dict[str, Tensor]:
        outputs = self.model(chunk.pixels, chunk.embeddings)
        names = {
            "image": "image_features", "text": "text_features", "scale": "logit_scale", "bias": "logit_bias"
        }  # fmt: skip
        return {ours: outputs[theirs] for ours, theirs in names.items() if theirs in outputs}


class ClipTask:
    """Task of `llm2clip train` (see `training.loop.Task`)."""

    title = "training CLIP"
    token_budget = 0

    def __init__(self, settings: TrainSettings, world: World) -> None:
        if not settings.data.train:
            raise ConfigError("data.train: expected at least one source of images and captions")
        if not settings.store:
            raise ConfigError("store: expected the embedding store that `llm2clip embed` made")
        self.settings = settings
        self._world = world
        self._store = EmbeddingStore.open(settings.store)
        self._source: Source = open_source(
            settings.data.train, weights=settings.data.weights, limit=settings.data.limit
        )
        _require_roles(settings.data.captions)
        require_stored_captions(self._source, settings.data.captions, self._store)
        _require_same_encoder(Path(settings.run.out), self._store, world)
        torch.manual_seed(settings.run.seed)  # the adapter's initial values
        self.model = LLM2CLIP.from_settings(
            model_settings(settings), self._store.dim, self._store.fingerprint
        ).to(world.device)
        self.module: nn.Module = TwoTowers(self.model)
        self.samples = len(self._source)
        self._transform = self.model.vision_model.preprocessing.transform(train=True)

    def groups(self) -> Mapping[str, NamedParameters]:
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.model.named_parameters():
            groups.setdefault(group_of(name), []).append((name, parameter))
        return groups

    def batches(self, epoch: int, batch: int) -> Iterator[tuple[Position, Sequence[ImageText]]]:
        data = self.settings.data
        transform = partial(_to_image_text, captions=data.captions, transform=self._transform)
        return rank_batches(self._source, transform, data, self.settings.run, self._world, (epoch, batch))

    def chunks(self, samples: Sequence[ImageText], size: int) -> Sequence[ImageTextChunk]:
        kept = _one_per_group(samples) if self.settings.loss.mask_duplicates else list(samples)
        embeddings = self._store.get([sample.text for sample in kept])
        step = size or len(kept)
        device = self._world.device
        return [
            ImageTextChunk(
                torch.stack([sample.pixels for sample in kept[start : start + step]]).to(device),
                embeddings[start : start + step].to(device),
            )
            for start in range(0, len(kept), step)
        ]

    def loss(self, outputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        image, text, scale = outputs["image"], outputs["text"], outputs["scale"]
        group = torch.distributed.group.WORLD if self._world.size > 1 else None
        metrics = {"logit_scale": scale.detach()}
        if self.settings.loss.kind == "sigmoid":
            metrics["logit_bias"] = outputs["bias"].detach()
            value = sigmoid_loss(image, text, scale, outputs["bias"], group=group)
        else:
            smoothing = self.settings.loss.label_smoothing
            value = infonce_loss(
                image, text, scale, label_smoothing=smoothing, logit_bias=outputs.get("bias"), group=group
            )
        with torch.no_grad():
            similarity = (image * text).sum(-1).float().mean()
        return value, {"positive_similarity": similarity, **metrics}

    def after_step(self) -> None:
        self.model.clamp_logit_scale()

    def names(self, samples: Sequence[ImageText]) -> list[str]:
        return [sample.key for sample in samples]

    def evaluate(self) -> dict[str, float]:
        """Retrieval on `data.val` with the model as it is, when there is any."""
        if not self.settings.data.val or not self._world.is_main:
            return {}
        from llm2clip.evaluation.retrieval import quick_retrieval

        self.model.eval()
        return quick_retrieval(self.model, self.settings.data, self._store)

    def export(self, path: Path) -> None:
        """Write the model as `LLM2CLIP.from_pretrained` reads it."""
        from llm2clip.export.card import run_card

        self.model.save_pretrained(path, run_card(Path(self.settings.run.out)))


def model_settings(settings: TrainSettings) -> ModelSettings:
    """The model's settings with the loss's own first scale and bias where they are left open.

    SigLIP (arXiv 2303.15343, section 3.2): scale 10 and bias -10, which make up for the many negatives.
    """
    model = settings.model
    if settings.loss.kind != "sigmoid":
        return model
    scale, bias = model.logit_scale_init, model.logit_bias_init
    return replace(
        model,
        logit_scale_init=math.log(10.0) if scale is None else scale,
        logit_bias_init=-10.0 if bias is None else bias,
    )


def require_stored_captions(
    source: Source, captions: CaptionSettings, store: EmbeddingStore, probe: int = 64
) -> None:
    """Check a spread of samples, so that a store of other data fails now and not in the middle of an epoch.

    Raises:
        StoreError: a caption is not in the store.
        DataError: none of the samples has a caption; the fields that were found are named.
    """
    stride = max(1, len(source) // probe)
    texts: list[str] = []
    found: set[str] = set()
    for index in range(0, len(source), stride):
        try:
            sample = source.captions_of(index)
        except BadSampleError:
            continue
        found.update(sample.captions)
        texts += [text for _, text in _roles(sample, captions)]
    if not texts:
        raise DataError(
            f"{source.name}: no caption in {', '.join((*captions.short, *captions.long))}; the caption fields found "
            f"are: {', '.join(sorted(found)) or 'none'}. Set data.captions.short and data.captions.long."
        )
    store.rows(texts)


def _require_same_encoder(out: Path, store: EmbeddingStore, world: World) -> None:
    """Refuse to go on with embeddings of another encoder than the run began with; their width may be the same."""
    record = out / "text_encoder.json"
    if checkpoint.latest(out) is not None and record.exists():
        store.check_fingerprint(read_json(record, CheckpointError))
    elif world.is_main:
        write_json(record, store.fingerprint)


def _require_roles(captions: CaptionSettings) -> None:
    chances = captions.probabilities
    if unknown := sorted(set(chances) - {"short", "long"}):
        raise ConfigError(
            f"data.captions.probabilities: expected the roles short and long, got {', '.join(unknown)}"
        )
    if chances and not (min(chances.values()) >= 0 and sum(chances.values()) > 0):
        raise ConfigError(
            f"data.captions.probabilities: expected shares of at least 0, one of them above, got {chances}"
        )


def _roles(sample: Sample, captions: CaptionSettings) -> list[tuple[str, str]]:
    roles = (("short", captions.short), ("long", captions.long))
    return [(role, text) for role, fields in roles if (text := caption_role(sample, fields))]


def pick_caption(sample: Sample, captions: CaptionSettings, rng: np.random.Generator) -> str:
    """One caption of the sample, its role drawn with `captions.probabilities`.

    Raises:
        BadSampleError: no role that may be drawn has text.
    """
    choices = [
        (text, captions.probabilities.get(role, 0.0) if captions.probabilities else 1.0)
        for role, text in _roles(sample, captions)
    ]
    total = sum(weight for _, weight in choices)
    if total <= 0:
        raise BadSampleError(
            sample.key,
            f"no caption in {', '.join((*captions.short, *captions.long))}; it has "
            f"{', '.join(sample.captions) or 'none'}",
        )
    point = rng.random() * total
    for text, weight in choices:
        point -= weight
        if point < 0:
            return text
    return choices[-1][0]


def _to_image_text(
    sample: Sample, rng: np.random.Generator, captions: CaptionSettings, transform: ImageTransform
) -> ImageText:
    text = pick_caption(sample, captions, rng)
    if sample.image is None:
        raise BadSampleError(sample.key, "it has no image")
    return ImageText(
        sample.key, sample.group, transform(decode_image(sample.image, key=sample.key), rng), text
    )


def _one_per_group(samples: Sequence[ImageText]) -> list[ImageText]:
    """Drop images of what the batch shows already: they would be false negatives."""
    kept: dict[str, ImageText] = {}
    for sample in samples:
        kept.setdefault(sample.group, sample)
    return list(kept.values())
