"""fuse_lora on bitsandbytes' 8-bit and 4-bit layers: equal to peft, whose base product both share."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes", reason="8-bit and 4-bit layers need bitsandbytes")

import bitsandbytes as bnb  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training  # noqa: E402
from peft.tuners import lora  # noqa: E402

import llm2clip.integrations.peft as integration  # noqa: E402
from llm2clip.integrations.peft import fuse_lora  # noqa: E402
from llm2clip_kernels.lora_linear import op  # noqa: E402
from tests.peft_kit import both_ways, randomised  # noqa: E402, F401
from tests.tiny_models import tiny_model  # noqa: E402

BF16 = torch.bfloat16
KINDS = ["8bit", "nf4", "fp4 double"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, ...]]:
    """dtypes of y, x and A of every fused call; `lora_linear` must not be used."""
    made: list[tuple[torch.dtype, ...]] = []
    real = integration.lora_add

    def spy(y: Tensor, x: Tensor, a: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made.append((y.dtype, x.dtype, a.dtype))
        return real(y, x, a, *args, **kwargs)

    monkeypatch.setattr(integration, "lora_add", spy)
    monkeypatch.setattr(integration, "lora_linear", None)
    return made


class Block(nn.Module):
    """Two quantised layers, the first with a bias. Rows of 64, the smallest block that is quantised by itself."""

    def __init__(self, kind: str, compute: torch.dtype) -> None:
        super().__init__()
        self.up, self.down = (self.quantised(kind, compute, *shape) for shape in ((64, 128), (128, 64)))

    @staticmethod
    def quantised(kind: str, compute: torch.dtype, inputs: int, outputs: int) -> nn.Module:
        plain = nn.Linear(inputs, outputs, bias=inputs == 64)
        options: dict[str, Any] = {"bias": inputs == 64}
        if kind == "8bit":
            layer = bnb.nn.Linear8bitLt(inputs, outputs, has_fp16_weights=False, **options)
        else:
            options |= {"quant_type": kind[:3], "compress_statistics": "double" in kind}
            layer = bnb.nn.Linear4bit(inputs, outputs, compute_dtype=compute, **options)
        layer.load_state_dict(plain.state_dict())
        return layer.requires_grad_(False).to("cpu")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def block(kind: str, compute: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(1)
    base: Any = Block(kind, compute)
    # as transformers marks what it has quantised; peft makes its quantised layers only then
    setattr(base, "is_loaded_in_8bit" if kind == "8bit" else "is_loaded_in_4bit", True)
    return randomised(
        get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["up", "down"], **options))
    )


def results(model: Any, x: Tensor) -> dict[str, Tensor]:
    """The output, the gradient of x and those of the adapters."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = model(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    assert x.grad is not None
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **gradients}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys() and len(want) == 2 + 4
    for name in want:
        assert got[name].dtype == want[name].dtype
        difference = (got[name].float() - want[name].float()).norm() / want[name].float().norm()
        assert difference <= tolerance, (name, difference)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", ["fp32", "bf16", "autocast"])
