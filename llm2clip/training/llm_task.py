"""The LLM stage: contrastive fine-tuning of a decoder LLM on pairs of texts, through LoRA.

Two captions of one image, a query and its passage, or one text under two dropout masks are a positive pair; the other
texts of the batch are negatives (LLM2CLIP, arXiv 2411.04997, section 3; LLM2Vec, arXiv 2404.05961).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.data.loader import Position
from llm2clip.data.sources import open_source
from llm2clip.errors import ConfigError, DataError
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.packed import make_packs
from llm2clip.models.tokens import Tokens
from llm2clip.settings import CaptionLossSettings, FinetuneLLMSettings
from llm2clip.training.batches import epoch_samples, rank_batches
from llm2clip.training.false_negatives import negative_keys, pair_keys
from llm2clip.training.llm_setup import is_sharded, trained_encoder
from llm2clip.training.optim import NamedParameters
from llm2clip.training.pair_loss import PairLoss, prefix_dims
from llm2clip.training.pair_sources import brings_negatives, pair_source
from llm2clip.training.pairs import TextPair, to_pair
from llm2clip.training.world import World

log = logging.getLogger("llm2clip.training")

_EVALUATED_PAIRS = 200


@dataclass(frozen=True)
class PairTokens:
    """Tokenised pairs; entry i of `query`, `positive` and `keys` belongs to one pair.

    Attributes:
        query, positive: b texts each.
        keys: (b, 3) int64, `false_negatives.pair_keys`.
        negative: hard negatives, any number; None: the run has none.
        negative_keys: (k, 3) int64, `false_negatives.negative_keys`.
    """

    query: Sequence[Tokens]
    positive: Sequence[Tokens]
    keys: Tensor
    negative: Sequence[Tokens] | None = None
    negative_keys: Tensor | None = None

    def __len__(self) -> int:
        return len(self.query)


class PairEmbedder(nn.Module):
    """Embeds the texts of pairs: `PairTokens` -> what `PairLoss` takes, embeddings (b, D) fp32.

    Args:
        encoder: the caption encoder.
        loss: the first scale, and whether it is trained.
        token_budget: tokens of a forward pass of a packed encoder; 0: as its `encode`.
        one_forward: make one forward of the LLM of every chunk, as long as it may be.
    """

    scale: Tensor

    def __init__(
        self,
        encoder: CaptionEncoder,
        loss: CaptionLossSettings | None = None,
        token_budget: int = 0,
        *,
        one_forward: bool = False,
    ) -> None:
        super().__init__()
        loss = loss or CaptionLossSettings()
        self.encoder, self.token_budget, self.one_forward = encoder, token_budget, one_forward
        if loss.learn_scale:
            self.logit_scale = nn.Parameter(torch.tensor(math.log(loss.scale), device=encoder.device))
        else:
            self.register_buffer("scale", torch.tensor(loss.scale, device=encoder.device), persistent=False)

    def forward(self, pairs: PairTokens) -> dict[str, Tensor]:
        sides = {"query": pairs.query, "positive": pairs.positive}
        if pairs.negative is not None:
            sides["negative"] = pairs.negative
        device = self.encoder.device
        outputs = self._embed(sides) | {"keys": pairs.keys.to(device)}
        if pairs.negative_keys is not None:
            outputs["negative_keys"] = pairs.negative_keys.to(device)
        cut = [[t.truncated for t in side] for side in (pairs.query, pairs.positive)]
        outputs["truncated"] = torch.tensor(cut, dtype=torch.float32, device=device).T
        outputs["scale"] = self.logit_scale.exp() if hasattr(self, "logit_scale") else self.scale
        return outputs

    def _embed(self, sides: Mapping[str, Sequence[Tokens]]) -> dict[str, Tensor]:
        if self.encoder.layout != "packed":
            return {name: self._padded(tokens) for name, tokens in sides.items()}
        everything = [tokens for side in sides.values() for tokens in side]
        budget = sum(len(t.ids) for t in everything) if self.one_forward else self.token_budget
        embeddings = self.encoder.embed(everything, token_budget=budget)
        return dict(zip(sides, embeddings.split([len(side) for side in sides.values()]), strict=True))

    def _padded(self, tokens: Sequence[Tokens]) -> Tensor:
        if not tokens:
            return self.encoder.embed(tokens)
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
    """Task of `llm2clip finetune-llm` for pairs (see `training.task.Task`)."""

    title = "fine-tuning the LLM"
    additive = False

    def __init__(self, settings: FinetuneLLMSettings, world: World) -> None:
        if not settings.data.train:
            raise ConfigError("data.train: expected at least one source of caption pairs")
        self.settings = settings
        self._world = world
        self.sharded = is_sharded(settings, world)
        self.token_budget = settings.token_budget
        source = open_source(settings.data.train, weights=settings.data.weights, limit=settings.data.limit)
        self._source = pair_source(source, settings, show=world.is_main)
        self.samples = epoch_samples(self._source, settings.run, one_source=settings.pairs.one_source)
        self.encoder = trained_encoder(settings, world)
        prefix_dims(settings.loss.matryoshka, self.encoder.dim)
        self._embedder = PairEmbedder(
            self.encoder, settings.loss, self.token_budget, one_forward=self.sharded
        )
        self.module: nn.Module = self._embedder
        self.loss = PairLoss(settings.loss, world)
        # for the whole run, since ranks must agree on it in every batch
        self._negatives = brings_negatives(self._source, settings)

    def groups(self) -> Mapping[str, NamedParameters]:
        trained = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        lora = [(n, p) for n, p in trained if n != "logit_scale"]
        scale = [(n, p) for n, p in trained if n == "logit_scale"]
        return {"lora": lora} | ({"logit_scale": scale} if scale else {})

    def batches(self, epoch: int, batch: int) -> Iterator[tuple[Position, Sequence[TextPair]]]:
        settings = self.settings
        return rank_batches(
            self._source, to_pair, settings.data, settings.run, self._world, (epoch, batch),
            one_source=settings.pairs.one_source,
        )  # fmt: skip

    def chunks(self, samples: Sequence[TextPair], size: int) -> Sequence[PairTokens]:
        documents = [pair.document_prompt for pair in samples]
        query = self._tokens([p.query for p in samples], [p.query_prompt for p in samples])
        positive = self._tokens([p.positive for p in samples], documents)
        given = [i for i, p in enumerate(samples) if p.negative] if self._negatives else []
        hard = self._tokens([samples[i].negative for i in given], [documents[i] for i in given])
        negative = dict(zip(given, hard, strict=True))
        lengths = [
            sum(len(t.ids) for t in (query[i], positive[i], *([negative[i]] if i in negative else [])))
            for i in range(len(samples))
        ]

        def chunk(part: Sequence[int]) -> PairTokens:
            kept = [i for i in part if i in negative]
            keys = torch.tensor([pair_keys(samples[i]) for i in part])
            other = torch.tensor([negative_keys(samples[i]) for i in kept], dtype=torch.int64).reshape(-1, 3)
            with_negatives = ([negative[i] for i in kept], other) if self._negatives else (None, None)
            return PairTokens([query[i] for i in part], [positive[i] for i in part], keys, *with_negatives)

        if self.token_budget:
            return [chunk(part.tolist()) for part in make_packs(lengths, self.token_budget)]
        # sorted by length, so that a chunk of long captions holds only long ones
        order = sorted(range(len(samples)), key=lambda i: lengths[i])
        step = size or len(order)
        return [chunk(order[start : start + step]) for start in range(0, len(order), step)]

    def _tokens(self, texts: Sequence[str], prompts: Sequence[str]) -> list[Tokens]:
        own = self.encoder.prompt
        return self.encoder.tokenize(texts, [own + prompt for prompt in prompts])

    def after_step(self) -> None:
        if self.settings.loss.learn_scale:
            with torch.no_grad():
                self._embedder.logit_scale.clamp_(0.0, math.log(self.settings.loss.max_scale))

    def names(self, samples: Sequence[TextPair]) -> list[str]:
        return [pair.key for pair in samples]

    def evaluate(self) -> dict[str, float]:
        """Recall of the other caption among the first held-out images, when there are any."""
        if not self.settings.data.val or not (self._world.is_main or self.sharded):
            return {}
        from llm2clip.evaluation.gallery import open_gallery
        from llm2clip_kernels import l2_normalize, retrieval_metrics, similarity_rank

        try:
            items = open_gallery(self.settings.data, _EVALUATED_PAIRS).items
        except DataError as problem:  # the training itself is done, and must not be lost
            log.warning("no evaluation on data.val: %s", problem)
            return {}
        texts = [(i.texts["short"], i.texts["long"]) for i in items if {"short", "long"} <= i.texts.keys()]
        texts = [pair for pair in texts if pair[0] != pair[1]]
        if len(texts) < 2:
            return {}
        # all ranks of a sharded model do the same, since each forward needs all of them
        encoded = self.encoder.encode([text for pair in texts for text in pair])
        short, long = l2_normalize(encoded[::2]), l2_normalize(encoded[1::2])
        values = {"val/pairs": float(len(texts))}
        names = ("short_to_long", "long_to_short")
        for name, rank in zip(names, similarity_rank(short, long), strict=True):
            values[f"val/{name}_r1"] = 100.0 * retrieval_metrics(rank, ks=(1,))["recall"][1]
        return values

    def export(self, path: Path) -> None:
        """Write the adapter as a plain peft directory."""
        dims = self.settings.loss.matryoshka
        notes: dict[str, Any] = {"objective": self.settings.objective}
        if dims:
            notes["matryoshka"] = list(prefix_dims(dims, self.encoder.dim))
        self.encoder.save_adapter(path, notes=notes)
