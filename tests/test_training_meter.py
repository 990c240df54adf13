"""Rates, FLOPs, trackers and signals of a run."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm2clip.data.loader import Position
from llm2clip.errors import ConfigError, DataError, TrainingError
from llm2clip.models.adapter import TextAdapter
from llm2clip.settings import RunSettings
from llm2clip.training import flops
from llm2clip.training.checkpoint import Progress
from llm2clip.training.meter import Meter
from llm2clip.training.metrics import MetricsLog
from llm2clip.training.precision import autocast_of
from llm2clip.training.signals import exit_status, stop_requested
from llm2clip.training.trackers import open_trackers
from tests.training_kit import ALONE, Hooks, curve, toy_run

CPU = torch.device("cpu")
PLAIN = autocast_of("fp32", CPU)


class Named(nn.Module):
    """A module's output under a name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.inner(x)}


def test_flops_of_linear_layers_and_of_the_adapter() -> None:
    count = flops.flops_per_sample(Named(nn.Linear(5, 7)), [torch.randn(3, 5)], CPU, PLAIN)
    # the input needs no gradient: forward and the weight's gradient
    assert count == 2 * 2 * 5 * 7
    adapter = Named(TextAdapter(8, 6, depth=2, expansion=3))
    parts = [torch.randn(2, 8), torch.randn(4, 8)]
    block, head = 2 * 2 * 8 * 24, 2 * 8 * 6
    assert flops.flops_per_sample(adapter, parts, CPU, PLAIN) == 3 * (2 * block + head)
    adapter.requires_grad_(False)
    assert flops.flops_per_sample(adapter, parts, CPU, PLAIN) == 2 * block + head


