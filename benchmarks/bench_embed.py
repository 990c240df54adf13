"""Captions per second through an LLM: packed, against a padded transformers loop in data order and by length.

python -m benchmarks.bench_embed                 # a few minutes on two cores
python -m benchmarks.bench_embed --dtype bf16    # weights and states in bf16, for all

`padded`: what one writes with transformers alone: padded batches in data order, the model's own masks and SDPA, the
mean of the real tokens' states. `sorted`: the same loop over captions sorted by length, as LLM2Vec and
sentence-transformers do. `packed`: `CaptionEncoder.encode_tokens` as it comes. First every batch size of the loops
runs on `--probe` captions; then the best of each runs on all captions beside ours, interleaved. Embeddings are
compared before anything is timed. All start from token ids: tokenising is the same for all, and a thousandth of the
time. "tflops" counts the linear layers and attention of the real tokens alone, "mfu_percent" is its share of what the
GPU's data sheet says.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import captions, harness
from benchmarks.report import table
from llm2clip.models import CaptionEncoder
from llm2clip.models.tokens import Tokens
from llm2clip.training.flops import peak_tflops

# embeddings further than this from those of one caption at a time are wrong, and not timed
ERROR_LIMIT = {"fp32": 1e-4, "bf16": 5e-2}
Embed = Callable[[Sequence[Tokens]], Tensor]


@torch.no_grad()
def padded_loop(encoder: CaptionEncoder, tokens: Sequence[Tokens], batch: int, *, by_length: bool) -> Tensor:
    """What one writes with transformers alone; the result in the order of `tokens`."""
    order = list(range(len(tokens)))
    if by_length:
        order.sort(key=lambda i: -len(tokens[i].ids))
    out = torch.empty(len(tokens), encoder.dim)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        inputs = encoder.collate([tokens[i] for i in part])
        model: Any = encoder.model
        states = model(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, use_cache=False
        ).last_hidden_state
        mask = inputs.attention_mask[..., None].to(states.dtype)
        out[part] = ((states * mask).sum(1) / mask.sum(1)).float().cpu()
    return out


def padding_share(tokens: Sequence[Tokens], batch: int, *, by_length: bool) -> float:
    """Padding among the tokens that a padded loop computes."""
    lengths = [len(t.ids) for t in tokens]
    if by_length:
        lengths.sort(reverse=True)
    parts = [lengths[i : i + batch] for i in range(0, len(lengths), batch)]
    return 1 - sum(lengths) / sum(len(part) * max(part) for part in parts)


def providers(
    packed: CaptionEncoder, padded: CaptionEncoder, options: argparse.Namespace
) -> dict[str, Embed]:
    """Name and setting -> embeddings of tokens."""
    found: dict[str, Embed] = {}
    for name, sizes in (("padded", options.batch), ("sorted", options.sorted_batch)):
        for batch in sizes:
            found[f"{name} {batch}"] = functools.partial(
                padded_loop, padded, batch=batch, by_length=name == "sorted"
            )
    for budget in options.budget or [0]:
        found[f"packed {budget}"] = functools.partial(packed.encode_tokens, token_budget=budget)
    return found


def embedding_errors(
    timed: dict[str, Embed], padded: CaptionEncoder, sample: Sequence[Tokens]
) -> dict[str, float]:
    """Relative errors against one caption at a time with the model's own attention."""
    want = padded_loop(padded, sample, 1, by_length=False)
    return {p: harness.relative_error(run(sample), want) for p, run in timed.items()}


def row_of(name: str, times: list[float], tokens: Sequence[Tokens], phase: str) -> dict[str, Any]:
    """One line of the result."""
    kind, size = name.split()
    row: dict[str, Any] = {"provider": kind, "phase": phase, "captions": len(tokens)}
    row |= {"token_budget": int(size) or "default"} if kind == "packed" else {"batch": int(size)}
    row |= {key: round(value, 1) for key, value in harness.summarize(times).items()}
    row["captions_per_s"] = round(len(tokens) / row["median_ms"] * 1e3, 2)
    row["tokens_per_s"] = round(sum(len(t.ids) for t in tokens) / row["median_ms"] * 1e3, 1)
    share = 0.0 if kind == "packed" else padding_share(tokens, int(size), by_length=kind == "sorted")
    row["padding_share"] = round(share, 3)
    return row


