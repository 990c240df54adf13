"""EVA02 towers against a plain definition, and their weights in every published form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llm2clip.errors import ModelError
from llm2clip.models import build_vision_tower
from llm2clip.models.eva02 import ARCHITECTURES, EVA02, EVA02Config
from llm2clip.models.eva02_files import read_eva02
from llm2clip.models.vision import tower_from_config
from llm2clip.settings import VisionSettings

TINY = EVA02Config(image_size=16, patch_size=4, width=24, depth=2, heads=3, hidden=20)


def tiny_eva02(seed: int = 0) -> EVA02:
    """A small tower whose every weight matters."""
    torch.manual_seed(seed)
    tower = EVA02(TINY)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            parameter.normal_(std=0.3)
            if "norm" in name or "_ln" in name:
                parameter.add_(1.0)
    return tower.eval()


def plain_eva02(state: dict[str, Tensor], pixels: Tensor, heads: int, grid: int, patch: int) -> Tensor:
    """The forward of the paper's architecture, one head, one token and one pair at a time."""
    state = {name: tensor.double() for name, tensor in state.items()}
    pixels = pixels.double()

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        bias = state.get(f"{name}.bias")
        return x @ state[f"{name}.weight"].T + (0 if bias is None else bias)

    def turn(vector: Tensor, row: float, column: float) -> Tensor:
        out, half = vector.clone(), len(vector) // 2
        for start, place in ((0, row), (half, column)):
            for pair in range(half // 2):
                angle = place * 10_000.0 ** (-2 * pair / half)
                i = start + 2 * pair
                a, b = vector[i], vector[i + 1]
                out[i] = a * math.cos(angle) - b * math.sin(angle)
                out[i + 1] = b * math.cos(angle) + a * math.sin(angle)
        return out

    features = []
    for image in pixels:
        tokens = [state["cls_token"][0, 0]]
        for row in range(grid):
            for column in range(grid):
                part = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
                weight = state["patch_embed.proj.weight"]
                tokens.append((weight * part).sum((1, 2, 3)) + state["patch_embed.proj.bias"])
        x = torch.stack(tokens) + state["pos_embed"][0]
        for index in range(1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks"))):
            name = f"blocks.{index}"
            h = norm(x, f"{name}.norm1")
            q, k, v = (linear(h, f"{name}.attn.{part}_proj").unflatten(-1, (heads, -1)) for part in "qkv")
            q, k = q.clone(), k.clone()
            for token in range(grid * grid):
                # places are counted on a grid of 16 x 16, whatever the grid
                row, column = token // grid * 16 / grid, token % grid * 16 / grid
                for head in range(heads):
                    q[1 + token, head] = turn(q[1 + token, head], row, column)
                    k[1 + token, head] = turn(k[1 + token, head], row, column)
            mixed = []
            for head in range(heads):
                scores = q[:, head] @ k[:, head].T / q.shape[-1] ** 0.5
                mixed.append(scores.softmax(-1) @ v[:, head])
            h = norm(torch.cat(mixed, -1), f"{name}.attn.inner_attn_ln")
            x = x + linear(h, f"{name}.attn.proj")
            h = norm(x, f"{name}.norm2")
            gate = linear(h, f"{name}.mlp.w1")
            h = gate / (1 + (-gate).exp()) * linear(h, f"{name}.mlp.w2")
            x = x + linear(norm(h, f"{name}.mlp.ffn_ln"), f"{name}.mlp.w3")
        features.append(norm(x[0], "norm"))
    return torch.stack(features)


def test_forward_follows_the_definition() -> None:
    tower, pixels = tiny_eva02(), torch.randn(2, 3, 16, 16)
    expected = plain_eva02(tower.state_dict(), pixels, heads=3, grid=4, patch=4)
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels).double(), expected, atol=1e-5, rtol=1e-5)
    assert tower.dim == 24


def test_rotations_stay_exact_in_half_precision() -> None:
    tower, pixels = tiny_eva02(), torch.randn(2, 3, 16, 16)
    exact = tower(pixels)
    half = tiny_eva02().to(torch.bfloat16)
    assert half.rope_cos.dtype == torch.float32 and torch.equal(half.rope_cos, tower.rope_cos)
    assert half.pos_embed.dtype == torch.bfloat16
    out = half(pixels.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, atol=0.15, rtol=0.1)
    assert tower.double().rope_sin.dtype == torch.float64


def test_sizes_are_the_published_ones() -> None:
    # timm counts the same for eva02_base_patch16_clip_224 and the two large ones, without classifier
    counts = {"eva02-b-16": 85_869_312, "eva02-l-14": 303_317_952, "eva02-l-14-336": 303_645_632}
    for name, config in ARCHITECTURES.items():
        with torch.device("meta"):
            tower = EVA02(config)
        assert sum(p.numel() for p in tower.parameters()) == counts[name], name
    names = set(tower.state_dict())
    assert {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "norm.weight",
        "norm.bias",
    } <= names
    block = {name.removeprefix("blocks.23.") for name in names if name.startswith("blocks.23.")}
    weights = {"attn.k_proj.weight"}
    both = ("norm1", "norm2", "attn.q_proj", "attn.v_proj", "attn.inner_attn_ln", "attn.proj")
    both += ("mlp.w1", "mlp.w2", "mlp.ffn_ln", "mlp.w3")
    assert block == weights | {f"{layer}.{kind}" for layer in both for kind in ("weight", "bias")}
    assert len(names) == 6 + 24 * len(block)


