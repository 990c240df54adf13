"""Kept memory: used again once it is free, never while anybody still reads it."""

from __future__ import annotations

import gc
import mmap
from collections.abc import Iterator

import pytest
import torch

from llm2clip_kernels import host_memory, infonce_loss, l2_normalize, native

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="this system cannot lend memory back")
COUNT = 64 * 1024


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(host_memory, "_kept", [])
    monkeypatch.setattr(host_memory, "_LEAST", 4096)
    yield
    gc.collect()


def test_free_memory_is_used_again() -> None:
    first = host_memory.floats(COUNT)
    place = first.fill_(1.0).data_ptr()
    del first
    assert len(host_memory._kept) == 1
    smaller = host_memory.floats(COUNT // 2)
    assert smaller.data_ptr() == place and smaller.shape == (COUNT // 2,) and not host_memory._kept


def test_memory_in_use_is_not_given_away() -> None:
    whole = host_memory.floats(COUNT)
    part = whole.fill_(3.0)[10:20]
    del whole
    other = host_memory.floats(COUNT).fill_(5.0)
    assert not host_memory._kept
    assert torch.equal(part, torch.full((10,), 3.0)) and torch.equal(other, torch.full((COUNT,), 5.0))
    assert part.untyped_storage().data_ptr() != other.data_ptr()
    assert other.data_ptr() % 64 == 0


def test_a_block_too_small_is_replaced() -> None:
    small = host_memory.floats(COUNT)
    del small
    large = host_memory.floats(4 * COUNT).fill_(2.0)
    del large
    assert [len(block) for block in host_memory._kept] == [16 * COUNT]


def test_only_sizes_worth_it_and_within_the_budget_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_MOST", 4 * COUNT)
    for count in (100, COUNT + 1, 0):
        assert host_memory.floats(count).shape == (count,)
        assert not host_memory._kept
    host_memory.floats(COUNT)
    assert len(host_memory._kept) == 1


def test_a_system_that_refuses_gets_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_FREE", 12345)
    host_memory.floats(COUNT)
    assert not host_memory._kept


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
def test_losses_alive_at_the_same_time_do_not_share_exponentials() -> None:
    def features(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x, y = (l2_normalize(torch.randn(300, 32, generator=generator)) for _ in range(2))
        return x.requires_grad_(), y.requires_grad_()

    def gradients(method: str, seeds: tuple[int, ...]) -> list[torch.Tensor]:
        inputs = [features(seed) for seed in seeds]
        losses = [infonce_loss(x, y, 20.0, method=method) for x, y in inputs]  # type: ignore[arg-type]
        for loss in losses:
            loss.backward()
        return [tensor.grad for pair in inputs for tensor in pair if tensor.grad is not None]

    gradients("cached", (7,))  # leaves a block behind
    for got, want in zip(gradients("cached", (0, 1, 2)), gradients("recompute", (0, 1, 2)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