def test_equals_peft(kind: str, inputs: str, calls: list[tuple[torch.dtype, ...]]) -> None:
    dtype = BF16 if inputs == "bf16" else torch.float32
    model = block(kind, BF16 if inputs != "fp32" else torch.float32)
    x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", BF16) if inputs == "autocast" else nullcontext():
        want = results(model, x)
        handle = fuse_lora(model)
        assert (handle.fused, handle.skipped) == (2, {})
        assert isinstance(model.base_model.model.up, lora.Linear8bitLt if kind == "8bit" else lora.Linear4bit)
        got = results(model, x)
    # the base product is the same; peft rounds the update to bf16 before it is added, and once more after it
    assert_same(got, want, 1e-5 if inputs == "fp32" else 2e-2)
    assert len(calls) == 2 and calls[0][1] == dtype
    handle.undo()
    assert type(model.base_model.model.up) in (lora.Linear8bitLt, lora.Linear4bit)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_after_training(kind: str, calls: list[tuple[torch.dtype, ...]]) -> None:
    """For inference on a CPU bitsandbytes lays weights out anew, and takes another product."""
    plain = block(kind)
    x = torch.randn(9, 64)
    with torch.no_grad():
        want = plain.eval()(x)
    model = block(kind)
    fuse_lora(model)
    results(model.train(), x)
    with torch.no_grad():
        got = model.eval()(x)
    assert (got - want).norm() <= 1e-5 * want.norm() and len(calls) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_states_that_are_left_to_peft(kind: str, calls: list[tuple[torch.dtype, ...]]) -> None:
    model = block(kind)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up"]))
    randomised(model)
    twin = copy.deepcopy(model)
    fuse_lora(model)
    x = torch.randn(5, 64)
    with torch.no_grad():
        with model.disable_adapter(), twin.disable_adapter():
            assert torch.equal(model(x), twin(x)) and not calls
        for m in (model, twin):
            m.base_model.set_adapter(["default", "other"])
        assert (model(x) - twin(x)).norm() <= 1e-5 * twin(x).norm()
        assert len(calls) == 1, "up has two active adapters"
        calls.clear()
        for m in (model, twin):
            m.set_adapter("other")
        assert (model(x) - twin(x)).norm() <= 1e-5 * twin(x).norm()
        assert len(calls) == 1, "down has no adapter of that name"
        calls.clear()
        for m in (model, twin):
            m.merge_adapter()
        assert torch.equal(model(x), twin(x)) and not calls
        for m in (model, twin):
            m.unmerge_adapter()
        assert (model(x) - twin(x)).norm() <= 1e-5 * twin(x).norm() and len(calls) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_less_is_kept_for_the_backward(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a bf16 model with fp32 adapters peft keeps an fp32 copy of x and the update; with dropout a mask too."""
    monkeypatch.setattr(op, "_SMALL", 0)
    model = block(kind, BF16, lora_dropout=0.1).train()
    x = torch.randn(512, 64).to(BF16)

    def kept() -> int:
        seen: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(x)
        assert y.requires_grad
        return sum(seen.values())

    plain = kept()
    with fuse_lora(model):
        assert kept() <= 0.7 * plain
    assert kept() == plain


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model_trains_along_the_same_curve_and_saves_plain_files(
    bits: int, tmp_path: Path
) -> None:
    from transformers import AutoModel, BitsAndBytesConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    tiny_model("llama", **sizes).save_pretrained(tmp_path / "base")
    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=BF16)
    )
    ids = torch.randint(3, 300, (4, 11), generator=torch.Generator().manual_seed(0))

    def base() -> Any:
        return AutoModel.from_pretrained(
            tmp_path / "base", quantization_config=settings, device_map="cpu", dtype=torch.float32
        )

    def train(fused: bool) -> list[float]:
        torch.manual_seed(3)
        prepared = prepare_model_for_kbit_training(
            base(), gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        model: Any = get_peft_model(prepared, LoraConfig(r=4, target_modules="all-linear"))
        if fused:
            assert fuse_lora(model).fused == 3 * 7
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(4):
            states = model.train()(input_ids=ids).last_hidden_state.float()
            loss = (states - torch.linspace(-1, 1, 64)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        model.save_pretrained(tmp_path / str(fused))
        return losses

    plain, fused = train(False), train(True)
    assert plain[-1] < 0.98 * plain[0]
    assert fused == pytest.approx(plain, rel=1e-2)
    names = [sorted(f.name for f in (tmp_path / name).iterdir()) for name in ("True", "False")]
    assert names[0] == names[1]
    # and peft reads it back without us
    loaded = PeftModel.from_pretrained(base(), tmp_path / "True").eval()
    with torch.no_grad():
        states = loaded(input_ids=ids).last_hidden_state.float()
    assert (states - torch.linspace(-1, 1, 64)).square().mean().item() < plain[0]
