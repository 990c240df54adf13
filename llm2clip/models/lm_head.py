"""The scores that a decoder LLM gives every token of its vocabulary, summed up without ever being stored."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llm2clip.errors import ModelError
from llm2clip.files import read_json
from llm2clip_kernels import similarity_lse

_ROWS = 256  # tokens whose scores are in memory at a time where the fused op does not serve


class LMHead(nn.Module):
    """Cross-entropy of tokens under the frozen language-model head.

    Args:
        embedding: the LLM's input embedding, whose weight is the head's where the two are tied; it is read when it
            is used, so it may be sharded in between.
        weight: (V, D), the head's own weight where they are not tied.
        bias: (V,) or None.
        multiplier: factor on the scores (Granite, Cohere).
        softcap: bound of the scores, softcap · tanh(score / softcap) (Gemma 2); None: none.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        embedding: nn.Module,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        multiplier: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self._embedding = (embedding,)  # not a module of its own: the LLM has it already
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.multiplier, self.softcap = multiplier, softcap

    def losses(self, states: Tensor, targets: Tensor) -> Tensor:
        """-log p(target | state) of every row.

        Scores are not stored: log-sum-exps come from the fused op, or by blocks of rows where the model caps its
        scores or adds a bias.

        Args:
            states: (M, D) last states of the LLM, any float dtype.
            targets: (M,) token ids.

        Returns:
            (M,) fp32 (fp64 for fp64), differentiable in `states`.
        """
        weight = self.weight
        if weight is None:
            tied = self._embedding[0].weight
            assert isinstance(tied, Tensor)
            weight = tied.detach()
        if not len(targets):
            return states.sum(dim=1).to(torch.promote_types(states.dtype, torch.float32))
        states = states.to(weight.dtype)
        if self.softcap is None and self.bias is None:
            row, _ = similarity_lse(states, weight, self.multiplier, directions="rows")
            return row - self.multiplier * (states.to(row.dtype) * weight[targets].to(row.dtype)).sum(1)
        parts = zip(states.split(_ROWS), targets.split(_ROWS), strict=True)
        return torch.cat([checkpoint(self._block, *part, weight, use_reentrant=False) for part in parts])

    def _block(self, states: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        scores = F.linear(states, weight, self.bias)
        scores = self.multiplier * scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return F.cross_entropy(scores, targets, reduction="none")


def load_lm_head(path: str | os.PathLike[str], gguf_file: str | None, model: Any) -> LMHead:
    """The head of an LLM that was loaded without it.

    Args:
        path, gguf_file: as the LLM was loaded from.
        model: the transformers base model.

    Raises:
        ModelError: the head is not tied to the embedding, and the files hold none.
    """
    config = model.config
    embedding = model.get_input_embeddings()
    like = embedding.weight
    weight = bias = None
    if not getattr(config, "tie_word_embeddings", False):
        weight, bias = _stored_head(Path(path), gguf_file, like.dtype)
        if weight.shape != like.shape:
            raise ModelError(
                f"the language-model head in {path} is {tuple(weight.shape)}, the embedding {tuple(like.shape)}; the "
                "files belong to different models"
            )
        weight = weight.to(like.device, like.dtype)
        bias = None if bias is None else bias.to(like.device, like.dtype)
    multiplier = float(getattr(config, "logit_scale", None) or 1.0)
    multiplier /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return LMHead(embedding, weight, bias, multiplier=multiplier, softcap=softcap)


def _stored_head(folder: Path, gguf_file: str | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    if gguf_file is not None:
        from transformers import AutoModelForCausalLM

        whole = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf_file, dtype=dtype, local_files_only=True
        )
        head = whole.get_output_embeddings()
        return head.weight.detach(), None if head.bias is None else head.bias.detach()
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    files = {"": "model.safetensors"}
    if index.is_file():
        try:
            files = dict(read_json(index, ModelError)["weight_map"])
        except (KeyError, TypeError, ValueError) as problem:
            raise ModelError(f"{index} has no weight_map ({type(problem).__name__}: {problem})") from None
    found: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        if not (folder / file).is_file():
            continue
        with safe_open(folder / file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # safetensors' object is no mapping
                if name.rpartition(".")[0].endswith("lm_head"):
                    found[name.rpartition(".")[2]] = tensors.get_tensor(name)
    if "weight" not in found:
        raise ModelError(
            f"{folder} has no language-model head (lm_head.weight), which objective=mntp needs: it was saved without "
            "it. Give llm.path the LLM's original directory."
        )
    return found["weight"], found.get("bias")
