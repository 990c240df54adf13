"""The LoRA benchmark: every provider is right on every kind of inputs, and a wrong one gets no speed."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks import bench_lora
from benchmarks.bench_lora import ERROR_LIMIT, KINDS, PROVIDERS, Case, errors, measure, parse

pytest.importorskip("peft")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["peft", "unsloth", "ours"])
def test_every_provider_computes_the_same_layer(name: str, kind: str) -> None:
    if (name, kind) == ("unsloth", "adapters"):
        pytest.skip("unsloth's formulation has one dtype")
    error = errors(name, Case(40, 24, 18, 4, kind))
    # an error of exactly zero would mean that the provider was compared with itself
    assert 0 < error <= ERROR_LIMIT[kind]


def options(*arguments: str) -> argparse.Namespace:
    return parse(["--no-memory", "--rounds", "1", "--min-seconds", "0", "--t", "40", *arguments])


def test_a_row_has_our_times_and_everyone_else_s_over_ours() -> None:
    row = measure(Case(40, 24, 18, 4, "float32"), ["base", "peft", "unsloth", "ours"], options())
    for what in ("forward", "step"):
        assert row[f"{what}_ms"] > 0
        assert all(row[f"{what}_{name}_over_ours"] > 0 for name in ("base", "peft", "unsloth"))
    assert row["error_ours"] <= 1e-5
    row = measure(Case(40, 24, 18, 4, "float32", dropout=0.1), ["peft", "unsloth", "ours"], options())
    assert row["dropout"] == 0.1 and "step_unsloth_over_ours" not in row


def test_the_speed_of_a_wrong_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    half = bench_lora.Provider("ours", lambda layer: lambda x: PROVIDERS_OURS(layer)(x) * 0.5, ours=True)
    PROVIDERS_OURS = PROVIDERS["ours"].make
    monkeypatch.setitem(PROVIDERS.providers, "ours", half)
    arguments = [
        "--shapes",
        "24x18",
        "--r",
        "4",
        "--inputs",
        "float32",
        "--providers",
        "peft",
        "ours",
        "--no-save",
    ]
    with pytest.raises(SystemExit, match="our own result is wrong"):
        bench_lora.main(["--no-memory", "--rounds", "1", "--min-seconds", "0", "--t", "40", *arguments])


def test_memory_is_that_of_one_step() -> None:
    run = bench_lora.memory_setup("ours", Case(40, 24, 18, 4, "autocast"))
    assert [t.dtype for t in run()] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
