"""Sections that measure the machine's ceilings and the contrastive loss beside its peers, and compare with targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_similarity, harness, record
from benchmarks.proof.sections import Context

# what the loss must reach on an H200, bf16, forward and backward: (N, D) -> milliseconds
TARGET_MS = {
    (32768, 512): 9.3,
    (32768, 768): 12.1,
    (32768, 1280): 17.7,
    (131072, 512): 149.0,
    (131072, 768): 194.0,
    (131072, 1280): 283.0,
}
# and by how much it must be faster than a peer at N = 32768
TARGET_RATIOS = {"inf_cl": 10.0, "open_clip": 2.5}
TARGET_MIB = {(131072, 768): 1024.0}


def ceilings(context: Context) -> dict[str, Any]:
    """What this machine can do at best: the GEMMs of the loss at its own shapes, copies from memory and from L2."""
    device = context.device
    dtype = torch.float32 if context.dry else torch.bfloat16
    sizes = (256, 512) if context.dry else (8192, 32768)
    rows: list[dict[str, Any]] = []
    for n in sizes:
        for d in (64,) if context.dry else (512, 768, 1280):
            x, y = (
                torch.nn.functional.normalize(torch.randn(n, d, device=device, dtype=dtype)) for _ in range(2)
            )
            logits = x.new_empty(n, n)
            torch.mm(x, y.T, out=logits)
            # S = x yᵀ, and both products of the gradient
            out = torch.empty_like(x)
            work = {
                "mm N·D·N": lambda x=x, y=y, s=logits: torch.mm(x, y.T, out=s),
                "mm N·N·D": lambda y=y, s=logits, o=out: torch.mm(s, y, out=o),
                "mm Nᵀ·N·D": lambda x=x, s=logits, o=out: torch.mm(s.T, x, out=o),
            }
            times = harness.interleave(
                work, rounds=3 if context.dry else 15, warmup_seconds=0.3, device=device
            )
            for name, seconds in times.items():
                row: dict[str, Any] = {"op": name, "n": n, "d": d, "dtype": str(dtype).removeprefix("torch.")}
                row |= {key: round(value, 4) for key, value in harness.summarize(seconds).items()}
                row["tflops"] = round(2 * n * n * d / row["median_ms"] / 1e9, 2)
                rows.append(row)
    l2 = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 4 << 20
    for name, size in (
        ("copy from memory", 1 << 22 if context.dry else 4 << 30),
        ("copy within L2", l2 // 4),
    ):
        source = torch.empty(size // 4, device=device).normal_()
        target = torch.empty_like(source)
        # many small copies in one measured call, so that a launch does not count
        repeats = max(1, (64 << 20) // size)

        def copies(
            source: torch.Tensor = source, target: torch.Tensor = target, repeats: int = repeats
        ) -> None:
            for _ in range(repeats):
                target.copy_(source)

        seconds = harness.interleave({name: copies}, rounds=3 if context.dry else 15, device=device)[name]
        row = {"op": name, "bytes": size}
        row |= {key: round(value, 4) for key, value in harness.summarize(seconds).items()}
        # read and written
        row["gb_per_s"] = round(2 * size * repeats / row["median_ms"] / 1e6, 1)
        rows.append(row)
    for row in rows:
        print(row, flush=True)
    _save_to(context)
    harness.save("ceilings", rows)
    return {"figures": len(rows)}


def _save_to(context: Context) -> None:
    """Lets this process's suites write into the proof's folder."""
    record.RESULTS = context.out.parent


def _similarity(
    context: Context, arguments: list[str], tag: str, *, dry_memory: bool = False
) -> dict[str, Any]:
    _save_to(context)
    if context.dry:
        arguments = [
            "--n",
            "64",
            "96",
            "--d",
            "16",
            "--rounds",
            "1",
            "--providers",
            "eager",
            "chunked",
            "recompute",
        ]
        arguments += [] if dry_memory else ["--no-memory"]
    else:
        arguments = [*arguments, "--dtype", "bfloat16"]
    bench_similarity.main([*arguments, "--device", context.device, "--tag", tag])
    return {"arguments": arguments}


def contrastive(context: Context) -> dict[str, Any]:
    """N = 8192 and 32768 beside every peer that is installed, random inputs, memory included."""
    arguments = ["--n", "32768", "8192", "--d", "512", "768", "1280", "--rounds", "10"]
    return _similarity(context, [*arguments, "--warmup-seconds", "0.5", "--max-seconds", "8"], "")


def contrastive_large(context: Context) -> dict[str, Any]:
    """N = 131072: ours, and stripes of torch's own GEMM; plain torch does not fit."""
    arguments = ["--n", "131072", "--d", "512", "768", "1280", "--rounds", "5", "--max-seconds", "10"]
    return _similarity(context, [*arguments, "--providers", "chunked", "recompute"], "_131k")


