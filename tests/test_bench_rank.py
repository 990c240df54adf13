"""The benchmark of the ranks: its peers agree on what a rank is, and a wrong result of ours is not timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_rank
from benchmarks.providers import Provider
from llm2clip_kernels import similarity_rank

TINY = ["--n", "40", "--d", "8", "--rounds", "2", "--device", "cpu", "--no-memory", "--no-save"]


def test_every_provider_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    bench_rank.main([*TINY, "--kind", "trained"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert {line.split("'")[3] for line in lines} == set(bench_rank.PROVIDERS.providers)
    assert all("'wrong': 0.0" in line and "'speedup_over_whole'" in line for line in lines)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def make() -> Any:
        def ranks(x: Tensor, y: Tensor) -> Any:
            row, col = similarity_rank(x, y)
            return row, torch.cat([col[:-1], col[-1:] + 1])

        return ranks

    monkeypatch.setitem(bench_rank.PROVIDERS.providers, "rank", Provider("rank", make, ours=True))
    with pytest.raises(SystemExit, match="our own result is wrong"):
        bench_rank.main([*TINY, "--providers", "rank_compare", "rank"])
    assert "'provider': 'rank'," not in capsys.readouterr().out
