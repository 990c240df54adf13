"""Parameter groups, the schedule and clipping."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from llm2clip.errors import ConfigError
from llm2clip.settings import OptimSettings
from llm2clip.training.optim import build_optimizer, clip_gradients
from llm2clip.training.schedule import lr_factor, set_learning_rate


def groups() -> dict[str, list[tuple[str, nn.Parameter]]]:
    vision = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    frozen = nn.Linear(2, 2).requires_grad_(False)
    return {
        "vision": list(vision.named_parameters()),
        "frozen": list(frozen.named_parameters()),
        "logit_scale": [("logit_scale", nn.Parameter(torch.tensor(1.0)))],
    }


def test_groups_have_their_decay_and_rate() -> None:
    named = groups()
    optimizer = build_optimizer(named, OptimSettings(lr=0.1, weight_decay=0.2, lr_scales={"vision": 0.5}))
    shown = [
        (g["name"], g["weight_decay"], g["lr_scale"], [tuple(p.shape) for p in g["params"]])
        for g in optimizer.param_groups
    ]
    assert shown == [
        ("vision", 0.2, 0.5, [(4, 3)]),
        ("vision", 0.0, 0.5, [(4,), (4,), (4,)]),
        ("logit_scale", 0.0, 1.0, [()]),
    ]
    assert set_learning_rate(optimizer, 0, 10, OptimSettings(lr=0.1, warmup_steps=2)) == pytest.approx(0.05)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.025, 0.025, 0.05])


def test_decay_moves_matrices_alone() -> None:
    named = groups()
    optimizer = build_optimizer(named, OptimSettings(lr=0.1, weight_decay=0.5))
    before = {name: p.clone() for name, p in named["vision"]}
    for _, parameter in named["vision"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in named["vision"]:
        factor = 0.95 if name == "0.weight" else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])


def test_unknown_groups_and_frozen_models_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr_scales names visoin; the groups are vision, frozen"):
        build_optimizer(groups(), OptimSettings(lr_scales={"visoin": 0.1}))
    with pytest.raises(ConfigError, match="nothing is trainable"):
        build_optimizer({"frozen": groups()["frozen"]}, OptimSettings())


def test_the_schedule() -> None:
    settings = OptimSettings(warmup_steps=4, final_lr=0.1)
    factors = [lr_factor(step, 20, settings) for step in range(20)]
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[12] == pytest.approx(0.1 + 0.9 * 0.5)
    assert lr_factor(20, 20, settings) == pytest.approx(0.1) == lr_factor(99, 20, settings)
    expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 15 / 16))
    assert factors[19] == pytest.approx(expected)
    constant = OptimSettings(warmup_steps=0, schedule="constant")
    assert [lr_factor(step, 5, constant) for step in range(5)] == [1.0] * 5
    # a warm-up longer than the run ends at the peak
    assert lr_factor(2, 3, settings) == 1.0


@pytest.mark.parametrize("limit", [0.0, 0.5, 100.0])
def test_clipping(limit: float) -> None:
    named = groups()
    optimizer = build_optimizer(named, OptimSettings())
    for _, parameter in named["vision"]:
        parameter.grad = torch.full_like(parameter, 2.0)
    norm = clip_gradients(optimizer, limit)
    count = sum(p.numel() for _, p in named["vision"])
    assert norm.item() == pytest.approx(2.0 * math.sqrt(count))
    scale = 1.0 if limit in (0.0, 100.0) else limit / norm.item()
    for _, parameter in named["vision"]:
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, torch.full_like(parameter, 2.0 * scale), rtol=1e-5, atol=0)
    assert named["logit_scale"][0][1].grad is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, r"optim\.lr: expected at least 0, got -1\.0"),
        ({"lr": float("nan")}, r"optim\.lr"),
        ({"warmup_steps": -1}, r"optim\.warmup_steps"),
        ({"betas": (0.9, 1.0)}, r"optim\.betas"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimSettings(**changes)  # type: ignore[arg-type]
