"""Triton kernels run on the GPU that holds their tensors, whichever is the current one."""

from __future__ import annotations

import importlib
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llm2clip_kernels import (
    adapter_block,
    infonce_loss,
    l2_normalize,
    lora_linear,
    segment_mean,
    sigmoid_loss,
    similarity_rank,
)

LAUNCHERS = {
    "adapter.kernel": ("layer_norm", "layer_norm_backward", "bias_gelu", "bias_gelu_backward"),
    "l2_normalize.kernel": ("forward", "backward"),
    "lora_linear.kernel": ("forward", "dropout_rows_"),
    "segment_mean.kernel": ("forward", "backward"),
    "sigmoid_loss.kernel": ("compute",),
    "similarity_distill.launch": ("forward", "backward"),
    "similarity_lse.launch": ("forward", "backward"),
    "similarity_rank.kernel": ("count",),
}


@pytest.mark.parametrize("module", LAUNCHERS)
def test_every_launcher_switches_to_the_gpu_of_its_tensors(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    entered: list[torch.device] = []

    @contextmanager
    def switch(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", switch)
    launchers = importlib.import_module(f"llm2clip_kernels.{module}")
    for name in LAUNCHERS[module]:
        for index, expected in ((0, []), (1, [torch.device("cuda:1")])):
            entered.clear()
            # no GPU is here: it is enough how far a call gets
            elsewhere: Any = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
            with pytest.raises(TypeError):
                getattr(launchers, name)(elsewhere)
            assert entered == expected, name


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs")
def test_ops_on_a_gpu_that_is_not_the_current_one() -> None:
    def run(device: str) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).bfloat16().to(device).requires_grad_()

        x, y, w, a, b = random(300, 64), random(300, 64), random(128, 64), random(4, 64), random(128, 4)
        edges = torch.tensor([0, 100, 300], device=device)
        seed = torch.tensor(7, device=device)
        found = [
            lora_linear(x, w, None, a, b, 2.0, dropout_p=0.1, seed=seed).float().square().sum(),
            adapter_block(x, None, None, w, None, w.T.contiguous(), None).float().square().sum(),
            segment_mean(l2_normalize(x), edges).square().sum(),
            infonce_loss(F.normalize(x, dim=1), F.normalize(y, dim=1), 20.0),
            sigmoid_loss(F.normalize(x, dim=1), F.normalize(y, dim=1), 10.0, -10.0),
        ]
        torch.stack(found).sum().backward()
        ranks = similarity_rank(x.detach(), y.detach())
        gradients = [t.grad for t in (x, y, w, a, b) if t.grad is not None]
        return [t.cpu() for t in (*found, *gradients, *(ranks if isinstance(ranks, tuple) else (ranks,)))]

    with torch.cuda.device(0):
        for here, there in zip(run("cuda:0"), run("cuda:1"), strict=True):
            assert torch.equal(here, there)
