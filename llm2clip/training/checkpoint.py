"""Checkpoints of a run: complete or absent, checked on load, never unpickled.

run/checkpoints/step_00000200/   trainable.safetensors   parameters and buffers that training changes
                                 optimizer.pt            AdamW state (loaded with weights_only)
                                 meta.json               step, data position, checksums
run/checkpoints/latest           name of the newest one
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm2clip.errors import CheckpointError
from llm2clip.files import atomic_path, read_json, sha256_file, write_json, write_text

TENSORS, OPTIMIZER, META = "trainable.safetensors", "optimizer.pt", "meta.json"


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
    directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, keep: int
) -> Path:
    """Write a checkpoint under `directory/checkpoints`, point `latest` at it, remove all but `keep`."""
    root = directory / "checkpoints"
    final = root / f"step_{progress.step:08d}"
    with atomic_path(final) as tmp:
        tmp.mkdir()
        state = {name: t.cpu().contiguous() for name, t in trainable_state(module).items()}
        save_file(state, str(tmp / TENSORS))
        # through a Python file, whose errors say why (a full disk); torch's own writer does not
        with open(tmp / OPTIMIZER, "wb") as handle:
            torch.save(optimizer.state_dict(), handle)
        meta = {"progress": progress.__dict__, "torch": str(torch.__version__)}
        meta["sha256"] = {name: sha256_file(tmp / name) for name in (TENSORS, OPTIMIZER)}
        write_json(tmp / META, meta)
    write_text(root / "latest", final.name + "\n")
    steps = sorted(p for p in root.iterdir() if p.is_dir() and p.name.startswith("step_"))
    complete = [p for p in steps if "." not in p.name]
    # names with a dot were left by a process that was killed while it wrote or replaced a checkpoint
    for old in [*complete[: -max(1, keep)], *(p for p in steps if "." in p.name)]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest(directory: Path) -> Path | None:
    """The newest checkpoint of a run directory, or None when there is none yet."""
    pointer = directory / "checkpoints" / "latest"
    if not pointer.exists():
        return None
    path = pointer.parent / pointer.read_text(encoding="utf-8").strip()
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


def load(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Load a checkpoint into a module and an optimizer built from the same settings.

    Raises:
        CheckpointError: a file is damaged, or names or shapes differ from the module's.
    """
    meta: dict[str, Any] = read_json(path / META, CheckpointError)
    try:
        progress = Progress(**meta["progress"])
        checksums = {name: meta["sha256"][name] for name in (TENSORS, OPTIMIZER)}
    except (KeyError, TypeError) as problem:
        raise CheckpointError(
            f"{path / META} is not that of a checkpoint ({type(problem).__name__}: {problem})"
        ) from None
    for name, expected in checksums.items():
        if not (path / name).exists() or sha256_file(path / name) != expected:
            raise CheckpointError(
                f"{path / name} is damaged (its SHA-256 differs from meta.json); remove {path} and write the name of "
                "an older checkpoint into `latest` beside it"
            )
    load_trainable(path, module)
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(torch.load(path / OPTIMIZER, weights_only=True, map_location="cpu"))
    except (ValueError, KeyError) as problem:
        raise CheckpointError(
            f"{path}: the optimizer's parameter groups differ ({problem}); resume with the settings of the run, or "
            "choose another run.out"
        ) from None
    except (UnpicklingError, RuntimeError) as problem:
        raise CheckpointError(f"{path / OPTIMIZER} cannot be read safely: {problem}") from None
    # moments come from the checkpoint, rates and decay from the settings
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
    return progress


def load_trainable(path: Path, module: nn.Module) -> None:
    """Load only the tensors of a checkpoint; every name and shape must match."""
    try:
        saved = load_file(str(path / TENSORS))
    except (SafetensorError, FileNotFoundError) as problem:
        raise CheckpointError(f"{path / TENSORS} cannot be read: {problem}") from None
    current = trainable_state(module)
    missing, extra = sorted(current.keys() - saved.keys()), sorted(saved.keys() - current.keys())
    other = [
        f"{name}: checkpoint {tuple(saved[name].shape)}, model {tuple(current[name].shape)}"
        for name in sorted(current.keys() & saved.keys())
        if saved[name].shape != current[name].shape
    ]
    if missing or extra or other:
        raise CheckpointError(
            f"checkpoint {path} is of another model. "
            + _listing("missing in it", missing)
            + _listing("unknown to the model", extra)
            + _listing("of another shape", other)
            + "Resume with the settings the run was started with, or choose another run.out."
        )
    with torch.no_grad():
        for name, tensor in saved.items():
            current[name].copy_(tensor)


def _listing(title: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{len(names)} {title}: {', '.join(names[:10])}{more}. "
