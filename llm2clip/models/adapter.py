"""The residual adapter that maps LLM embeddings into the shared space.

Structure and state-dict names are those of the published LLM2CLIP checkpoints: `adaptor.{i}.ln`,
`adaptor.{i}.fn.0`, `adaptor.{i}.fn.3` for block i, then `adaptor.{depth}` (LayerNorm) and
`adaptor.{depth + 1}` (Linear with bias).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from llm2clip.errors import ModelError


class ResidualBlock(nn.Module):
    """x + W2 drop(gelu(W1 LN(x))), with the erf form of GELU."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(dim)
        self.fn = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
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
    """

    def __init__(
        self,
        llm_dim: int,
        embed_dim: int,
        depth: int = 4,
        expansion: int = 2,
        dropout: float = 0.0,
        normalize_input: bool = True,
    ) -> None:
        super().__init__()
        if min(llm_dim, embed_dim, expansion) < 1 or depth < 0:
            raise ModelError(
                f"adapter sizes must be positive, got llm_dim={llm_dim}, embed_dim={embed_dim}, "
                f"depth={depth}, "
                f"expansion={expansion}"
            )
        self.llm_dim, self.embed_dim, self.normalize_input = llm_dim, embed_dim, normalize_input
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
        if self.normalize_input:
            embeddings = F.normalize(embeddings, dim=-1)
        return self.adaptor(embeddings)
