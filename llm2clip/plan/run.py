"""`llm2clip plan`: all steps planned, shown, and written."""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict
from typing import Any

from llm2clip.errors import ConfigError
from llm2clip.evaluation.tables import Table, render_text
from llm2clip.files import write_json
from llm2clip.plan.fit import Remedy, fitted
from llm2clip.plan.stages import GIB, Planner, StagePlan
from llm2clip.settings import PlanSettings

_NOTE = (
    "Counted by running both models on tensors without values, by torch's rules for a CPU; not yet compared with a "
    "GPU. Reading and decoding data is not counted: a run waits for it where CPUs are slower than the GPU."
)


def make_plan(settings: PlanSettings) -> dict[str, Any]:
    """The plan as plain values, ready for JSON: sizes, store, a list of steps, each with its remedies.

    Raises:
        ConfigError: a model or GPU is not known, or a figure is missing.
        ModelError: a model cannot be planned with.
    """
    if not (settings.llm or settings.finetune.llm.path):
        raise ConfigError(
            "llm is empty; name one, for example llm=llama-3.1-8b, or a directory with a config.json"
        )
    if settings.pairs < 1:
        raise ConfigError("pairs: expected the number of training images, for example pairs=15000000")
    if settings.finetune.objective == "mntp":
        raise ConfigError(
            "finetune.objective: a plan covers contrastive and simcse; plan mntp's memory as contrastive"
        )
    planner = Planner(settings)
    _say("counting the LLM")
    decoder, _ = planner.sizes()
    steps = []
    for name, stage, plan_of in (
        ("finetune-llm", settings.finetune, planner.finetune),
        ("embed", settings.embed, planner.embed),
        ("train", settings.train, planner.train),
    ):
        _say(f"running {name} without values")
        plan, found = fitted(stage, plan_of, planner)  # type: ignore[type-var, arg-type]
        steps.append(_step(plan, found, planner.gpu.memory_gib))
    model = planner.sizes()[1].size
    return {
        "llm": {"name": settings.llm or settings.finetune.llm.path, **asdict(decoder)},
        "model": {"tower_name": settings.tower or settings.train.model.vision.kind, **asdict(model)},
        "gpus": settings.gpus,
        "gpu": {"name": settings.gpu, **asdict(planner.gpu)},
        "captions": settings.pairs * settings.captions_per_image,
        "store_bytes": planner.store_bytes(),
        "store_dtype": settings.embed.dtype,
        "steps": steps,
        "assumed": {
            "reserve_gib": settings.reserve_gib,
            "utilisation": settings.assumed_utilisation,
            "caption_tokens": settings.caption_tokens,
        },
        "note": _NOTE,
    }


def run_plan(settings: PlanSettings) -> int:
    """Make the plan, print it, write it; returns 0 where everything fits, else 1.

    Raises:
        UserError: as `make_plan`, or the file cannot be written.
    """
    for name in ("llm2clip.integrations.peft", "llm2clip_kernels"):  # nothing that they report is run
        logging.getLogger(name).setLevel(logging.WARNING)
    plan = make_plan(settings)
    print(render(plan))
    if settings.out:
        write_json(settings.out, plan)
    return 0 if all(step["fits"] for step in plan["steps"]) else 1


def render(plan: dict[str, Any]) -> str:
    """The plan for a terminal."""
    llm, model, gpu = plan["llm"], plan["model"], plan["gpu"]
    name = f"{gpu['name']}, " if gpu["name"] else ""
    lines = [
        f"LLM {llm['name']}: {_count(llm['parameters'])} parameters, embeddings of {llm['dim']}; "
        f"adapters {_count(llm['trained'])}",
        f"tower {model['tower_name']} at {model['image_size']} pixels: {_count(model['tower'])}; text adapter "
        f"{_count(model['adapter'])}; trained {_count(model['trained'])} of {_count(model['parameters'])}",
        f"store: {plan['captions']:,} captions in {plan['store_dtype']}, {_size(plan['store_bytes'])} on disk",
        f"GPUs: {plan['gpus']} x {name}{gpu['memory_gib']:g} GiB",
        "",
        render_text(_memory_table(plan)),
        "",
        render_text(_time_table(plan)),
    ]
    for step in plan["steps"]:
        lines += _advice(step, gpu["memory_gib"])
    assumed = plan["assumed"]
    lines += [
        "",
        f"Assumed: captions of {assumed['caption_tokens']} tokens, {assumed['reserve_gib']:g} GiB in reserve"
        + (
            ""
            if all(step["measured"] for step in plan["steps"])
            else f", and {100 * assumed['utilisation']:g} % of the peak where no MFU was measured"
        )
        + ".",
        plan["note"],
    ]
    return "\n".join(lines)


def _memory_table(plan: dict[str, Any]) -> Table:
    rows = []
    for step in plan["steps"]:
        rows += [[step["command"], name, f"{size / GIB:.2f}"] for name, size in step["memory"].items()]
        rows.append([step["command"], "together", f"{step['total_bytes'] / GIB:.2f}"])
    return Table("Memory of one GPU", "At the peak of a step.", ["step", "what", "GiB"], rows, 2)


def _time_table(plan: dict[str, Any]) -> Table:
    rows = [
        [
            step["command"],
            f"{step['steps']:,}" if step["steps"] else "-",
            f"{step['flops'] / 1e18:,.3g}",
            step["rate"],
            f"{100 * step['share']:g}" + (" (measured)" if step["measured"] else " (assumed)"),
            _hours(step["hours"]),
        ]
        for step in plan["steps"]
    ]
    note = "Arithmetic alone, on all GPUs together; what is recomputed to save memory is counted."
    return Table("Time", note, ["step", "steps", "EFLOP", "precision", "% of peak", "hours"], rows, 1)


def _advice(step: dict[str, Any], memory_gib: float) -> list[str]:
    if step["fits"]:
        return []
    lines = ["", f"{step['command']} DOES NOT FIT: {step['total_bytes'] / GIB:.1f} GiB of {memory_gib:g}."]
    for remedy in step["remedies"]:
        size, hours = f"{remedy['total_bytes'] / GIB:.1f} GiB", _hours(remedy["hours"])
        if remedy["fits"]:
            lines.append(f"  {remedy['command']}: {size}, {hours} hours")
        else:
            lines.append(
                f"  even with {remedy['command']}: {size}; take GPUs with more memory, or a smaller model"
            )
    return lines


def _step(plan: StagePlan, found: list[Remedy], memory_gib: float) -> dict[str, Any]:
    return {
        "command": plan.command,
        "memory": plan.memory,
        "total_bytes": plan.total,
        "fits": plan.total <= memory_gib * GIB,
        "steps": plan.steps,
        "flops": plan.flops,
        "model_flops": plan.model_flops,
        "rate": plan.rate,
        "share": plan.share,
        "measured": plan.measured,
        "hours": plan.hours,
        "remedies": [
            {
                "command": remedy.command(),
                "total_bytes": remedy.plan.total,
                "hours": remedy.plan.hours,
                "fits": remedy.fits,
            }
            for remedy in found
        ],
    }


def _count(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:g} "


def _size(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def _hours(hours: float) -> str:
    return f"{hours:,.2f}" if hours < 10 else f"{hours:,.0f}"


def _say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr)
