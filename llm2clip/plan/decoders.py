"""The LLM's part of a plan: size of a decoder with its adapters, memory and FLOPs of captions through it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.models import bidirectional, packed
from llm2clip.models.llm_files import DTYPES
from llm2clip.models.lora import add_lora, base_model
from llm2clip.models.packed import PackedBatch, model_inputs, pool_packed
from llm2clip.models.pooling import pool
from llm2clip.plan.measure import Flops, Valueless, Work, line_through
from llm2clip.plan.shapes import decoder, layer_period
from llm2clip.settings import LLMSettings, LoraSettings, Quantization

# bytes of a quantised weight: LLM.int8, and NF4 with a scale for each 64 weights, itself in 8 bits
_QUANTIZED: dict[Quantization, float] = {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}
# layers that a deep model is run with, in periods of their types: all layers of a type cost the same
_RUN = (2, 3)
_KERNELS: Any = torch.ops.llm2clip_kernels


@dataclass(frozen=True)
class DecoderSize:
    """What a decoder holds.

    Attributes:
        parameters: of the frozen model, without a language-model head.
        frozen_bytes: they take, in their dtype or quantised.
        trained: parameters of the adapters.
        largest_layer_bytes: of the layer with most weights.
        dim: width of the embeddings.
    """

    parameters: int
    frozen_bytes: float
    trained: int
    largest_layer_bytes: float
    dim: int


def decoder_size(config: Any, llm: LLMSettings, lora: LoraSettings | None) -> DecoderSize:
    """Count the weights of a decoder.

    Args:
        config: its transformers configuration.
        llm: dtype and quantisation of the frozen weights, `llm.dim`.
        lora: adapters on it; None: none.
    """
    with torch.device("meta"):
        model = decoder(config)
        frozen = {id(p): p for p in model.parameters()}
        linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
        each = DTYPES[llm.dtype].itemsize

        def size(parameters: dict[int, nn.Parameter]) -> float:
            packed_size = _QUANTIZED.get(llm.quantization, each)
            return sum(p.numel() * (packed_size if key in linear else each) for key, p in parameters.items())

        layers = [{id(p): p for p in m.parameters()} for _, m in bidirectional.decoder_layers(model)]
        largest = max(size(layer) for layer in layers)
        trained = 0
        if lora is not None and lora.rank:
            adapted = add_lora(model, lora)
            trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    count = sum(p.numel() for p in frozen.values())
    return DecoderSize(count, size(frozen), trained, largest, llm.dim or int(config.hidden_size))


def captions_through(
    config: Any,
    llm: LLMSettings,
    lora: LoraSettings | None,
    *,
    tokens: int,
    count: int,
    precision: str,
    train: bool,
    checkpointing: bool = False,
) -> Work:
    """Run captions of `tokens` tokens through a decoder without values.

    Args:
        config: the decoder's transformers configuration.
        llm: dtype, attention, pooling, layout.
        lora: adapters on it.
        tokens: of each caption.
        count: captions of a forward pass, at which the result is exact; for other numbers it is a line through two.
        precision: autocast of the forward.
        train: whether there is a backward.
        checkpointing: keep each layer's input only; FLOPs are without what that recomputes.
    """
    total, period = int(config.num_hidden_layers), layer_period(config)
    depths = [n * period for n in _RUN] if total > _RUN[-1] * period else [total]
    counts = sorted({max(1, count // 2), count})
    peaks: dict[tuple[int, int], int] = {}
    flops: dict[int, Flops] = {}
    for depth in depths:
        runner = _Runner(config, depth, llm, lora, tokens)
        flops[depth] = runner.flops(train)
        if checkpointing:
            runner = _Runner(config, depth, llm, lora, tokens, checkpointing=True)
        for n in counts:
            peaks[depth, n] = runner.peak(n, precision, train)

    def whole(values: list[float]) -> float:
        if len(depths) == 1:
            return values[0]
        (few, many), (low, high) = depths, values
        return low + (high - low) * (total - few) / (many - few)

    fixed, each = line_through({n: whole([float(peaks[depth, n]) for depth in depths]) for n in counts})
    return Work(
        whole([flops[depth].forward for depth in depths]),
        whole([flops[depth].backward for depth in depths]),
        fixed,
        each,
    )


class _Runner:
    """The first layers of a decoder, without values, and captions of one length for it."""

    def __init__(
        self,
        config: Any,
        layers: int,
        llm: LLMSettings,
        lora: LoraSettings | None,
        tokens: int,
        *,
        checkpointing: bool = False,
    ) -> None:
        own = lora
        if own is not None and own.fused == "auto":
            # of dropout the fused layers keep a seed, whose value the CPU's kernel wants to know
            own = replace(own, dropout=0.0)

        def build() -> nn.Module:
            model: Any = decoder(config, layers).to(DTYPES[llm.dtype]).requires_grad_(False)
            bidirectional.set_attention(model, bidirectional=llm.bidirectional)
            if llm.layout != "padded" and not packed.refusal(model, llm.max_length):
                packed.install(model)
            adapted: nn.Module = add_lora(model, own) if own is not None and own.rank else model
            if checkpointing:
                base_model(adapted).gradient_checkpointing_enable({"use_reentrant": False})
            return adapted

        self._model, self._llm, self._tokens = Valueless(build), llm, tokens
        implementation = base_model(self._model.module).config._attn_implementation
        self._packed = implementation == packed.IMPLEMENTATION

    def flops(self, train: bool) -> Flops:
        """Of one caption."""

        def attention(q: Tensor, *rest: Any, **more: Any) -> int:
            return 4 * int(q.shape[-2]) * int(q.shape[-1]) * self._tokens**2

        def attention_backward(grad: Any, q: Tensor, *rest: Any, **more: Any) -> int:
            return attention(q) * 5 // 2

        # the trainer's own formulas read the lengths, which have no values here
        formulas = {
            _KERNELS.packed_attention: attention,
            _KERNELS.packed_attention_backward: attention_backward,
        }
        for formula in formulas.values():
            setattr(formula, "_get_raw", True)  # noqa: B010
        return self._model.flops(lambda: self._captions(1), self._embed, train=train, formulas=formulas)

    def peak(self, count: int, precision: str, train: bool) -> int:
        """Of `count` captions."""
        return self._model.peak(lambda: self._captions(count), self._embed, precision=precision, train=train)

    def _captions(self, count: int) -> Any:
        tokens = self._tokens
        if not self._packed:
            return torch.zeros(count, tokens, dtype=torch.int64)
        places, edges = (
            torch.zeros(count * tokens, dtype=torch.int64),
            torch.zeros(count + 1, dtype=torch.int32),
        )
        return PackedBatch(
            places, torch.zeros_like(places), edges, torch.zeros(count, dtype=torch.int64), tokens
        )

    def _embed(self, module: Any, batch: Any) -> Tensor:
        if isinstance(batch, PackedBatch):
            states = module(**model_inputs(batch)).last_hidden_state[0]
            return pool_packed(states, batch, self._llm.pooling)
        states = module(input_ids=batch, attention_mask=None, use_cache=False).last_hidden_state
        return pool(states, torch.ones_like(batch), self._llm.pooling)
