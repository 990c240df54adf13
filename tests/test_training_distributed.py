"""Two gloo processes train like one, and none waits for another that has failed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm2clip.cli import main
from llm2clip.config import dump_yaml
from llm2clip.data.image_address import image_address
from llm2clip.data.sources import open_source
from llm2clip.data.store import EmbeddingStore
from llm2clip.errors import DataError
from llm2clip.training import checkpoint, failures
from llm2clip.training.clip_task import ClipTask
from llm2clip.training.run import finetune_llm, train_clip
from llm2clip.training.world import World
from tests.tiny_models import save_tiny_clip
from tests.training_kit import Kit, curve, make_kit, newest_tensors, records, wait_for, write_set

pytestmark = pytest.mark.dist
FORK = multiprocessing.get_context("fork")
Prepare = Callable[[int], None]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return make_kit(tmp_path_factory.mktemp("kit"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(rank: int, port: int, command: list[str], prepare: Prepare) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    prepare(rank)
    sys.exit(main(command))


def start(settings: Any, prepare: Prepare = lambda rank: None) -> list[Any]:
    """Start a stage on two ranks, as torchrun would."""
    out = Path(settings.run.out)
    path = out.with_name(out.name + ".yaml")
    path.write_text(dump_yaml(settings))
    return start_command(
        ["finetune-llm" if hasattr(settings, "llm") else "train", "--config", str(path)], prepare
    )


def start_command(command: list[str], prepare: Prepare = lambda rank: None) -> list[Any]:
    """Start a command of ours on two ranks."""
    port = free_port()
    ranks = [FORK.Process(target=_rank, args=(rank, port, command, prepare)) for rank in range(2)]
    for process in ranks:
        process.start()
    return ranks


def exit_codes(ranks: list[Any], seconds: float = 60.0) -> list[int | None]:
    """Exit statuses; None for a process that was still there."""
    end = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return codes


def sigmoid_stage(kit: Kit, out: Path, **run: Any) -> Any:
    return kit.clip_stage(out, loss={"kind": "sigmoid"}, **run)


def grouped_stage(kit: Kit, out: Path, **run: Any) -> Any:
    """Images that share what they show, on both ranks; two captions an image; two teachers."""
    path = kit.root / "data" / "twins.tar"
    if not path.exists():
        write_set(path, [entry | {"group": f"g{i % 13}"} for i, entry in enumerate(records(40))])
    distill = {"tower": {"mse": 1.0, "cosine": 1.0, "structure": 5.0}}
    more = {
        "data": {"train": [str(path)], "captions": kit.data()["captions"] | {"per_image": 2}},
        "loss": {"distill": distill, "label_smoothing": 0.1},
        "teacher": {"start": True},
        "optim": {"ema": 0.9, "lr": 1e-3, "warmup_steps": 2, "layer_decay": {"vision": 0.7}},
    }
    return kit.clip_stage(out, more, **run)


def masked_stage(kit: Kit, out: Path, **run: Any) -> Any:
    """Images that share what they show, as masked pairs over both ranks."""
    settings = grouped_stage(kit, out, peak_tflops=1.0, **run)
    captions = replace(settings.data.captions, per_image=1)
    return replace(settings, data=replace(settings.data, captions=captions))


@pytest.mark.parametrize(
    ("stage", "micro_batch", "parallel"),
    [
        (Kit.llm_stage, 0, "ddp"),
        (Kit.llm_stage, 3, "ddp"),
        (Kit.clip_stage, 0, "ddp"),
        (Kit.clip_stage, 3, "fsdp"),
        (sigmoid_stage, 3, "ddp"),
        (grouped_stage, 3, "ddp"),
        (masked_stage, 0, "fsdp"),
    ],
)
def test_two_processes_train_like_one(
    kit: Kit, tmp_path: Path, stage: Callable[..., Any], micro_batch: int, parallel: str
) -> None:
    options: dict[str, Any] = {"dropout": 0.0, "steps": 7, "batch_size": 9, "micro_batch": micro_batch}
    one = stage(kit, tmp_path / "one", **options)
    (finetune_llm if hasattr(one, "llm") else train_clip)(one)
    assert exit_codes(start(stage(kit, tmp_path / "two", parallel=parallel, **options))) == [0, 0]
    lines, expected = curve(tmp_path / "two"), curve(tmp_path / "one")
    for line, other in zip(lines, expected, strict=True):
        for name in ("step", "loss", "grad_norm", "lr"):
            if name in other:
                assert line[name] == pytest.approx(other[name], rel=1e-3), (line["step"], name)
    assert_close_weights(newest_tensors(tmp_path / "two"), newest_tensors(tmp_path / "one"))
    assert (tmp_path / "two" / "result" / "DONE").exists()
    exported = [tmp_path / run / "result" / "model.safetensors" for run in ("two", "one")]
    if exported[0].exists():
        assert_close_weights(*(load_file(path) for path in exported))


def assert_close_weights(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name in mine:
        if name.endswith("k_proj.bias"):
            # cancels in the softmax over the keys: its gradient is rounding, which Adam makes large
            continue
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=2e-4, msg=name)


def test_a_sharded_run_goes_on_anywhere(kit: Kit, tmp_path: Path) -> None:
    # two sharded ranks, then one process, then two whole copies: the samples and losses of one undisturbed process
    options: dict[str, Any] = {"dropout": 0.0, "micro_batch": 2, "save_every": 2, "lr": 3e-3}
    # the middle part has another end, which the rate must not depend on
    more = {"optim": {"ema": 0.9, "warmup_steps": 2, "schedule": "constant"}}
    train_clip(kit.clip_stage(tmp_path / "one", more, **options))
    cut = kit.clip_stage(tmp_path / "cut", more, parallel="fsdp", **options)
    assert exit_codes(start(cut, _signal_in_step(signal.SIGUSR1, only=0))) == [0, 0]
    assert checkpoint.latest(tmp_path / "cut") == tmp_path / "cut" / "checkpoints" / "step_00000004"
    train_clip(kit.clip_stage(tmp_path / "cut", more, steps=5, **options))
    shutil.rmtree(tmp_path / "cut" / "result")
    assert exit_codes(start(kit.clip_stage(tmp_path / "cut", more, **options))) == [0, 0]
    lines = [line for line in curve(tmp_path / "cut") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line, other in zip(lines, [o for o in curve(tmp_path / "one") if "loss" in o], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)
    exported = [tmp_path / run / "result" / "model.safetensors" for run in ("cut", "one")]
    assert_close_weights(*(load_file(path) for path in exported))


def test_ranks_see_the_samples_of_one_process_after_any_resume(kit: Kit, tmp_path: Path) -> None:
    def seen(world: World, start: tuple[int, int]) -> list[list[str]]:
        stream = ClipTask(kit.clip_stage(tmp_path / "run", batch_size=10), world).batches(*start)
        return [next(stream)[1].keys for _ in range(5)]

    cpu = torch.device("cpu")
    whole = seen(World(0, 1, cpu), (0, 2))
    # an epoch has four batches: these cross its end
    for size in (2, 3):
        parts = [seen(World(rank, size, cpu), (0, 2)) for rank in range(size)]
        assert [[key for part in parts for key in part[i]] for i in range(5)] == whole


def test_two_processes_embed_images_into_one_store(kit: Kit, tmp_path: Path) -> None:
    save_tiny_clip(tmp_path / "clip")
    options = [f"data.train={kit.data()['train']}", f"model={tmp_path / 'clip'}", "device=cpu", "dtype=fp32"]
    command = ["embed", "images", *options, "views=2", "batch_size=8"]
    assert exit_codes(start_command([*command, f"out={tmp_path / 'two'}"])) == [0, 0]
    assert main([*command, f"out={tmp_path / 'one'}"]) == 0
    one, two = EmbeddingStore.open(tmp_path / "one"), EmbeddingStore.open(tmp_path / "two")
    assert len(one) == len(two) == 80 and two.complete and not list((tmp_path / "two").glob("rank-*"))
    source = open_source(kit.data()["train"])
    addresses = [image_address(source[i].image or b"", view) for i in range(40) for view in range(2)]
    torch.testing.assert_close(two.get(addresses), one.get(addresses), rtol=1e-4, atol=1e-5)


def test_an_overflow_on_one_rank_is_left_out_by_both(kit: Kit, tmp_path: Path) -> None:
    def prepare(rank: int) -> None:
        loss, calls = ClipTask.loss, iter(range(10**6))

        def overflowing(self: ClipTask, outputs: Any) -> Any:
            value, metrics = loss(self, outputs)
            extra = 1e34 * outputs["image"].square().sum() if next(calls) == 2 and rank == 1 else 0.0
            # so small that nothing else overflows at the first scale
            return 1e-3 * value + extra, metrics

        ClipTask.loss = overflowing  # type: ignore[method-assign]

    settings = kit.clip_stage(tmp_path / "run", precision="fp16", parallel="fsdp", steps=5)
    assert exit_codes(start(settings, prepare)) == [0, 0]
    lines = [line for line in curve(tmp_path / "run") if "loss" in line]
    scales = [line["loss_scale"] for line in lines]
    assert [line["grad_norm"] is None for line in lines] == [False, False, True, False, False], scales
    assert scales == [65536.0] * 2 + [32768.0] * 3


def _signal_in_step(number: signal.Signals, only: int) -> Prepare:
    def prepare(rank: int) -> None:
        original, calls = ClipTask.chunks, iter(range(10**6))

        def chunks(self: ClipTask, samples: Any, size: int) -> Any:
            if next(calls) == 3 and rank == only:
                os.kill(os.getpid(), number)
            return original(self, samples, size)

        ClipTask.chunks = chunks  # type: ignore[method-assign]

    return prepare


def test_a_signal_to_one_rank_stops_both_and_one_process_goes_on(kit: Kit, tmp_path: Path) -> None:
    train_clip(kit.clip_stage(tmp_path / "one", dropout=0.0))
    cut = kit.clip_stage(tmp_path / "cut", dropout=0.0, save_every=100)
    assert exit_codes(start(cut, _signal_in_step(signal.SIGTERM, only=1))) == [143, 143]
    newest = checkpoint.latest(tmp_path / "cut")
    assert newest is not None and newest.name == "step_00000004"
    train_clip(cut)
    for line, other in zip(curve(tmp_path / "cut"), curve(tmp_path / "one"), strict=True):
        assert line.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), rel=1e-3)


def _fail(kind: str, only: int) -> Prepare:
    """Let one rank fail at its third batch."""

    def prepare(rank: int) -> None:
        if rank != only:
            return
        batches, chunks, calls = ClipTask.batches, ClipTask.chunks, iter(range(10**6))

        def failing_batches(self: ClipTask, epoch: int, batch: int) -> Any:
            for item in batches(self, epoch, batch):
                if next(calls) == 2:
                    raise DataError("the shard of this rank is gone")
                yield item

        def failing_chunks(self: ClipTask, samples: Any, size: int) -> Any:
            if next(calls) == 2:
                if kind == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("something that nobody expected")
            return chunks(self, samples, size)

        if kind == "data":
            ClipTask.batches = failing_batches  # type: ignore[method-assign]
        else:
            ClipTask.chunks = failing_chunks  # type: ignore[method-assign]

    return prepare


@pytest.mark.parametrize("only", [0, 1])
@pytest.mark.parametrize(("kind", "code"), [("data", 2), ("crash", 1), ("killed", -signal.SIGKILL)])
def test_a_rank_that_fails_takes_the_other_along(
    kit: Kit,
    tmp_path: Path,
    kind: str,
    code: int,
    only: int,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(failures, "_PATIENCE", 0.5)  # a killed rank leaves no note to wait for
    codes = exit_codes(start(kit.clip_stage(tmp_path / "run"), _fail(kind, only)))
    assert codes[only] == code
    # the other one knows why
    assert codes[1 - only] == 2
    shown = capfd.readouterr().err
    assert not (tmp_path / "run" / "result").exists()
    if kind == "data":
        assert "error: the shard of this rank is gone" in shown and "Traceback" not in shown
        assert f"error: rank {only} failed: the shard of this rank is gone. This rank ends too" in shown
    elif kind == "crash":
        assert f"error: rank {only} failed: RuntimeError: something that nobody expected. This rank" in shown
    else:
        assert "error: another rank is gone without a word" in shown


def test_an_error_before_the_first_step_ends_both(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    settings = kit.clip_stage(tmp_path / "run")

    def prepare(rank: int) -> None:
        def groups(self: ClipTask) -> Any:
            raise DataError("only here")

        if rank == 1:
            ClipTask.groups = groups  # type: ignore[method-assign]

    codes = exit_codes(start(settings, prepare))
    assert codes == [2, 2]
    assert "error: rank 1 failed: only here." in capfd.readouterr().err


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_with_different_numbers_of_samples(kit: Kit, tmp_path: Path, parallel: str) -> None:
    # rank 1 loses samples of its half: none, some, and all of them (that batch is skipped by both)
    def prepare(rank: int) -> None:
        batches, calls = ClipTask.batches, iter(range(10**6))

        def fewer(self: ClipTask, epoch: int, batch: int) -> Any:
            for position, samples in batches(self, epoch, batch):
                left = (5, 1, 0, 3)[next(calls) % 4] if rank == 1 else len(samples)
                yield position, samples[:left]

        ClipTask.batches = fewer  # type: ignore[method-assign]

    settings = kit.clip_stage(tmp_path / "run", micro_batch=2, batch_size=10, steps=5, parallel=parallel)
    assert exit_codes(start(settings, prepare)) == [0, 0]
    assert [line["step"] for line in curve(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4, 5]


def test_a_batch_smaller_than_the_ranks_is_refused(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert exit_codes(start(kit.clip_stage(tmp_path / "run", batch_size=1))) == [2, 2]
    assert "the batch of 1 samples is smaller than the 2 ranks" in capfd.readouterr().err


def test_torchrun_is_stopped_and_one_process_goes_on(kit: Kit, tmp_path: Path) -> None:
    settings = kit.clip_stage(tmp_path / "run", steps=5000, save_every=5000, dropout=0.0)
    (tmp_path / "a.yaml").write_text(dump_yaml(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    train = ["-m", "llm2clip", "train", "--config", str(tmp_path / "a.yaml")]
    launcher = subprocess.Popen(
        [*command, str(free_port()), *train],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for((tmp_path / "run" / "metrics.jsonl").exists, 60)
        launcher.terminate()
        assert launcher.wait(60) != 0
    finally:
        launcher.kill()
    newest = checkpoint.latest(tmp_path / "run")
    assert newest is not None
    at = int(newest.name[5:13])
    assert 0 < at < 5000
    train_clip(replace(settings, run=replace(settings.run, steps=at + 2)))
    assert [line["step"] for line in curve(tmp_path / "run") if "loss" in line] == list(range(1, at + 3))