def measure(
    timed: dict[str, Embed], tokens: Sequence[Tokens], errors: dict[str, float], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of the probe, and of the best setting of each provider over all tokens."""
    probe = tokens[: options.probe]
    times = _interleaved(timed, probe, 1, options.device)
    rows = [row_of(p, times[p], probe, "probe") for p in timed]
    print("probe:", {p: f"{row['captions_per_s']}/s" for p, row in zip(timed, rows, strict=True)}, flush=True)
    best = {
        kind: min((p for p in timed if p.startswith(kind)), key=lambda p: times[p][0])
        for kind in ("padded", "sorted", "packed")
    }
    times = _interleaved({p: timed[p] for p in best.values()}, tokens, options.rounds, options.device)
    for p in best.values():
        row = row_of(p, times[p], tokens, "best") | {"error": float(f"{errors[p]:.1e}")}
        for kind in ("padded", "sorted"):
            row[f"over_{kind}"] = round(1 / harness.ratio_to(times[p], times[best[kind]]), 2)
        rows.append(row)
    return rows


def _interleaved(
    timed: dict[str, Embed], tokens: Sequence[Tokens], rounds: int, device: str
) -> dict[str, list[float]]:
    calls = {p: functools.partial(run, tokens) for p, run in timed.items()}
    # kernels are compiled and memory is found in a first round on a GPU
    warmup = int(device == "cuda")
    return harness.interleave(calls, rounds=rounds, warmup=warmup, device=device, clock="wall")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--captions", type=int, default=256)
    parser.add_argument("--probe", type=int, default=48, help="captions on which every setting is tried")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--sorted-batch", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--budget", type=int, nargs="+", help="token budgets of ours; default: its own")
    parser.add_argument("--model", type=Path, help="transformers directory; default: SmolLM2-135M")
    parser.add_argument("--data", type=Path, default=captions.OPENSTAX, help="folder of WebDataset tars")
    parser.add_argument(
        "--shape", default="", choices=captions.SHAPES, help="random bf16 weights of that size"
    )
    parser.add_argument("--device", default=harness.default_device(), choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=list(ERROR_LIMIT))
    parser.add_argument("--causal", action="store_true", help="causal instead of bidirectional attention")
    parser.add_argument("--no-save", action="store_true", help="print only")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    found, source = captions.pairs(-(-options.captions // 2), options.data)
    with tempfile.TemporaryDirectory() as folder:
        (packed, name), (padded, _) = (
            captions.encoder(
                options.model,
                Path(folder),
                shape=options.shape,
                device=options.device,
                layout=layout,
                bidirectional=not options.causal,
            )
            for layout in ("packed", "padded")
        )
    if options.shape:
        padded.model.load_state_dict(packed.model.state_dict(), assign=True)  # one copy for both
    for encoder in (packed, padded):
        encoder.model.to(torch.bfloat16 if options.dtype == "bf16" else torch.float32)
        encoder.eval()
    tokens = packed.tokenize([text for pair in found for text in pair][: options.captions])
    timed = providers(packed, padded, options)
    errors = embedding_errors(timed, padded, tokens[:12])
    if fault := harness.wrong(errors, ERROR_LIMIT[options.dtype]):
        sys.exit(f"wrong embeddings, not timed: {fault}")
    rows = measure(timed, tokens, errors, options)
    peak = peak_tflops(torch.device(options.device))
    for row in rows:
        useful = captions.flops(padded, [len(t.ids) for t in tokens[: row["captions"]]])
        row["tflops"] = round(useful / row["median_ms"] / 1e9, 2)
        if peak:
            row["mfu_percent"] = round(100 * row["tflops"] / peak, 1)
        row |= {"model": name, "data": source, "dtype": options.dtype}
    print(table(rows, {title: title for row in rows for title in row if title not in ("p20_ms", "p80_ms")}))
    if not options.no_save:
        print(harness.save("_".join(filter(None, ("embed", options.shape, options.dtype))), rows))


if __name__ == "__main__":
    main()
