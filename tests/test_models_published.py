"""Published LLM2CLIP checkpoints of every layout against plain definitions; nothing dropped, nothing executed."""

from __future__ import annotations

import argparse
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llm2clip.errors import ModelError
from llm2clip.models import LLM2CLIP
from llm2clip.models.eva02 import EVA02
from llm2clip.models.published import CheckpointOptions, assemble
from tests import published_kit as kit
from tests.test_models_eva02 import plain_eva02, published, tiny_eva02

PIXELS = torch.randn(2, 3, kit.SIDE, kit.SIDE, generator=torch.Generator().manual_seed(7))
LLM = torch.randn(3, kit.LLM, generator=torch.Generator().manual_seed(8)) * 4
CLIP_CONFIG: dict[str, Any] = {
    "model_type": "clip",
    "architectures": ["CLIPModel"],
    "auto_map": {"AutoModel": "modeling_clip.CLIPModel"},
    "projection_dim": kit.EMBED,
    "text_config": {"model_type": "clip_text_model"},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": kit.WIDTH,
        "intermediate_size": kit.HIDDEN,
        "num_hidden_layers": kit.DEPTH,
        "num_attention_heads": 4,
        "patch_size": kit.PATCH,
        "image_size": kit.SIDE,
        "hidden_act": "quick_gelu",
    },
}


def hub_state() -> dict[str, Tensor]:
    shapes = kit.clip_hub_shapes() | {"visual_projection.weight": (kit.EMBED, kit.WIDTH)}
    return kit.filled(shapes | kit.adapter_shapes("text_adapter.adaptor."))


def hub_directory(folder: Path, state: dict[str, Tensor] | None = None, config: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CLIP_CONFIG if config is None else config))
    save_file(hub_state() if state is None else state, folder / "model.safetensors")
    return folder


def repository_state(
    tower: kit.Shapes, prefix: str = "text.text_adaptor.", embed: int = kit.EMBED
) -> dict[str, Tensor]:
    return kit.filled(tower | kit.adapter_shapes(prefix, embed=embed))


def same(model: LLM2CLIP, images: Tensor, texts: Tensor, scale: float | Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model.get_image_features(PIXELS), images, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.get_text_features(LLM), texts, atol=1e-4, rtol=1e-4)
        assert model.logit_scale.item() == pytest.approx(float(scale))


def test_hugging_face_layout(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    state = hub_state()
    reference = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**{**CLIP_CONFIG["vision_config"], "projection_dim": kit.EMBED})
    ).eval()
    own = {n: n if n in reference.state_dict() else f"vision_model.{n}" for n in reference.state_dict()}
    reference.load_state_dict({n: state[own[n]] for n in own})
    images = reference(pixel_values=PIXELS).image_embeds.detach()
    texts = kit.plain_adapter(state, "text_adapter.adaptor.", LLM)
    model = LLM2CLIP.from_pretrained(hub_directory(tmp_path / "hub"))
    same(model, images, texts, state["logit_scale"])
    assert not model.training and model.settings.adapter_depth == 4 and model.llm_dim == kit.LLM
    assert (model.vision_model.preprocessing.fit, model.vision_model.mean[0]) == ("crop", 0.48145466)
    # the scale of an embedding does not matter, as in the published forward
    torch.testing.assert_close(model.get_text_features(LLM * 3), texts, atol=1e-4, rtol=1e-4)
    unit = model.get_text_features(LLM, normalize=True)
    torch.testing.assert_close(unit, texts / texts.norm(dim=-1, keepdim=True), atol=1e-4, rtol=1e-4)

    # position ids of older files, shards, half precision and pytorch_model.bin
    extra = {"vision_model.embeddings.position_ids": torch.arange(1 + kit.GRID**2)[None]}
    half = {name: tensor.half() for name, tensor in state.items()} | extra
    folder = hub_directory(tmp_path / "old")
    (folder / "model.safetensors").unlink()
    torch.save(half, folder / "pytorch_model.bin")
    old = LLM2CLIP.from_pretrained(folder)
    torch.testing.assert_close(old.get_image_features(PIXELS), images, atol=2e-2, rtol=2e-2)
    assert old.logit_scale.dtype == torch.float32
    names = sorted(state)
    (folder / "pytorch_model.bin").unlink()
    parts = {"a.safetensors": names[:30], "b.safetensors": names[30:]}
    for file, inside in parts.items():
        save_file({name: state[name] for name in inside}, folder / file)
    index = {"weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    same(LLM2CLIP.from_pretrained(folder), images, texts, state["logit_scale"])
    assert LLM2CLIP.from_pretrained(folder, dtype=torch.bfloat16).logit_scale.dtype == torch.bfloat16


def test_repository_layout_of_openais_towers(tmp_path: Path) -> None:
    state = repository_state(kit.openai_shapes())
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{n}": t for n, t in state.items()}}, tmp_path / "model.pt"
    )
    model = LLM2CLIP.from_pretrained(tmp_path / "model.pt")
    same(
        model,
        kit.plain_openai(state, PIXELS),
        kit.plain_adapter(state, "text.text_adaptor.", LLM),
        state["logit_scale"],
    )
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    exact = LLM2CLIP.from_pretrained(
        tmp_path / "model.safetensors", options=CheckpointOptions(activation="gelu", normalize=False)
    )
    same(
        exact,
        kit.plain_openai(state, PIXELS, quick=False),
        kit.plain_adapter(state, "text.text_adaptor.", LLM, normalize=False),
        state["logit_scale"],
    )


