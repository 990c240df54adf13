"""What a step changes, through the loop and resumed: fp16 with its scale, averages, optimizers, layer rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm2clip.errors import ConfigError, TrainingError
from llm2clip.settings import OptimSettings, RunSettings
from llm2clip.training import checkpoint
from llm2clip.training.ema import WeightAverage
from llm2clip.training.layers import layer_numbers
from llm2clip.training.loop import train
from llm2clip.training.optim import build_optimizer, freeze
from llm2clip.training.schedule import lr_factor
from tests.training_kit import (
    ALONE,
    OPTIM,
    Hooks,
    Interrupted,
    ToyTask,
    assert_same_run,
    curve,
    newest_tensors,
    stop_at,
)


def run(out: Path, hooks: Hooks | None = None, optim: OptimSettings = OPTIM, **options: Any) -> ToyTask:
    settings = RunSettings(
        **{"out": str(out), "steps": 12, "batch_size": 6, "log_every": 1, "save_every": 5, **options}
    )
    task = ToyTask(settings, hooks)
    train(task, settings, optim, ALONE)
    return task


def overflow(step: int, loss: Tensor) -> Tensor:
    # finite in fp32, infinite once it is scaled; a tenth of the others, which would overflow at the first scale
    return loss.float() * (1e36 if step in (3, 4) else 0.1)


class CountedSteps(Hooks):
    """Hooks whose step number also grows when the optimizer's step is left out."""

    def __init__(self, change: Any) -> None:
        calls = iter(range(10**6))
        super().__init__(change_loss=lambda step, loss: change(next(calls), loss))


