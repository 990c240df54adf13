"""CLIP_benchmark with our models: `python -m llm2clip.evaluation.clip_benchmark eval --model_type llm2clip ...`.

`--model` is the directory of the CLIP model, `--pretrained` that of its LLM, or `LLM+ADAPTER`. Everything else is
CLIP_benchmark's own command.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.evaluation.joint_encoder import JointEncoder
from llm2clip.integrations.handle import Handle
from llm2clip.models.tokens import Tokens

MODEL_TYPE = "llm2clip"
_PAD = -1


class BenchmarkModel(nn.Module):
    """A model as CLIP_benchmark knows them: `encode_image` of pixels, `encode_text` of what `tokenize` returns."""

    def __init__(self, encoder: JointEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Captions to (n, 1 + L) integers: where pooling starts, then token ids, filled up with -1."""
        tokens = self.encoder.captions.tokenize(texts)
        rows = torch.full((len(tokens), 1 + max(len(t.ids) for t in tokens)), _PAD, dtype=torch.int64)
        for row, token in zip(rows, tokens, strict=True):
            row[0] = token.pool_start
            row[1 : 1 + len(token.ids)] = torch.tensor(token.ids)
        return rows

    def encode_text(self, rows: Tensor) -> Tensor:
        """(n, 1 + L) of `tokenize` to (n, D) unit features; the LLM computes in its own precision."""
        tokens = [
            Tokens([i for i in ids if i != _PAD], start, truncated=False) for start, *ids in rows.tolist()
        ]
        with torch.autocast(rows.device.type, enabled=False):
            return self.encoder.encode_tokens(tokens).to(rows.device)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(n, 3, S, S) to (n, D) unit features."""
        return self.encoder.encode_pixels(pixel_values).to(pixel_values.device)


def load(
    model_name: str, pretrained: str, cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[BenchmarkModel, Any, Any]:
    """CLIP_benchmark's loader.

    Args:
        model_name: directory of the CLIP model.
        pretrained: directory of the LLM, or "LLM+ADAPTER".
        cache_dir: not used, nothing is downloaded.
        device: where both compute.

    Returns:
        Model, image transform, tokenizer.

    Raises:
        ModelError: one of them cannot be used, or they do not belong together.
    """
    llm, _, adapter = pretrained.partition("+")
    encoder = JointEncoder.from_pretrained(model_name, llm, adapter=adapter or None, device=device)
    model = BenchmarkModel(encoder)
    return model, encoder.transform, model.tokenize


def register() -> Handle:
    """Adds `llm2clip` to CLIP_benchmark's model types, in this process.

    Returns:
        The handle: `undo()`, or a `with` block.
    """
    from clip_benchmark import models

    if MODEL_TYPE in models.TYPE2FUNC:
        return Handle()
    models.TYPE2FUNC[MODEL_TYPE] = load
    models.MODEL_TYPES.append(MODEL_TYPE)
    return Handle(partial(models.TYPE2FUNC.pop, MODEL_TYPE), partial(models.MODEL_TYPES.remove, MODEL_TYPE))


def main() -> None:
    """CLIP_benchmark's command line, with our model type."""
    from clip_benchmark import cli

    register()
    cli.main()


if __name__ == "__main__":
    main()
