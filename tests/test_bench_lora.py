"""The LoRA benchmark: every provider is right on every kind of inputs, and a wrong one gets no speed."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks import bench_lora
from benchmarks.bench_lora import ERROR_LIMIT, KINDS, errors, measure, parse
from benchmarks.lora_peers import PROVIDERS, SCALING, Case, Layer, split_graph
from benchmarks.providers import Provider

pytest.importorskip("peft")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["peft", "unsloth", "lorafusion", "ours"])
def test_every_provider_computes_the_same_layer(name: str, kind: str) -> None:
    if kind == "adapters" and name in ("unsloth", "lorafusion"):
        pytest.skip("these formulations have one dtype")
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
    half = Provider("ours", lambda layer: lambda x: PROVIDERS_OURS(layer)(x) * 0.5, ours=True)
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


def test_the_summary_names_where_peft_is_faster() -> None:
    row = {
        "inputs": "float32",
        "t": 64,
        "k": 8,
        "n": 4,
        "r": 2,
        "step_ms": 1.0,
        "forward_peft_over_ours": 1.2,
    }
    text = bench_lora.summary([row | {"step_peft_over_ours": 0.995}, row | {"step_peft_over_ours": 0.9}])
    assert text.endswith("more than 2%:\n  float32 T=64 8x4 R=2 step: 0.9")
    assert bench_lora.summary([row]).endswith("none")


def test_the_split_graph_has_dropout_s_gradients() -> None:
    """Under one mask, which the seed fixes: against the same formula in torch's own ops."""
    layer = Layer(Case(40, 24, 18, 4, "float32", dropout=0.3))
    torch.manual_seed(0)
    got = layer.step(split_graph(layer))

    def composed(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        dropped = torch.native_dropout(x, 0.3, True)[0]
        return x @ layer.weight.t() + SCALING * dropped @ layer.a.t() @ layer.b.t()

    for g, w in zip(got, [t.clone() for t in layer.step(composed)], strict=True):
        assert torch.allclose(g, w, atol=1e-4)
