"""The loop of both stages on a toy task: exact resume, signals, kills, bad losses, bookkeeping."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm2clip.errors import CheckpointError, ConfigError, DataError, TrainingError
from llm2clip.settings import RunSettings
from llm2clip.training import checkpoint
from llm2clip.training.loop import step_seed, train
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
    toy_run,
    wait_for,
)

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    toy_run(out)
    return out


@pytest.mark.parametrize("steps", [(7,), (0,), (5,), (11,), (7, 3, 1)])
@pytest.mark.parametrize("micro_batch", [0, 4])
def test_resume_equals_an_undisturbed_run(tmp_path: Path, steps: tuple[int, ...], micro_batch: int) -> None:
    toy_run(tmp_path / "whole", micro_batch=micro_batch)
    for step in steps:
        with pytest.raises(Interrupted):
            toy_run(tmp_path / "cut", stop_at(step), micro_batch=micro_batch)
    toy_run(tmp_path / "cut", micro_batch=micro_batch)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert [line["step"] for line in curve(tmp_path / "cut")] == list(range(1, 13))


def test_training_changes_with_seed_and_dropout(tmp_path: Path, whole: Path) -> None:
    # otherwise the equality of the other tests would hold for a loop that trains nothing
    toy_run(tmp_path / "other", seed=1)
    assert curve(tmp_path / "other")[0]["loss"] != curve(whole)[0]["loss"]
    losses = [line["loss"] for line in curve(whole)]
    assert losses[-1] < 0.8 * losses[0]


def test_step_seeds_differ_within_a_run() -> None:
    seeds = {step_seed(0, step, rank) for step in range(500) for rank in range(16)}
    assert len(seeds) == 8000 and min(seeds) >= 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_after_the_step_with_a_checkpoint(
    tmp_path: Path, whole: Path, number: signal.Signals, status: int
) -> None:
    def kill(step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        toy_run(tmp_path, Hooks(before_loss=kill))
    assert ended.value.code == status
    assert signal.getsignal(number) == before
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and newest.name == "step_00000007"
    assert not (tmp_path / "result").exists()
    toy_run(tmp_path)
    assert_same_run(whole, tmp_path)


def _slow(out: Path, pause: float) -> None:
    def wait(step: int) -> None:
        time.sleep(pause)

    torch.set_num_threads(1)
    toy_run(out, Hooks(before_loss=wait), save_every=1)


def _hang(out: Path) -> None:
    def wait(step: int) -> None:
        (out / "inside").touch()
        while signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            time.sleep(0.01)
        (out / "asked").touch()  # a second signal before the first has come would count as none
        time.sleep(60)

    torch.set_num_threads(1)
    toy_run(out, Hooks(before_loss=wait))


def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    child = FORK.Process(target=_hang, args=(tmp_path,))
    child.start()
    assert child.pid is not None
    for name in ("inside", "asked"):
        wait_for((tmp_path / name).exists)
        assert child.is_alive()
        os.kill(child.pid, signal.SIGTERM)
    child.join(5)
    assert child.exitcode == -signal.SIGTERM


def test_killed_at_any_instant_it_goes_on(tmp_path: Path) -> None:
    toy_run(tmp_path / "whole", save_every=1)
    rng = random.Random(5)
    for _ in range(6):
        child = FORK.Process(target=_slow, args=(tmp_path / "killed", 0.01))
        child.start()
        time.sleep(rng.uniform(0.02, 0.2))
        child.kill()
        child.join()
    toy_run(tmp_path / "killed", save_every=1)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    left = [p.name for p in (tmp_path / "killed").rglob("*") if ".partial" in p.name or ".old" in p.name]
    assert left == []


def _nan(step: int, loss: Tensor) -> Tensor:
    return loss * float("nan") if step == 7 else loss


def _nan_gradient(step: int, loss: Tensor) -> Tensor:
    # the value stays finite, its gradient is 0 * inf
    return loss + (loss * 0.0).sqrt() if step == 7 else loss


@pytest.mark.parametrize("change", [_nan, _nan_gradient])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer(tmp_path: Path, change: Any) -> None:
    run = RunSettings(out=str(tmp_path), steps=12, batch_size=6, log_every=1, save_every=1)
    task = ToyTask(run, Hooks(change_loss=change))
    with pytest.raises(TrainingError, match="step 8: .* not finite") as error:
        train(task, run, OPTIM, ALONE)
    assert "step_00000007" in str(error.value)
    # the second batch of the third epoch of 20 samples
    expected = list(task.batches(2, 1).__next__()[1])
    assert f"Batch: {', '.join(f'key{sample}' for sample in expected)}." in str(error.value)
    saved = newest_tensors(tmp_path)
    for name, parameter in task.module.named_parameters():
        assert torch.equal(parameter, saved[name]), name
    assert not (tmp_path / "result").exists()
    assert [line["step"] for line in curve(tmp_path)] == list(range(1, 8))
    toy_run(tmp_path, save_every=1)
    toy_run(tmp_path / "whole", save_every=1)
    assert_same_run(tmp_path / "whole", tmp_path)


def test_a_finished_run_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy_run(tmp_path)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()}
    hooks = Hooks()
    run = RunSettings(out=str(tmp_path), steps=12, batch_size=6)
    with caplog.at_level(logging.WARNING):
        assert train(ToyTask(run, hooks), run, OPTIM, ALONE) == tmp_path / "result"
    assert hooks.calls == [] and caplog.text == ""
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()} == before
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["samples"]) == (12, 72) and summary["seconds"] > 0


def test_a_used_directory_is_refused_and_other_settings_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Interrupted):
        toy_run(tmp_path, stop_at(6))
    config = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"run\.resume"):
        toy_run(tmp_path, resume=False)
    assert (tmp_path / "config.yaml").read_text() == config
    (tmp_path / "config.yaml").write_text(
        config.replace("lr: 0.0001", "lr: 0.5").replace("seed: 0", "seed: 9")
    )
    with caplog.at_level(logging.WARNING):
        toy_run(tmp_path)
    assert "optim.lr: 0.5 -> 0.0001" in caplog.text and "run.seed: 9 -> 0" in caplog.text


@pytest.mark.parametrize("width", [5, 7])
def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path, width: int) -> None:
    with pytest.raises(Interrupted):
        toy_run(tmp_path, stop_at(6))
    with pytest.raises(CheckpointError, match=rf"net\.0\.weight: checkpoint \(6, 4\), model \({width}, 4\)"):
        toy_run(tmp_path, width=width)


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.batch_size.* 21 .* 20 "):
        toy_run(tmp_path, batch_size=21)
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(ConfigError, match=r"run\.out"):
        train(ToyTask(RunSettings()), RunSettings(), OPTIM, ALONE)


def test_epochs_decide_when_steps_do_not(tmp_path: Path) -> None:
    toy_run(tmp_path, steps=None, epochs=2.5)
    # 3 batches of 6 an epoch
    assert [line["step"] for line in curve(tmp_path)] == list(range(1, 9))


def test_checkpoints_evaluations_and_lines_come_when_asked(tmp_path: Path) -> None:
    hooks = Hooks(metrics={"val/r1": 0.5})
    toy_run(tmp_path, hooks, log_every=4, eval_every=5, save_every=3, keep_checkpoints=2)
    lines = curve(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [4, 8, 12]
    assert [line["step"] for line in lines if "val/r1" in line] == [5, 10, 12]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step_00000009",
        "step_00000012",
    ]
    assert json.loads((tmp_path / "summary.json").read_text())["val/r1"] == 0.5
    assert {"lr", "grad_norm", "mean"} <= set(lines[0])


def test_the_rate_warms_up_and_decays(tmp_path: Path, whole: Path) -> None:
    rates = [line["lr"] for line in curve(whole)]
    assert rates[:3] == pytest.approx([5e-3, 1e-2, 1e-2]) and rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 5e-4


def test_an_export_that_fails_is_done_again_and_evaluated_once(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.mkdir()
        raise Interrupted

    with pytest.raises(Interrupted):
        toy_run(tmp_path, Hooks(on_export=fail, metrics={"val/r1": 0.5}))
    assert not (tmp_path / "result" / "DONE").exists()
    hooks = Hooks(metrics={"val/r1": 0.5})
    toy_run(tmp_path, hooks)
    assert hooks.calls == ["evaluate", "export"] and (tmp_path / "result" / "DONE").exists()
    assert [line["step"] for line in curve(tmp_path) if "val/r1" in line] == [12]


def test_tensorboard_is_written_or_its_absence_named(tmp_path: Path) -> None:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"run\.tensorboard: the package tensorboard is missing"):
            toy_run(tmp_path, tensorboard=True)
    else:
        toy_run(tmp_path, tensorboard=True)
        assert any((tmp_path / "tensorboard").iterdir())


def test_a_batch_without_a_usable_sample_is_skipped(tmp_path: Path) -> None:
    taken: list[int] = []

    def drop(position: Any, samples: list[int]) -> list[int]:
        taken.append(len(samples))
        return [] if len(taken) in (2, 3) else samples

    toy_run(tmp_path, Hooks(samples=drop))
    assert len(taken) == 14 and [line["step"] for line in curve(tmp_path)] == list(range(1, 13))


def test_a_data_error_ends_the_run_and_keeps_the_checkpoint(tmp_path: Path, whole: Path) -> None:
    count = iter(range(100))

    def fail(position: Any, samples: list[int]) -> list[int]:
        if next(count) == 7:
            raise DataError("the shard is gone")
        return samples

    with pytest.raises(DataError, match="the shard is gone"):
        toy_run(tmp_path, Hooks(samples=fail))
    toy_run(tmp_path)
    assert_same_run(whole, tmp_path)
