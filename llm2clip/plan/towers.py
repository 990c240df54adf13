"""The CLIP stage's part of a plan: the model that is trained, memory and FLOPs of a chunk of images and captions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.errors import ConfigError
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.plan.measure import Valueless, Work, line_through
from llm2clip.plan.shapes import vision_tower
from llm2clip.settings import TrainSettings, VisionSettings
from llm2clip.training.clip_batch import ImageTexts
from llm2clip.training.parallel import transformer_blocks
from llm2clip.training.towers import TwoTowers
from llm2clip_kernels.similarity_lse import chunked
from llm2clip_kernels.stripes import stripe_rows

_FLOPS_IMAGES = 2  # a count that every layer takes
_STRIPES = 3  # of the loss that are run; all take the same memory


@dataclass(frozen=True)
class ModelSize:
    """What the model of the CLIP stage holds, in fp32.

    Attributes:
        parameters, trained: all of them, and those with a gradient.
        tower: of the vision tower.
        adapter: of the text adapter.
        largest_block_bytes: of the transformer block with most weights; 0 without blocks.
        image_size: side of an image in pixels.
    """

    parameters: int
    trained: int
    tower: int
    adapter: int
    largest_block_bytes: float
    image_size: int


class ClipModel:
    """The model of the CLIP stage, without values.

    Args:
        settings: of the stage.
        tower: see `vision_tower`.
        llm_dim: width of the stored embeddings.

    Attributes:
        size: what it holds.

    Raises:
        ConfigError: the settings ask for something that a plan does not cover.
        ModelError: it cannot be built.
    """

    def __init__(self, settings: TrainSettings, tower: str, llm_dim: int) -> None:
        if settings.text.source != "stored" or settings.model.clip_text.use != "none":
            raise ConfigError(
                "a plan covers captions from a store: train.text.source=stored and train.model.clip_text.use=none"
            )
        self._settings, self._tower, self._llm_dim = settings, tower, llm_dim
        self._runner = Valueless(lambda: self._build(settings.model.vision))
        self.size = self._size()

    def _build(self, vision: VisionSettings) -> nn.Module:
        tower = vision_tower(self._tower, vision)
        model = LLM2CLIP(replace(self._settings.model, init=None), self._llm_dim, vision=tower)
        return TwoTowers(model, self._settings)

    def _size(self) -> ModelSize:
        module: Any = self._runner.module
        blocks = [4.0 * sum(p.numel() for p in block.parameters()) for block in transformer_blocks(module)]
        count = [p.numel() for p in module.parameters()]
        return ModelSize(
            sum(count),
            sum(p.numel() for p in module.parameters() if p.requires_grad),
            sum(p.numel() for p in module.model.vision_model.parameters()),
            sum(p.numel() for p in module.model.text_adapter.parameters()),
            max(blocks, default=0.0),
            module.model.vision_model.image_size,
        )

    def images_through(self, count: int, precision: str) -> Work:
        """Run `count` images, at which memory is exact; for other numbers it is a line through two."""
        peaks = {
            n: float(self._runner.peak(partial(self._batch, n), _outputs, precision=precision))
            for n in (max(1, count // 2), count)
        }
        return Work(*self.flops(), *line_through(peaks))

    def flops(self) -> tuple[float, float]:
        """FLOPs of one image's forward and backward, whatever gradient checkpointing recomputes left out."""
        vision, runner = self._settings.model.vision, self._runner
        if vision.grad_checkpointing:
            runner = Valueless(lambda: self._build(replace(vision, grad_checkpointing=False)))
        found = runner.flops(lambda: self._batch(_FLOPS_IMAGES), _outputs)
        return found.forward / _FLOPS_IMAGES, found.backward / _FLOPS_IMAGES

    def _batch(self, count: int) -> ImageTexts:
        captions = count * self._settings.data.captions.per_image
        size = self.size.image_size
        stored = bool(self._settings.features)
        module: Any = self._runner.module
        return ImageTexts(
            keys=[""] * count,
            groups=torch.zeros(count, dtype=torch.int64),
            counts=[self._settings.data.captions.per_image] * count,
            texts=[""] * captions,
            embeddings=torch.zeros(captions, self._llm_dim),
            images=() if stored else (torch.zeros(count, 3, size, size, dtype=torch.uint8),),
            features=torch.zeros(count, module.model.vision_model.dim) if stored else None,
            owners=torch.zeros(captions, dtype=torch.int64),
        )


def _outputs(module: nn.Module, batch: ImageTexts) -> Tensor:
    outputs = [output for output in module(batch).values() if output.requires_grad]
    return torch.cat([output.float().flatten() for output in outputs])


@lru_cache(maxsize=256)
def loss_workspace(rows: int, columns: int, dim: int) -> float:
    """Bytes that the contrastive loss takes beside its inputs, its gradients included.

    The trainer's losses stay in fp32, which the kernels take by stripes on a GPU; they are run here without values.

    Args:
        rows: rows of this rank.
        columns: rows of all ranks, hard negatives included.
        dim: of the features.
    """
    run = min(rows, _STRIPES * stripe_rows(columns, rows))

    class _Nothing(nn.Module):
        pass

    def loss(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        x, y, scale, vector, row, column, groups_x, groups_y = inputs
        row_lse, column_lse = chunked.forward(x, y, scale, True, 0, groups_x, groups_y)
        dx, dy, _ = chunked.backward(
            row, column, vector, x, y, scale, row_lse, column_lse, 0, groups_x, groups_y, True, True, True
        )
        return dx[:1] + dy[:1]

    def inputs() -> tuple[Tensor, ...]:
        x, y = torch.zeros(run, dim), torch.zeros(columns, dim)
        row, column = torch.zeros(run), torch.zeros(columns)
        groups = torch.zeros(run, dtype=torch.int64), torch.zeros(columns, dtype=torch.int64)
        return x, y, torch.zeros(()), torch.zeros(run), row, column, *groups

    given = 4 * (run + columns) * dim
    peak = Valueless(_Nothing).peak(inputs, loss, train=False)
    # rows that were not run have a gradient too
    return peak - given + 4 * (rows - run) * dim
