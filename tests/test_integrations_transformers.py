"""fuse_clip_loss against the own loss of every dual encoder of transformers: values, gradients, calls."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="transformers is not installed")

from llm2clip.integrations.dual_encoders import FAMILIES  # noqa: E402
from llm2clip.integrations.transformers import fuse_clip_loss  # noqa: E402
from tests.tiny_dual_encoders import CONFIGURATIONS, dual_encoder, inputs  # noqa: E402


def step(model: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """The output with its loss, and the gradients by name."""
    model.zero_grad()
    torch.manual_seed(7)
    output = model(**given, return_loss=True)
    (1.7 * output.loss).backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys() and want
    largest = max(true.abs().max().item() for true in want.values())
    for name, true in want.items():
        torch.testing.assert_close(got[name], true, rtol=2e-3, atol=2e-5 * largest, msg=name)


def test_every_family_has_a_case() -> None:
    assert CONFIGURATIONS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_equals_the_models_own_loss(name: str) -> None:
    # dropout on: it must draw the same numbers
    model, given = dual_encoder(name).train(), inputs(name)
    twin = copy.deepcopy(model)
    want, gradients = step(twin, given)
    with fuse_clip_loss(model) as handle:
        assert handle.fused == [name] and isinstance(model, type(twin))
        got, fused = step(model, given)
    assert type(model) is type(twin)
    side = FAMILIES[name].side
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
    assert_same(fused, gradients)
    assert getattr(got, f"logits_per_{side}") is None and got.logits_per_text is None
    for field in (f"{side}_embeds", "text_embeds"):
        torch.testing.assert_close(got[field], want[field], rtol=1e-4, atol=1e-5)
    assert (
        type(got) is type(want)
        and got.text_model_output is not None
        and got[FAMILIES[name].tower] is not None
    )


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_without_a_loss_the_model_is_as_before(name: str) -> None:
    model, given = dual_encoder(name).eval(), inputs(name)
    with torch.no_grad():
        want = model(**given)
        fuse_clip_loss(model)
        got = model(**given)
        assert torch.equal(got.logits_per_text, want.logits_per_text) and got.loss is None
        # tuples are told apart by their places
        own = model(**given, return_loss=True, return_dict=False)
        assert own[0].ndim == 0 and own[1].shape == (5, 5)
        # evaluation too has a loss without logits
        assert model(**given, return_loss=True).logits_per_text is None


class Shapes(TorchDispatchMode):
    """Shapes of whatever any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, (tuple, list)) else (result,)
        self.seen |= {tuple(t.shape) for t in found if isinstance(t, Tensor)}
        return result


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "ClapModel"])
def test_no_logits_are_made(name: str) -> None:
    model, given = dual_encoder(name).eval(), inputs(name, batch=29)
    seen = []
    for fused in (False, True):
        if fused:
            fuse_clip_loss(model)
        with Shapes() as shapes:
            step(model, given)
        seen.append((29, 29) in shapes.seen)
    assert seen == [True, False]


def test_signature_configuration_files_and_copies(tmp_path: Path) -> None:
    model, given = dual_encoder("CLIPModel").eval(), inputs("CLIPModel")
    signature = inspect.signature(model.forward)
    keys = list(model.state_dict())
    want, gradients = step(model, given)
    model.save_pretrained(tmp_path / "plain")
    fuse_clip_loss(model)
    assert fuse_clip_loss(model).fused == [], "fused already"
    assert inspect.signature(model.forward) == signature and list(model.state_dict()) == keys
    assert repr(type(model)) == "<class 'transformers.models.clip.modeling_clip.CLIPModel'>"
    model.save_pretrained(tmp_path / "fused")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "fused" / file).read_bytes()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        output, fused = step(again, given)
        assert output.logits_per_text is None
        assert_same(fused, gradients)
        assert again.logit_scale is not model.logit_scale
    # by position, as the original
    positional = model(given["input_ids"], given["pixel_values"], given["attention_mask"], None, True)
    torch.testing.assert_close(positional.loss, want.loss)
    assert positional.logits_per_text is None


def test_bfloat16_and_autocast() -> None:
    model, given = dual_encoder("CLIPModel").eval(), inputs("CLIPModel", batch=16)
    exact, gradients = step(model, given)
    with torch.autocast("cpu", torch.bfloat16):
        plain = step(model, given)
        with fuse_clip_loss(model):
            fused = step(model, given)
    assert abs(fused[0].loss - exact.loss) <= 2 * abs(plain[0].loss - exact.loss) + 1e-2
    for name, true in gradients.items():
        error, allowed = (fused[1][name] - true).norm(), (plain[1][name] - true).norm()
        assert error <= 2 * allowed + 1e-3 * true.norm(), name


def test_compiled() -> None:
    model, given = dual_encoder("CLIPModel").eval(), inputs("CLIPModel")
    _, gradients = step(model, given)
    fuse_clip_loss(model)
    compiled = torch.compile(model, backend="eager")
    output, fused = step(compiled, given)
    assert output.logits_per_text is None
    assert_same({name.removeprefix("_orig_mod."): g for name, g in fused.items()}, gradients)


def test_inside_other_models() -> None:
    """A detection head around OWL-ViT, and a peft model."""
    peft = pytest.importorskip("peft")
    from transformers import OwlViTForObjectDetection

    detector = OwlViTForObjectDetection(dual_encoder("OwlViTModel").config)
    assert fuse_clip_loss(detector).fused == ["OwlViTModel"]
    configuration = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.get_peft_model(dual_encoder("CLIPModel"), configuration).eval()
    given = inputs("CLIPModel")
    want, gradients = step(model, given)
    fuse_clip_loss(model)
    got, fused = step(model, given)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
    assert_same(fused, gradients)


def test_cases_left_to_the_model() -> None:
    segmenting, given = dual_encoder("GroupViTModel").eval(), inputs("GroupViTModel")
    fuse_clip_loss(segmenting)
    output = segmenting(**given, return_loss=True, output_segmentation=True)
    assert output.segmentation_logits is not None and output.logits_per_text is not None
    one_sided, given = dual_encoder("Tipsv2Model").eval(), inputs("Tipsv2Model")
    fuse_clip_loss(one_sided)
    assert one_sided(pixel_values=given["pixel_values"], return_loss=True).text_embeds is None


def test_errors() -> None:
    with pytest.raises(ValueError, match="Linear has none of these in it: AlignModel, "):
        fuse_clip_loss(nn.Linear(2, 2))
    model: Any = dual_encoder("CLIPModel")

    class Own(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model.__class__ = Own
    with pytest.raises(ValueError, match="none of these"):
        fuse_clip_loss(model)
    model = dual_encoder("CLIPModel")
    model.forward = model.forward
    with pytest.raises(ValueError, match="before it is prepared"):
        fuse_clip_loss(model)
    given = inputs("CLIPModel")
    model = dual_encoder("CLIPModel")
    handle = fuse_clip_loss(model)
    with pytest.raises(ValueError, match="pair up"):
        model(**{**given, "pixel_values": given["pixel_values"][:3]}, return_loss=True)
    # as fully_shard does
    model.__class__ = type("FSDPCLIPModel", (type(model),), {})
    with pytest.raises(ValueError, match="changed again after fuse_clip_loss"):
        handle.undo()
