"""Checkpoints of a run: complete or absent, checked on load, never unpickled, the same for any number of ranks.

run/checkpoints/step_00000200/   trainable.safetensors   parameters and buffers that training changes
                                 ema.safetensors         their moving average, where the run has one
                                 optimizer.pt            state of the optimizer (loaded with weights_only)
                                 meta.json               step, data position, scale of an fp16 loss, checksums
run/checkpoints/latest           name of the newest one

Sharded tensors are gathered one by one and written whole, so a run may go on with another number of ranks, or with its
weights spread in another way.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm2clip.errors import CheckpointError
from llm2clip.files import atomic_path, read_json, sha256_file, write_json, write_text
from llm2clip.training.ema import WeightAverage
from llm2clip.training.parallel import full_tensor, sharded_like

TENSORS, AVERAGE, OPTIMIZER, META = "trainable.safetensors", "ema.safetensors", "optimizer.pt", "meta.json"


_NAME = re.compile(r"step_\d{8,18}")
# bytes of these are read; what a foreign meta.json names besides is none of ours
_FILES = (TENSORS, AVERAGE, OPTIMIZER)


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        epoch: epoch of the next batch.
        batch: index of the next batch within that epoch.
        samples: samples seen so far.
        seconds: training time so far.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    samples: int = 0
    seconds: float = 0.0


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that require a gradient, and every buffer (batch-norm statistics), by name."""
    state = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    persistent = module.state_dict(keep_vars=True)
    state.update({name: b.detach() for name, b in module.named_buffers() if name in persistent})
    return state


def save(
    directory: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    keep: int,
    *,
    average: WeightAverage | None = None,
    scaler: torch.amp.GradScaler | None = None,
    write: bool = True,
) -> Path:
    """Write a checkpoint under `directory/checkpoints`, point `latest` at it, remove all but `keep`.

    Every rank calls it where weights are sharded; those with `write=False` only give their shards.
    """
    root = directory / "checkpoints"
    final = root / f"step_{progress.step:08d}"
    state = _gathered(trainable_state(module), write)
    averages = _gathered(average.averages, write) if average is not None else {}
    moments = _gathered_optimizer(optimizer, write)
    if not write:
        return final
    with atomic_path(final) as tmp:
        tmp.mkdir()
        save_file(state, str(tmp / TENSORS))
        if average is not None:
            save_file(averages, str(tmp / AVERAGE))
        # through a Python file, whose errors say why (a full disk); torch's own writer does not
        with open(tmp / OPTIMIZER, "wb") as handle:
            torch.save(moments, handle)
        meta = {"progress": progress.__dict__, "torch": str(torch.__version__)}
        meta["scaler"] = scaler.state_dict() if scaler is not None else {}
        meta["sha256"] = {file.name: sha256_file(file) for file in sorted(tmp.iterdir())}
        write_json(tmp / META, meta)
    write_text(root / "latest", final.name + "\n")
    prune(directory, keep)
    return final


def prune(directory: Path, keep: int) -> None:
    """Remove all checkpoints of a run but the last `keep` and the one to go on from, and what a kill left of others."""
    root = directory / "checkpoints"
    newest = latest(directory)
    steps = sorted(p for p in root.glob("step_*") if p.is_dir() and p != newest)
    complete = [p for p in steps if "." not in p.name]
    spare = len(complete) - max(1, keep) + (newest is not None)
    # names with a dot were left by a process that was killed while it wrote or replaced a checkpoint
    for old in [*complete[: max(0, spare)], *(p for p in steps if "." in p.name)]:
        shutil.rmtree(old, ignore_errors=True)


