"""Small random checkpoints in the layouts that LLM2Vec and LLM2CLIP publish their language models in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer

TARGETS = ("q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MNTP = "McGill-NLP/LLM2Vec-Meta-Llama-3-8B-Instruct-mntp"
# running it would be the failure
REMOTE_CODE = 'raise RuntimeError("code of the checkpoint was run")\n'


def llm2vec_adapter(
    folder: Path,
    base: Any,
    *,
    prefix: str = "base_model.model.",
    rank: int = 4,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A directory like `LLM2Vec-Meta-Llama-3-8B-Instruct-mntp`: adapter, config.json with remote code, tokenizer.

    Args:
        folder: where it goes.
        base: the tiny transformers model that it adapts.
        prefix: what stands before `layers.` in the names; `base_model.model.` as peft writes them for a bare decoder.
        rank: of the update.
        seed: of its weights.
        changes: entries of adapter_config.json that are another.
    """
    folder.mkdir(parents=True)
    config = {
        "alpha_pattern": {},
        "auto_mapping": {
            "base_model_class": "LlamaEncoderModel",
            "parent_library": f"transformers_modules.{MNTP.replace('/', '.')}.0.modeling_llama_encoder",
        },
        "base_model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.05,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(TARGETS),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in base.named_parameters():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in TARGETS:
            out, width = parameter.shape
            tensors[f"{prefix}{module}.lora_A.weight"] = torch.randn(rank, width, generator=generator) / 8
            tensors[f"{prefix}{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator) / 8
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    base.config.save_pretrained(folder)
    _edit(
        folder / "config.json",
        _name_or_path="meta-llama/Meta-Llama-3-8B-Instruct",
        architectures=["LlamaForCausalLM"],
        auto_map={"AutoModel": "modeling_llama_encoder.LlamaEncoderModel"},
        transformers_version="4.40.1",
    )
    (folder / "modeling_llama_encoder.py").write_text(REMOTE_CODE)
    (folder / "attn_mask_utils.py").write_text(REMOTE_CODE)
    settings = {
        "pooling_mode": "weighted_mean",
        "max_length": 400,
        "doc_max_length": 400,
        "skip_instruction": True,
    }
    (folder / "llm2vec_config.json").write_text(json.dumps(settings))
    tiny_tokenizer().save_pretrained(folder)
    return folder


def llm2clip_checkpoint(folder: Path, *, prefix: str = "", seed: int = 0, **changes: Any) -> Path:
    """A directory like `LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned`: sharded weights, code in another repository.

    Args:
        folder: where it goes.
        prefix: what stands before the names of the weights: "" (the bare class) or `model.`.
        seed: of the weights.
        changes: entries of config.json that are another.
    """
    folder.mkdir(parents=True)
    model = tiny_model("llama", seed=seed)
    model.config.save_pretrained(folder)
    _edit(
        folder / "config.json",
        **{
            "_name_or_path": "microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned",
            "architectures": ["LlamaEncoderModel"],
            "auto_map": {"AutoModel": f"{MNTP}--modeling_llama_encoder.LlamaEncoderModel"},
            "torch_dtype": "bfloat16",
            "transformers_version": "4.44.2",
        }
        | changes,
    )
    tensors = {f"{prefix}{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tiny_tokenizer().save_pretrained(folder)
    return folder


def plain_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    """The same weights as `llm2clip_checkpoint(seed=seed)` in the layout of transformers."""
    return save_tiny(folder, "llama", seed=seed)


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
