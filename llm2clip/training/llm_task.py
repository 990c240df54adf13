"""The LLM stage: caption contrastive fine-tuning of a decoder LLM through LoRA.

Two captions of one image are a positive pair, all other captions of the batch are negatives (LLM2CLIP, arXiv
2411.04997, section 3; LLM2Vec's loss, arXiv 2404.05961, as an alternative).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from llm2clip.data.loader import Position
from llm2clip.data.sample import Sample
from llm2clip.data.sources import open_source
from llm2clip.errors import ConfigError
from llm2clip.losses import HardNegativeNLLLoss
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.packed import make_packs
from llm2clip.models.tokens import Tokens
from llm2clip.settings import CaptionSettings, FinetuneLLMSettings
from llm2clip.training.batches import rank_batches
from llm2clip.training.optim import NamedParameters
from llm2clip.training.pairs import CaptionPair, caption_pair, pair_source, without_duplicates
from llm2clip.training.world import World
from llm2clip_kernels import infonce_loss, l2_normalize


@dataclass(frozen=True)
class PairTokens:
    """Tokenised pairs; entry i of both lists belongs to one image."""

    short: Sequence[Tokens]
    long: Sequence[Tokens]

    def __len__(self) -> int:
        return len(self.short)


class CaptionPairEmbedder(nn.Module):
    """Embeds both captions of each pair: `PairTokens` of b pairs -> `short`, `long`, each (b, D) fp32.

    Args:
        encoder: the caption encoder.
        token_budget: tokens of a forward pass of a packed encoder; 0: as its `encode`.
    """

    def __init__(self, encoder: CaptionEncoder, token_budget: int = 0) -> None:
        super().__init__()
        self.encoder, self.token_budget = encoder, token_budget

    def forward(self, pairs: PairTokens) -> dict[str, Tensor]:
        if self.encoder.layout == "packed":
            both = self.encoder.embed([*pairs.short, *pairs.long], token_budget=self.token_budget)
            return {"short": both[: len(pairs)], "long": both[len(pairs) :]}
        return {"short": self._embed(pairs.short), "long": self._embed(pairs.long)}

    def _embed(self, tokens: Sequence[Tokens]) -> Tensor:
        # neighbours in length share a forward, so that little of it is padding
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i].ids))
        parts = [
            self.encoder(self.encoder.collate([tokens[i] for i in group]))
            for group in _length_groups(order, tokens)
        ]
        position = torch.empty(len(order), dtype=torch.long)
        position[torch.tensor(order)] = torch.arange(len(order))
        return torch.cat(parts)[position.to(parts[0].device)]


def _length_groups(
    order: Sequence[int], tokens: Sequence[Tokens], slack: float = 1.25
) -> Iterator[list[int]]:
    """Split indices sorted by length where the longest would pad the shortest by more than `slack`."""
    group: list[int] = []
    for index in order:
        if group and len(tokens[index].ids) > slack * len(tokens[group[0]].ids) + 4:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


class LLMTask:
    """Task of `llm2clip finetune-llm` (see `training.loop.Task`)."""

    title = "fine-tuning the LLM"

    def __init__(
        self, settings: FinetuneLLMSettings, world: World, encoder: CaptionEncoder | None = None
    ) -> None:
        if not settings.data.train:
            raise ConfigError("data.train: expected at least one source of caption pairs")
        self.settings = settings
        self._world = world
        self.encoder = encoder or CaptionEncoder.from_settings(settings.llm, world.device)
        torch.manual_seed(settings.run.seed)  # the adapters' initial values
        self.encoder.add_lora(settings.lora)
        self.token_budget = settings.token_budget
        self.module: nn.Module = CaptionPairEmbedder(self.encoder, self.token_budget)
        source = open_source(settings.data.train, weights=settings.data.weights, limit=settings.data.limit)
        self._source = pair_source(source, settings.data.captions, show=world.is_main)
        self.samples = len(self._source)
        self._hard_negative = HardNegativeNLLLoss(scale=settings.loss.scale)
        self._scale = settings.loss.scale

    def groups(self) -> Mapping[str, NamedParameters]:
        return {"lora": [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]}

    def batches(self, epoch: int, batch: int) -> Iterator[tuple[Position, Sequence[CaptionPair]]]:
        data = self.settings.data
        transform = partial(_to_pair, captions=data.captions)
        return rank_batches(self._source, transform, data, self.settings.run, self._world, (epoch, batch))

    def chunks(self, samples: Sequence[CaptionPair], size: int) -> Sequence[PairTokens]:
        pairs = without_duplicates(samples) if self.settings.loss.mask_duplicates else list(samples)
        short = self.encoder.tokenize([pair.short for pair in pairs])
        long = self.encoder.tokenize([pair.long for pair in pairs])
        if self.token_budget:
            lengths = [len(s.ids) + len(t.ids) for s, t in zip(short, long, strict=True)]
            packs = make_packs(lengths, self.token_budget)
            return [PairTokens([short[i] for i in part], [long[i] for i in part]) for part in packs]
        # sorted by length, so that a chunk of long captions holds only long ones
        order = sorted(range(len(pairs)), key=lambda i: len(long[i].ids))
        step = size or len(order)
        return [
            PairTokens([short[i] for i in part], [long[i] for i in part])
            for part in (order[start : start + step] for start in range(0, len(order), step))
        ]

    def loss(self, outputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        short, long = outputs["short"], outputs["long"]
        if self.settings.loss.kind == "hard_negative":
            value = self._hard_negative(short, long)
        else:
            value = infonce_loss(
                l2_normalize(short),
                l2_normalize(long),
                self._scale,
                group=_group(self._world),
            )
        with torch.no_grad():
            similarity = nn.functional.cosine_similarity(short, long, dim=-1).mean()
        return value, {"positive_similarity": similarity}

    def after_step(self) -> None:
        pass

    def names(self, samples: Sequence[CaptionPair]) -> list[str]:
        return [pair.key for pair in samples]

    def evaluate(self) -> dict[str, float]:
        return {}

    def export(self, path: Path) -> None:
        """Write the adapter as a plain peft directory."""
        self.encoder.save_adapter(path)


def _group(world: World) -> torch.distributed.ProcessGroup | None:
    return torch.distributed.group.WORLD if world.size > 1 else None


def _to_pair(sample: Sample, rng: np.random.Generator, captions: CaptionSettings) -> CaptionPair:
    return caption_pair(sample, captions)