def eva_repository() -> dict[str, Tensor]:
    state = {f"visual.{n}": t for n, t in published(tiny_eva02(), "LLM2CLIP").items()}
    head = kit.linear_shapes("visual.head", kit.EMBED, 24) | {"logit_scale": ()}
    return state | repository_state(head)


def test_repository_layout_of_eva02_towers(tmp_path: Path) -> None:
    state = eva_repository()
    torch.save(state, tmp_path / "LLM2CLIP-EVA02.pt")
    model = LLM2CLIP.from_pretrained(tmp_path / "LLM2CLIP-EVA02.pt")
    tower = {n.removeprefix("visual."): t for n, t in state.items() if n.startswith("visual.")}
    features = plain_eva02({n: t for n, t in tower.items() if "rope" not in n}, PIXELS, 3, 4, 4).float()
    images = features @ state["visual.head.weight"].T + state["visual.head.bias"]
    same(model, images, kit.plain_adapter(state, "text.text_adaptor.", LLM), state["logit_scale"])
    assert isinstance(model.vision_model.model, EVA02) and model.settings.projection == "affine"


def test_hugging_face_layout_of_eva02_towers(tmp_path: Path) -> None:
    state = eva_repository()
    block = {
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attn.proj": "self_attn.out_proj",
        "attn.": "self_attn.",
        "mlp.w1": "mlp.fc1",
        "mlp.w2": "mlp.fc2",
        "mlp.w3": "mlp.fc3",
    }
    hub: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.replace("text.text_adaptor.", "text_adapter.adaptor.").replace(
            "visual.head.", "visual_projection."
        )
        if "rope" in name and "blocks" in name:
            continue
        if name.startswith("visual.blocks."):
            for old, new in block.items():
                if f".{old}" in name:
                    name = name.replace(f".{old}", f".{new}")
                    break
            name = name.replace("visual.blocks.", "vision_model.encoder.layers.")
        names = {
            "visual.cls_token": ("vision_model.embeddings.class_embedding", tensor.flatten()),
            "visual.pos_embed": (
                "vision_model.embeddings.position_embedding.weight",
                tensor[0] if tensor.ndim else tensor,
            ),
            "visual.norm.weight": ("vision_model.post_layernorm.weight", tensor),
            "visual.norm.bias": ("vision_model.post_layernorm.bias", tensor),
            "visual.patch_embed.proj.weight": ("vision_model.embeddings.patch_embedding.weight", tensor),
            "visual.patch_embed.proj.bias": ("vision_model.embeddings.patch_embedding.bias", tensor),
            "visual.rope.freqs_cos": ("vision_model.rope.freqs_cos", tensor),
            "visual.rope.freqs_sin": ("vision_model.rope.freqs_sin", tensor),
        }
        name, tensor = names.get(name, (name, tensor))
        hub[name] = tensor.contiguous().clone()
    vision = {"num_attention_heads": 3, "layer_norm_eps": 1e-6, "image_size": 16, "patch_size": 4}
    config = {"model_type": "evaclip", "vision_config": vision, "projection_dim": kit.EMBED}
    model = LLM2CLIP.from_pretrained(hub_directory(tmp_path / "eva", hub, config))
    torch.save(state, tmp_path / "eva.pt")
    other = LLM2CLIP.from_pretrained(tmp_path / "eva.pt")
    assert torch.equal(model.get_image_features(PIXELS), other.get_image_features(PIXELS))
    assert torch.equal(model.get_text_features(LLM), other.get_text_features(LLM))
    # another epsilon is another model: it comes from the configuration
    config["vision_config"]["layer_norm_eps"] = 0.1
    blurred = LLM2CLIP.from_pretrained(hub_directory(tmp_path / "blurred", hub, config))
    assert not torch.allclose(blurred.get_image_features(PIXELS), model.get_image_features(PIXELS), atol=1e-3)


