"""One step of caption contrastive LoRA training: packed, against peft with padding; speed, losses and memory.

python -m benchmarks.bench_llm_step                 # a few minutes on two cores
python -m benchmarks.bench_llm_step --dtype bf16    # autocast, for all

`peft_padded`: short and long captions each padded to their longest, in data order, in one graph, with peft's own
layers. `peft_grouped`: the same with captions of like length in a forward pass, our layout=padded. `packed`: in packs,
with fused LoRA layers. `packed_cached`: in packs of `--budget` tokens through the gradient cache, which embeds
everything twice for memory's sake. `peft_packed`: packs with peft's layers, which tells both gains apart. All start
from the same adapter, see the same batches and take AdamW steps without dropout; their losses must agree. "peak_mib"
is the growth of the peak resident set over one such step, in a process of its own, with the LLM stage's own dropout
(`--memory-dropout`). "tflops" counts the real tokens' forward and the gradients of activations once, "mfu_percent" its
share of what the GPU's data sheet says.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import captions, harness
from benchmarks.report import table
from llm2clip.models import CaptionEncoder
from llm2clip.models.packed import make_packs
from llm2clip.models.tokens import Tokens
from llm2clip.settings import LoraSettings
from llm2clip.training import gradient_cache
from llm2clip.training.flops import peak_tflops
from llm2clip.training.llm_task import PairEmbedder, PairTokens

PROVIDERS = ("peft_padded", "peft_grouped", "packed", "packed_cached", "peft_packed")
PEERS = PROVIDERS[:2]
SCALE = 20.0
LOSS_LIMIT = {"fp32": 1e-3, "bf16": 5e-2}


def loss(outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Symmetric InfoNCE in plain torch, the same for all."""
    short, long = (F.normalize(outputs[name], dim=-1) for name in ("query", "positive"))
    logits, target = SCALE * short @ long.T, torch.arange(len(short), device=short.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2, {}


class Trainer:
    """A provider with its own encoder, adapter and optimizer."""

    def __init__(self, name: str, options: argparse.Namespace, dropout: float = 0.0) -> None:
        self.name, self.options = name, options
        layout: Any = "padded" if name in PEERS else "packed"
        self.encoder: CaptionEncoder
        with tempfile.TemporaryDirectory() as folder:
            self.encoder, self.model = captions.encoder(
                options.model, Path(folder), shape=options.shape, device=options.device, layout=layout
            )
        torch.manual_seed(0)
        fused: Any = "off" if name.startswith("peft") else "auto"
        self.encoder.add_lora(LoraSettings(rank=16, alpha=32.0, dropout=dropout, fused=fused))
        self.encoder.train()
        self.module = PairEmbedder(self.encoder)
        self.optimizer = torch.optim.AdamW([p for p in self.encoder.parameters() if p.requires_grad], lr=1e-4)

    def step(self, texts: Sequence[tuple[str, str]]) -> float:
        """One optimizer step; returns the loss before it."""
        short, long = (self.encoder.tokenize([pair[i] for pair in texts]) for i in range(2))
        self.optimizer.zero_grad(set_to_none=True)
        bf16 = functools.partial(torch.autocast, self.options.device, torch.bfloat16)
        autocast = bf16 if self.options.dtype == "bf16" else nullcontext
        if self.name == "peft_padded":
            with autocast():
                embeddings = {"query": self._padded(short), "positive": self._padded(long)}
            value, _ = loss(embeddings)
            value.backward()
        else:
            value, _ = gradient_cache.backward(
                self.module, self._chunks(short, long), loss, torch.device(self.options.device), autocast
            )
        self.optimizer.step()
        return value.item()

    def _padded(self, tokens: Sequence[Tokens]) -> Tensor:
        batch = self.encoder.collate(tokens)
        model: Any = self.encoder.model
        states = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state
        mask = batch.attention_mask[..., None].float()
        return (states.float() * mask).sum(1) / mask.sum(1)

    def _chunks(self, short: Sequence[Tokens], long: Sequence[Tokens]) -> list[PairTokens]:
        order = [list(range(len(short)))]
        if self.name == "packed_cached":
            lengths = [len(s.ids) + len(t.ids) for s, t in zip(short, long, strict=True)]
            order = [part.tolist() for part in make_packs(lengths, self.options.budget)]
            self.module.token_budget = self.options.budget
            # the loss sees pairs in chunk order, and is the same in every order
        keys = torch.zeros(len(short), 3, dtype=torch.int64)  # which this loss does not look at
        return [PairTokens([short[i] for i in part], [long[i] for i in part], keys[part]) for part in order]


def memory_setup(name: str, options: argparse.Namespace, texts: list[tuple[str, str]]) -> Callable[[], float]:
    """What `harness.peak_mib` measures: a step after one on two pairs, so that states exist already."""
    trainer = Trainer(name, options, options.memory_dropout)
    trainer.step(texts[:2])
    return lambda: trainer.step(texts)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8, help="pairs of captions")
    parser.add_argument("--steps", type=int, default=5, help="measured ones, after one that warms up")
    parser.add_argument("--budget", type=int, default=1024, help="tokens of a pack of packed_cached")
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS[:4]), choices=PROVIDERS)
    parser.add_argument("--model", type=Path, help="transformers directory; default: SmolLM2-135M")
    parser.add_argument("--data", type=Path, default=captions.OPENSTAX, help="folder of WebDataset tars")
    parser.add_argument(
        "--shape", default="", choices=captions.SHAPES, help="random bf16 weights of that size"
    )
    parser.add_argument("--device", default=harness.default_device(), choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=list(LOSS_LIMIT), help="bf16: autocast")
    parser.add_argument("--memory-dropout", type=float, default=LoraSettings().dropout)
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    if "peft_padded" not in options.providers:
        parser.error("--providers must name peft_padded, to which the others are compared")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    found, source = captions.pairs(options.batch * (options.steps + 1), options.data)
    batches = [found[start : start + options.batch] for start in range(0, len(found), options.batch)]
    trainers = {name: Trainer(name, options) for name in options.providers}
    losses: dict[str, list[float]] = {name: [] for name in trainers}
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for number, batch in enumerate(batches):
        run = {name: functools.partial(_record, losses[name], t, batch) for name, t in trainers.items()}
        found_times = harness.interleave(run, rounds=1, warmup=0, device=options.device, clock="wall")
        for name, seconds in found_times.items():
            if number > 0:
                times[name] += seconds
        print(f"step {number}:", {name: f"{values[-1]:.5f}" for name, values in losses.items()}, flush=True)
    differences = {name: loss_difference(values, losses["peft_padded"]) for name, values in losses.items()}
    if fault := harness.wrong(differences, LOSS_LIMIT[options.dtype]):
        sys.exit(f"losses differ from those of peft_padded, nothing is reported: {fault}")

    encoder = trainers["peft_padded"].encoder
    rows: list[dict[str, Any]] = []
    texts = [text for batch in batches[1:] for pair in batch for text in pair]
    lengths = [len(t.ids) for t in encoder.tokenize(texts)]
    # forward, and the gradients of activations: frozen weights have none of their own
    useful, peak = 2 * captions.flops(encoder, lengths), peak_tflops(torch.device(options.device))
    for name, trainer in trainers.items():
        row: dict[str, Any] = {"provider": name, "pairs": options.batch, "dtype": options.dtype}
        row |= {key: round(value, 1) for key, value in harness.summarize(times[name]).items()}
        row["tokens_per_s"] = round(sum(lengths) / sum(times[name]), 1)
        row["tflops"] = round(useful / sum(times[name]) / 1e12, 2)
        if peak:
            row["mfu_percent"] = round(100 * row["tflops"] / peak, 1)
        for peer in (p for p in PEERS if p in times):
            row[f"over_{peer}"] = round(1 / harness.ratio_to(times[name], times[peer]), 2)
        row["losses"] = " ".join(f"{value:.4f}" for value in losses[name])
        row["loss_difference"] = float(f"{differences[name]:.1e}")
        if not options.no_memory:
            row["peak_mib"] = round(
                harness.peak_mib(memory_setup, name, options, batches[0], device=options.device), 1
            )
            row["peak_over_peft"] = round(row["peak_mib"] / (rows[0] if rows else row)["peak_mib"], 2)
        row |= {"model": trainer.model, "data": source}
        rows.append(row)
    print(table(rows, {title: title for title in rows[0] if title not in ("p20_ms", "p80_ms")}))
    if not options.no_save:
        print(harness.save("_".join(filter(None, ("llm_step", options.shape, options.dtype))), rows))


def loss_difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """The largest relative difference of two curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def _record(losses: list[float], trainer: Trainer, batch: Sequence[tuple[str, str]]) -> None:
    losses.append(trainer.step(batch))


if __name__ == "__main__":
    main()
