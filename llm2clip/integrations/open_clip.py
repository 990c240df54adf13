"""open_clip's trainer with the fused losses: `patch()` before `open_clip_train.main`, nothing else.

Works on the names, not on instances: open_clip 3.3 makes its loss in `open_clip.factory.create_loss`, 4 makes it in
the tasks, which import it from `open_clip.loss` when they are built. Whoever builds the loss alone passes
`llm2clip.losses.ClipLoss` and needs no patch.
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from types import ModuleType

import open_clip
import open_clip.factory
import open_clip.loss

from llm2clip_kernels import losses

from .handle import Handle

log = logging.getLogger(__name__)

_NAMES = ("ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss")
_PACKAGES = ("open_clip", "open_clip_train")


def _host_modules() -> list[ModuleType]:
    """The modules of open_clip that are loaded; those that come later import the names from these."""
    # a copy, for looking at a module may load another
    return [module for name, module in list(sys.modules.items()) if name.split(".")[0] in _PACKAGES]


def patch() -> Handle:
    """Puts the fused losses in the place of open_clip's own, wherever open_clip has their names.

    `ClipLoss`, `SigLipLoss`, `CoCaLoss` and `DistillClipLoss` take the same arguments and give the same values and
    gradients, without logits in memory. Losses that exist already stay what they are. A second patch changes nothing.

    Returns:
        The handle: `undo()`, or a `with` block.

    Examples:
        >>> patch()
        >>> open_clip_train.main.main(["--dataset-type", "webdataset", ...])
    """
    handles = []
    changed = []
    for name in _NAMES:
        original, fused = getattr(open_clip.loss, name), getattr(losses, name)
        if original is fused:
            continue
        for module in _host_modules():
            if module.__dict__.get(name) is original:
                setattr(module, name, fused)
                handles.append(partial(setattr, module, name, original))
                changed.append(f"{module.__name__}.{name}")
    log.info("open_clip's losses replaced: %s", ", ".join(changed) or "none, they are already")
    return Handle(*handles)


__all__ = ["patch"]
