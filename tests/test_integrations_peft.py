"""fuse_lora against plain peft: outputs, gradients, files, and every state that peft lets a layer be in."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.helpers import disable_input_dtype_casting  # noqa: E402
from peft.tuners import lora  # noqa: E402

import llm2clip.integrations.peft as integration  # noqa: E402
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

BF16 = torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"bias": "lora_only"}], ids=str)
def test_equals_peft(options: dict[str, Any], calls: list[str]) -> None:
    model = block(**options)
    want = results(model, IDS)
    keys = list(model.state_dict())
    handle = fuse_lora(model)
    assert (handle.fused, handle.skipped) == (2, {})
    assert_same(results(model, IDS), want)
    assert calls == ["lora_linear"] * 2 and list(model.state_dict()) == keys
    handle.undo()
    handle.undo()
    assert type(model.base_model.model.up) is lora.Linear
    assert "_llm2clip_notes" not in model.base_model.model.up.__dict__
    again = results(model, IDS)
    assert torch.equal(again[0], want[0]) and len(calls) == 2


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_whole_models(family: str, checkpointing: bool, autocast: bool) -> None:
    config = LoraConfig(r=4, target_modules="all-linear")
    model = randomised(get_peft_model(tiny_model(family), config)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    ids = torch.randint(3, 300, (3, 11))
    exact = results(model, input_ids=ids)
    context = torch.autocast("cpu", BF16) if autocast else nullcontext()
    with context:
        want = results(model, input_ids=ids)
        with fuse_lora(model) as handle:
            assert handle.fused == len([m for m in model.modules() if isinstance(m, FusedLoraLinear)]) > 0
            got = results(model, input_ids=ids)
    if not autocast:
        assert_same(got, want, 1e-4)
    # bf16 rounds after every layer, so both are compared with fp32
    for name, true in exact[1].items():
        assert (got[1][name] - true).norm() <= 2 * (want[1][name] - true).norm() + 1e-4 * true.norm(), name
    assert got[0].dtype == want[0].dtype
    assert (got[0] - exact[0]).norm() <= 2 * (want[0] - exact[0]).norm() + 1e-4 * exact[0].norm()
    assert not any(isinstance(m, FusedLoraLinear) for m in model.modules())


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_half_precision_base_with_fp32_adapters(dtype: torch.dtype, calls: list[str]) -> None:
    """peft keeps adapters of a half-precision model in fp32: their gradients are fp32-exact with both."""
    model = get_peft_model(nn.Sequential(nn.Linear(40, 30)).to(dtype), LoraConfig(r=4, target_modules=["0"]))
    layer: Any = randomised(model).base_model.model[0]
    assert layer.lora_A["default"].weight.dtype == torch.float32
    x = torch.randn(50, 40).to(dtype)
    want = results(layer, x)
    fuse_lora(model)
    got = results(layer, x)
    assert calls == ["lora_linear"]
    for name in want[1]:
        assert torch.allclose(got[1][name], want[1][name], rtol=1e-4, atol=1e-3), name
    assert (got[0].float() - want[0].float()).norm() <= 2 * torch.finfo(dtype).eps * want[0].float().norm()


def test_save_and_load(tmp_path: Path) -> None:
    model = block()
    want = results(model, IDS)
    model.save_pretrained(tmp_path / "plain")
    fuse_lora(model)
    model.save_pretrained(tmp_path / "fused")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "fused" / name).read_bytes()
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(Block(), tmp_path / "fused", is_trainable=True)
    assert_same(results(loaded, IDS), want)
    fuse_lora(loaded)
    assert_same(results(loaded, IDS), want)


def test_merge_unmerge_and_unload(calls: list[str]) -> None:
    model = block()
    with torch.no_grad():
        want = model(IDS)
        fuse_lora(model)
        model.merge_adapter()
        assert torch.allclose(model(IDS), want, atol=1e-5) and not calls
        model.unmerge_adapter()
        assert torch.allclose(model(IDS), want, atol=1e-5) and len(calls) == 2
        plain = model.merge_and_unload()
        assert torch.allclose(plain(IDS), want, atol=1e-5) and type(plain.up) is nn.Linear


def test_several_adapters(calls: list[str]) -> None:
    model = block()
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=9, target_modules=["up"]))
    randomised(model)
    twin = copy.deepcopy(model)
    fuse_lora(model)

    def both() -> tuple[Any, Any, list[str]]:
        calls.clear()
        return results(model, IDS), results(twin, IDS), list(calls)

    for name in ("default", "other"):
        model.set_adapter(name)
        twin.set_adapter(name)
        got, want, used = both()
        assert_same(got, want)
        assert used == ["lora_linear"] * (2 if name == "default" else 1), "down has no adapter of that name"
    for m in (model, twin):
        m.base_model.set_adapter(["default", "other"])
    got, want, used = both()
    assert_same(got, want)
    assert used == ["lora_linear"], "up has two active adapters, down one"
    for m in (model, twin):
        m.delete_adapter("other")
        m.set_adapter("default")
    got, want, used = both()
    assert_same(got, want)
    assert used == ["lora_linear"] * 2


def test_disabled_adapters(calls: list[str]) -> None:
    model = block()
    fuse_lora(model)
    with torch.no_grad():
        torch.manual_seed(1)
        bare = Block()
        with model.disable_adapter():
            assert torch.equal(model(IDS), bare(IDS)) and not calls
        assert not torch.allclose(model(IDS), bare(IDS)) and len(calls) == 2


def test_mixed_batches(calls: list[str]) -> None:
    model = block().eval()
    names = ["default", "__base__", "default", "default", "__base__"]
    with torch.no_grad():
        want = model(IDS, adapter_names=names)
        fuse_lora(model)
        assert torch.equal(model(IDS, adapter_names=names), want) and not calls


def test_other_layers_and_variants_are_left_alone(calls: list[str], caplog: pytest.LogCaptureFixture) -> None:
    model = block(("embed", "conv", "up"))
    want = results(model, IDS)
    with caplog.at_level(logging.INFO):
        handle = fuse_lora(model)
    assert handle.fused == 1 and handle.skipped == {"Embedding layer": 1, "Conv1d layer": 1}
    assert "1 LoRA layers fused" in caplog.text and "1 (Conv1d layer)" in caplog.text
    assert_same(results(model, IDS), want)
    assert fuse_lora(model).skipped["fused already"] == 1
    dora = block(use_dora=True)
    want = results(dora, IDS)
    handle = fuse_lora(dora)
    assert handle.fused == 0 and handle.skipped == {"DoraLinearVariant layer": 2}
    # DoRA beside a plain adapter: fused where the plain one is active
    dora.add_adapter("plain", LoraConfig(r=2, target_modules=["up", "down"]))
    randomised(dora)
    twin = copy.deepcopy(dora)
    assert fuse_lora(dora).fused == 2
    calls.clear()
    for name, fused in (("default", 0), ("plain", 2)):
        dora.set_adapter(name)
        twin.set_adapter(name)
        assert_same(results(dora, IDS), results(twin, IDS))
        assert len(calls) == fused


def test_few_rows_are_left_to_peft(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """45 rows of 12 + 18 numbers: below the bound, and above an eighth of it with dropout."""
    monkeypatch.setattr(integration, "_FEW", 2400)
    model = block(("up",), lora_dropout=0.1)
    want = results(model.eval(), IDS)
    fuse_lora(model)
    assert_same(results(model, IDS), want, 0.0)
    assert not calls, "no dropout in evaluation"
    model.train()(IDS)
    assert calls == ["lora_linear"]
    model(IDS[:1])
    assert len(calls) == 1
    monkeypatch.setattr(integration, "_FEW", 1000)
    assert_same(results(model.eval(), IDS), want)
    assert len(calls) == 2


def test_layers_whose_forward_is_replaced_are_not_counted_as_fused(calls: list[str]) -> None:
    model = block()
    want = results(model, IDS)
    layer = model.base_model.model.up
    layer.forward = layer.forward  # as accelerate does, around a call of the old one
    handle = fuse_lora(model)
    assert handle.fused == 1 and handle.skipped == {"its forward is replaced (accelerate's hooks)": 1}
    assert_same(results(model, IDS), want)
    assert calls == ["lora_linear"], "down"


def test_says_a_reason_once(caplog: pytest.LogCaptureFixture) -> None:
    model = block()
    fuse_lora(model)
    with caplog.at_level(logging.INFO), model.disable_adapter():
        model(IDS)
        model(IDS)
    assert caplog.text.count("adapters are disabled") == 1
    with pytest.raises(ValueError, match="no LoRA layer"):
        fuse_lora(Block())


def test_lora_bias_and_disabled_casting_and_hooks(calls: list[str]) -> None:
    model = block(lora_bias=True)
    want = results(model, IDS)
    fuse_lora(model)
    assert_same(results(model, IDS), want)
    assert not calls
    model = block()
    fuse_lora(model)
    seen: list[tuple[int, ...]] = []
    hook = model.base_model.model.up.lora_A["default"].register_forward_hook(
        lambda m, i, o: seen.append(o.shape)
    )
    model(IDS)
    assert seen == [(5, 9, 4)] and calls == ["lora_linear"], "only down"
    hook.remove()
    model.base_model.model.up.base_layer.register_forward_hook(lambda m, i, o: o * 0)
    calls.clear()
    with_hook = model(IDS)
    assert calls == ["lora_add", "lora_linear"] and not torch.allclose(with_hook, block()(IDS))
    model = block()
    fuse_lora(model)
    kept: list[tuple[Tensor, Tensor]] = []
    model.base_model.model.down.base_layer.register_forward_hook(lambda m, i, o: kept.append((o, o.clone())))
    model(IDS)
    assert torch.equal(*kept[0]), "what a hook keeps of the base layer is not written to"
    half = get_peft_model(nn.Sequential(nn.Linear(8, 6)).to(BF16), LoraConfig(r=2, target_modules=["0"]))
    fuse_lora(half)
    calls.clear()
    with disable_input_dtype_casting(half), pytest.raises(RuntimeError):
        half(torch.randn(3, 8).to(BF16))  # as plain peft, whose matrices then do not fit
    assert not calls


class Int8Linear(nn.Linear):
    """A base layer with its own product: weights of 8 bits, one scale a row."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.detach().abs().amax(1, keepdim=True) / 127
        return nn.functional.linear(x, (self.weight / scale).round() * scale, self.bias)


