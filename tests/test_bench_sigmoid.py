"""The benchmark of the sigmoid loss: it measures right results, and refuses to time wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import bench_sigmoid
from benchmarks.contrastive import Case
from benchmarks.providers import Provider
from llm2clip_kernels import sigmoid_loss

TINY = ["--n", "40", "--d", "8", "--rounds", "2", "--device", "cpu", "--no-memory", "--no-save"]


def test_the_truth_is_the_definition() -> None:
    leaves = bench_sigmoid.leaves_of(Case(30, 8))
    wide = [t.detach().double().requires_grad_() for t in leaves]
    loss = bench_sigmoid.eager_loss(*[t.double() for t in wide])  # type: ignore[arg-type]
    loss.backward()
    # eager takes the log-sigmoid in fp32, whatever comes
    for got, want in zip(bench_sigmoid.exact(leaves, rows=7), [loss, *(t.grad for t in wide)], strict=True):
        assert torch.allclose(got, want.double(), rtol=1e-5, atol=1e-7)  # type: ignore[union-attr]


def test_every_provider_that_runs_here_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    bench_sigmoid.main([*TINY, "--providers", "eager", "open_clip", "ours", "rows", "value"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    measured = {line.split("'")[3] for line in lines}
    assert {"mm", "mm_out", "eager", "ours", "rows", "value"} <= measured
    assert all("'passes'" in line for line in lines)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def make(case: Case) -> Any:
        def step(leaves: list[torch.Tensor]) -> Any:
            loss = sigmoid_loss(leaves[0], leaves[1], leaves[2], leaves[3] + 0.1)
            return [loss.detach(), None, None, None, None]

        return step

    monkeypatch.setitem(bench_sigmoid.PROVIDERS.providers, "ours", Provider("ours", make, ours=True))
    with pytest.raises(SystemExit, match="our own result is wrong"):
        bench_sigmoid.main([*TINY, "--providers", "eager", "ours"])
    assert "'provider': 'ours'" not in capsys.readouterr().out