def test_fp16_leaves_steps_out_that_overflow(tmp_path: Path) -> None:
    run(tmp_path, CountedSteps(overflow), precision="fp16", peak_tflops=0)
    lines = curve(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    # the logged scale is that of the next step
    assert [line["loss_scale"] for line in lines] == [65536.0] * 3 + [32768.0] + [16384.0] * 8
    assert lines[3]["grad_norm"] is None and all(line["grad_norm"] for line in lines[5:])
    run(tmp_path / "wide", peak_tflops=0)
    wide = [line["loss"] for line in curve(tmp_path / "wide")]
    assert 10 * lines[0]["loss"] != wide[0] and 10 * lines[0]["loss"] == pytest.approx(wide[0], rel=1e-2)
    assert lines[11]["loss"] < 0.8 * lines[0]["loss"]


def test_a_step_left_out_changes_nothing(tmp_path: Path) -> None:
    seen: list[list[Tensor]] = []

    def remember(step: int, loss: Tensor) -> Tensor:
        seen.append([p.detach().clone() for p in task.module.parameters()])
        return overflow(step, loss)

    settings = RunSettings(out=str(tmp_path), steps=8, batch_size=6, precision="fp16", peak_tflops=0)
    task = ToyTask(settings, CountedSteps(remember))
    train(task, settings, OPTIM, ALONE)
    same = [all(map(torch.equal, one, other)) for one, other in zip(seen, seen[1:], strict=False)]
    assert same == [False, False, False, True, True, False, False]


def test_fp16_that_overflows_at_any_scale_ends(tmp_path: Path) -> None:
    def diverged(step: int, loss: Tensor) -> Tensor:
        small = 0.1 * loss.float()
        return small + (small * 0.0).sqrt() if step >= 2 else small

    with pytest.raises(TrainingError, match="step 19: .* is not finite"):
        run(tmp_path, CountedSteps(diverged), precision="fp16", steps=40, peak_tflops=0)
    with pytest.raises(TrainingError, match="step 3: loss nan"):
        run(
            tmp_path / "nan",
            CountedSteps(lambda step, loss: loss * float("nan") if step == 2 else loss),
            precision="fp16",
        )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_everything_resumes_bitwise(tmp_path: Path, name: str, precision: str) -> None:
    if name == "lion":
        pytest.importorskip("lion_pytorch", reason="needs the extra lion")
    settings = OptimSettings(
        name=name,
        lr=3e-3,
        warmup_steps=2,
        ema=0.9,
        schedule="wsd",
        layer_decay={"all": 0.5},  # type: ignore[arg-type]
    )
    options: dict[str, Any] = {"precision": precision, "micro_batch": 4, "peak_tflops": 0}
    change = overflow if precision == "fp16" else lambda step, loss: loss
    run(tmp_path / "whole", CountedSteps(change), settings, **options)
    with pytest.raises(Interrupted):
        hooks = CountedSteps(change)
        hooks.before_loss = stop_at(7 if precision == "fp32" else 6).before_loss
        run(tmp_path / "cut", hooks, settings, **options)
    newest = checkpoint.latest(tmp_path / "cut")
    assert newest is not None and newest.name == "step_00000005"
    meta = json.loads((newest / checkpoint.META).read_text())
    assert meta["scaler"].get("scale") == (16384.0 if precision == "fp16" else None)
    run(tmp_path / "cut", CountedSteps(lambda step, loss: change(9, loss)), settings, **options)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    whole, cut = (checkpoint.latest(tmp_path / path) for path in ("whole", "cut"))
    assert whole is not None and cut is not None
    assert (whole / checkpoint.AVERAGE).read_bytes() == (cut / checkpoint.AVERAGE).read_bytes()
    assert (tmp_path / "whole/result/weights").read_text() == (tmp_path / "cut/result/weights").read_text()


def test_the_average_follows_its_formula_and_is_exported(tmp_path: Path) -> None:
    seen: list[list[Tensor]] = []

    def remember(step: int, loss: Tensor) -> Tensor:
        seen.append([p.detach().double().clone() for p in task.module.parameters()])
        return loss

    settings = RunSettings(out=str(tmp_path), steps=6, batch_size=6, eval_every=3)
    task = ToyTask(settings, Hooks(change_loss=remember))
    train(task, settings, OptimSettings(lr=1e-2, warmup_steps=2, ema=0.3), ALONE)
    last = [p.detach().double().clone() for p in task.module.parameters()]
    average = seen[0]
    for step, now in enumerate([*seen[1:], last], 1):
        decay = min(0.3, (1 + step) / (10 + step))
        average = [decay * old + (1 - decay) * new for old, new in zip(average, now, strict=True)]
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    from safetensors.torch import load_file

    stored = load_file(newest / checkpoint.AVERAGE)
    for (name, parameter), want in zip(task.module.named_parameters(), average, strict=True):
        torch.testing.assert_close(stored[name].double(), want, rtol=1e-5, atol=1e-6)
        # training went on with its own weights, and ended with them
        torch.testing.assert_close(parameter.detach(), newest_tensors(tmp_path)[name])
    exported = (tmp_path / "result/weights").read_text()
    assert exported == repr([stored[name].tolist() for name, _ in task.module.named_parameters()])


def test_the_average_may_stay_in_the_checkpoint(tmp_path: Path) -> None:
    task = run(tmp_path, None, OptimSettings(lr=1e-2, ema=0.9, ema_export=False))
    weights = repr([p.tolist() for p in task.module.parameters()])
    assert (tmp_path / "result/weights").read_text() == weights


def test_an_average_begins_where_a_checkpoint_has_none(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path, stop_at(7))
    at_five = newest_tensors(tmp_path)
    with pytest.raises(Interrupted):
        run(tmp_path, stop_at(1), OptimSettings(lr=1e-2, warmup_steps=2, ema=0.9))
    module = ToyTask(RunSettings()).module
    average = WeightAverage(module, 0.9)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    optimizer = build_optimizer({"all": list(module.named_parameters())}, OPTIM)
    checkpoint.load(newest, module, optimizer, average=average)
    for name, value in average.averages.items():
        assert torch.equal(value, at_five[name]), name


def test_a_damaged_average_is_found(tmp_path: Path) -> None:
    from llm2clip.errors import CheckpointError

    settings = OptimSettings(lr=1e-2, ema=0.9)
    with pytest.raises(Interrupted):
        run(tmp_path, stop_at(7), settings)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    data = bytearray((newest / checkpoint.AVERAGE).read_bytes())
    data[-1] ^= 1
    (newest / checkpoint.AVERAGE).write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="ema.safetensors is damaged"):
        run(tmp_path, None, settings)


