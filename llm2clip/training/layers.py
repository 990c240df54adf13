"""Which layer of its tower a parameter belongs to, for learning rates that fall towards the input."""

from __future__ import annotations

import re
from collections.abc import Sequence

# numbered containers of transformers, timm, open_clip, EfficientNet and the text adapter; nested ones both count
_NUMBERED = re.compile(r"(?:^|\.)_?(?:blocks?|layers?|stages?|resblocks|adaptor|h)\.(\d+)(?=\.)")


def layer_numbers(names: Sequence[str]) -> list[int]:
    """Layer of each parameter of one tower, by its name.

    Args:
        names: parameter names in the order of the module's definition.

    Returns:
        0 for what is defined before the first numbered layer (patch and position embeddings), then 1, 2, ... for
        the layers, and one more for what comes after them (norms, poolers). Layers inside stages are counted
        through (`stages.0.blocks.1`). Without numbered layers everything is 0. So counts BEiT's layer decay, and
        LLM2CLIP's after it.
    """
    paths = [tuple(int(number) for number in _NUMBERED.findall(name)) for name in names]
    order = {path: number for number, path in enumerate(sorted({path for path in paths if path}), 1)}
    numbers: list[int] = []
    for path in paths:
        begun = any(numbers)
        numbers.append(order[path] if path else len(order) + 1 if begun else 0)
    return numbers
