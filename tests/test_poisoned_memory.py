"""Every op gives the same bits when memory it did not write is full of NaN, and leaves its inputs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import llm2clip_kernels as kernels


def unit(rows: int, dim: int) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1)


@pytest.fixture
def poison() -> Iterator[Callable[[], None]]:
    """Called, it lets torch fill every new allocation with NaN (integers with their largest value)."""
    before = torch.are_deterministic_algorithms_enabled()
    yield lambda: torch.use_deterministic_algorithms(True, warn_only=True)
    torch.use_deterministic_algorithms(before)


def leaves() -> list[Tensor]:
    """x, y (70, 33), p, q (70, 20), W (9, 33), bias (9,), A (4, 33), B (9, 4), scale, shift."""
    sizes = [(9, 33), (9,), (4, 33), (9, 4)]
    tensors = [unit(70, 33), unit(70, 33), unit(70, 20), unit(70, 20), *(torch.randn(s) for s in sizes)]
    return [*tensors, torch.tensor(9.0), torch.tensor(-2.0)]


IDS = torch.arange(70) // 3
OPS: dict[str, Callable[..., Any]] = {
    "recompute": lambda x, y, p, q, w, b, la, lb, s, c: kernels.infonce_loss(x, y, s, method="recompute"),
    "cached": lambda x, y, p, q, w, b, la, lb, s, c: kernels.infonce_loss(x, y, s, method="cached"),
    "underflow": lambda x, y, p, q, w, b, la, lb, s, c: kernels.infonce_loss(x, y, 1e3 * s),
    "masked": lambda x, y, p, q, w, b, la, lb, s, c: kernels.infonce_loss(x, y, s, groups=IDS),
    "positives": lambda x, y, p, q, w, b, la, lb, s, c: kernels.infonce_loss(
        x, y, s, groups=IDS, same_group="positive", label_smoothing=0.1
    ),
    "nll": lambda x, y, p, q, w, b, la, lb, s, c: kernels.nll_loss(x, y, x.flip(0), s),
    "ranking": lambda x, y, p, q, w, b, la, lb, s, c: kernels.ranking_loss(
        x, y, directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    ),
    "sigmoid": lambda x, y, p, q, w, b, la, lb, s, c: kernels.sigmoid_loss(x, y, s, c),
    "distill": lambda x, y, p, q, w, b, la, lb, s, c: sum(kernels.distill_loss(x, y, s, p, q, 20.0)),
    "rank": lambda x, y, p, q, w, b, la, lb, s, c: torch.stack(kernels.similarity_rank(x, y)),
    "topk": lambda x, y, p, q, w, b, la, lb, s, c: kernels.similarity_topk(x, y, 5)[0],
    "lora": lambda x, y, p, q, w, b, la, lb, s, c: kernels.lora_linear(x, w, b, la, lb, 0.5).square().sum(),
    "normalize": lambda x, y, p, q, w, b, la, lb, s, c: (kernels.l2_normalize(x * 3) * y).sum(),
    "segments": lambda x, y, p, q, w, b, la, lb, s, c: (
        kernels.segment_mean(x, torch.tensor([0, 3, 4, 40, 70]), normalize=True).cos().sum()
    ),
    "attention": lambda x, y, p, q, w, b, la, lb, s, c: (
        kernels.packed_attention(
            p.view(70, 5, 4), q.view(70, 5, 4), (p * q).view(70, 5, 4), torch.tensor([0, 3, 4, 40, 70]), 36,
            causal=True,
        ).sin().sum()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", ["native", "chunked"])
def test_nothing_unwritten_is_read(
    name: str, kind: str, poison: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM2CLIP_BACKEND", "chunked" if kind == "chunked" else "auto")
    start = leaves()

    def once() -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in start]
        result = OPS[name](*inputs)
        if result.requires_grad:
            result.backward()
        assert all(torch.equal(t, before) for t, before in zip(inputs, start, strict=True))
        return [result.detach(), *(t.grad for t in inputs if t.grad is not None)]

    want = once()
    poison()
    assert torch.empty(3).isnan().all(), "this torch does not fill new memory"
    got = once()
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.isfinite().all() and torch.equal(g, w)