def contrastive_million(context: Context) -> dict[str, Any]:
    """N = 1,048,576 at D = 768 on one GPU: one forward and backward."""
    arguments = ["--n", "1048576", "--d", "768", "--rounds", "1", "--warmup", "0", "--providers", "recompute"]
    return _similarity(context, arguments, "_1m")


def contrastive_trained(context: Context) -> dict[str, Any]:
    """Inputs as late in training (correlated positives, a shared mean): does the time depend on the data?"""
    arguments = ["--n", "32768", "--d", "768", "--rounds", "10", "--kind", "trained", "--no-memory"]
    return _similarity(context, [*arguments, "--max-seconds", "8"], "")


def contrastive_small(context: Context) -> dict[str, Any]:
    """N = 64 to 2048 by the wall clock, launches included: never slower than plain torch."""
    return _similarity(context, ["--small", "--clock", "wall", "--min-seconds", "1"], "")


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row per target that the measured rows allow to judge: what, target, measured, met."""
    ours = {
        (row["n"], row["d"]): row for row in rows if row["provider"] == "recompute" and "median_ms" in row
    }
    found: list[dict[str, Any]] = []

    def add(what: str, target: float, measured: float, met: bool) -> None:
        found.append({"what": what, "target": target, "measured": measured, "met": met})

    for (n, d), target in TARGET_MS.items():
        if (n, d) in ours:
            measured = ours[n, d]["median_ms"]
            add(f"ms at N={n}, D={d}", target, measured, measured <= target)
    for (n, d), target in TARGET_MIB.items():
        if "peak_mib" in ours.get((n, d), {}):
            measured = ours[n, d]["peak_mib"]
            add(f"MiB at N={n}, D={d}", target, measured, measured <= target)
    for row in rows:
        ratio = row.get("time_over_recompute")
        if (
            row["provider"] in ("mm", "mm_out", "recompute", "cached", "auto")
            or ratio is None
            or row["n"] < 8192
        ):
            continue
        target = TARGET_RATIOS.get(row["provider"], 1.0) if row["n"] == 32768 else 1.0
        add(
            f"times faster than {row['provider']} at N={row['n']}, D={row['d']}",
            target,
            ratio,
            ratio >= target,
        )
    return found


def targets(context: Context) -> dict[str, Any]:
    """Compares what was measured with what must be reached; a target that is missed is a failure."""
    rows: list[dict[str, Any]] = []
    for path in sorted(Path(context.out).glob("similarity_bfloat16_random*.json")):
        rows += json.loads(path.read_text())["rows"]
    judged = judge(rows)
    for row in judged:
        print(row, flush=True)
    assert judged or context.dry, "nothing was measured that a target speaks of"
    missed = [f"{r['what']}: {r['measured']} (target {r['target']})" for r in judged if not r["met"]]
    if judged:
        _save_to(context)
        harness.save("targets", judged)
    assert not missed, f"{len(missed)} of {len(judged)} missed: {'; '.join(missed)}"
    return {"met": len(judged)}
