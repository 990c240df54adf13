"""The directory of a run: what it was started with, and whether it is finished.

run/config.yaml      the resolved settings
run/metrics.jsonl    training.metrics
run/checkpoints/     training.checkpoint
run/failures/        training.failures: why ranks ended
run/result/          what users load; the file DONE in it says that it is complete
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm2clip.config import dump_yaml, read_yaml, to_tree
from llm2clip.errors import ConfigError
from llm2clip.files import write_text
from llm2clip.settings import RunSettings
from llm2clip.training import checkpoint

log = logging.getLogger("llm2clip.training")

CONFIG, RESULT, DONE = "config.yaml", "result", "DONE"
# what may differ between two starts of one run without changing what it learns
_FREE = {
    *(f"run.{name}" for name in ("out", "device", "threads", "micro_batch", "resume", "tensorboard")),
    *(f"run.{name}" for name in ("log_every", "save_every", "eval_every", "keep_checkpoints")),
    *(f"run.{name}" for name in ("parallel", "timeout", "wandb", "peak_tflops")),
    "optim.ema_export",
    "data.workers",
}
# read by the evaluation only
_EVALUATED = ("data.val", "data.captions.translations")


def finished(settings: Any, run: RunSettings) -> Path | None:
    """The result of a run that ended before, or None when there is something to do.

    Raises:
        ConfigError: `run.out` is empty, or it holds a run and `run.resume` is false.
    """
    if not run.out:
        raise ConfigError("run.out: expected the directory of this run, for example run.out=runs/first")
    out = Path(run.out)
    done = (out / RESULT / DONE).exists()
    if not done and checkpoint.latest(out) is None:
        return None
    if not run.resume:
        raise ConfigError(
            f"run.out: {out} holds a run already and run.resume is false; choose another directory"
        )
    if not done:
        return None
    _warn_of_changes(out, settings, "its result is kept as it is")
    return out / RESULT


def prepare(settings: Any, run: RunSettings) -> None:
    """Write the resolved settings into the run directory; a run that goes on with other ones says so."""
    out = Path(run.out)
    if checkpoint.latest(out) is not None:
        checkpoint.prune(out, run.keep_checkpoints)  # which a kill may have kept the last save from
        _warn_of_changes(out, settings, "it goes on with the new ones")
    write_text(out / CONFIG, dump_yaml(settings))


def _warn_of_changes(out: Path, settings: Any, consequence: str) -> None:
    if changed := changed_settings(out, settings):
        shown = ", ".join(changed[:10]) + (f" and {len(changed) - 10} more" if len(changed) > 10 else "")
        log.warning(
            "the run in %s was started with other settings (%s); %s. Choose another run.out to begin anew.",
            out, shown, consequence,
        )  # fmt: skip


def changed_settings(out: Path, settings: Any) -> list[str]:
    """`name: before -> now` of the settings that change what is learned and differ from the run's own."""
    if not (out / CONFIG).exists():
        return []
    # a setting that a run of an earlier version does not name had its default
    before = _flat(to_tree(type(settings)())) | _flat(read_yaml(out / CONFIG))
    now = _flat(to_tree(settings))
    return [
        f"{name}: {before.get(name)} -> {now.get(name)}"
        for name in {**before, **now}
        if name not in _FREE and not name.startswith(_EVALUATED) and before.get(name) != now.get(name)
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
