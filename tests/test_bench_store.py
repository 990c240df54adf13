"""The benchmark of the embedding store: it runs, checks results first, and refuses wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import bench_store
from llm2clip.data.store import EmbeddingStore

TINY = ["--rows", "700", "--dim", "8", "--batch", "50", "--rounds", "2", "--no-save"]


@pytest.mark.parametrize("extra", [["--dtype", "fp16", "int8"], ["--cold"]])
def test_every_part_is_measured(extra: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    bench_store.main([*TINY, *extra, "--folder", str(tmp_path)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    reads = ["raw", "raw_fp32", "read_into", "get_into", "read"]
    for name in ("build", "verify", "open", *(f"{r}, cold" if "--cold" in extra else r for r in reads)):
        assert sum(f"'provider': '{name}'" in line for line in lines) == (1 if "--cold" in extra else 2)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = EmbeddingStore.read

    def wrong(self: EmbeddingStore, rows: Any, *, out: torch.Tensor | None = None) -> torch.Tensor:
        return right(self, rows, out=out) + 1

    monkeypatch.setattr(EmbeddingStore, "read", wrong)
    with pytest.raises(SystemExit, match="our own result is wrong"):
        bench_store.main(TINY)
