"""The gradient cache over packs: is it the whole batch's loss and gradient, and does memory stay flat?

python -m benchmarks.bench_gradient_cache --batch 64 256 1024 2048

`whole`: all pairs in one graph, for batches up to `--whole-limit`. `packs`: in packs of `--budget` tokens through the
gradient cache, as `finetune-llm token_budget=N` trains. Losses and gradients must agree wherever both run; they are
compared in fp64 at the smallest batch as well. The model is a small Llama with random weights, LoRA of rank 16 and
dropout 0; captions have the lengths of OpenStax's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import captions, harness
from llm2clip.models import CaptionEncoder
from llm2clip.models.packed import make_packs
from llm2clip.settings import CaptionLossSettings, LoraSettings
from llm2clip.training import gradient_cache
from llm2clip.training.llm_task import PairEmbedder, PairTokens
from llm2clip.training.pair_loss import PairLoss
from llm2clip.training.world import World

CPU = torch.device("cpu")
LIMITS = {torch.float32: 2e-3, torch.float64: 1e-9}


def embedder(options: argparse.Namespace, dtype: torch.dtype) -> PairEmbedder:
    """The same small model with the same adapter for every provider."""
    from transformers import AutoModel, LlamaConfig

    torch.manual_seed(0)
    tokenizer = captions.word_tokenizer()
    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        vocab_size=len(tokenizer),
        pad_token_id=0,
    )
    encoder = CaptionEncoder(AutoModel.from_config(config).requires_grad_(False), tokenizer, layout="packed")
    encoder.add_lora(LoraSettings(rank=16, alpha=32.0, dropout=0.0))
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)  # not zero, which would hide gradients
    return PairEmbedder(encoder.to(dtype).train(), CaptionLossSettings())


def step(module: PairEmbedder, batch: int, budget: int, data: Any) -> Callable[[], tuple[float, Tensor]]:
    """One loss with its gradients over `batch` pairs, in packs of `budget` tokens (0: one graph)."""
    pairs, _ = captions.pairs(batch, data)
    short, long = (module.encoder.tokenize([pair[i] for pair in pairs]) for i in range(2))
    keys = torch.arange(3 * len(pairs)).reshape(-1, 3)
    lengths = [len(s.ids) + len(t.ids) for s, t in zip(short, long, strict=True)]
    parts = [part.tolist() for part in make_packs(lengths, budget)] if budget else [list(range(len(pairs)))]
    chunks = [PairTokens([short[i] for i in part], [long[i] for i in part], keys[part]) for part in parts]
    module.token_budget, module.one_forward = budget, budget == 0
    loss = PairLoss(CaptionLossSettings(), World(0, 1, CPU))

    def run() -> tuple[float, Tensor]:
        module.zero_grad(set_to_none=True)
        value, _ = gradient_cache.backward(module, chunks, loss, CPU)
        found = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        return value.item(), torch.cat(found)

    return run


def memory_setup(options: argparse.Namespace, batch: int, budget: int) -> Callable[[], Any]:
    """What `harness.peak_and_seconds` measures: a step after a small one, so that buffers exist already."""
    module = embedder(options, torch.float32)
    step(module, 2, 0, options.data)()
    return step(module, batch, budget, options.data)


def compare(
    module: PairEmbedder, batch: int, budget: int, options: argparse.Namespace
) -> tuple[float, float]:
    """Relative differences of loss and gradients between packs and the whole batch."""
    whole_loss, whole = step(module, batch, 0, options.data)()
    loss, gradient = step(module, batch, budget, options.data)()
    return abs(loss - whole_loss) / abs(whole_loss), ((gradient - whole).norm() / whole.norm()).item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256, 1024, 2048], help="pairs")
    parser.add_argument("--budget", type=int, default=2048, help="tokens of a pack")
    parser.add_argument("--whole-limit", type=int, default=256, help="largest batch that runs in one graph")
    parser.add_argument("--width", type=int, default=192, help="of the model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument(
        "--data", type=type(captions.OPENSTAX), default=captions.OPENSTAX, help="folder of tars"
    )
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(arguments)

    rows: list[dict[str, Any]] = []
    for batch in sorted(options.batch):
        errors: dict[torch.dtype, tuple[float, float]] = {}
        if batch <= options.whole_limit:
            kinds = [torch.float32] + ([torch.float64] if batch == min(options.batch) else [])
            for dtype in kinds:
                errors[dtype] = compare(embedder(options, dtype), batch, options.budget, options)
                if max(errors[dtype]) > LIMITS[dtype]:
                    sys.exit(f"batch {batch}, {dtype}: packs differ from the whole batch by {errors[dtype]}")
        for provider, budget in (("whole", 0), ("packs", options.budget)):
            if provider == "whole" and batch > options.whole_limit:
                continue
            mib, seconds = harness.peak_and_seconds(
                memory_setup, options, batch, budget, device="cpu", timeout=3600
            )
            row: dict[str, Any] = {"provider": provider, "pairs": batch, "budget": budget}
            row |= {"peak_mib": round(mib, 1), "seconds": round(seconds, 2)}
            for dtype, (loss, gradient) in errors.items():
                kind = "fp64" if dtype == torch.float64 else "fp32"
                row |= {
                    f"loss_difference_{kind}": f"{loss:.1e}",
                    f"gradient_difference_{kind}": f"{gradient:.1e}",
                }
            rows.append(row)
            print(row, flush=True)
    if not options.no_save:
        print(harness.save("gradient_cache", rows))


if __name__ == "__main__":
    main()
