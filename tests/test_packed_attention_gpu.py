"""packed_attention on a CUDA GPU: every backend against the dense mask, and packed captions. Skipped without one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from llm2clip_kernels import packed_attention
from llm2clip_kernels.packed_attention import library, packed_attention_reference
from tests.on_gpu import MARKS

pytestmark = MARKS

LENGTHS = [63, 64, 65, 7, 300, 1, 30]
RULES: list[dict[str, Any]] = [
    {"causal": causal, "window": window} for causal, window in itertools.product((False, True), (None, 5))
]


def leaves_of(dtype: torch.dtype, heads: tuple[int, int], width: int) -> list[Tensor]:
    shapes = [(sum(LENGTHS), h, width) for h in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, device="cuda").to(dtype).requires_grad_() for shape in shapes]


def edges() -> Tensor:
    return torch.tensor([0, *itertools.accumulate(LENGTHS)], device="cuda", dtype=torch.int32)


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "varlen", "xformers", "buckets"])
def test_error_is_at_most_twice_that_of_plain_torch(
    backend: Any, dtype: torch.dtype, heads: tuple[int, int], rules: dict[str, Any]
) -> None:
    leaves = leaves_of(dtype, heads, 64)
    refusals = {
        "varlen": lambda: library.varlen_refusal(leaves[0], rules["window"], None),
        "xformers": lambda: library.xformers_refusal(leaves[0], rules["causal"], rules["window"], None),
    }
    if backend in refusals and (why := refusals[backend]()):
        pytest.skip(f"{backend} cannot serve: {why}")
    grad = torch.randn(leaves[0].shape, device="cuda").to(dtype)
    ours = packed_attention(*leaves, edges(), max(LENGTHS), backend=backend, **rules)
    plain = packed_attention_reference(*leaves, edges(), **rules)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = packed_attention_reference(*exact, edges(), **rules)
    found = [
        [out.detach(), *torch.autograd.grad(out, inputs, g)]
        for out, inputs, g in ((ours, leaves, grad), (plain, leaves, grad), (truth, exact, grad.double()))
    ]
    for name, got, other, want in zip(["out", "dq", "dk", "dv"], *found, strict=True):
        error, bound = ((t.double() - want).norm() / want.norm() for t in (got, other))
        assert error <= 2 * bound + 1e-6, (name, error.item(), bound.item())


def test_halves_do_not_wait_for_the_gpu() -> None:
    leaves = leaves_of(torch.bfloat16, (6, 2), 64)
    if why := library.varlen_refusal(leaves[0], None, None):
        pytest.skip(f"varlen cannot serve: {why}")
    cu = edges()
    packed_attention(*leaves, cu, max(LENGTHS), causal=True)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed_attention(*leaves, cu, max(LENGTHS), causal=True).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_packed_captions_equal_padded_ones(family: str) -> None:
    from llm2clip.models import CaptionEncoder
    from tests.tiny_models import tiny_model, tiny_tokenizer

    texts = ["a dog", "two cats on a mat, sleeping", "x", "the quick brown fox jumps"]
    found = []
    for layout in ("packed", "padded"):
        encoder = CaptionEncoder(tiny_model(family).cuda(), tiny_tokenizer(), layout=layout).eval()
        found.append(encoder.encode(texts))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