def test_counting_leaves_no_trace() -> None:
    module = Named(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    chunk = torch.randn(3, 4)
    state = torch.get_rng_state()
    assert flops.flops_per_sample(module, [chunk], CPU, PLAIN) > 0
    assert torch.equal(state, torch.get_rng_state()) and module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_what_cannot_be_counted_costs_no_run(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            raise RuntimeError("no evaluation mode")

    assert flops.flops_per_sample(Broken(), [torch.zeros(1)], CPU, PLAIN) == 0.0
    assert "FLOPs are not counted: no evaluation mode" in caplog.text
    assert flops.peak_tflops(CPU) == 0.0


def test_flops_of_attention_on_the_cpu() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            rows = (x * self.scale).view(len(x), 1, 6, 4)
            return {"out": nn.functional.scaled_dot_product_attention(rows, rows, rows)}

    # two products of 6 x 6 x 4 forward, five backward
    assert flops.flops_per_sample(Attention(), [torch.randn(3, 24)], CPU, PLAIN) == 7 * 2 * 6 * 6 * 4


def test_rates_are_over_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    meter = Meter(ALONE, peak_tflops=2.0)
    meter.flops_per_sample = 3e11

    def slow_batches() -> Any:
        for number in range(3):
            clock[0] += 1.0
            yield Position(0, number + 1), [1, 2]

    batches, at = slow_batches(), Progress()
    for _ in range(2):
        position, samples = meter.fetch(batches)
        clock[0] += 3.0
        at = meter.advance(at, position, len(samples))
        with meter.paused():
            clock[0] += 50.0
    rates = meter.rates()
    assert rates["samples_per_second"] == pytest.approx(4 / 8) and rates["data_wait"] == pytest.approx(2 / 8)
    assert rates["tflops"] == pytest.approx(0.15) and rates["mfu"] == pytest.approx(0.075)
    assert rates["peak_memory_mib"] > 50
    assert at == Progress(2, 0, 2, 4, 8.0)
    meter.flops_per_sample = 0.0
    position, samples = meter.fetch(batches)
    clock[0] += 1.0
    meter.advance(at, position, len(samples))
    again = meter.rates()
    assert again["data_wait"] == pytest.approx(0.5) and "mfu" not in again and "tflops" not in again


def test_a_run_logs_its_rates(tmp_path: Path) -> None:
    from llm2clip.training.metrics import read_metrics

    toy_run(tmp_path, log_every=4, peak_tflops=1.0)
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        assert (
            line["samples_per_second"] > 0
            and 0 <= line["data_wait"] < 1
            and line["mfu"] == line["tflops"] > 0
        )
    toy_run(tmp_path / "off", log_every=4, peak_tflops=0)
    assert "tflops" not in read_metrics(tmp_path / "off" / "metrics.jsonl")[0]


class Recorded:
    """Stands in for the package wandb: keeps what a run would send."""

    def __init__(self, **options: Any) -> None:
        self.options, self.lines, self.finished = options, [], False
        self.id = options["id"] or "run-1"

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.lines.append((step, dict(values)))

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_every_line_and_a_resumed_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.training_kit import Interrupted, stop_at

    runs: list[Recorded] = []

    def init(**options: Any) -> Recorded:
        runs.append(Recorded(**options))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(Interrupted):
        toy_run(tmp_path / "mine", stop_at(7), wandb="pictures")
    toy_run(tmp_path / "mine", wandb="pictures")
    first, second = runs
    assert first.options["project"] == "pictures" and first.options["name"] == "mine"
    assert first.options["id"] is None and second.options["id"] == "run-1" and second.finished
    assert first.options["config"]["run"]["batch_size"] == 256  # the toy's settings are the defaults
    assert [step for step, _ in second.lines] == [6, 7, 8, 9, 10, 11, 12]
    assert [values["loss"] for _, values in second.lines] == [
        line["loss"] for line in curve(tmp_path / "mine")[5:]
    ]


def test_a_missing_wandb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"run\.wandb: the package wandb is missing; pip install"):
        toy_run(tmp_path, wandb="pictures")
    assert open_trackers(RunSettings(out=str(tmp_path)), None, 0) == []


def test_trackers_are_closed_with_the_log(tmp_path: Path) -> None:
    calls: list[str] = []
    tracker = types.SimpleNamespace(
        log=lambda step, values: calls.append(f"{step}"), close=lambda: calls.append("x")
    )
    log = MetricsLog(tmp_path, trackers=[tracker])
    log.write(3, {"loss": 1.0})
    log.write(4, {})
    log.close()
    assert calls == ["3", "x"]


def test_signals_are_remembered_until_the_step_ends() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    with stop_requested() as stopping:
        assert stopping() == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stopping() == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping() == signal.SIGTERM
        # the next one of a kind is the usual one
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert {number: signal.getsignal(number) for number in before} == before
    assert [exit_status(s) for s in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)] == [0, 143, 130]


def test_a_loader_that_fails_ends_the_fetch() -> None:
    def failing() -> Any:
        yield Position(0, 1), []
        raise DataError("gone")

    with pytest.raises(DataError, match="gone"):
        Meter(ALONE).fetch(failing())


def test_data_that_ends_or_cannot_be_used_ends_the_run() -> None:
    with pytest.raises(TrainingError, match="ended before the run"):
        Meter(ALONE).fetch(iter(()))
    empty = itertools.repeat((Position(0, 1), []))
    some = itertools.chain(itertools.islice(empty, 99), [(Position(0, 2), [1])])
    assert Meter(ALONE).fetch(some) == (Position(0, 2), [1])
    with pytest.raises(TrainingError, match="100 batches in a row"):
        Meter(ALONE).fetch(empty)


def test_sigusr1_saves_and_ends_well(tmp_path: Path) -> None:
    from llm2clip.training import checkpoint

    def send(step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(SystemExit) as ended:
        toy_run(tmp_path, Hooks(before_loss=send), eval_every=7)
    assert ended.value.code == 0
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and newest.name == "step_00000007" and not (tmp_path / "result").exists()