def test_repository_layout_of_siglip2_towers(tmp_path: Path) -> None:
    # trained with the LLM in the loop: other names, and LLM embeddings as they come
    state = repository_state(kit.siglip_shapes(), "text.text_proj.text_adaptor.", embed=kit.WIDTH)
    torch.save(state, tmp_path / "siglip2.pt")
    with pytest.raises(ModelError, match="heads of a SigLIP tower of width 128 are not known"):
        LLM2CLIP.from_pretrained(tmp_path / "siglip2.pt")
    model = LLM2CLIP.from_pretrained(tmp_path / "siglip2.pt", options=CheckpointOptions(heads=4))
    texts = kit.plain_adapter(state, "text.text_proj.text_adaptor.", LLM, normalize=False)
    same(model, kit.plain_siglip(state, PIXELS, 4), texts, state["logit_scale"])
    assert model.settings.projection == "none" and not model.settings.adapter_normalize
    # the LLM's own weights in the file are not the model's: they must be named to be left out
    torch.save(state | {"text.text.model.norm.weight": torch.ones(3)}, tmp_path / "siglip2.pt")
    options: dict[str, Any] = {"options": CheckpointOptions(heads=4)}
    with pytest.raises(ModelError, match=r"1 unexpected \(text.text.model.norm.weight\)"):
        LLM2CLIP.from_pretrained(tmp_path / "siglip2.pt", **options)
    LLM2CLIP.from_pretrained(tmp_path / "siglip2.pt", allow_unexpected=["text.text.*"], **options)


@pytest.mark.parametrize(
    ("width", "depth", "patch", "side", "count"),
    [(1024, 24, 14, 336, 578_587_905), (768, 12, 16, 224, 360_552_193)],
)
def test_published_sizes_count_as_published(
    width: int, depth: int, patch: int, side: int, count: int
) -> None:
    rows = (side // patch) ** 2
    shapes = kit.clip_hub_shapes(width, depth, 4 * width, patch, rows)
    shapes |= {"visual_projection.weight": (1280, width)}
    shapes |= kit.adapter_shapes("text_adapter.adaptor.", llm=4096, embed=1280)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == count
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // 64,
        "patch_size": patch,
        "image_size": side,
    }
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        model = assemble(state, {"model_type": "clip", "vision_config": vision}, "the hub")
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.settings.embed_dim == 1280 and model.llm_dim == 4096


