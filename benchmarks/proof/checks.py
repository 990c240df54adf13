"""Sections that check results on the device: the library, repeatability, graphs, streams, indices past 32 bits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.proof import cases
from benchmarks.proof.sections import Context, Skip
from llm2clip_kernels import build_info, native, similarity_lse


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _computations(context: Context) -> Iterator[tuple[str, cases.Compute]]:
    for name, make in cases.available().items():
        for dtype in cases.dtypes(context.device):
            yield f"{name} {str(dtype).removeprefix('torch.')}", make(context.device, dtype)


def library(context: Context) -> dict[str, Any]:
    """The library that came with the checkout, built beside a CPU-only torch, loads here and its kernels launch."""
    if not native.available():
        raise Skip(f"no library in the checkout: {native.load()}")
    record = native.build_record()
    slabs = torch.rand(7, 300, device=context.device) + 0.5
    shift = torch.tensor([3.0], device=context.device)
    flag = torch.zeros(1, dtype=torch.int32, device=context.device)
    if not context.dry:
        assert record.get("cuda_sources"), "the library in the checkout was built without its CUDA sources"
        lse = torch.ops.llm2clip_native.lse_from_slabs(slabs, shift, flag)
        want = slabs.double().sum(0).log() + 3.0
        assert torch.allclose(lse.double(), want, rtol=0, atol=1e-5), "lse_from_slabs is wrong"
        assert int(flag) == 0
    x, y = (
        cases.features(300, 64, context.device, torch.float32, 0),
        cases.features(280, 64, context.device, torch.float32, 1),
    )
    dtype = torch.float32 if context.dry else torch.bfloat16
    x, y = x.detach().to(dtype), y.detach().to(dtype)
    row, col = similarity_lse(x, y, 20.0, method="recompute")
    logits = 20.0 * x.double() @ y.double().T
    for found, want in ((row, logits.logsumexp(1)), (col, logits.logsumexp(0))):
        assert torch.allclose(found.double(), want, rtol=0, atol=1e-4), "similarity_lse is wrong"
    return {"built_beside": record.get("torch"), "running_on": torch.__version__, "build": build_info()}


def determinism(context: Context) -> dict[str, Any]:
    """The same bits from every run, with freed memory full of NaN in between."""
    different = []
    for name, compute in _computations(context):
        first = compute()
        for _ in range(3):
            # whatever is read before it is written now becomes NaN
            poison = [torch.full((1 << 20,), torch.nan, device=context.device) for _ in range(8)]
            del poison
            if not _same(first, compute()):
                different.append(name)
                break
    assert not different, f"other bits in a later run: {', '.join(different)}"
    return {"cases": [name for name, _ in _computations(context)], "runs": 4}


def graph(context: Context) -> dict[str, Any]:
    """Forward and backward captured in one CUDA graph compute, when replayed, what they compute eagerly."""
    done, failed = [], {}
    for name, compute in _computations(context):
        if name.split()[0] in cases.NOT_CAPTURED:
            continue
        expected = compute()
        try:
            found = compute() if context.dry else _replayed(compute)
            assert _same(expected, found), "another result"
            done.append(name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    assert not failed, f"not captured: {failed}"
    return {"cases": done, "captured": not context.dry}


def _replayed(compute: cases.Compute) -> list[Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        outputs = compute()
    # what the replay does not write must not pass for its result
    for output in outputs:
        output.zero_()
    captured.replay()
    torch.cuda.synchronize()
    return outputs


def streams(context: Context) -> dict[str, Any]:
    """On streams of the caller's own, two at a time, the results are those of the default stream."""
    wrong = []
    names = []
    for name, compute in _computations(context):
        names.append(name)
        expected = compute()
        if context.dry:
            found = _in_a_thread(compute)
        else:
            torch.cuda.synchronize()
            found = []
            pair = [torch.cuda.Stream(), torch.cuda.Stream()]
            for stream in pair:
                with torch.cuda.stream(stream):
                    found.append(compute())
            torch.cuda.synchronize()
            if torch.cuda.device_count() > 1:
                found.append([t.to(context.device) for t in _on_another_device(name)])
        if not all(_same(expected, each) for each in found):
            wrong.append(name)
    assert not wrong, f"another result on another stream: {', '.join(wrong)}"
    return {"cases": names}


def _on_another_device(name: str) -> list[Tensor]:
    """The named computation on the second GPU while the first is the current one."""
    case, dtype = name.split()
    return cases.available()[case]("cuda:1", getattr(torch, dtype))()


def _in_a_thread(compute: cases.Compute) -> list[list[Tensor]]:
    found: list[list[Tensor]] = []
    thread = threading.Thread(target=lambda: found.append(compute()))
    thread.start()
    thread.join()
    assert found, "it raised in another thread"
    return found


def large_index(context: Context) -> dict[str, Any]:
    """More than 2^31 pairs, and more than 2^31 elements of x: sampled rows against fp64, gradients included."""
    pairs = (300, 260, 16) if context.dry else (50_000, 50_000, 64)
    elements = (400, 70, 24) if context.dry else (2_200_000, 64, 1024)
    return {"pairs": _sampled(context, *pairs), "elements": _sampled(context, *elements)}


def _sampled(context: Context, m: int, n: int, d: int) -> dict[str, float]:
    dtype = torch.float32 if context.dry else torch.bfloat16
    generator = torch.Generator(context.device).manual_seed(0)
    x, y = (
        torch.nn.functional.normalize(
            torch.randn(rows, d, generator=generator, device=context.device, dtype=dtype)
        )
        for rows in (m, n)
    )
    x, y = x.requires_grad_(), y.requires_grad_()
    row, col = similarity_lse(x, y, 20.0, method="recompute")
    (row.sum() + col.sum()).backward()
    assert x.grad is not None
    wide_y, wide_col = y.detach().double(), col.detach().double()
    chosen = torch.tensor([0, 1, m // 2, m - 2, m - 1], device=context.device)
    logits = 20.0 * x.detach()[chosen].double() @ wide_y.T
    true_row = logits.logsumexp(1)
    # the gradient of these rows takes every column's log-sum-exp, which is the op's own, checked below
    weights = (logits - true_row[:, None]).exp() + (logits - wide_col).exp()
    true_dx = 20.0 * weights @ wide_y
    columns = torch.tensor([0, n // 2, n - 1], device=context.device)
    true_col = torch.stack([_column(x.detach(), y.detach()[j]) for j in columns])
    found = {
        "row_lse": float((row.detach()[chosen].double() - true_row).abs().max()),
        "col_lse": float((col.detach()[columns].double() - true_col).abs().max()),
        "dx": float((x.grad[chosen].double() - true_dx).norm() / true_dx.norm()),
    }
    assert found["row_lse"] < 1e-3 and found["col_lse"] < 1e-3, f"{(m, n, d)}: {found}"
    assert found["dx"] < (1e-4 if context.dry else 2e-2), f"{(m, n, d)}: {found}"
    return found


def _column(x: Tensor, y: Tensor, rows: int = 1 << 18) -> Tensor:
    """The log-sum-exp of one column in fp64, without a copy of x in fp64."""
    parts = [(20.0 * part.double() @ y.double()).logsumexp(0) for part in x.split(rows)]
    return torch.stack(parts).logsumexp(0)
