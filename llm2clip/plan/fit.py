"""Which settings make a step fit into a GPU's memory when it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from llm2clip.errors import ConfigError
from llm2clip.plan.stages import GIB, Planner, StagePlan
from llm2clip.settings import EmbedSettings, FinetuneLLMSettings, TrainSettings

S = TypeVar("S", FinetuneLLMSettings, EmbedSettings, TrainSettings)
Change = tuple[str, Any]
_SMALLEST_TOKENS = 256


@dataclass(frozen=True)
class Remedy:
    """Settings of a step, and what it takes with them.

    Attributes:
        changes: (name, value) of each setting that is changed.
        plan: the step then.
        fits: whether that is little enough.
    """

    changes: tuple[Change, ...]
    plan: StagePlan
    fits: bool

    def command(self) -> str:
        """The changes as they are written on the command line."""
        return " ".join(f"{name}={_written(value)}" for name, value in self.changes)


def remedies(
    settings: S, plan_of: Callable[[S], StagePlan], changes: Sequence[Sequence[Change]], memory: float
) -> list[Remedy]:
    """What makes a step fit: every single change that does; where none does, several, the cheapest kinds first.

    Args:
        settings: of the step.
        plan_of: plans it.
        changes: kinds of changes, the cheapest kind first; each with its values, mildest first.
        memory: bytes there are on a GPU.

    Returns:
        Remedies that fit, or one that does not: all changes together. Empty where there is nothing to change.
    """
    kinds = [kind for kind in changes if kind]
    tried = [_mildest(settings, plan_of, [(change,) for change in kind], memory) for kind in kinds]
    found = [remedy for remedy in tried if remedy is not None and remedy.fits]
    if found or not kinds:
        return found
    best = None
    for count in range(2, len(kinds) + 1):
        others: tuple[Change, ...] = tuple(kind[-1] for kind in kinds[1:count])
        remedy = _mildest(settings, plan_of, [(first, *others) for first in kinds[0]], memory)
        best = remedy or best
        if best is not None and best.fits:
            break
    return [best] if best is not None else []


def _mildest(
    settings: S, plan_of: Callable[[S], StagePlan], rows: Sequence[tuple[Change, ...]], memory: float
) -> Remedy | None:
    """The first row of changes that fits, else the last one; None where the settings refuse them all."""
    remedy = None
    for changes in rows:
        try:
            changed = settings
            for name, value in changes:
                changed = with_setting(changed, name, value)
        except ConfigError:  # they exclude each other
            continue
        plan = plan_of(changed)
        remedy = Remedy(changes, plan, plan.total <= memory)
        if remedy.fits:
            break
    return remedy


def changes_of(stage: Any, planner: Planner) -> list[list[Change]]:
    """What may be changed of a step's settings without changing what is trained, the cheapest kind first."""
    many, plan = planner.settings.gpus > 1, planner.settings
    if isinstance(stage, EmbedSettings):
        budget = stage.token_budget or 8192
        return [
            [("token_budget", n) for n in _halves(budget, _SMALLEST_TOKENS)],
            [("llm.dtype", "bf16")] if stage.llm.dtype == "fp32" else [],
            [("llm.quantization", kind) for kind in ("8bit", "4bit")]
            if stage.llm.quantization == "none"
            else [],
        ]
    local = -(-stage.run.batch_size // plan.gpus)
    sharded = [[("run.parallel", "fsdp")] if many and stage.run.parallel == "ddp" else []]
    if isinstance(stage, FinetuneLLMSettings):
        tokens = stage.token_budget or 2 * (stage.run.micro_batch or local) * plan.caption_tokens
        quantized: list[Change] = []
        if stage.llm.quantization == "none" and stage.run.parallel == "ddp":
            quantized = [("llm.quantization", kind) for kind in ("8bit", "4bit")]
        return [
            [("token_budget", n) for n in _halves(tokens, max(_SMALLEST_TOKENS, 2 * plan.caption_tokens))],
            [("gradient_checkpointing", True)] if not stage.gradient_checkpointing else [],
            [("llm.dtype", "bf16")] if stage.llm.dtype == "fp32" else [],
            *sharded,
            quantized,
        ]
    vision = stage.model.vision
    return [
        [("run.micro_batch", n) for n in _halves(stage.run.micro_batch or local, 1)],
        [("model.vision.grad_checkpointing", True)] if not vision.grad_checkpointing else [],
        [("run.precision", "bf16")] if stage.run.precision == "fp32" else [],
        *sharded,
    ]


def fitted(stage: S, plan_of: Callable[[S], StagePlan], planner: Planner) -> tuple[StagePlan, list[Remedy]]:
    """The plan of a step, and what makes it fit where it does not."""
    memory = planner.gpu.memory_gib * GIB
    plan = plan_of(stage)
    if plan.total <= memory:
        return plan, []
    return plan, remedies(stage, plan_of, changes_of(stage, planner), memory)


def with_setting(settings: S, name: str, value: Any) -> S:
    """The settings with one of them, by its dotted name, changed."""
    head, _, rest = name.partition(".")
    new = with_setting(getattr(settings, head), rest, value) if rest else value
    return replace(settings, **{head: new})


def _halves(start: int, least: int) -> Iterator[int] | list[int]:
    # powers of two below what is there
    values, n = [], 1 << max(0, start.bit_length() - 1)
    n = n if n < start else n // 2
    while n >= least:
        values.append(n)
        n //= 2
    return values


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