def test_a_base_layer_with_its_own_product(calls: list[str]) -> None:
    base = nn.Sequential(Int8Linear(16, 12), nn.Tanh(), nn.Linear(12, 5))
    model = randomised(get_peft_model(base, LoraConfig(r=3, target_modules=["0", "2"])))
    x = torch.randn(7, 16, requires_grad=True)
    want = results(model, x)
    dx = x.grad
    x.grad = None
    fuse_lora(model)
    assert_same(results(model, x), want)
    assert calls == ["lora_add", "lora_linear"]
    assert dx is not None and x.grad is not None and torch.allclose(x.grad, dx, atol=1e-5)


def test_dropout_has_peft_s_distribution_and_follows_the_seed() -> None:
    model = block(lora_dropout=0.3).train()
    evaluated = copy.deepcopy(model).eval()
    fuse_lora(model)
    layer, plain = model.base_model.model.up, evaluated.base_model.model.up
    x = torch.randn(1, 12).expand(20_000, 12)
    with torch.no_grad():
        base, full = plain.base_layer(x[:1]), plain(x[:1])
        torch.manual_seed(3)
        first = layer(x)
        torch.manual_seed(3)
        assert torch.equal(layer(x), first) and not torch.equal(layer(x), first)
        plain.train()
        reference = plain(x)
        # mean and spread of the update over many masks: the mean is that without dropout
        for statistic in (lambda t: (t - base).mean(0), lambda t: (t - base).std(0)):
            assert torch.allclose(statistic(first), statistic(reference), atol=0.05, rtol=0.05)
        assert torch.allclose((first - base).mean(0), (full - base)[0], atol=0.05)
        model.eval()
        assert torch.allclose(layer(x[:1]), full, atol=1e-5)


