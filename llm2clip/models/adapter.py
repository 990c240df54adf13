"""The residual adapter that maps LLM embeddings into the shared space.

Structure and state-dict names are those of the published LLM2CLIP checkpoints: `adaptor.{i}.ln`,
`adaptor.{i}.fn.0`, `adaptor.{i}.fn.3` for block i, then `adaptor.{depth}` (LayerNorm) and
`adaptor.{depth + 1}` (Linear with bias).

The forward runs the fused ops of `llm2clip_kernels` on the parameters of these modules: the same function with half the
saved activations. A module that was replaced (LoRA, quantisation, a parametrisation), carries hooks or has sharded
or quantised weights is called itself, and so are its neighbours in the block.
"""

from __future__ import annotations

from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm2clip.errors import ModelError
from llm2clip_kernels import adapter_block, l2_normalize
from llm2clip_kernels.adapter import layer_norm_linear
from llm2clip_kernels.checks import is_plain

_Module = TypeVar("_Module", bound=nn.Module)


def _is_plain(module: object, kind: type[_Module]) -> TypeGuard[_Module]:
    """Whether calling the module does nothing but its class's arithmetic, so that an op may stand in for it."""
    if type(module) is not kind:
        return False
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    # a forward on the instance is how accelerate attaches its hooks
    if hooks or module._backward_pre_hooks or "forward" in module.__dict__:
        return False
    # sharded and quantised weights (DTensor, torchao) are known to torch's own layers alone
    return all(p is None or is_plain(p) for p in module._parameters.values())


class ResidualBlock(nn.Module):
    """x + W2 drop(gelu(W1 LN(x))), with the erf form of GELU."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(dim)
        self.fn = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim). Dropout's mask comes from a seed drawn from torch's generator."""
        if not _is_plain(self.fn, nn.Sequential) or len(self.fn) != 4:
            return self.forward_plain(x)
        norm, (first, gelu, dropout, last) = self.ln, self.fn
        if not (
            _is_plain(norm, nn.LayerNorm)
            and _is_plain(first, nn.Linear)
            and _is_plain(gelu, nn.GELU)
            and gelu.approximate == "none"
            and _is_plain(dropout, nn.Dropout)
            and _is_plain(last, nn.Linear)
        ):
            return self.forward_plain(x)
        return adapter_block(
            x,
            norm.weight,
            norm.bias,
            first.weight,
            first.bias,
            last.weight,
            last.bias,
            eps=norm.eps,
            dropout_p=dropout.p if dropout.training else 0.0,
        )

    def forward_plain(self, x: Tensor) -> Tensor:
        """The same by torch's modules; the definition of `forward`."""
        return x + self.fn(self.ln(x))


class TextAdapter(nn.Module):
    """L2-normalise -> `depth` residual blocks -> LayerNorm -> Linear.

    Args:
        llm_dim: width of the LLM embeddings.
        embed_dim: dimension D of the shared space.
        depth: residual blocks; 0 leaves LayerNorm and Linear.
        expansion: hidden width of a block in multiples of `llm_dim`.
        dropout: dropout inside a block.
        normalize_input: scale embeddings to unit length first, as the published models do.
        noise: length of the Gaussian noise that training adds to the embeddings, as a share of theirs (CapDec,
            arXiv 2211.00575): what the adapter learns of a caption then holds for its neighbourhood.

    Raises:
        ModelError: a size below 1, a negative depth, or noise that is no finite share.
    """

    def __init__(
        self,
        llm_dim: int,
        embed_dim: int,
        depth: int = 4,
        expansion: int = 2,
        dropout: float = 0.0,
        normalize_input: bool = True,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        if min(llm_dim, embed_dim, expansion) < 1 or depth < 0:
            raise ModelError(
                f"adapter sizes must be positive, got llm_dim={llm_dim}, embed_dim={embed_dim}, "
                f"depth={depth}, "
                f"expansion={expansion}"
            )
        if not 0 <= noise < float("inf"):
            raise ModelError(f"adapter noise: expected a finite share of at least 0, got {noise}")
        self.llm_dim, self.embed_dim = llm_dim, embed_dim
        self.normalize_input, self.noise = normalize_input, noise
        blocks = [ResidualBlock(llm_dim, expansion * llm_dim, dropout) for _ in range(depth)]
        self.adaptor = nn.Sequential(*blocks, nn.LayerNorm(llm_dim), nn.Linear(llm_dim, embed_dim))

    def forward(self, embeddings: Tensor) -> Tensor:
        """LLM embeddings (B, llm_dim) -> features (B, embed_dim), not normalised.

        Raises:
            ModelError: the embeddings have another width, that is, they come from another LLM.
        """
        if embeddings.shape[-1] != self.llm_dim:
            raise ModelError(
                f"the text adapter expects LLM embeddings of width {self.llm_dim}, got "
                f"{embeddings.shape[-1]}: "
                "they were made by another LLM. Embed the captions with the LLM that the model was "
                "trained with."
            )
        x = self._noisy(l2_normalize(embeddings) if self.normalize_input else embeddings)
        if not _is_plain(self.adaptor, nn.Sequential):
            return self.adaptor(x)
        *blocks, norm, last = self.adaptor
        for block in blocks:
            x = block(x)
        if _is_plain(norm, nn.LayerNorm) and _is_plain(last, nn.Linear):
            return layer_norm_linear(x, norm.weight, norm.bias, last.weight, last.bias, eps=norm.eps)
        return last(norm(x))

    def forward_plain(self, embeddings: Tensor) -> Tensor:
        """The same by torch's modules, every activation kept; the definition of `forward`."""
        x = self._noisy(F.normalize(embeddings, dim=-1) if self.normalize_input else embeddings)
        *blocks, norm, last = self.adaptor
        for block in blocks:
            assert isinstance(block, ResidualBlock)
            x = block.forward_plain(x)
        return last(norm(x))

    def _noisy(self, x: Tensor) -> Tensor:
        """In training, with noise drawn from torch's generator: repeated with its state, as dropout is."""
        if not (self.training and self.noise):
            return x
        length = x.detach().norm(dim=-1, keepdim=True)
        return x + torch.randn_like(x) * (length * (self.noise / self.llm_dim**0.5))
