"""One small call of every native op and host function, with results that can be compared."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import llm2clip_kernels as kernels
from llm2clip.data.shards import index_tar
from llm2clip.data.store import EmbeddingStore, StoreWriter
from llm2clip.packing import pack
from llm2clip_kernels import native as native_library
from llm2clip_kernels.adapter.head import layer_norm_linear
from llm2clip_kernels.dropout import new_seed
from tests.data_files import write_shards
from tests.test_poisoned_memory import OPS, leaves

Call = Callable[[], list[Tensor]]


def op_calls() -> dict[str, Call]:
    """Forward and backward of every op, on inputs that are made once."""
    calls: dict[str, Call] = {name: _with_gradients(op) for name, op in OPS.items()}
    x = torch.randn(40, 12)
    ln, lb, w1, b1 = torch.ones(12), torch.zeros(12), torch.randn(24, 12), torch.randn(24)
    w2, b2, seed = torch.randn(12, 24), torch.randn(12), new_seed(x.device)

    def block(*inputs: Tensor) -> Tensor:
        return kernels.adapter_block(*inputs, dropout_p=0.25, seed=seed).square().sum()

    calls["adapter block"] = _once(block, x, ln, lb, w1, b1, w2, b2)
    calls["adapter head"] = _once(lambda *a: layer_norm_linear(*a).square().sum(), x, ln, lb, w1, b1)

    def dropped(*inputs: Tensor) -> Tensor:
        a, w, la, ma = inputs
        return kernels.lora_linear(a, w, None, la, ma, 0.5, dropout_p=0.5, seed=seed).square().sum()

    calls["lora dropout"] = _once(dropped, x, w1, torch.randn(4, 12), torch.randn(24, 4))
    if reason := native_library.load():
        raise RuntimeError(f"the native library is {reason}")
    native = torch.ops.llm2clip_native
    rows = torch.arange(40)
    calls["pairs"] = lambda: [native.pair_scores(x, x, rows, rows.flip(0))]
    calls["product"] = lambda: [_product(x)]
    slabs, flag = torch.rand(3, 40), torch.zeros(1, dtype=torch.int32)
    calls["slabs"] = lambda: [native.lse_from_slabs(slabs, torch.zeros(()), flag)]
    return calls


def host_calls() -> dict[str, Call]:
    """The host module: tar index, packing, addresses, lookup, rows of every number format."""
    root, captions = _files()
    shard = root / "train-000000.tar"
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    calls: dict[str, Call] = {
        "tar index": lambda: [torch.tensor(index_tar(shard).offsets)],
        "pack": lambda: [torch.tensor([number for group in pack(lengths, 64) for number in group])],
    }
    for dtype in ("fp32", "fp16", "bf16", "int8", "fp8"):
        store = EmbeddingStore.open(root / dtype)
        calls[f"rows {dtype}"] = lambda store=store: [store.get(captions)]  # type: ignore[misc]
    return calls


def _product(x: Tensor) -> Tensor:
    out = torch.empty(40, 40)
    torch.ops.llm2clip_native.tile_product(out, x, x.T.contiguous(), False)
    return out


def _with_gradients(op: Callable[..., Tensor]) -> Call:
    return _once(op, *leaves())


def _once(op: Callable[..., Tensor], *start: Tensor) -> Call:
    def call() -> list[Tensor]:
        inputs = [tensor.clone().requires_grad_() for tensor in start]
        result = op(*inputs)
        if result.requires_grad:
            result.backward()
        return [result.detach(), *(t.grad for t in inputs if t.grad is not None)]

    return call


@cache
def _files() -> tuple[Path, list[str]]:
    # lives as long as the process
    folder: Any = tempfile.TemporaryDirectory()
    _kept.append(folder)
    root = Path(folder.name)
    write_shards(root, 1, 3)
    captions = [f"caption {number}" for number in range(200)]
    values = torch.randn(200, 7, generator=torch.Generator().manual_seed(0))
    for dtype in ("fp32", "fp16", "bf16", "int8", "fp8"):
        with StoreWriter(root / dtype, dim=7, dtype=dtype, fingerprint={}) as out:  # type: ignore[arg-type]
            out.add(captions, values)
            out.finish()
    return root, captions


_kept: list[Any] = []
