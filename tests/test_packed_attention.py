"""`packed_attention` against a dense mask over the whole pack: values, gradients, layouts, bad input."""

from __future__ import annotations

import itertools
import logging
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from llm2clip_kernels import native, packed_attention
from llm2clip_kernels.packed_attention import library, op, packed_attention_reference
from llm2clip_kernels.packed_attention.plan import PIECE, make_plan

# one token; repeated, neighbouring, scattered and empty sequences; one longer than a block of query rows
PACKS = [[1], [5], [3, 0, 7, 1, 7, 6], [63, 64, 65, 20, 8, 8, 8, 0], [0, 0], [600, 3]]
RULES: list[dict[str, Any]] = [
    {"causal": causal, "window": window, "softcap": softcap}
    for causal, window, softcap in itertools.product((False, True), (None, 0, 3), (None, 2.0))
]


def edges(lengths: list[int], device: Any = "cpu") -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], device=device)


def inputs(
    lengths: list[int], heads: tuple[int, int] = (4, 2), width: int = 8, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(sum(lengths), h, width, dtype=dtype) for h in (heads[0], heads[1], heads[1]))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def both(lengths: list[int], leaves: tuple[Tensor, ...], **rules: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of ours and of the reference, in the dtype of the leaves."""
    cu = edges(lengths)
    upstream = torch.randn(leaves[0].shape, dtype=leaves[0].dtype)
    ours = packed_attention(*leaves, cu, max(lengths), **rules)
    theirs = packed_attention_reference(*leaves, cu, **rules)
    return tuple([out.detach(), *torch.autograd.grad(out, leaves, upstream)] for out in (ours, theirs))  # type: ignore[return-value]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_equals_the_dense_mask_in_fp64(lengths: list[int], rules: dict[str, Any]) -> None:
    ours, theirs = both(lengths, inputs(lengths), **rules)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", ["native", "chunked"])
@pytest.mark.parametrize("rules", [rules for rules in RULES if not rules["softcap"]], ids=str)
@pytest.mark.parametrize("lengths", [*PACKS, [64], [65, 129, 31]], ids=str)
def test_fp32_kernels_are_as_exact_as_plain_torch(
    lengths: list[int], rules: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "native" and not native.available():
        pytest.skip("the native library is not built")
    monkeypatch.setenv("LLM2CLIP_BACKEND", backend)
    for heads, width in (((6, 2), 20), ((3, 3), 64)):
        leaves = inputs(lengths, heads, width, torch.float32)
        exact = tuple(t.detach().double().requires_grad_() for t in leaves)
        torch.manual_seed(1)
        ours, theirs = both(lengths, leaves, scale=-0.3, **rules)
        torch.manual_seed(1)
        upstream = torch.randn(leaves[0].shape).double()
        out = packed_attention_reference(*exact, edges(lengths), scale=-0.3, **rules)
        truth = [out.detach(), *torch.autograd.grad(out, exact, upstream)]
        for name, got, plain, want in zip(["out", "dq", "dk", "dv"], ours, theirs, truth, strict=True):
            error, bound = ((t.double() - want).norm() for t in (got, plain))
            assert error <= 2 * bound + 1e-6 * want.norm() + 1e-6, (name, error, bound)
            torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 1), (9, 3), (6, 2)])
@pytest.mark.parametrize("width", [1, 8, 20, 96])
def test_grouped_heads_and_head_sizes(heads: tuple[int, int], width: int) -> None:
    lengths = [9, 8, 2]
    ours, theirs = both(lengths, inputs(lengths, heads, width), causal=True, scale=0.3)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rules", [RULES[0], RULES[5], RULES[6], RULES[10]], ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(dtype: torch.dtype, rules: dict[str, Any]) -> None:
    lengths = [63, 64, 65, 7, 30]
    leaves = inputs(lengths, (6, 2), 64)
    rounded = tuple(t.detach().to(dtype).requires_grad_() for t in leaves)
    exact = tuple(t.detach().double().requires_grad_() for t in rounded)
    torch.manual_seed(1)
    ours, theirs = both(lengths, rounded, **rules)
    torch.manual_seed(1)
    upstream = torch.randn(rounded[0].shape, dtype=dtype).double()
    out = packed_attention_reference(*exact, edges(lengths), **rules)
    truth = [out.detach(), *torch.autograd.grad(out, exact, upstream)]
    for name, got, plain, want in zip(["out", "dq", "dk", "dv"], ours, theirs, truth, strict=True):
        error, bound = ((t.double() - want).norm() / want.norm() for t in (got, plain))
        assert error <= 2 * bound + 1e-7, (name, error, bound)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
def test_computes_only_the_gradients_asked_for(needs: tuple[int, ...]) -> None:
    lengths = [4, 3]
    leaves = tuple(t.detach().requires_grad_(bool(n)) for t, n in zip(inputs(lengths), needs, strict=True))
    packed_attention(*leaves, edges(lengths), 4, causal=False, softcap=1.0).square().sum().backward()
    copies = tuple(t.detach().requires_grad_() for t in leaves)
    packed_attention_reference(*copies, edges(lengths), causal=False, softcap=1.0).square().sum().backward()
    for leaf, copy, needed in zip(leaves, copies, needs, strict=True):
        assert (leaf.grad is not None) == bool(needed)
        if needed:
            torch.testing.assert_close(leaf.grad, copy.grad, rtol=1e-11, atol=1e-12)


def test_gradcheck() -> None:
    lengths = [3, 0, 2]
    assert torch.autograd.gradcheck(
        lambda q, k, v: packed_attention(
            q, k, v, edges(lengths), 3, causal=True, window=1, softcap=1.5, scale=0.7
        ),
        inputs(lengths, (2, 1), 3),
    )


def test_opcheck() -> None:
    lengths = [3, 0, 5]
    args = (*inputs(lengths, dtype=torch.float32), edges(lengths), 5, True, 2, 0.5, 0.0)
    torch.library.opcheck(torch.ops.llm2clip_kernels.packed_attention, args)
    grad = torch.randn(8, 4, 8)
    detached = [t.detach() if isinstance(t, Tensor) else t for t in args]
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(torch.ops.llm2clip_kernels.packed_attention_backward, (grad, *detached, *needs))


def test_compiles_whole_and_once_for_every_number_of_tokens() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def run(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Tensor:
        return packed_attention(q, k, v, cu, longest, causal=True) * 2

    for lengths in ([4, 3], [9, 2, 8], [3, 7, 7, 5]):
        leaves = inputs(lengths, dtype=torch.float32)
        want = 2 * packed_attention_reference(*leaves, edges(lengths), causal=True)
        torch.testing.assert_close(run(*leaves, edges(lengths), max(lengths)), want)
    assert counter.frame_count == 1


@pytest.mark.parametrize("layout", ["heads first", "sliced", "expanded", "joined"])
def test_any_strides(layout: str) -> None:
    lengths, heads, width = [6, 5, 5], 4, 8
    tokens = sum(lengths)
    if layout == "heads first":
        q, k, v = (torch.randn(heads, tokens, width).transpose(0, 1) for _ in range(3))
    elif layout == "sliced":
        q, k, v = (torch.randn(tokens, heads, 2 * width)[..., ::2] for _ in range(3))
    elif layout == "expanded":
        q, k, v = (torch.randn(tokens, 1, width).expand(tokens, heads, width) for _ in range(3))
    else:
        q, k, v = torch.randn(tokens, 3 * heads, width).split(heads, dim=1)
    want = packed_attention_reference(q, k, v, edges(lengths), causal=False)
    torch.testing.assert_close(packed_attention(q, k, v, edges(lengths), 6, causal=False), want)


def test_a_sequence_with_nan_leaves_its_neighbours_alone() -> None:
    lengths = [8, 7, 6, 8]  # one padded dense batch
    leaves = inputs(lengths, dtype=torch.float32)
    clean = packed_attention(*leaves, edges(lengths), 8, causal=False)
    dirty = tuple(t.detach().clone() for t in leaves)
    for t, value in zip(dirty, (float("nan"), float("inf"), float("nan")), strict=True):
        t[14] = value  # the last token of the second sequence, which padding repeats
    for t in dirty:
        t.requires_grad_()
    out = packed_attention(*dirty, edges(lengths), 8, causal=False)
    out.sum().backward()
    mine = torch.zeros(29, dtype=torch.bool)
    mine[8:15] = True
    torch.testing.assert_close(out[~mine], clean[~mine])
    assert out[mine].isnan().any()
    for t in dirty:
        assert t.grad is not None and torch.isfinite(t.grad[~mine]).all()


@pytest.mark.parametrize("scale", [0.0, 1e4, -3.0])
def test_extreme_scales(scale: float) -> None:
    lengths = [5, 4]
    ours, theirs = both(lengths, inputs(lengths), causal=True, scale=scale)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_is_deterministic() -> None:
    lengths = [33, 31, 30, 5]
    leaves = inputs(lengths, dtype=torch.float32)

    def run() -> list[Tensor]:
        out = packed_attention(*leaves, edges(lengths), 33, causal=True)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_cu_seqlens_may_be_int32_and_a_bound_above_the_longest_is_fine() -> None:
    lengths = [4, 3]
    leaves = inputs(lengths)
    want = packed_attention(*leaves, edges(lengths), 4, causal=False)
    assert torch.equal(packed_attention(*leaves, edges(lengths).int(), 100, causal=False), want)


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_wider_than_any_number_is_none(causal: bool) -> None:
    lengths = [70, 3]
    leaves = inputs(lengths, dtype=torch.float32)
    want = packed_attention(*leaves, edges(lengths), 70, causal=causal)
    got = packed_attention(*leaves, edges(lengths), 70, causal=causal, window=sys.maxsize)
    assert torch.equal(got, want)


def test_dense_batches_cover_every_token_once_and_stay_small() -> None:
    torch.manual_seed(3)
    lengths = torch.randint(0, 400, (60,)).tolist()
    cu = tuple(edges(lengths).tolist())
    plan = make_plan(cu, False, None, torch.device("cpu"))
    seen: list[int] = []
    for bucket in plan:
        dense = bucket.count * bucket.length
        gather = torch.arange(bucket.first, bucket.first + dense) if bucket.gather is None else bucket.gather
        real = gather if bucket.places is None else gather[bucket.places]
        seen += real.tolist()
        assert bucket.count == 1 or bucket.count * bucket.length**2 <= PIECE
        # what padding costs is bounded
        assert dense <= len(real) / 0.8 + 8 * bucket.count + 8
    assert sorted(seen) == list(range(sum(lengths)))


def test_equal_lengths_are_a_view_without_a_mask() -> None:
    (bucket,) = make_plan((0, 5, 10, 15), False, None, torch.device("cpu"))
    assert bucket.gather is None and bucket.places is None and bucket.blocks[0].hidden is None


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cu": [0, 5, 3, 7]}, ValueError, "must not fall, sequence 1 runs from 5 to 3"),
    ({"cu": [0, 3]}, ValueError, "must run from 0 to the 7 tokens of q, it runs from 0 to 3"),
    ({"cu": [1, 7]}, ValueError, "it runs from 1 to 7"),
    ({"cu": [0, 3, 7], "longest": 3}, ValueError, "max_seqlen is 3, sequence 1 has 4"),
    ({"cu": [[0, 7]]}, ValueError, r"shape \(sequences \+ 1,\)"),
    ({"cu": [0.0, 7.0]}, TypeError, "int32 or int64"),
    ({"longest": -1}, ValueError, "max_seqlen must be at least 0"),
    ({"k": (7, 3, 8), "v": (7, 3, 8)}, ValueError, "multiple of that of key heads, got 4 and 3"),
    ({"k": (6, 2, 8), "v": (6, 2, 8)}, ValueError, r"\(T, Hk, Dh\)"),
    ({"v": (7, 2, 4)}, ValueError, r"\(T, Hk, Dh\)"),
    ({"q": (7, 8)}, ValueError, "must be 3-D"),
    ({"window": -2}, ValueError, "window must be at least 0"),
    ({"softcap": 0.0}, ValueError, "softcap must be positive"),
    ({"backend": "fast"}, ValueError, "backend must be"),
    ({"dtype": torch.float32}, TypeError, "one dtype and device"),
    ({"backend": "varlen"}, RuntimeError, "varlen attention cannot serve: it serves bf16 and fp16 on CUDA"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD, ids=[str(case[0]) for case in BAD])
def test_bad_input(change: dict[str, Any], error: type[Exception], text: str) -> None:
    q = torch.zeros(change.get("q", (7, 4, 8)), dtype=torch.float64)
    k = torch.zeros(change.get("k", (7, 2, 8)), dtype=change.get("dtype", torch.float64))
    v = torch.zeros(change.get("v", (7, 2, 8)), dtype=torch.float64)
    options = {name: change[name] for name in ("window", "softcap", "backend") if name in change}
    with pytest.raises(error, match=text):
        packed_attention(
            q, k, v, torch.tensor(change.get("cu", [0, 7])), change.get("longest", 7), causal=False, **options
        )


def test_no_sequence_at_all() -> None:
    q = torch.zeros(0, 2, 4, requires_grad=True)
    out = packed_attention(q, q, q, torch.tensor([0]), 0, causal=True)
    out.sum().backward()
    assert out.shape == (0, 2, 4) and q.grad is not None


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    op._log.cache_clear()
    q = torch.zeros(3, 1, 8)
    with caplog.at_level(logging.INFO, logger="llm2clip_kernels"):
        for _ in range(3):
            packed_attention(q, q, q, torch.tensor([0, 3]), 3, causal=True)
    assert [r.message for r in caplog.records] == ["packed_attention: buckets serves torch.float32 on cpu"]


def test_an_installed_but_unusable_xformers_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    # xformers without kernels for the device imports well and fails at the call
    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\nmore lines")

    mask = types.SimpleNamespace(from_seqlens=lambda lengths: lengths)
    bias = types.SimpleNamespace(BlockDiagonalMask=mask)
    ops = types.ModuleType("xformers.ops")
    ops.fmha = types.SimpleNamespace(attn_bias=bias)  # type: ignore[attr-defined]
    ops.memory_efficient_attention = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    for function in (library._xformers, library._xformers_runs):
        function.cache_clear()
    q = torch.zeros(3, 1, 8)
    try:
        with pytest.raises(RuntimeError, match="xformers cannot serve: NotImplementedError: No operator"):
            packed_attention(q, q, q, torch.tensor([0, 3]), 3, causal=True, backend="xformers")
    finally:
        for function in (library._xformers, library._xformers_runs):
            function.cache_clear()


def test_xformers_that_was_asked_for_without_gradients_is_not_refused_for_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ops = types.ModuleType("xformers.ops")
    mask = types.SimpleNamespace(from_seqlens=lambda lengths: lengths)
    ops.fmha = types.SimpleNamespace(  # type: ignore[attr-defined]
        attn_bias=types.SimpleNamespace(BlockDiagonalMask=mask)
    )
    ops.memory_efficient_attention = lambda q, k, v, attn_bias: q + k + v  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    for function in (library._xformers, library._xformers_runs):
        function.cache_clear()
    try:
        with torch.inference_mode():
            assert library.xformers_refusal(torch.zeros(3, 1, 8), True, None, None) == ""
    finally:
        for function in (library._xformers, library._xformers_runs):
            function.cache_clear()


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 2)])
def test_the_mask_given_to_xformers_is_ours(causal: bool, window: int | None) -> None:
    pytest.importorskip("xformers", reason="xformers is not installed")
    lengths = [4, 1, 6]
    bias = library.xformers_mask(lengths, causal, window).materialize((11, 11))
    q = torch.randn(11, 1, 16, dtype=torch.float64)
    logits = q[:, 0] @ q[:, 0].T / 4 + bias.double()
    want = packed_attention_reference(q, q, q, edges(lengths), causal=causal, window=window)
    torch.testing.assert_close(logits.softmax(-1) @ q[:, 0], want[:, 0])
