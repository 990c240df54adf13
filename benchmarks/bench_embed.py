"""Captions per second through an LLM: packed, against a padded transformers loop in data order and by length.

python -m benchmarks.bench_embed --captions 384 --rounds 2

The padded loop hands padded batches to the transformers model, which builds its masks and attends with SDPA, and
takes the mean of the real tokens' states. First every setting runs on `--probe` captions; then the best batch
size of each loop and the best token budget run on all captions, interleaved. Embeddings are compared before
anything is timed. All start from token ids: tokenising is the same for all, and a thousandth of the time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import captions, harness
from llm2clip.models import CaptionEncoder
from llm2clip.models.tokens import Tokens

# embeddings further than this from those of one caption at a time are wrong, and not timed
ERROR_LIMIT = {"fp32": 1e-4, "bf16": 5e-2}


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
) -> dict[str, Callable[[Sequence[Tokens]], Tensor]]:
    """Name -> embeddings of tokens."""
    found: dict[str, Callable[[Sequence[Tokens]], Tensor]] = {}
    for batch in options.batch:
        found[f"padded {batch}"] = lambda t, b=batch: padded_loop(padded, t, b, by_length=False)  # type: ignore[misc]
    for batch in options.sorted_batch:
        found[f"sorted {batch}"] = lambda t, b=batch: padded_loop(padded, t, b, by_length=True)  # type: ignore[misc]
    for budget in options.budget:
        found[f"packed {budget}"] = lambda t, b=budget: packed.encode_tokens(t, token_budget=b)  # type: ignore[misc]
    return found


def row_of(name: str, times: list[float], tokens: Sequence[Tokens], phase: str) -> dict[str, Any]:
    """One line of the result."""
    kind, size = name.split()
    row: dict[str, Any] = {"provider": kind, "batch" if kind != "packed" else "token_budget": int(size)}
    row |= {"phase": phase, "captions": len(tokens)}
    row |= {key: round(value, 1) for key, value in harness.summarize(times).items()}
    row["captions_per_s"] = round(len(tokens) / row["median_ms"] * 1e3, 2)
    row["tokens_per_s"] = round(sum(len(t.ids) for t in tokens) / row["median_ms"] * 1e3, 1)
    share = 0.0 if kind == "packed" else padding_share(tokens, int(size), by_length=kind == "sorted")
    row["padding_share"] = round(share, 3)
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--captions", type=int, default=384)
    parser.add_argument("--probe", type=int, default=64, help="captions on which every setting is tried")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--sorted-batch", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--budget", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--model", type=Path, help="transformers directory; default: SmolLM2-135M")
    parser.add_argument("--data", type=Path, default=captions.OPENSTAX, help="folder of WebDataset tars")
    parser.add_argument("--dtype", default="fp32", choices=list(ERROR_LIMIT))
    parser.add_argument("--causal", action="store_true", help="causal instead of bidirectional attention")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(arguments)

    found, source = captions.pairs(-(-options.captions // 2), options.data)
    with tempfile.TemporaryDirectory() as folder:
        packed, padded = (
            captions.encoder(options.model, Path(folder), layout=layout, bidirectional=not options.causal)
            for layout in ("packed", "padded")
        )
    name = packed[1]
    for encoder, _ in (packed, padded):
        encoder.model.to(torch.bfloat16 if options.dtype == "bf16" else torch.float32)
        encoder.eval()
    tokens = packed[0].tokenize([text for pair in found for text in pair][: options.captions])
    timed = providers(packed[0], padded[0], options)

    sample = tokens[:12]
    want = padded_loop(padded[0], sample, 1, by_length=False)
    errors = {p: ((run(sample) - want).norm() / want.norm()).item() for p, run in timed.items()}
    wrong = {p: error for p, error in errors.items() if not error <= ERROR_LIMIT[options.dtype]}
    if wrong:
        sys.exit(f"wrong embeddings, not timed: {wrong}")

    rows = []
    probe = tokens[: options.probe]
    times = harness.interleave({p: lambda r=run: r(probe) for p, run in timed.items()}, rounds=1, warmup=0)  # type: ignore[misc]
    for p in timed:
        rows.append(row_of(p, times[p], probe, "probe"))
        print(rows[-1], flush=True)
    best = {
        kind: min((p for p in timed if p.startswith(kind)), key=lambda p: times[p][0])
        for kind in ("padded", "sorted", "packed")
    }
    final = {p: timed[p] for p in best.values()}
    times = harness.interleave(
        {p: lambda r=run: r(tokens) for p, run in final.items()}, rounds=options.rounds, warmup=0
    )  # type: ignore[misc]
    for p in final:
        row = row_of(p, times[p], tokens, "best")
        row["speedup_over_padded"] = round(1 / harness.ratio_to(times[p], times[best["padded"]]), 2)
        row["speedup_over_sorted"] = round(1 / harness.ratio_to(times[p], times[best["sorted"]]), 2)
        row |= {"error": f"{errors[p]:.1e}", "model": name, "data": source, "dtype": options.dtype}
        rows.append(row)
        print(row, flush=True)
    if not options.no_save:
        print(harness.save(f"embed_{options.dtype}", rows))


if __name__ == "__main__":
    main()