NAMES = {
    "clip": ["embeddings.class_embedding", "pre_layrnorm.weight", "encoder.layers.0.mlp.fc1.weight",
             "encoder.layers.0.mlp.fc1.bias", "encoder.layers.10.mlp.fc1.weight", "post_layernorm.weight"],
    "adapter": ["adaptor.0.fn.0.weight", "adaptor.0.fn.3.weight", "adaptor.1.ln.weight", "adaptor.2.weight",
                "adaptor.3.weight"],
    "stages": ["patch.weight", "stages.0.blocks.0.a", "stages.0.blocks.1.a", "stages.1.downsample.weight",
               "stages.1.blocks.0.a", "norm.weight"],
    "efficientnet": ["network._conv_stem.weight", "network._blocks.0.a", "network._blocks.1.a", "network._conv_head.w"],
    "none": ["weight", "bias"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "numbers"),
    [
        ("clip", [0, 0, 1, 1, 2, 3]),
        ("adapter", [1, 1, 2, 3, 4]),
        ("stages", [0, 1, 2, 3, 4, 5]),
        ("efficientnet", [0, 1, 2, 3]),
        ("none", [0, 0]),
    ],
)
def test_layers_are_counted_from_the_input(family: str, numbers: list[int]) -> None:
    assert layer_numbers(NAMES[family]) == numbers


def named(names: list[str]) -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.ones(2, 2) if "weight" in name else torch.ones(2))) for name in names]


def test_rates_fall_from_the_last_layer_to_the_first() -> None:
    groups = {
        "vision": named(NAMES["clip"]),
        "adapter": named(NAMES["adapter"]),
        "projection": named(["weight"]),
    }
    settings = OptimSettings(lr=1.0, layer_decay={"vision": 0.5, "adapter": 0.1}, lr_scales={"vision": 2.0})
    optimizer = build_optimizer(groups, settings)
    found = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    assert [found[id(p)] for _, p in groups["vision"]] == pytest.approx([0.25, 0.25, 0.5, 0.5, 1.0, 2.0])
    assert [found[id(p)] for _, p in groups["adapter"]] == pytest.approx([1e-3, 1e-3, 1e-2, 0.1, 1.0])
    assert [found[id(p)] for _, p in groups["projection"]] == [1.0]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 12


def test_decay_is_kept_off_named_parameters() -> None:
    groups = {"vision": named(["a.weight", "b.weight", "a.bias"])}
    optimizer = build_optimizer(groups, OptimSettings(weight_decay=0.3, no_decay=("b.*",)))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert [decays[id(p)] for _, p in groups["vision"]] == [0.3, 0.0, 0.0]


def test_groups_are_frozen_by_name() -> None:
    groups = {"vision": named(["weight"]), "adapter": named(["weight"])}
    freeze(groups, ("adapter",))
    (entry,) = build_optimizer(groups, OptimSettings()).param_groups
    assert entry["name"] == "vision"
    for settings, message in (
        (
            OptimSettings(layer_decay={"visoin": 0.5}),
            r"optim\.layer_decay names visoin; the groups are vision, adapter",
        ),
        (OptimSettings(lr_scales={"x": 0.5}), r"optim\.lr_scales names x"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_optimizer(groups, settings)
    with pytest.raises(ConfigError, match=r"optim\.freeze names all"):
        freeze(groups, ("all",))


def test_lion_moves_by_signs() -> None:
    pytest.importorskip("lion_pytorch", reason="needs the extra lion")
    groups = {"all": named(["weight", "bias"])}
    optimizer = build_optimizer(groups, OptimSettings(name="lion", lr=0.1, weight_decay=0.5))
    for _, parameter in groups["all"]:
        parameter.grad = torch.full_like(parameter, -3.0)
    optimizer.step()
    torch.testing.assert_close(groups["all"][0][1].detach(), torch.full((2, 2), 0.95 + 0.1))
    torch.testing.assert_close(groups["all"][1][1].detach(), torch.full((2,), 1.1))
    with pytest.raises(ConfigError, match="lion needs a rate above 0"):
        build_optimizer(groups, OptimSettings(name="lion", lr=0.0))


def test_warm_up_stable_decay() -> None:
    settings = OptimSettings(warmup_steps=4, schedule="wsd", decay_share=0.25, final_lr=0.1)
    factors = [lr_factor(step, 20, settings) for step in range(21)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0]) and factors[4:16] == [1.0] * 12
    assert factors[16] == pytest.approx(0.1 + 0.9 * (1 - (1 / 5) ** 0.5)) and factors[20] == pytest.approx(
        0.1
    )
    assert factors[15:] == sorted(factors[15:], reverse=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema": 1.0}, r"optim\.ema: expected a decay in \[0, 1\)"),
        ({"decay_share": 1.5}, r"optim\.decay_share"),
        ({"layer_decay": {"vision": 0.0}}, r"optim\.layer_decay\.vision: expected a factor above 0"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimSettings(**changes)
