"""Content hashes that say which embeddings belong together.

Two encoders with the same fingerprint give the same embeddings; whatever changes an embedding (a weight, the
adapter, the tokenizer, pooling, prompt, attention direction, length limit, precision) changes it. Hashes are
of content, never of paths, so a GGUF file and the directory converted from it agree.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

_HASHING = 2  # threads


def tensor_digest(tensor: Tensor) -> bytes:
    """Hash of dtype, shape and every byte of a tensor."""
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    data = tensor.detach().cpu().contiguous()
    if data.numel():
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def tensors_digest(tensors: Iterable[tuple[str, Tensor]], *, dtype: torch.dtype | None = None) -> str:
    """Hash of named tensors, independent of their order; `dtype` casts them first.

    Hashing in bf16 makes the result independent of the precision the weights were loaded in: fp32 weights
    rounded to bf16 equal the same weights loaded as bf16.
    """
    named = sorted(tensors, key=lambda item: item[0])
    digests: list[bytes] = []
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(_HASHING) as pool:  # hashing releases the interpreter lock
        for _, tensor in named:
            # cast here, as torch has threads of its own for that, and a few at a time, as casts take memory
            waiting.append(pool.submit(tensor_digest, tensor if dtype is None else tensor.detach().to(dtype)))
            if len(waiting) > _HASHING:
                digests.append(waiting.popleft().result())
        digests += [future.result() for future in waiting]
    total = hashlib.blake2b(digest_size=16)
    for (name, _), digest in zip(named, digests, strict=True):
        total.update(name.encode() + b"\0" + digest)
    return total.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash of what a fast tokenizer does: its whole definition, without padding and truncation state."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition.pop("padding", None)
    definition.pop("truncation", None)
    special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    return json_digest({"definition": definition, "special": special})


def json_digest(value: Any) -> str:
    """Hash of a JSON value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
