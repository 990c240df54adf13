"""The two training commands: settings in, result directory out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm2clip.settings import FinetuneLLMSettings, RunSettings, TrainSettings
from llm2clip.training import failures
from llm2clip.training.directory import finished
from llm2clip.training.loop import train
from llm2clip.training.world import World, start_world


def finetune_llm(settings: FinetuneLLMSettings) -> Path:
    """Run the LLM stage; returns the directory of the adapter (a plain peft directory)."""
    # before the model and the data are loaded
    if (result := finished(settings, settings.run)) is not None:
        print(f"already finished: {result}", file=sys.stderr)
        return result
    from llm2clip.training.llm_task import LLMTask
    from llm2clip.training.mntp_task import MNTPTask

    with _ranks(settings.run) as world:
        task = (MNTPTask if settings.objective == "mntp" else LLMTask)(settings, world)
        return _report(train(task, settings.run, settings.optim, world), world)


def train_clip(settings: TrainSettings) -> Path:
    """Run the CLIP stage; returns the directory of the model (`LLM2CLIP.from_pretrained` reads it)."""
    if (result := finished(settings, settings.run)) is not None:
        print(f"already finished: {result}", file=sys.stderr)
        return result
    from llm2clip.training.clip_task import ClipTask

    with _ranks(settings.run) as world:
        return _report(train(ClipTask(settings, world), settings.run, settings.optim, world), world)


@contextmanager
def _ranks(run: RunSettings) -> Iterator[World]:
    """This rank among all that train, which learn of each other's failures."""
    with start_world(run.device, run.threads, run.timeout) as world, failures.shared(run.out, world):
        yield world


def _report(result: Path, world: World) -> Path:
    if world.is_main:
        print(f"result: {result}", file=sys.stderr)
    return result
