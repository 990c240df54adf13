"""Reading and writing decoder LLMs: transformers directories and GGUF files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm2clip.errors import ModelError
from llm2clip.files import atomic_path, read_json
from llm2clip.models.llm_layouts import llm2vec_options, llm_config, refuse_adapter_alone
from llm2clip.models.quantization import quantized_loading
from llm2clip.models.weights import require_plausible, weight_files
from llm2clip.settings import Quantization

ENCODER_CONFIG = "llm2clip_config.json"
"""Our file beside a model or adapter: how it was trained to be used, and for adapters the base's hash."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_llm(
    path: str | os.PathLike[str],
    gguf_file: str | None,
    dtype: torch.dtype,
    *,
    quantization: Quantization = "none",
    device: str | torch.device = "cpu",
) -> tuple[Any, Any]:
    """Load base model (no language-model head) and tokenizer from a local directory.

    Args:
        path: directory with config.json, weights and tokenizer, or the folder of a GGUF file.
        gguf_file: name of the GGUF file in `path`; its weights are dequantised to `dtype`.
        dtype: dtype of the weights.
        quantization: whether linear layers are loaded in 8 or 4 bits; then the model is on `device`.
        device: read for a quantised model, others are on the CPU.

    Returns:
        (model, tokenizer): transformers objects; the model in eval mode, all weights frozen.

    Raises:
        ModelError: the directory, a file in it or the architecture cannot be used, or weights are missing.
    """
    folder = Path(path)
    _check_folder(folder, gguf_file)
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    # never asked: what a checkpoint brings as code is not run
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if gguf_file is not None:
        source["gguf_file"] = gguf_file
    where = folder / gguf_file if gguf_file else folder
    quantized = quantized_loading(quantization, dtype, device, gguf_file)
    try:
        config = llm_config(folder) if gguf_file is None else AutoConfig.from_pretrained(folder, **source)
        if gguf_file is None:
            require_plausible(config, weight_files(folder), os.fspath(where))
        else:
            require_plausible(
                config, [folder / gguf_file], os.fspath(where), _gguf_tensors(folder / gguf_file)
            )
        source["config"] = config
        tokenizer = AutoTokenizer.from_pretrained(folder, **source)
        model, report = AutoModel.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **source, **quantized
        )
    except ModelError:
        raise
    except Exception as error:  # transformers, safetensors and gguf raise a dozen unrelated types here
        raise ModelError(
            f"cannot load an LLM from {where}: {type(error).__name__}: {_first_lines(error)}. Expected a "
            "transformers decoder (config.json, safetensors, tokenizer.json) or a GGUF file (with gguf_file)."
        ) from error
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise ModelError(
            f"{where} lacks {len(missing)} weights of {type(model).__name__}, for example "
            f"{', '.join(missing[:5])}; the files are incomplete or belong to another architecture"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{where} has no fast tokenizer (tokenizer.json); convert it with transformers first"
        )
    # multimodal checkpoints (Gemma 3) hold the decoder inside
    model = getattr(model, "language_model", model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{where} is an encoder-decoder ({type(model).__name__}); a decoder LLM is needed")
    if not quantized:
        _forget_quantization(model)
    return model.eval().requires_grad_(False), tokenizer


def write_llm(
    model: nn.Module, tokenizer: Any, path: str | os.PathLike[str], extra: dict[str, Any] | None = None
) -> None:
    """Write a plain transformers directory atomically; `extra` becomes llm2clip_config.json."""
    from safetensors.torch import save_file

    config: Any = model.config
    with atomic_path(path) as folder:
        folder.mkdir()
        # not model.save_pretrained: it refuses models that came from a GGUF file, dequantised or not
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if extra is not None:
            from llm2clip.files import write_json

            write_json(folder / ENCODER_CONFIG, extra)


def convert_gguf(path: str | os.PathLike[str], gguf_file: str, out: str | os.PathLike[str]) -> Path:
    """Write a GGUF model as a plain fp32 transformers directory, once; it then loads in a second or two.

    Args:
        path: folder of the GGUF file.
        gguf_file: its name.
        out: directory to create (atomically). One that is already there is kept, so calling again is free.

    Returns:
        `out` as a path.
    """
    target = Path(out)
    if (target / "config.json").is_file() and (target / "model.safetensors").is_file():
        return target
    model, tokenizer = load_llm(path, gguf_file, torch.float32)
    write_llm(model, tokenizer, target)
    return target


def read_encoder_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Our notes beside a model or adapter, else LLM2Vec's; empty where there are none."""
    file = Path(folder) / ENCODER_CONFIG
    if not file.is_file():
        return llm2vec_options(Path(folder))
    value = read_json(file, ModelError)
    if not isinstance(value, dict):
        raise ModelError(f"{file} must hold a JSON object, got {type(value).__name__}")
    return value


def _check_folder(folder: Path, gguf_file: str | None) -> None:
    if not folder.is_dir():
        raise ModelError(
            f"model directory {folder} does not exist. Give llm.path a local directory in the transformers "
            "layout "
            "(nothing is downloaded), or the folder of a GGUF file together with llm.gguf_file."
        )
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            found = sorted(p.name for p in folder.glob("*.gguf"))
            raise ModelError(
                f"{folder} has no file {gguf_file!r}; GGUF files there: {', '.join(found) or 'none'}"
            )
        _require("gguf", "accelerate")
        return
    refuse_adapter_alone(folder)
    if not (folder / "config.json").is_file():
        found = sorted(p.name for p in folder.glob("*.gguf"))
        hint = f" It holds {found[0]}: set llm.gguf_file to that." if found else ""
        raise ModelError(f"{folder} has no config.json, so it is not a transformers model directory.{hint}")


def _gguf_tensors(file: Path) -> int:
    """How many tensors a GGUF file has, from its header; a layer has at least one."""
    with open(file, "rb") as handle:
        return int.from_bytes(handle.read(16)[8:], "little")


def _require(*packages: str) -> None:
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"GGUF files need {' and '.join(missing)}: pip install {' '.join(missing)}")


def _forget_quantization(model: Any) -> None:
    # a dequantised GGUF model is an ordinary one, but still says that it is quantised, and then refuses
    # saving and fine-tuning
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)
    for name in ("is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)


def _first_lines(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + " ..."
