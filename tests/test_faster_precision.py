"""What `run.precision: auto` takes, by hardware and model; and that the benchmark behind it judges it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import bench_bf16
from llm2clip.training.faster_precision import faster_precision

LINEAR = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=2))
DEPTHWISE = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(4, 4, 5, groups=4))
FROZEN = nn.Sequential(nn.Conv2d(4, 4, 5, groups=4).requires_grad_(False), nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "onednn", "module", "want"),
    [
        (False, False, True, LINEAR, "fp32"),
        (False, True, True, LINEAR, "bf16"),
        (True, True, True, LINEAR, "bf16"),
        (True, True, False, LINEAR, "fp32"),
        (False, True, True, DEPTHWISE, "fp32"),
        (False, True, True, FROZEN, "bf16"),
        (True, True, True, DEPTHWISE, "bf16"),
    ],
)
def test_on_a_cpu(
    amx: bool,
    avx512_bf16: bool,
    onednn: bool,
    module: nn.Module,
    want: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    assert faster_precision(torch.device("cpu"), module) == want


@pytest.mark.parametrize(("units", "want"), [(True, "bf16"), (False, "fp32")])
def test_on_a_gpu(units: bool, want: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return units

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert faster_precision(torch.device("cuda"), DEPTHWISE) == want and asked == [False]
    assert faster_precision(torch.device("mps"), LINEAR) == "fp32"


def test_the_benchmark_measures_both_precisions_and_judges_the_choice() -> None:
    arguments = ["--rows", "64", "--rounds", "1", "--min-seconds", "0", "--no-save", "--device", "cpu"]
    options = bench_bf16.parse(arguments)
    found = list(bench_bf16.workloads(64, "cpu"))
    row = bench_bf16.measure(*found[0], "cpu", options)
    assert 0 < row["error"] < 3e-2 and row["auto"] == faster_precision(torch.device("cpu"), found[0][1])
    assert row["step_bf16_gain"] > 0 and row["forward_bf16_ms"] > 0
    for auto, gain, fault in (
        ("bf16", 1.9, False),
        ("bf16", 0.95, False),
        ("bf16", 0.8, True),
        ("fp32", 0.8, False),
        ("fp32", 1.9, True),
    ):
        assert bench_bf16.costs({"auto": auto, "step_bf16_gain": gain}) is fault
    assert bench_bf16.costs({"auto": "fp32", "not_timed": "wrong result"})
