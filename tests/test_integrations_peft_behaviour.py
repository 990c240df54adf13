"""What peft does with adapters, done to fused layers: the same adapters, the same outputs and gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners import lora  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from llm2clip.integrations.peft import FusedLoraLinear, fuse_lora  # noqa: E402
from tests.peft_kit import (  # noqa: E402, F401
    IDS,
    Block,
    assert_same,
    block,
    both_ways,
    calls_fixture,
    randomised,
    results,
)
from tests.tiny_models import tiny_model  # noqa: E402

TOKENS = torch.randint(3, 300, (3, 11), generator=torch.Generator().manual_seed(0))


def assert_fused_equals(model: Any, *args: Any, layers: int, calls: list[str], **inputs: Any) -> None:
    """The model fused and not; `layers` fused calls in one forward."""
    want = results(model, *args, **inputs)
    assert not calls
    with fuse_lora(model):
        got = results(model, *args, **inputs)
    assert_same(got, want, 1e-4)
    assert calls == ["lora_linear"] * layers
    calls.clear()


@pytest.mark.parametrize("combination", ["linear", "cat", "svd", "ties", "dare_linear"])
def test_weighted_adapters(combination: str, calls: list[str]) -> None:
    """Combining adapters reads and writes A and B; a fused model must come out as peft's own."""
    model = block()
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=9, target_modules=["up", "down"]))
    randomised(model)
    twin = copy.deepcopy(model)
    fuse_lora(model)
    density = {"density": 0.6} if combination in ("ties", "dare_linear") else {}
    for m in (model, twin):
        torch.manual_seed(5)
        m.add_weighted_adapter(
            ["default", "other"], [0.7, 0.4], "mixed", combination_type=combination, **density
        )
        m.set_adapter("mixed")
    rank = model.base_model.model.up.lora_A["mixed"].weight.shape[0]
    assert rank == (8 if combination == "cat" else 4)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name)), name
    assert_same(results(model, IDS), results(twin, IDS))
    assert calls == ["lora_linear"] * 2
    for m in (model, twin):
        m.delete_adapter("mixed")
        m.set_adapter("other")
    calls.clear()
    assert_same(results(model, IDS), results(twin, IDS))
    assert calls == ["lora_linear"] * 2


def test_modules_to_save_train_beside_fused_layers(calls: list[str], tmp_path: Path) -> None:
    model = block(("up",), modules_to_save=["down"])
    want = results(model, IDS)
    assert any("modules_to_save" in name for name in want[1])
    assert_fused_equals(model, IDS, layers=1, calls=calls)
    with torch.no_grad():
        model.base_model.model.down.modules_to_save["default"].weight.add_(0.5)
    fuse_lora(model)
    want = results(model, IDS)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    assert_same(results(PeftModel.from_pretrained(Block(), tmp_path, is_trainable=True), IDS), want)


def test_ranks_and_scalings_by_layer(calls: list[str]) -> None:
    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        rank_pattern={"q_proj": 1, "down_proj": 40},
        alpha_pattern={"v_proj": 64},
    )
    model = randomised(get_peft_model(tiny_model("llama"), config))
    ranks = {m.lora_A["default"].weight.shape[0] for m in model.modules() if isinstance(m, lora.Linear)}
    assert ranks == {1, 4, 40}
    assert_fused_equals(model, input_ids=TOKENS, layers=21, calls=calls)


def test_replicated_layers_share_a_base_and_have_adapters_of_their_own(calls: list[str]) -> None:
    from transformers import AutoModelForCausalLM

    from tests.tiny_models import tiny_config

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny_config("llama"))
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], layer_replication=[(0, 2), (1, 3)])
    model = randomised(get_peft_model(base, config)).eval()
    layers = model.base_model.model.model.layers
    assert len(layers) == 4 and layers[1].mlp.up_proj.weight is layers[2].mlp.up_proj.weight

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        logits = model(input_ids=TOKENS).logits
        (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
        return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want = run()
    assert len(want[1]) == 4 * 2 * 2 and not calls
    with fuse_lora(model) as handle:
        assert handle.fused == 8
        assert_same(run(), want, 1e-4)
    assert calls == ["lora_linear"] * 8


@pytest.mark.parametrize("initial", ["gaussian", "pissa", "olora", "orthogonal", False], ids=str)
def test_other_initial_values(initial: Any, calls: list[str]) -> None:
    """Some of them change the base weight by what the adapter adds."""
    torch.manual_seed(1)
    model = get_peft_model(Block(), LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=initial))
    assert_fused_equals(model, IDS, layers=2, calls=calls)


def test_transposed_base_weights_make_their_own_product(calls: list[str]) -> None:
    """GPT-2's linear layers keep their weights transposed."""
    torch.manual_seed(0)
    base = nn.Sequential(Conv1D(24, 16), nn.Tanh(), nn.Linear(24, 5))
    model = randomised(get_peft_model(base, LoraConfig(r=3, target_modules=["0", "2"], fan_in_fan_out=True)))
    x = torch.randn(7, 16)
    want = results(model, x)
    fuse_lora(model)
    assert_same(results(model, x), want)
    assert calls == ["lora_add", "lora_linear"]
    with torch.no_grad():
        model.merge_adapter()
        assert torch.allclose(model(x), want[0], atol=1e-5)
        model.unmerge_adapter()
        assert torch.allclose(model(x), want[0], atol=1e-5)


def test_an_adapter_loaded_into_a_fused_model_is_used(tmp_path: Path, calls: list[str]) -> None:
    saved = block()
    want = results(saved, IDS)
    saved.save_pretrained(tmp_path)
    torch.manual_seed(1)
    model = get_peft_model(Block(), LoraConfig(r=2, target_modules=["up"]))
    fuse_lora(model)
    model.load_adapter(tmp_path, "second", is_trainable=True)
    # peft makes a new layer for `down`, which had none: its forward is peft's own until it is fused too
    assert type(model.base_model.model.down) is lora.Linear
    assert type(model.base_model.model.up) is FusedLoraLinear
    model.set_adapter("second")
    got = results(model, IDS)
    assert torch.allclose(got[0], want[0], atol=1e-5) and calls == ["lora_linear"]
    again = fuse_lora(model)
    assert again.fused == 1 and again.skipped == {"fused already": 1}
    calls.clear()
    assert torch.allclose(results(model, IDS)[0], want[0], atol=1e-5) and calls == ["lora_linear"] * 2


def test_unload_gives_the_base_model_back(calls: list[str]) -> None:
    model = block()
    fuse_lora(model)
    torch.manual_seed(1)
    bare = Block()
    plain = model.unload()
    with torch.no_grad():
        assert torch.equal(plain(IDS), bare(IDS)) and not calls
    assert type(plain.up) is nn.Linear and type(plain.down) is nn.Linear


def test_inference_mode_and_frozen_adapters(calls: list[str]) -> None:
    model = block()
    with torch.no_grad():
        want = model(IDS)
    fuse_lora(model)
    with torch.inference_mode():
        assert torch.allclose(model(IDS), want, atol=1e-5)
    model.requires_grad_(False)
    y = model(IDS)
    assert not y.requires_grad and torch.allclose(y, want, atol=1e-5)
    assert calls == ["lora_linear"] * 4
