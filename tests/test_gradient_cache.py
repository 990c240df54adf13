"""The gradient cache equals one big batch: fp64, any chunking, dropout, shared scalars, unused outputs."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from llm2clip.training import gradient_cache

CPU = torch.device("cpu")
BATCH = 12


class Towers(nn.Module):
    """Two towers and a temperature; `unused` is returned and enters no loss."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Dropout(dropout), nn.Linear(7, 4))
        self.right = nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.ignored = nn.Linear(5, 2)

    def forward(self, chunk: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {
            "unused": self.ignored(chunk[0]),
            "left": self.left(chunk[0]),
            "scale": self.scale.exp(),
            "right": self.right(chunk[1]),
            "constant": torch.ones(len(chunk[0]), 2, dtype=chunk[0].dtype),
        }


def contrastive(outputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Every row against every other, so that a loss over chunks alone would differ."""
    logits = outputs["scale"] * outputs["left"] @ outputs["right"].T + outputs["constant"].sum()
    loss = nn.functional.cross_entropy(logits, torch.arange(len(logits)))
    return loss, {"largest": logits.detach().max()}


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(BATCH, 5, generator=generator, dtype=dtype),
        torch.randn(BATCH, 3, generator=generator, dtype=dtype),
    )


def split(batch: tuple[Tensor, Tensor], sizes: int | Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch[0].split(sizes), batch[1].split(sizes), strict=True))


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("always_cache", [False, True])
@pytest.mark.parametrize("sizes", [1, 3, 5, 11, BATCH, [2, 7, 3]])
def test_equals_one_big_batch(sizes: int | list[int], always_cache: bool) -> None:
    module = Towers().double()
    expected, _ = contrastive(module(data()))
    expected.backward()
    whole = gradients(module)
    module.zero_grad(set_to_none=True)
    loss, metrics = gradient_cache.backward(
        module, split(data(), sizes), contrastive, CPU, always_cache=always_cache
    )
    assert not loss.requires_grad and loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=0)
    assert set(metrics) == {"largest"}
    for name, gradient in gradients(module).items():
        if name.startswith("ignored"):
            assert gradient is None and whole[name] is None  # weight decay must not reach it
        else:
            torch.testing.assert_close(gradient, whole[name], rtol=1e-11, atol=1e-14)
            assert gradient is not None and gradient.abs().max() > 0


@pytest.mark.parametrize("sizes", [4, 5])
def test_dropout_is_the_same_in_both_passes(sizes: int) -> None:
    module = Towers(dropout=0.5).double()
    chunks = split(data(), sizes)
    # what one graph over chunks gives when each draws its own dropout in turn
    torch.manual_seed(11)
    parts = [module(chunk) for chunk in chunks]
    joined = {n: torch.cat([p[n] for p in parts]) for n in ("left", "right", "constant")}
    expected, _ = contrastive(joined | {"scale": module.scale.exp()})
    expected.backward()
    whole = gradients(module)
    after = torch.rand(3)

    module.zero_grad(set_to_none=True)
    torch.manual_seed(11)
    loss, _ = gradient_cache.backward(module, chunks, contrastive, CPU)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=0)
    for name, gradient in gradients(module).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-11, atol=1e-14)
    # replaying leaves the generator where the first pass left it
    assert torch.equal(torch.rand(3), after)


def test_gradients_accumulate_like_backward() -> None:
    module = Towers().double()
    gradient_cache.backward(module, split(data(), 5), contrastive, CPU)
    once = gradients(module)
    gradient_cache.backward(module, split(data(), 4), contrastive, CPU)
    for name, gradient in gradients(module).items():
        before = once[name]
        if before is not None:
            torch.testing.assert_close(gradient, 2 * before, rtol=1e-11, atol=1e-14)


def test_autocast_is_used_in_both_passes() -> None:
    module = Towers()
    seen: list[bool] = []
    module.left.register_forward_hook(lambda *args: seen.append(args[2].dtype == torch.bfloat16))
    batch = data(torch.float32)
    loss, _ = gradient_cache.backward(
        module,
        split(batch, 5),
        lambda outputs: contrastive({name: output.float() for name, output in outputs.items()}),
        CPU,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    )
    assert seen == [True] * 6
    reference, _ = contrastive(module(batch))
    torch.testing.assert_close(loss, reference.detach(), rtol=0.05, atol=0.05)
    for name, gradient in gradients(module).items():
        assert name.startswith("ignored") or (gradient is not None and gradient.dtype == torch.float32)


def test_no_chunk_is_an_error() -> None:
    with pytest.raises(ValueError, match="no chunk"):
        gradient_cache.backward(Towers(), [], contrastive, CPU)


def test_what_the_loss_computed_with_is_gone_before_the_chunks_run_again() -> None:
    module, seen = Towers().double(), list[weakref.ref[Tensor]]()
    alive: list[int] = []

    def loss(outputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        # the joined features, and what a loss keeps for its backward
        value, metrics = contrastive(outputs)
        seen.extend(map(weakref.ref, (outputs["left"], outputs["right"], value)))
        return value, metrics

    module.register_forward_pre_hook(lambda *_: alive.append(sum(ref() is not None for ref in seen)))
    gradient_cache.backward(module, split(data(), 4), loss, CPU)
    assert len(seen) == 3 and alive == [0] * 6
