"""What the tests of `fuse_lora` share: a small adapted module, its results, and the two fixtures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llm2clip.integrations.peft as integration
from llm2clip_kernels.lora_linear import op


@pytest.fixture(params=["few rows", "many rows"], autouse=True)
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test through both ways of the op, whatever the size."""
    monkeypatch.setattr(integration, "_FEW", 0)
    if request.param == "many rows":
        monkeypatch.setattr(op, "_SMALL", 0)


class Block(nn.Module):
    """A module with every kind of layer that peft adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.up = nn.Linear(12, 18)
        self.down = nn.Linear(18, 12, bias=False)
        self.conv = nn.Conv1d(12, 6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        hidden = hidden + self.down(torch.tanh(self.up(hidden)))
        return self.conv(hidden.transpose(1, 2))


def randomised(model: Any) -> Any:
    """The model with adapters that do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                parameter.normal_(std=0.3)
    return model


def block(targets: tuple[str, ...] = ("up", "down"), **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return randomised(
        get_peft_model(Block(), LoraConfig(r=4, lora_alpha=6, target_modules=list(targets), **options))
    )


IDS = torch.randint(0, 20, (5, 9), generator=torch.Generator().manual_seed(0))


def results(model: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients by name."""
    model.zero_grad()
    output = model(*args, **kwargs)
    output = getattr(output, "last_hidden_state", output)
    (output.float() * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    return output.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    assert got[0].dtype == want[0].dtype and got[1].keys() == want[1].keys() and want[1]
    for name, p, q in [("output", got[0], want[0])] + [(n, got[1][n], want[1][n]) for n in want[1]]:
        assert p.dtype == q.dtype
        assert (p - q).norm() <= tolerance * q.norm() + 1e-6, name


@pytest.fixture(name="calls")
def calls_fixture(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The op of every fused call."""
    made: list[str] = []
    for name in ("lora_linear", "lora_add"):
        real = getattr(integration, name)

        def spy(*args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Tensor:
            made.append(name)
            result: Tensor = real(*args, **kwargs)
            return result

        monkeypatch.setattr(integration, name, spy)
    return made