def _gathered(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, one gathered after the other; empty on ranks that do not keep them."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = full_tensor(tensor)
        if keep:
            found[name] = whole.cpu().contiguous()
    return found


def _gathered_optimizer(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    saved = optimizer.state_dict()
    found: dict[int, dict[str, Any]] = {}
    for number, state in saved["state"].items():
        found[number] = {}
        for name, value in state.items():
            whole = full_tensor(value) if isinstance(value, Tensor) else value
            if keep:
                found[number][name] = whole.cpu() if isinstance(whole, Tensor) else whole
    return {**saved, "state": found}


def latest(directory: Path) -> Path | None:
    """The newest checkpoint of a run directory, or None when there is none yet."""
    pointer = directory / "checkpoints" / "latest"
    if not pointer.exists():
        return None
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise CheckpointError(
            f"{pointer} cannot be read ({problem}); write the name of a checkpoint into it"
        ) from None
    if not _NAME.fullmatch(name):
        raise CheckpointError(
            f"{pointer} holds {name[:80]!r}, expected the name of a checkpoint beside it, as step_00000200"
        )
    path = pointer.parent / name
    if not path.is_dir():
        # killed between the two renames that replace a directory of the same step: the old one is complete
        aside = path.with_name(path.name + ".old")
        if aside.is_dir():
            return aside
        raise CheckpointError(
            f"{pointer} names {path.name}, which does not exist; name another checkpoint in that file or remove "
            f"{pointer.parent} to start over"
        )
    return path


def load(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    average: WeightAverage | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Progress:
    """Load a checkpoint into a module and an optimizer built from the same settings.

    An average that the checkpoint does not have begins anew at its weights.

    Raises:
        CheckpointError: a file is damaged, or names or shapes differ from the module's.
    """
    progress, checksums, scale = _read_meta(path / META)
    for name, expected in checksums.items():
        if not (path / name).exists() or sha256_file(path / name) != expected:
            raise CheckpointError(
                f"{path / name} is damaged (its SHA-256 differs from meta.json); remove {path} and write the name of "
                "an older checkpoint into `latest` beside it"
            )
    load_trainable(path, module)
    if average is not None:
        current = {
            name: tensor for name, tensor in trainable_state(module).items() if name in average.averages
        }
        if AVERAGE in checksums:
            _copy_into(average.averages, path / AVERAGE)
        else:
            _copy_tensors(average.averages, current)
    _load_optimizer(path, optimizer)
    if scaler is not None and scaler.is_enabled() and scale:
        scaler.load_state_dict(scale)
    return progress


def _read_meta(file: Path) -> tuple[Progress, dict[str, str], dict[str, Any]]:
    """Progress, checksums by file name, and state of the scaler."""
    meta: dict[str, Any] = read_json(file, CheckpointError)
    try:
        progress = Progress(**meta["progress"])
        seconds, *counts = (
            getattr(progress, name) for name in ("seconds", "step", "epoch", "batch", "samples")
        )
        if not isinstance(seconds, (int, float)) or any(
            type(count) is not int or count < 0 for count in counts
        ):
            raise ValueError(f"progress {meta['progress']}")
        sha256 = meta["sha256"]
        checksums = {TENSORS: sha256[TENSORS], OPTIMIZER: sha256[OPTIMIZER], **sha256}
        if unknown := [name for name in checksums if name not in _FILES]:
            raise ValueError(f"unknown file {unknown[0]!r}")
        return progress, checksums, dict(meta.get("scaler", {}))
    except (KeyError, TypeError, ValueError) as problem:
        raise CheckpointError(
            f"{file} is not that of a checkpoint ({type(problem).__name__}: {problem})"
        ) from None


def _load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """The moments come from the checkpoint, rates and decay from the settings."""
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        saved = torch.load(path / OPTIMIZER, weights_only=True, map_location="cpu")
    except Exception as problem:  # a damaged pickle ends in nearly any exception
        raise CheckpointError(
            f"{path / OPTIMIZER} cannot be read safely: {type(problem).__name__}: {problem}"
        ) from None
    try:
        if not isinstance(saved, dict) or not isinstance(saved.get("state"), Mapping):
            raise ValueError("it holds no state of an optimizer")
        for number, state in saved["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameters[number].shape:
                    state[name] = sharded_like(value, parameters[number])
        optimizer.load_state_dict(saved)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as problem:
        raise CheckpointError(
            f"{path}: the optimizer's parameter groups differ ({problem}); resume with the settings of the run, or "
            "choose another run.out"
        ) from None
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)


def load_trainable(path: Path, module: nn.Module) -> None:
    """Load only the tensors of a checkpoint; every name and shape must match."""
    _copy_into(trainable_state(module), path / TENSORS)


def _copy_into(current: dict[str, Tensor], file: Path) -> None:
    try:
        saved = load_file(str(file))
    except (SafetensorError, FileNotFoundError) as problem:
        raise CheckpointError(f"{file} cannot be read: {problem}") from None
    missing, extra = sorted(current.keys() - saved.keys()), sorted(saved.keys() - current.keys())
    other = [
        f"{name}: checkpoint {tuple(saved[name].shape)}, model {tuple(current[name].shape)}"
        for name in sorted(current.keys() & saved.keys())
        if saved[name].shape != current[name].shape
    ]
    if missing or extra or other:
        raise CheckpointError(
            f"checkpoint {file.parent} is of another model. "
            + _listing("missing in it", missing)
            + _listing("unknown to the model", extra)
            + _listing("of another shape", other)
            + "Resume with the settings the run was started with, or choose another run.out."
        )
    _copy_tensors(current, saved)


@torch.no_grad()
def _copy_tensors(current: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, tensor in current.items():
        tensor.copy_(sharded_like(values[name], tensor))


def _listing(title: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{len(names)} {title}: {', '.join(names[:10])}{more}. "
