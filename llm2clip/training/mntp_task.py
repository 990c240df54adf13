"""Masked next-token prediction: a first step that teaches an LLM to use attention to both sides.

Some tokens of a text are masked, and the state of the position before each predicts it, so that the head keeps the
meaning it was trained with (LLM2Vec, arXiv 2404.05961, section 2; LLM2CLIP's optional stage 0).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llm2clip.data.loader import Position
from llm2clip.data.sample import Sample
from llm2clip.data.sources import open_source
from llm2clip.errors import BadSampleError, ConfigError
from llm2clip.models import packed
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.lm_head import LMHead, load_lm_head
from llm2clip.models.lora import base_model
from llm2clip.models.packed import make_packs
from llm2clip.settings import FinetuneLLMSettings
from llm2clip.training.batches import epoch_samples, rank_batches
from llm2clip.training.llm_setup import is_sharded, trained_encoder
from llm2clip.training.masking import MaskedText, Masker
from llm2clip.training.optim import NamedParameters
from llm2clip.training.pair_sources import SingleTexts, pair_source
from llm2clip.training.pairs import OwnedSample
from llm2clip.training.world import World

_EVALUATED_TEXTS = 256
_EVALUATION_SEED = 7
_BUDGET = 4096  # tokens of a chunk of the evaluation


@dataclass(frozen=True, slots=True)
class TextToMask:
    """A text as the loader gives it, and the seed of its masks and of its window."""

    key: str
    text: str
    seed: int


@dataclass(frozen=True)
class MaskedTexts:
    """Texts of one forward pass, and the number of masked tokens in the whole batch over all ranks."""

    texts: Sequence[MaskedText]
    total: int

    def __len__(self) -> int:
        return len(self.texts)


class MaskedTokenModel(nn.Module):
    """`MaskedTexts` -> `losses` (M,) of the masked tokens, and the 0-dim `total` they are divided by."""

    def __init__(self, encoder: CaptionEncoder, head: LMHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, chunk: MaskedTexts) -> dict[str, Tensor]:
        encoder, tokens = self.encoder, [text.tokens for text in chunk.texts]
        device = encoder.device
        if encoder.layout == "packed":
            pack = packed.flatten(tokens, device)
            states = encoder.token_states(pack)
            starts = np.cumsum([0, *(len(t.ids) for t in tokens)])
        else:
            padded = encoder.token_states(encoder.collate(tokens))
            starts = np.arange(len(tokens)) * padded.shape[1]
            states = padded.flatten(0, 1)
        before = [
            start + place - 1
            for start, text in zip(starts, chunk.texts, strict=False)
            for place in text.places
        ]
        rows = torch.tensor(before, dtype=torch.int64, device=device)
        targets = torch.tensor(
            [t for text in chunk.texts for t in text.targets], dtype=torch.int64, device=device
        )
        return {
            "losses": self.head.losses(states[rows], targets),
            "total": torch.tensor(float(max(1, chunk.total)), device=device),
        }


class MNTPTask:
    """Task of `llm2clip finetune-llm objective=mntp` (see `training.task.Task`)."""

    title = "masked next-token prediction"
    additive = True

    def __init__(self, settings: FinetuneLLMSettings, world: World) -> None:
        if not settings.data.train:
            raise ConfigError("data.train: expected at least one source of texts")
        self.settings, self._world = settings, world
        self.sharded, self.token_budget = is_sharded(settings, world), settings.token_budget
        self._source = self._texts(settings.data.train, settings.data.weights)
        self.samples = epoch_samples(self._source, settings.run)
        self.encoder = trained_encoder(settings, world)
        self._mask = Masker(self.encoder.tokenizer, settings.masking)
        head = load_lm_head(settings.llm.path, settings.llm.gguf_file, base_model(self.encoder.model))
        self.module: nn.Module = MaskedTokenModel(self.encoder, head)

    def _texts(self, paths: Sequence[str], weights: Sequence[float] = ()) -> Any:
        source = open_source(paths, weights=weights, limit=self.settings.data.limit)
        return pair_source(source, self.settings, show=False)

    def groups(self) -> Mapping[str, NamedParameters]:
        return {"lora": [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]}

    def batches(self, epoch: int, batch: int) -> Iterator[tuple[Position, Sequence[TextToMask]]]:
        settings = self.settings
        return rank_batches(
            self._source, to_masked_text, settings.data, settings.run, self._world, (epoch, batch)
        )

    def chunks(self, samples: Sequence[TextToMask], size: int) -> Sequence[MaskedTexts]:
        texts = self._masked(samples)
        total = self._world.sum(sum(len(text.places) for text in texts))
        return [
            MaskedTexts([texts[i] for i in part], total)
            for part in self._parts(texts, self.token_budget, size)
        ]

    def _masked(self, samples: Sequence[TextToMask]) -> list[MaskedText]:
        generators = [np.random.default_rng(sample.seed) for sample in samples]
        windows = [generator.random() for generator in generators]
        tokens = self.encoder.tokenize([sample.text for sample in samples], windows=windows)
        return [self._mask(t, generator) for t, generator in zip(tokens, generators, strict=True)]

    def _parts(self, texts: Sequence[MaskedText], budget: int, size: int) -> list[list[int]]:
        lengths = [len(text.tokens.ids) for text in texts]
        if budget:
            return [part.tolist() for part in make_packs(lengths, budget)]
        order = sorted(range(len(texts)), key=lambda i: lengths[i])
        step = size or len(order)
        return [order[start : start + step] for start in range(0, len(order), step)]

    def loss(self, outputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """This chunk's share of the mean over all masked tokens; the ranks' gradients are averaged afterwards."""
        return outputs["losses"].sum() * (self._world.size / outputs["total"]), {}

    def after_step(self) -> None:
        pass

    def names(self, samples: Sequence[TextToMask]) -> list[str]:
        return [sample.key for sample in samples]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Perplexity of masked tokens of held-out texts with the adapter, and without it: after and before."""
        if not self.settings.data.val or not (self._world.is_main or self.sharded):
            return {}
        held_out = islice(_all_texts(self._texts(self.settings.data.val)), _EVALUATED_TEXTS)
        texts = self._masked(list(held_out))
        chunks = [MaskedTexts([texts[i] for i in part], 1) for part in self._parts(texts, _BUDGET, 0)]
        count = sum(len(text.places) for text in texts)
        adapted: Any = self.encoder.model
        values: dict[str, float] = {}
        self.module.eval()
        for name, without in (("val/perplexity_base", True), ("val/perplexity", False)):
            with adapted.disable_adapter() if without else nullcontext():
                total = sum(self.module(chunk)["losses"].double().sum().item() for chunk in chunks)
            values[name] = math.exp(min(total / max(1, count), 700.0))
        return values

    def export(self, path: Path) -> None:
        """Write the adapter as a plain peft directory."""
        self.encoder.save_adapter(path, notes={"objective": self.settings.objective})


def to_masked_text(sample: Sample, rng: np.random.Generator) -> TextToMask:
    """The loader's transform: one text of the sample, and a seed for everything else that is drawn."""
    assert isinstance(sample, OwnedSample) and isinstance(sample.owner, SingleTexts)
    return TextToMask(sample.key, sample.owner.text(sample, rng), int(rng.integers(2**63)))


def _all_texts(source: Any) -> Iterator[TextToMask]:
    """Texts of a source in order; those that cannot be read are left out."""
    for index in range(len(source)):
        try:
            yield to_masked_text(source[index], np.random.default_rng([_EVALUATION_SEED, index]))
        except BadSampleError:
            continue
