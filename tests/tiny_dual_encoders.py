"""A tiny random model of every dual encoder of transformers that `fuse_clip_loss` knows, with inputs for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 16,
    # where a model pools the state at this token
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 30,
    "patch_size": 15,
    "num_channels": 3,
}
WIDTH = {"projection_dim": 24}
# name of the configuration -> what is not as in TEXT, VISION and WIDTH
TEXTS: dict[str, dict[str, Any]] = {
    "AltCLIPConfig": {"project_dim": 32, "max_position_embeddings": 40},
    "BlipConfig": {"encoder_hidden_size": 32, "projection_dim": 24},
    "SiglipConfig": {"projection_size": 32},
    "Siglip2Config": {"projection_size": 32},
    "ClapConfig": {"max_position_embeddings": 40, "projection_dim": 24},
    "Tipsv2Config": {"num_attention_heads": 4},
}
VISIONS: dict[str, dict[str, Any]] = {
    "GroupViTConfig": {
        "depths": [2, 2, 2],
        "num_hidden_layers": 6,
        "num_group_tokens": [8, 4, 0],
        "num_output_groups": [8, 4, 4],
        "hidden_size": 32,
        "image_size": 32,
        "patch_size": 8,
    },
    "Siglip2Config": {"num_patches": 16, "patch_size": 4},
}
CONFIGURATIONS = {
    "AlignModel": "AlignConfig",
    "AltCLIPModel": "AltCLIPConfig",
    "BlipModel": "BlipConfig",
    "CLIPModel": "CLIPConfig",
    "CLIPSegModel": "CLIPSegConfig",
    "ChineseCLIPModel": "ChineseCLIPConfig",
    "ClapModel": "ClapConfig",
    "GroupViTModel": "GroupViTConfig",
    "MetaClip2Model": "MetaClip2Config",
    "OwlViTModel": "OwlViTConfig",
    "Owlv2Model": "Owlv2Config",
    "Siglip2Model": "Siglip2Config",
    "SiglipModel": "SiglipConfig",
    "Tipsv2Model": "Tipsv2Config",
    "VisionTextDualEncoderModel": "VisionTextDualEncoderConfig",
}


def dual_encoder(name: str, seed: int = 0) -> Any:
    """The model of a class name, with random weights large enough that embeddings differ."""
    import transformers

    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    kind = CONFIGURATIONS[name]
    text, vision, more = {**TEXT, **TEXTS.get(kind, {})}, {**VISION, **VISIONS.get(kind, {})}, dict(WIDTH)
    if name == "VisionTextDualEncoderModel":
        configuration = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
            transformers.ViTConfig(**vision), transformers.BertConfig(**text), projection_dim=24
        )
    else:
        sides: dict[str, Any] = {"text_config": text, "vision_config": vision}
        if name == "AlignModel":
            # EfficientNet with one block of each kind
            sides["vision_config"] = {
                "image_size": 32, "width_coefficient": 1.0, "depth_coefficient": 0.3, "hidden_dim": 32,
                "kernel_sizes": [3, 3], "in_channels": [32, 16], "out_channels": [16, 32], "strides": [1, 2],
                "num_block_repeats": [1, 1], "expand_ratios": [1, 6], "depthwise_padding": [],
            }  # fmt: skip
            more = {"projection_dim": 32}
        if name == "ClapModel":
            sides["audio_config"] = {
                "spec_size": 64, "num_mel_bins": 16, "hidden_size": 32, "patch_embeds_hidden_size": 16,
                "depths": [1, 1], "num_attention_heads": [2, 2], "window_size": 4, "patch_size": 4,
                "patch_stride": [4, 4], "projection_dim": 24, "num_hidden_layers": 2, "enable_fusion": False,
            }  # fmt: skip
            del sides["vision_config"]
        configuration = getattr(transformers, kind)(**sides, **more)
    torch.manual_seed(seed)
    model = getattr(transformers, name)(configuration)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
            elif parameter_name.endswith("temperature"):
                parameter.fill_(0.2)
    return model


def inputs(name: str, batch: int = 5, seed: int = 0) -> dict[str, Any]:
    """Tokens with padding and an end, and images (or sounds), for `batch` pairs."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 99, (batch, 7), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        length = 3 + row % 4
        ids[row, length], ids[row, length + 1 :], mask[row, length + 1 :] = 2, 0, 0
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if name == "ClapModel":
        given["input_features"] = torch.randn(batch, 1, 256, 16, generator=generator)
    elif name == "Siglip2Model":
        given["pixel_values"] = torch.randn(batch, 16, 3 * 4 * 4, generator=generator)
        given["pixel_attention_mask"] = torch.ones(batch, 16, dtype=torch.int64)
        given["spatial_shapes"] = torch.tensor([[4, 4]] * batch)
    else:
        size = 32 if name in ("AlignModel", "GroupViTModel") else 30
        given["pixel_values"] = torch.randn(batch, 3, size, size, generator=generator)
    return given
