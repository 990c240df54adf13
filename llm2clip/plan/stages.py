"""The three steps of the method as a plan has them: what each holds in memory, computes, and how long that takes.

What is counted comes from `measure`; what is assumed (the reserve, the share of the peak that is reached) is a setting
and is named in the plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llm2clip.data.store_format import bytes_per_caption
from llm2clip.errors import ConfigError
from llm2clip.plan.decoders import DecoderSize, captions_through, decoder_size
from llm2clip.plan.measure import Work
from llm2clip.plan.shapes import GPU, decoder_config, find_gpu
from llm2clip.plan.towers import ClipModel, loss_workspace
from llm2clip.settings import (
    EmbedSettings,
    FinetuneLLMSettings,
    LLMSettings,
    LoraSettings,
    OptimSettings,
    PlanSettings,
    RunSettings,
    TrainSettings,
)

GIB = 2**30
_TOKEN_BUDGET = 8192  # of an encoder on a GPU where the settings give none
_FP32 = 4
# layers of a sharded model that are whole at a time: the one that runs, and the next one on its way
_GATHERED = 2


@dataclass(frozen=True)
class StagePlan:
    """One step.

    Attributes:
        command: of llm2clip.
        memory: what is held on one GPU -> bytes.
        flops: of the whole step over all GPUs, what is recomputed counted.
        model_flops: the same without what is recomputed, as the MFU in metrics.jsonl counts.
        tflops: peak of one GPU in the precision of the step.
        share: of the peak that is reached.
        measured: whether `share` was measured.
        hours: on all GPUs together.
        steps: optimizer steps; 0: there are none.
        rate: precision and peak, in words.
    """

    command: str
    memory: dict[str, float]
    flops: float
    model_flops: float
    tflops: float
    share: float
    measured: bool
    hours: float
    steps: int = 0
    rate: str = ""

    @property
    def total(self) -> float:
        """Bytes on one GPU."""
        return sum(self.memory.values())


class Planner:
    """Plans each step for any settings of it; measures every shape once.

    Args:
        settings: models, data, GPUs, assumptions.

    Raises:
        ConfigError: a model or GPU is not known, or a figure is missing.
        ModelError: a model cannot be planned with.
    """

    def __init__(self, settings: PlanSettings) -> None:
        self.settings = settings
        self.gpu = _gpu(settings)
        self.config = decoder_config(settings.llm or settings.finetune.llm.path)
        self._sizes: dict[Any, DecoderSize] = {}
        self._captions: dict[Any, Work] = {}
        self._models: dict[Any, tuple[ClipModel, dict[Any, Work]]] = {}

    def finetune(self, stage: FinetuneLLMSettings) -> StagePlan:
        """The LLM stage, contrastive or simcse: LoRA on pairs of captions."""
        plan, run = self.settings, stage.run
        texts = 3 if stage.pairs.negatives == "random" else 2
        local = math.ceil(run.batch_size / plan.gpus)
        captions, cached = self._chunk(stage, local * texts, texts)
        precision = self._precision(run.precision)
        size = self._size(stage.llm, stage.lora)
        cost = self._through(stage.llm, stage.lora, captions, precision, True, stage.gradient_checkpointing)
        everywhere, columns = plan.gpus > 1, run.batch_size * (texts - 1)
        dim = size.dim
        memory = {
            "frozen LLM": self._share(
                size.frozen_bytes, size.largest_layer_bytes, run.parallel == "fsdp" and everywhere
            ),
            **_trained(size.trained, stage.optim, ddp=everywhere and run.parallel == "ddp"),
            f"activations of {captions} captions": cost.peak(captions),
            "features and their gradients": _features(local, texts, columns, dim, cached, everywhere),
            "loss": loss_workspace(local, columns, dim),
            "reserve (assumed)": plan.reserve_gib * GIB,
        }
        steps = _steps(run, plan.pairs)
        each = texts * (cost.forward_flops + cost.backward_flops)
        again = texts * cost.forward_flops * (cached + stage.gradient_checkpointing)
        return self._plan(
            "finetune-llm", memory, steps * run.batch_size, each, again, precision, plan.finetune_mfu, steps
        )

    def embed(self, stage: EmbedSettings) -> StagePlan:
        """Every caption through the LLM, once."""
        plan = self.settings
        captions = max(1, (stage.token_budget or _TOKEN_BUDGET) // plan.caption_tokens)
        lora = plan.finetune.lora
        size = self._size(stage.llm, lora)
        cost = self._through(stage.llm, lora, captions, "fp32", False, False)
        memory = {
            "LLM": size.frozen_bytes + _FP32 * size.trained,
            f"activations of {captions} captions": cost.peak(captions),
            "reserve (assumed)": plan.reserve_gib * GIB,
        }
        count = plan.pairs * plan.captions_per_image
        return self._plan("embed", memory, count, cost.forward_flops, 0.0, stage.llm.dtype, plan.embed_mfu)

    def train(self, stage: TrainSettings) -> StagePlan:
        """The CLIP stage: tower, adapter and projection against stored embeddings."""
        plan, run = self.settings, stage.run
        local = math.ceil(run.batch_size / plan.gpus)
        chunk = min(run.micro_batch or local, local)
        cached, per_image = chunk < local, stage.data.captions.per_image
        precision = self._precision(run.precision)
        model, cost = self._images(stage, chunk, precision)
        size, sharded = model.size, run.parallel == "fsdp" and plan.gpus > 1
        parts = plan.gpus if sharded else 1
        held = _trained(size.trained, stage.optim, ddp=plan.gpus > 1 and not sharded)
        frozen = size.parameters - size.trained
        memory = {
            **({"frozen weights": _FP32 * frozen / parts} if frozen else {}),
            **{name: value / parts for name, value in held.items()},
            **({"gathered blocks": _GATHERED * size.largest_block_bytes} if sharded else {}),
            f"activations of {chunk} images": cost.peak(chunk),
            "features and their gradients": _features(
                local, 1 + per_image, run.batch_size * per_image, stage.model.embed_dim, cached, plan.gpus > 1
            ),
            "loss": loss_workspace(local, run.batch_size * per_image, stage.model.embed_dim),
            "reserve (assumed)": plan.reserve_gib * GIB,
        }
        steps = _steps(run, plan.pairs)
        each = cost.forward_flops + cost.backward_flops
        again = cost.forward_flops * (cached + stage.model.vision.grad_checkpointing)
        found = self._plan(
            "train", memory, steps * run.batch_size, each, again, precision, plan.train_mfu, steps
        )
        return found

    def store_bytes(self) -> float:
        """Of the embedding store."""
        plan = self.settings
        dim = self._size(plan.embed.llm, plan.finetune.lora).dim
        return plan.pairs * plan.captions_per_image * bytes_per_caption(dim, plan.embed.dtype)

    def sizes(self) -> tuple[DecoderSize, ClipModel]:
        """What both models hold."""
        plan = self.settings
        stage = plan.train
        return self._size(plan.finetune.llm, plan.finetune.lora), self._model(stage)[0]

    def _chunk(self, stage: FinetuneLLMSettings, texts: int, each: int) -> tuple[int, bool]:
        """Captions of one forward with a graph, and whether there are several in a batch."""
        if stage.token_budget:
            captions = max(each, stage.token_budget // self.settings.caption_tokens)
        else:
            captions = stage.run.micro_batch * each or texts
        return min(captions, texts), captions < texts

    def _plan(
        self,
        command: str,
        memory: dict[str, float],
        samples: float,
        each: float,
        again: float,
        precision: str,
        mfu: float | None,
        steps: int = 0,
    ) -> StagePlan:
        plan = self.settings
        peak = plan.peak_tflops or (self.gpu.fp32_tflops if precision == "fp32" else self.gpu.tflops)
        flops, model_flops = samples * (each + again), samples * each
        # a measured MFU has paid for what is recomputed; an assumed share has not
        share = mfu if mfu is not None else plan.assumed_utilisation
        counted = model_flops if mfu is not None else flops
        hours = counted / (plan.gpus * peak * 1e12 * share) / 3600
        return StagePlan(
            command, memory, flops, model_flops, peak, share, mfu is not None, hours, steps,
            f"{precision} at {peak:g} TFLOP/s",
        )  # fmt: skip

    def _precision(self, precision: str) -> str:
        # `auto` is bf16 on every GPU that has it
        return "bf16" if precision == "auto" else precision

    def _share(self, total: float, layer: float, sharded: bool) -> float:
        return total / self.settings.gpus + _GATHERED * layer if sharded else total

    def _size(self, llm: LLMSettings, lora: LoraSettings | None) -> DecoderSize:
        key = (llm.dtype, llm.quantization, llm.dim, lora)
        if key not in self._sizes:
            self._sizes[key] = decoder_size(self.config, llm, lora)
        return self._sizes[key]

    def _through(
        self,
        llm: LLMSettings,
        lora: LoraSettings,
        count: int,
        precision: str,
        train: bool,
        checkpointing: bool,
    ) -> Work:
        # memory is a line in the number of captions
        key = (llm.dtype, llm.bidirectional, llm.pooling, llm.layout, lora, precision, train, checkpointing)
        if key not in self._captions:
            self._captions[key] = captions_through(
                self.config, llm, lora,
                tokens=self.settings.caption_tokens, count=count, precision=precision, train=train,
                checkpointing=checkpointing,
            )  # fmt: skip
        return self._captions[key]

    def _model(self, stage: TrainSettings) -> tuple[ClipModel, dict[Any, Work]]:
        key = repr((stage.model, stage.loss, stage.features, stage.data.captions.per_image))
        if key not in self._models:
            dim = self._size(self.settings.embed.llm, self.settings.finetune.lora).dim
            self._models[key] = ClipModel(stage, self.settings.tower, dim), {}
        return self._models[key]

    def _images(self, stage: TrainSettings, count: int, precision: str) -> tuple[ClipModel, Work]:
        model, known = self._model(stage)
        if precision not in known:
            known[precision] = model.images_through(count, precision)
        return model, known[precision]


def _gpu(settings: PlanSettings) -> GPU:
    memory, peak = settings.gpu_memory_gib, settings.peak_tflops
    if settings.gpu:
        found = find_gpu(settings.gpu)
        return GPU(memory or found.memory_gib, peak or found.tflops, peak or found.fp32_tflops)
    if memory is None or peak is None:
        raise ConfigError("gpu is empty; name it (gpu=H100), or set both gpu_memory_gib and peak_tflops")
    return GPU(memory, peak, peak)


def _trained(count: int, optim: OptimSettings, *, ddp: bool) -> dict[str, float]:
    """Bytes of trained parameters and of what the optimizer keeps, all in fp32."""
    moments = 1 if optim.name == "lion" else 2
    memory = {
        "trained weights": float(_FP32 * count),
        "gradients": float(_FP32 * count),
        f"{optim.name} state": float(_FP32 * count * moments),
    }
    if optim.ema:
        memory["average of the weights"] = float(_FP32 * count)
    if ddp:
        memory["gradients in DDP's buckets"] = float(_FP32 * count)
    return memory


def _features(local: int, sides: int, columns: int, dim: int, cached: bool, everywhere: bool) -> float:
    """Bytes of the features of a batch, of their gradients where they are cached, and of what ranks gather."""
    own = local * sides * dim * _FP32 * (2 if cached else 1)
    gathered = 2 * columns * dim * _FP32 if everywhere else 0
    return float(own + gathered)


def _steps(run: RunSettings, pairs: int) -> int:
    return run.steps if run.steps is not None else max(1, int(pairs * run.epochs) // run.batch_size)