def test_deepcopy_and_pickle() -> None:
    model = block()
    want = results(model, IDS)
    handle = fuse_lora(model)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    handle.undo()
    for other in (copied, pickled, saved):
        assert type(other.base_model.model.up) is FusedLoraLinear
        assert_same(results(other, IDS), want)
    assert type(model.base_model.model.up) is lora.Linear
    with fuse_lora(model), pytest.raises(RuntimeError, match="inside"):
        raise RuntimeError("inside")
    assert type(model.base_model.model.up) is lora.Linear


def test_compiles_whole() -> None:
    model = block()
    want = results(model, IDS)
    fuse_lora(model)
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    got = compiled(IDS)
    (got * torch.linspace(-1, 1, got.numel()).view(got.shape)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert_same((got.detach(), gradients), want)


def test_trainer_learns_along_the_same_curve(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from tests.tiny_models import tiny_config

    def losses(fused: bool) -> list[float]:
        torch.manual_seed(3)
        base = AutoModelForCausalLM.from_config(tiny_config("llama"))
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        if fused:
            fuse_lora(model)
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, max_steps=6, logging_steps=1, learning_rate=1e-2,
            gradient_checkpointing=True, save_strategy="no", report_to=[], seed=1, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        ids = torch.arange(20, 32)
        data = [{"input_ids": ids, "labels": ids}] * 24
        trainer = Trainer(model, arguments, train_dataset=data)  # type: ignore[arg-type]
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    plain, fused = losses(False), losses(True)
    assert len(plain) == 6 and plain[-1] < plain[0]
    assert fused == pytest.approx(plain, rel=1e-4)
