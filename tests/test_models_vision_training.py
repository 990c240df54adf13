"""What training does to towers: patch dropout, checkpointing, adapters, locks, other image sizes, compilation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip.errors import ConfigError, ModelError
from llm2clip.integrations.peft import FusedLoraLinear
from llm2clip.models import build_vision_tower
from llm2clip.models.vision_lora import merged
from llm2clip.settings import VisionLoraSettings, VisionSettings
from tests.vision_kit import VITS, any_tower, hf_tower, hf_vision_model

ALL = [*VITS, "eva02"]


@pytest.mark.parametrize("kind", ALL)
def test_patch_dropout_hides_patches_and_keeps_their_places(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = any_tower(tmp_path, kind, patch_dropout=0.5)
    pixels = torch.randn(2, 3, 16, 16)
    whole = tower(pixels)  # evaluation sees everything
    kept = torch.tensor([[5, 0, 3], [15, 1, 2]])
    chosen: list[torch.Tensor] = [kept]

    def choose(batch: int, patches: int, rate: float, device: Any) -> torch.Tensor:
        assert (batch, patches, rate) == (2, 16, 0.5)
        return chosen[0]

    for module in ("hf_vision", "eva02"):
        monkeypatch.setattr(f"llm2clip.models.{module}.kept_patches", choose)
    tower.train()
    part = tower(pixels)
    assert not torch.allclose(part, whole, atol=1e-3)

    def changed(image: int, patch: int) -> torch.Tensor:
        other = pixels.clone()
        other.unfold(2, 4, 4).unfold(3, 4, 4)[image, :, patch // 4, patch % 4] = 9.0
        return tower(other)

    torch.testing.assert_close(changed(0, 7), part)  # a patch that image 0 does not show
    assert not torch.allclose(changed(0, 5)[0], part[0], atol=1e-3)
    torch.testing.assert_close(changed(0, 5)[1], part[1])
    # all patches in another order are the same image: positions travel with them
    chosen[0] = torch.stack([torch.randperm(16), torch.randperm(16)])
    torch.testing.assert_close(tower(pixels), whole, atol=1e-5, rtol=1e-4)
    chosen[0] = kept
    part.sum().backward()
    assert [n for n, p in tower.named_parameters() if p.requires_grad and p.grad is None] == []


def test_patch_dropout_needs_patches(tmp_path: Path) -> None:
    hf_vision_model("convnext").save_pretrained(tmp_path)
    for settings in (
        VisionSettings(kind="transformers", path=str(tmp_path), patch_dropout=0.5),
        VisionSettings(image_size=32, pretrained=False, patch_dropout=0.5),
    ):
        with pytest.raises(ModelError, match="patch_dropout needs a vision transformer"):
            build_vision_tower(settings)
    tower = any_tower(tmp_path / "vit", "vit")
    tower.model.set_patch_dropout(0.5)
    tower.model.set_patch_dropout(0.0)
    pixels = torch.randn(1, 3, 16, 16)
    expected = tower(pixels)
    assert torch.equal(tower.train()(pixels), expected)
    tower.model.set_patch_dropout(0.5)  # once more: patches are still dropped once
    seen: list[int] = []
    tower.model.model.layers[0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    tower(pixels)
    assert seen == [1 + 8]


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model", "vit", "dinov3_vit", "eva02"])
def test_checkpointing_recomputes_blocks_with_equal_gradients(kind: str, tmp_path: Path) -> None:
    plain = any_tower(tmp_path, kind, patch_dropout=0.25).train()
    lean = any_tower(tmp_path, kind, patch_dropout=0.25, grad_checkpointing=True).train()
    pixels = torch.randn(2, 3, 16, 16)
    calls: list[int] = []
    *_, (_, block) = [
        (n, m) for n, m in lean.named_modules() if n.endswith(("layers.1", "layer.1", "blocks.1"))
    ]
    norm = next(m for m in block.modules() if isinstance(m, torch.nn.LayerNorm))
    norm.register_forward_hook(lambda *args: calls.append(1))
    for tower in (plain, lean):
        torch.manual_seed(3)
        tower(pixels).square().sum().backward()
    assert len(calls) == 2
    theirs = dict(plain.named_parameters())
    for name, parameter in lean.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, msg=name)
    calls.clear()
    lean.eval()(pixels)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["clip_vision_model", "dinov2", "vit", "siglip_vision_model", "eva02"])
def test_adapters_start_at_nothing_train_alone_and_merge(kind: str, tmp_path: Path) -> None:
    plain = any_tower(tmp_path, kind)
    lora = VisionLoraSettings(rank=2, alpha=8.0, dropout=0.0)
    tower = any_tower(tmp_path, kind, lora=lora)
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(tower(pixels), plain(pixels))
    trainable = [n for n, p in tower.named_parameters() if p.requires_grad]
    # queries, keys and values of two blocks, two matrices each
    assert len(trainable) == 2 * 3 * 2 and all(".lora_" in name for name in trainable)
    assert sum(isinstance(m, FusedLoraLinear) for m in tower.modules()) == 6
    tower.train()(pixels).square().sum().backward()
    ups = {n: p for n, p in tower.named_parameters() if ".lora_B." in n}
    assert len(ups) == 6 and all(p.grad is not None and p.grad.any() for p in ups.values())
    with torch.no_grad():
        for parameter in ups.values():
            parameter.normal_()
    trained = tower.eval()(pixels)
    assert not torch.allclose(trained, plain(pixels), atol=1e-2)
    whole = merged(tower.model)
    torch.testing.assert_close(whole(pixels), trained, atol=1e-4, rtol=1e-4)
    assert set(whole.state_dict()) == set(plain.model.state_dict())
    assert any(".lora_" in name for name, _ in tower.named_parameters())  # the tower itself keeps them


def test_adapters_on_named_layers_and_bad_settings(tmp_path: Path) -> None:
    lora = VisionLoraSettings(rank=2, targets=("fc1", "fc2"), fused="off")
    tower = hf_tower(tmp_path, "clip_vision_model", lora=lora)
    adapted = {name.rsplit(".lora_", 1)[0] for name, _ in tower.named_parameters() if ".lora_" in name}
    assert len(adapted) == 4 and all(name.endswith(("fc1", "fc2")) for name in adapted)
    with pytest.raises(ModelError, match=r"none of vision.lora.targets \(wq\) .* it has fc1, fc2, k_proj"):
        hf_tower(tmp_path, "clip_vision_model", lora=VisionLoraSettings(rank=2, targets=("wq",)))
    with pytest.raises(ConfigError, match="contradict"):
        VisionSettings(freeze=True, lora=VisionLoraSettings(rank=1))
    with pytest.raises(ConfigError, match="patch_dropout"):
        VisionSettings(patch_dropout=1.0)


@pytest.mark.parametrize("kind", ALL)
def test_groups_run_from_the_input_to_the_output(kind: str, tmp_path: Path) -> None:
    tower = any_tower(tmp_path, kind)
    groups = tower.layer_groups()
    assert [group.name for group in groups] == ["embeddings", "layer.0", "layer.1"]
    names = [name for group in groups for name in group.parameters]
    assert sorted(names) == sorted(name for name, _ in tower.named_parameters())
    embeddings, first, last = (group.parameters for group in groups)
    assert any("patch_embed" in name for name in embeddings) and not any(
        "norm1" in name for name in embeddings
    )
    assert all(".0." in name for name in first)
    # the final norm belongs to the last block
    assert any("norm" in name and ".1." not in name for name in last) and not any(".0." in n for n in last)


def test_locking_counts_groups_as_open_clip_does(tmp_path: Path) -> None:
    def trained(unlocked: int) -> set[str]:
        options: dict[str, Any] = {"freeze": True, "unlocked_groups": unlocked}
        tower = hf_tower(tmp_path, "clip_vision_model", **options).train()
        assert tower.training == (unlocked > 1)
        feature = tower(torch.randn(1, 3, 16, 16))
        assert feature.requires_grad == (unlocked > 1)
        names = {name for name, p in tower.named_parameters() if p.requires_grad}
        return {name.removeprefix("model.model.").removeprefix("vision_model.") for name in names}

    def parts(names: set[str]) -> set[str]:
        return {name.split(".layers.")[1][0] if ".layers." in name else name.split(".")[0] for name in names}

    assert trained(0) == trained(1) == set()  # the projection is no part of the tower
    assert parts(trained(2)) == {"1", "post_layernorm"}
    assert parts(trained(3)) == {"0", "1", "post_layernorm"}
    assert parts(trained(4)) == {"0", "1", "post_layernorm", "pre_layrnorm", "embeddings"}
    with pytest.raises(ModelError, match="3 groups and the projection, so at most 4, got 5"):
        trained(5)
    # more and more is unlocked as training goes on
    tower = hf_tower(tmp_path, "clip_vision_model")
    whole = {name for name, p in tower.named_parameters() if p.requires_grad}
    counts = []
    for unlocked in (0, 1, 2, 3, 1):
        tower.lock(unlocked)
        counts.append(sum(p.requires_grad for p in tower.parameters()))
    assert counts[0] == 0 < counts[1] < counts[2] < counts[3] == len(whole) and counts[4] == counts[1]
    assert not tower.frozen


def test_locked_batch_norms_keep_their_statistics() -> None:
    from llm2clip.models import VisionTower
    from llm2clip.models.efficientnet import EfficientNetLite0
    from llm2clip.models.preprocessing import Preprocessing

    tower = VisionTower(EfficientNetLite0(32, pretrained=False), Preprocessing(32))
    tower.lock(1)
    before = {name: buffer.clone() for name, buffer in tower.named_buffers() if "running" in name}
    tower.train()(torch.randn(2, 3, 32, 32))
    moved = {
        name
        for name, buffer in tower.named_buffers()
        if name in before and not torch.equal(buffer, before[name])
    }
    last = tower.layer_groups()[-1].parameters
    assert moved and all(any(name.rsplit(".", 1)[0] in own for own in last) for name in moved)
    trained = {name for name, p in tower.named_parameters() if p.requires_grad}
    assert trained == set(last)


@pytest.mark.parametrize("kind", ALL)
def test_loading_at_another_size_changes_positions_alone(kind: str, tmp_path: Path) -> None:
    native = any_tower(tmp_path, kind)
    larger = any_tower(tmp_path, kind, image_size=24)
    assert (native.image_size, larger.image_size) == (16, 24)
    old, new = native.state_dict(), larger.state_dict()
    assert set(old) == set(new)
    changed = [name for name in old if old[name].shape != new[name].shape]
    assert all(torch.equal(old[name], new[name]) for name in old if name not in changed)
    # SigLIP 2 and DINOv3 take any grid as they are
    assert len(changed) == (0 if kind in ("siglip2_vision_model", "dinov3_vit") else 1)
    pixels = torch.randn(2, 3, 24, 24)
    feature = larger(pixels)
    assert feature.shape == (2, larger.dim) and torch.isfinite(feature).all()
    if kind != "eva02":  # which calls the fused attention itself
        for tower in (native, larger):
            assert tower.model.model.config._attn_implementation == "sdpa"
    with pytest.raises(ModelError, match="multiple of the patch size 4"):
        any_tower(tmp_path, kind, image_size=18)


@pytest.mark.parametrize("kind", ["clip_vision_model", "eva02"])
def test_compiles_as_one_graph(kind: str, tmp_path: Path) -> None:
    tower = any_tower(tmp_path, kind, patch_dropout=0.5)
    pixels = torch.randn(2, 3, 16, 16)
    expected = tower(pixels)
    tower.model.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(tower(pixels), expected)
    tower.train()(pixels).sum().backward()
    assert all(p.grad is not None for p in tower.parameters() if p.requires_grad)
    assert set(tower.state_dict()) == set(any_tower(tmp_path, kind).state_dict())


def test_compile_is_a_setting(tmp_path: Path) -> None:
    tower = hf_tower(tmp_path, "clip_vision_model", compile=True)
    assert tower.model._compiled_call_impl is not None
    assert hf_tower(tmp_path, "clip_vision_model").model._compiled_call_impl is None