def published(tower: EVA02, kind: str) -> dict[str, Tensor]:
    """The tower's weights as LLM2CLIP or EVA-CLIP stores them, with rotary tables in every block."""
    state: dict[str, Tensor] = {}
    for name, tensor in tower.state_dict().items():
        if kind == "EVA-CLIP":
            name = name.replace("q_proj.bias", "q_bias").replace("v_proj.bias", "v_bias")
        state[name] = tensor.half() if kind == "EVA-CLIP" else tensor
    places = torch.arange(4.0) * 4
    angles = torch.outer(places, 10_000.0 ** -(torch.arange(0, 4, 2) / 4)).repeat_interleave(2, 1)
    both = torch.cat([angles[:, None].expand(4, 4, 4), angles[None].expand(4, 4, 4)], -1).reshape(16, 8)
    for place in ("", *(f"blocks.{i}.attn." for i in range(2))):
        state[f"{place}rope.freqs_cos"], state[f"{place}rope.freqs_sin"] = both.cos(), both.sin()
    return state


@pytest.mark.parametrize("kind", ["LLM2CLIP", "EVA-CLIP"])
def test_weights_of_both_repositories(kind: str, tmp_path: Path) -> None:
    tower, pixels = tiny_eva02(), torch.randn(2, 3, 16, 16)
    state = {f"visual.{name}": tensor for name, tensor in published(tower, kind).items()}
    state |= {"visual.head.weight": torch.ones(5, 24), "visual.head.bias": torch.ones(5)}
    state |= {"text.ln_final.weight": torch.ones(3), "logit_scale": torch.ones(())}
    torch.save({"state_dict": {f"module.{n}": t for n, t in state.items()}}, tmp_path / "eva.pt")
    built = build_vision_tower(VisionSettings(kind="eva02", path=str(tmp_path / "eva.pt"))).eval()
    assert built.image_size == 16 and built.model.sizes == TINY
    weight, bias = built.model.pretrained_projection
    assert torch.equal(weight, torch.ones(5, 24)) and torch.equal(bias, torch.ones(5))
    tolerance = 1e-6 if kind == "LLM2CLIP" else 2e-2
    torch.testing.assert_close(built(pixels), tower(pixels), atol=tolerance, rtol=tolerance)
    again = tower_from_config(built.to_config()).eval()
    again.load_state_dict(built.state_dict())
    assert torch.equal(again(pixels), built(pixels))


def test_other_image_size_interpolates_positions_and_recounts_rotations(tmp_path: Path) -> None:
    tower = tiny_eva02()
    save_file(tower.state_dict(), tmp_path / "tower.safetensors")
    settings = VisionSettings(kind="eva02", path=str(tmp_path / "tower.safetensors"), image_size=24)
    # without rotary tables in the file heads are taken to be 64 wide
    assert build_vision_tower(settings).model.sizes.heads == 1
    save_file(published(tower, "LLM2CLIP"), tmp_path / "tower.safetensors")
    built = build_vision_tower(settings).eval()
    pixels = torch.randn(2, 3, 24, 24)
    expected = plain_eva02(built.model.state_dict(), pixels, heads=3, grid=6, patch=4)
    torch.testing.assert_close(built(pixels).double(), expected, atol=1e-5, rtol=1e-5)
    old = tower.state_dict()
    changed = [
        n for n, t in built.model.state_dict().items() if t.shape != old[n].shape or (t != old[n]).any()
    ]
    assert changed == ["pos_embed"]
    assert torch.equal(built.model.pos_embed[:, 0], tower.pos_embed[:, 0])


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    state = published(tiny_eva02(), "LLM2CLIP")
    tables = {n: t + 0.1 for n, t in state.items() if "freqs_cos" in n}
    with pytest.raises(
        ModelError, match="rotary table freqs_cos .* is not that of EVA02-CLIP for 4 x 4 patches"
    ):
        read_eva02({**state, **tables}, "file")
    with pytest.raises(ModelError, match=r"1 missing \(norm.bias\), 1 unexpected \(more\)"):
        read_eva02({**{n: t for n, t in state.items() if n != "norm.bias"}, "more": torch.ones(1)}, "file")
    with pytest.raises(ModelError, match="holds no EVA02 tower: it has no patch_embed.proj.weight"):
        read_eva02({"a": torch.ones(1)}, "file")
    save_file({**state, "decoder.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    settings = VisionSettings(kind="eva02", path=str(tmp_path / "a.safetensors"))
    with pytest.raises(ModelError, match="unexpected .*decoder.weight"):
        build_vision_tower(settings)


def test_names_without_weights_and_bad_sizes() -> None:
    random = VisionSettings(kind="eva02", name="eva02-b-16", image_size=256, pretrained=False)
    with torch.device("meta"):
        tower = build_vision_tower(random)
    assert tower.model.pos_embed.shape == (1, 257, 768) and tower.image_size == 256
    with pytest.raises(ModelError, match="vision.name: eva02-b-16, eva02-l-14, eva02-l-14-336; got None"):
        build_vision_tower(VisionSettings(kind="eva02", pretrained=False))
    with pytest.raises(ModelError, match="needs vision.path, the weights, for nothing is downloaded"):
        build_vision_tower(VisionSettings(kind="eva02", name="eva02-b-16"))
    bad: list[tuple[dict[str, Any], str]] = [
        ({"image_size": 15}, "not a multiple"),
        ({"heads": 5}, "heads divide"),
        ({"depth": 0}, "positive"),
    ]
    for change, message in bad:
        with pytest.raises(ModelError, match=message):
            EVA02Config(**{**TINY.__dict__, **change})
