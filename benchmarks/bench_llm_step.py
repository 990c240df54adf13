"""One step of caption contrastive LoRA training: packed, against peft with padding; speed, losses and memory.

python -m benchmarks.bench_llm_step --batch 16 --steps 3

`peft_padded`: short and long captions each padded to their longest, in data order, in one graph, with peft's own
layers. `peft_packed`: the same layers, in packs. `packed`: with fused LoRA layers too. `packed_cached`: in packs
of `--budget` tokens through the gradient cache. All start from the same adapter, see the same batches and take
AdamW steps; their losses must agree.
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
from llm2clip.models import CaptionEncoder
from llm2clip.models.packed import make_packs
from llm2clip.models.tokens import Tokens
from llm2clip.settings import LoraSettings
from llm2clip.training import gradient_cache
from llm2clip.training.llm_task import PairEmbedder, PairTokens

PROVIDERS = ("peft_padded", "peft_packed", "packed", "packed_cached")
SCALE = 20.0
LOSS_LIMIT = {"fp32": 1e-3, "bf16": 5e-2}


def loss(outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Symmetric InfoNCE in plain torch, the same for all."""
    short, long = (F.normalize(outputs[name], dim=-1) for name in ("query", "positive"))
    logits, target = SCALE * short @ long.T, torch.arange(len(short))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2, {}


class Trainer:
    """A provider with its own encoder, adapter and optimizer."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        layout: Any = "padded" if name == "peft_padded" else "packed"
        self.encoder: CaptionEncoder
        with tempfile.TemporaryDirectory() as folder:
            self.encoder, self.model = captions.encoder(options.model, Path(folder), layout=layout)
        torch.manual_seed(0)
        fused: Any = "off" if name.startswith("peft") else "auto"
        self.encoder.add_lora(LoraSettings(rank=16, alpha=32.0, dropout=0.0, fused=fused))
        self.encoder.train()
        self.module = PairEmbedder(self.encoder)
        self.optimizer = torch.optim.AdamW([p for p in self.encoder.parameters() if p.requires_grad], lr=1e-4)

    def step(self, texts: Sequence[tuple[str, str]]) -> float:
        """One optimizer step; returns the loss before it."""
        short, long = (self.encoder.tokenize([pair[i] for pair in texts]) for i in range(2))
        self.optimizer.zero_grad(set_to_none=True)
        bf16 = functools.partial(torch.autocast, "cpu", torch.bfloat16)
        autocast = bf16 if self.options.dtype == "bf16" else nullcontext
        if self.name == "peft_padded":
            with autocast():
                embeddings = {"query": self._padded(short), "positive": self._padded(long)}
            value, _ = loss(embeddings)
            value.backward()
        else:
            value, _ = gradient_cache.backward(
                self.module, self._chunks(short, long), loss, torch.device("cpu"), autocast
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
    trainer = Trainer(name, options)
    trainer.step(texts[:2])
    return lambda: trainer.step(texts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16, help="pairs of captions")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--budget", type=int, default=1024, help="tokens of a pack of packed_cached")
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=PROVIDERS)
    parser.add_argument("--model", type=Path, help="transformers directory; default: SmolLM2-135M")
    parser.add_argument("--data", type=Path, default=captions.OPENSTAX, help="folder of WebDataset tars")
    parser.add_argument("--dtype", default="fp32", choices=list(LOSS_LIMIT), help="bf16: autocast")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    if "peft_padded" not in options.providers:
        parser.error("--providers must name peft_padded, to which the others are compared")

    found, source = captions.pairs(options.batch * (options.steps + 1), options.data)
    batches = [found[start : start + options.batch] for start in range(0, len(found), options.batch)]
    trainers = {name: Trainer(name, options) for name in options.providers}
    losses: dict[str, list[float]] = {name: [] for name in trainers}
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for number, batch in enumerate(batches):
        run = {name: functools.partial(_record, losses[name], t, batch) for name, t in trainers.items()}
        for name, seconds in harness.interleave(run, rounds=1, warmup=0).items():
            if number > 0:  # the first step warms up
                times[name] += seconds
        print(f"step {number}:", {name: f"{values[-1]:.5f}" for name, values in losses.items()}, flush=True)
    reference = losses["peft_padded"]
    wrong = {
        name: values
        for name, values in losses.items()
        if any(
            abs(a - b) > LOSS_LIMIT[options.dtype] * abs(b) for a, b in zip(values, reference, strict=True)
        )
    }
    if wrong:
        sys.exit(f"losses differ from peft_padded's {reference}: {wrong}")

    tokenize = trainers["peft_padded"].encoder.tokenize
    rows: list[dict[str, Any]] = []
    tokens = sum(len(t.ids) for batch in batches[1:] for t in tokenize([text for p in batch for text in p]))
    for name, trainer in trainers.items():
        row: dict[str, Any] = {"provider": name, "pairs": options.batch, "dtype": options.dtype}
        row |= {key: round(value, 1) for key, value in harness.summarize(times[name]).items()}
        row["tokens_per_s"] = round(tokens / sum(times[name]), 1)
        row["speedup_over_peft"] = round(sum(times["peft_padded"]) / sum(times[name]), 2)
        row["losses"] = " ".join(f"{value:.5f}" for value in losses[name])
        if not options.no_memory:
            row["peak_mib"] = round(harness.peak_mib(memory_setup, name, options, batches[0]), 1)
            row["peak_over_peft"] = round(row["peak_mib"] / (rows[0] if rows else row)["peak_mib"], 2)
        row |= {"model": trainer.model, "data": source}
        rows.append(row)
        print(row, flush=True)
    if not options.no_save:
        print(harness.save(f"llm_step_{options.dtype}", rows))


def _record(losses: list[float], trainer: Trainer, batch: Sequence[tuple[str, str]]) -> None:
    losses.append(trainer.step(batch))


if __name__ == "__main__":
    main()