def test_what_is_missing_or_surplus_must_be_allowed_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = hub_state()
    more = state | {
        "text_model.embeddings.token_embedding.weight": torch.ones(4, 2),
        "mystery": torch.ones(1),
    }
    folder = hub_directory(tmp_path / "hub", more)
    with pytest.raises(ModelError) as error:
        LLM2CLIP.from_pretrained(folder)
    assert "2 unexpected (mystery; text_model.embeddings.token_embedding.weight)" in str(error.value)
    with caplog.at_level(logging.WARNING):
        LLM2CLIP.from_pretrained(folder, allow_unexpected=["text_model.*", "mystery"])
    assert "left out as allowed: mystery, text_model." in caplog.text

    lost = {n: t for n, t in state.items() if n not in ("logit_scale", "text_adapter.adaptor.5.bias")}
    folder = hub_directory(tmp_path / "hub", lost)
    with pytest.raises(ModelError, match=r"2 missing \(logit_scale; text_adapter.adaptor.5.bias\)"):
        LLM2CLIP.from_pretrained(folder)
    with pytest.raises(ModelError, match=r"1 missing \(text_adapter.adaptor.5.bias\)"):
        LLM2CLIP.from_pretrained(folder, allow_missing=["logit_scale"])
    assert LLM2CLIP.from_pretrained(folder, allow_missing=["logit_scale", "*.bias"]).logit_scale.item() > 2.6

    wrong = state | {"text_adapter.adaptor.2.fn.0.weight": torch.ones(7, kit.LLM)}
    with pytest.raises(ModelError, match=r"fn.0.weight: file \(7, 12\), model \(24, 12\)"):
        LLM2CLIP.from_pretrained(hub_directory(tmp_path / "hub", wrong))
    tower = {n: t for n, t in state.items() if n != "vision_model.post_layernorm.bias"}
    with pytest.raises(ModelError, match="post_layernorm.bias"):
        LLM2CLIP.from_pretrained(hub_directory(tmp_path / "hub", tower))


def test_a_checkpoint_of_the_image_side_alone(tmp_path: Path) -> None:
    state = {n: t for n, t in hub_state().items() if not n.startswith("text_adapter")}
    folder = hub_directory(tmp_path / "hub", state)
    with pytest.raises(ModelError, match="has no text adapter .* half a model"):
        LLM2CLIP.from_pretrained(folder)
    model = LLM2CLIP.from_pretrained(
        folder, allow_missing=["text_adapter.*"], options=CheckpointOptions(llm_dim=20)
    )
    assert model.get_image_features(PIXELS).shape == (2, kit.EMBED) and model.llm_dim == 20


class Malicious:
    """What unpickling would run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("kind", ["inside", "alone", "namespace"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_with_more_than_tensors_are_refused(kind: str, tmp_path: Path) -> None:
    marker = tmp_path / "was-run"
    evil = Malicious(marker)
    content: Any = {"inside": {"weights": evil}, "alone": evil, "namespace": {"a": argparse.Namespace(a=1)}}[
        kind
    ]
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ModelError, match="is refused: it holds more than tensors"):
        LLM2CLIP.from_pretrained(tmp_path / "model.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(content))
    with pytest.raises(ModelError, match="refused|damaged"):
        LLM2CLIP.from_pretrained(tmp_path / "plain.pt")
    folder = hub_directory(tmp_path / "hub")
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="is refused"):
        LLM2CLIP.from_pretrained(folder)
    assert not marker.exists()
    torch.load(tmp_path / "model.pt", weights_only=False)  # the trap works
    assert marker.exists() == (kind != "namespace")


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    cases: list[tuple[Any, str]] = [
        (torch.ones(2), "holds a Tensor, expected tensors by name"),
        ({"state_dict": {"a": torch.ones(1), "step": 3}}, "got other things under step"),
        ({}, "got other things under no name"),
        ({"weight": torch.ones(2)}, "holds no vision tower: expected names that begin with visual."),
        ({"visual.a": torch.ones(2)}, "holds no EVA02 tower: it has no patch_embed.proj.weight"),
        (
            {"visual.transformer.a": torch.ones(2)},
            "the vision tower has no embeddings.patch_embedding.weight",
        ),
    ]
    for content, message in cases:
        torch.save(content, file)
        with pytest.raises(ModelError, match=message):
            LLM2CLIP.from_pretrained(file)
    file.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(ModelError, match="damaged or half-copied"):
        LLM2CLIP.from_pretrained(file)
    folder = hub_directory(tmp_path / "hub")
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="neither model.safetensors nor pytorch_model.bin"):
        LLM2CLIP.from_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="not a file beside it"):
        LLM2CLIP.from_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="neither of model_type llm2clip nor of a published checkpoint"):
        LLM2CLIP.from_pretrained(folder)
