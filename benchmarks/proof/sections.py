"""What the proof consists of, and how one section runs: its outcome, never an exception."""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["passed", "failed", "skipped"]


class Skip(Exception):
    """Raised by a section that cannot run on this machine; its text is the reason."""


@dataclass(frozen=True)
class Context:
    """What a section is told.

    Attributes:
        device: "cuda", or "cpu" for the dry run at tiny sizes.
        out: the results folder; a section's own files go there.
        seconds: how long it may take; what it starts must end by then.
    """

    device: str
    out: Path
    seconds: float = 600.0

    @property
    def dry(self) -> bool:
        """Whether this is the dry run without a GPU."""
        return self.device == "cpu"


Run = Callable[[Context], Mapping[str, Any]]


@dataclass(frozen=True)
class Section:
    """One part of the proof.

    Attributes:
        name: as in `--sections`.
        where: "module:function" under benchmarks.proof; the function takes a Context, returns details and raises
            AssertionError (or anything else) for a failure and Skip where it cannot run.
        seconds: how long it may take on a GPU.
        by_default: whether it belongs to a run that names no sections.
    """

    name: str
    where: str
    seconds: float
    by_default: bool = True

    def load(self) -> Run:
        """Returns the section's function."""
        module, function = self.where.split(":")
        run: Run = getattr(importlib.import_module(f"benchmarks.proof.{module}"), function)
        return run


@dataclass
class Outcome:
    """What became of a section."""

    section: str
    status: Status
    reason: str = ""
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)


# most valuable first: what a short time on a GPU should not miss
SECTIONS = (
    Section("library", "checks:library", 60),
    Section("build", "build:build", 240),
    Section("determinism", "checks:determinism", 60),
    Section("graph", "checks:graph", 60),
    Section("streams", "checks:streams", 60),
    Section("large_index", "checks:large_index", 60),
    Section("ceilings", "speed:ceilings", 60),
    Section("contrastive", "speed:contrastive", 240),
    Section("contrastive_large", "speed:contrastive_large", 90),
    Section("contrastive_million", "speed:contrastive_million", 90),
    Section("tests", "tools:tests", 240),
    Section("sanitizer", "tools:sanitizer", 180),
    Section("contrastive_trained", "speed:contrastive_trained", 60),
    Section("contrastive_small", "speed:contrastive_small", 60),
    Section("siblings", "suites:siblings", 180),
    Section("targets", "speed:targets", 20),
    # the second half: python -m benchmarks.gpu_proof --sections projections captions large_llm clip_stage stage_targets
    Section("projections", "suites:projections", 120, by_default=False),
    Section("captions", "suites:captions", 150, by_default=False),
    Section("large_llm", "suites:large_llm", 150, by_default=False),
    Section("clip_stage", "suites:clip_stage", 300, by_default=False),
    Section("stage_targets", "suites:stage_targets", 20, by_default=False),
    Section("demo", "suites:demo", 560, by_default=False),
    Section("ncu", "tools:ncu", 120, by_default=False),
)


def choose(names: list[str] | None) -> list[Section]:
    """Returns the named sections in the order named, or those of a default run; raises ValueError for a name."""
    if names is None:
        return [section for section in SECTIONS if section.by_default]
    known = {section.name: section for section in SECTIONS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no section {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names]


def run(section: Section, context: Context) -> Outcome:
    """Runs a section in this process; whatever it raises becomes its outcome."""
    start = time.perf_counter()
    try:
        outcome = Outcome(section.name, "passed", details=dict(section.load()(context)))
    except Skip as reason:
        outcome = Outcome(section.name, "skipped", str(reason))
    except BaseException as error:
        traceback.print_exc()
        outcome = Outcome(section.name, "failed", f"{type(error).__name__}: {error}"[:2000])
    outcome.seconds = round(time.perf_counter() - start, 1)
    return outcome
