"""A sentence-transformers directory, or a plain encoder such as BERT, as a baseline.

The usual ones (a transformer, mean or class-token pooling, normalisation) run on transformers alone; others need the
package sentence-transformers.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip.errors import ConfigError, ModelError
from llm2clip.evaluation.text_encoder import WARM_UP, Encoded, TextEncoder
from llm2clip.files import read_json
from llm2clip.models.tokens import token_batches
from llm2clip.progress import Progress

_POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
_TOKEN_BUDGET = 8192


class SentenceEncoder(TextEncoder):
    """An encoder of the BERT kind.

    Args:
        folder: sentence-transformers directory (modules.json), or a transformers one, which is mean-pooled.
        device: where it computes.
        token_budget: tokens per forward pass, padding included; 0: 8192.

    Raises:
        ModelError: it cannot be loaded.
        ConfigError: it needs sentence-transformers, which is not installed.
    """

    def __init__(self, folder: Path, device: torch.device, token_budget: int = 0) -> None:
        self._folder, self._device, self._budget = folder, device, token_budget or _TOKEN_BUDGET
        self._host: Any = None
        plan = _plain_plan(folder)
        if plan is None:
            if importlib.util.find_spec("sentence_transformers") is None:
                raise ConfigError(
                    f"{folder} has modules beyond mean or class-token pooling; pip install sentence-transformers"
                )
            from sentence_transformers import SentenceTransformer

            self._host = SentenceTransformer(str(folder), device=str(device), local_files_only=True)
            self._pooling, self._length = "sentence-transformers", int(self._host.max_seq_length or 512)
            return
        self._pooling, inner, length, self._normalize = plan
        from transformers import AutoModel, AutoTokenizer

        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(inner, **options)
            self._model: Any = AutoModel.from_pretrained(inner, **options).to(device).eval()
        except Exception as error:  # transformers raises a dozen unrelated types here
            raise ModelError(f"cannot load {inner}: {type(error).__name__}: {error}") from error
        most = int(getattr(self._model.config, "max_position_embeddings", 512))
        self._length = min(length or most, int(self._tokenizer.model_max_length), most)

    def encode(self, texts: Sequence[str], progress: Progress) -> Encoded:
        if self._host is not None:
            self._host.encode(list(texts[:WARM_UP]))
            start = time.perf_counter()
            values = torch.from_numpy(self._host.encode(list(texts), convert_to_numpy=True)).float()
            seconds = time.perf_counter() - start
            progress.update(len(texts))
            return Encoded(values, seconds)
        self._embed(self._tokenize(texts[:WARM_UP])[0])
        start = time.perf_counter()
        ids, cut = self._tokenize(texts)
        values = self._embed(ids, progress)
        return Encoded(values, time.perf_counter() - start, sum(map(len, ids)), cut)

    def _tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """(token ids of each text, cut to the limit; how many were cut)."""
        # one token more than is used tells which ones are too long
        ids = self._tokenizer(list(texts), truncation=True, max_length=self._length + 1)["input_ids"]
        long = [row for row, own in enumerate(ids) if len(own) > self._length]
        if long:
            # again, so that the special token at the end stays
            cut = self._tokenizer([texts[row] for row in long], truncation=True, max_length=self._length)
            for row, own in zip(long, cut["input_ids"], strict=True):
                ids[row] = own
        return ids, len(long)

    @torch.no_grad()
    def _embed(self, ids: Sequence[Sequence[int]], progress: Progress | None = None) -> Tensor:
        out: Tensor | None = None
        for indices in token_batches([len(own) for own in ids], self._budget):
            inputs = self._tokenizer.pad({"input_ids": [ids[i] for i in indices]}, return_tensors="pt")
            inputs = inputs.to(self._device)
            states = self._model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None].float()
            values = states[:, 0] if self._pooling == "cls" else (states * mask).sum(1) / mask.sum(1)
            if self._normalize:
                values = torch.nn.functional.normalize(values, dim=1)
            if out is None:
                out = torch.empty(len(ids), values.shape[1])
            out[indices] = values.cpu()
            if progress is not None:
                progress.update(len(indices))
        return torch.zeros(0, 1) if out is None else out

    def describe(self) -> dict[str, Any]:
        model = self._model if self._host is None else self._host
        return {
            "kind": f"{'transformers' if self._host is None else 'sentence-transformers'} {self._folder.name}",
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "attention": "bidirectional",
            "pooling": self._pooling,
            "max_length": self._length,
        }


def _plain_plan(folder: Path) -> tuple[str, Path, int, bool] | None:
    """(pooling, directory of the transformer, longest text or 0, normalise); None where that is not all there is."""
    modules = folder / "modules.json"
    if not modules.is_file():
        return "mean", folder, 0, False
    kinds: dict[str, Path] = {}
    for module in read_json(modules, ModelError):
        kinds[str(module["type"]).rsplit(".", 1)[-1]] = folder / str(module.get("path") or "")
    if not {"Transformer", "Pooling"} <= set(kinds) <= {"Transformer", "Pooling", "Normalize"}:
        return None
    pooling = read_json(kinds["Pooling"] / "config.json", ModelError)
    # older files have a flag for each mode, newer ones its name
    chosen = [
        _POOLING.get(key, "?")
        for key, on in pooling.items()
        if key.startswith("pooling_mode_") and on is True
    ]
    if isinstance(pooling.get("pooling_mode"), str):
        chosen = [pooling["pooling_mode"]]
    if len(chosen) != 1 or chosen[0] not in _POOLING.values() or pooling.get("include_prompt") is False:
        return None
    inner = kinds["Transformer"]
    length = 0
    for name in (
        "sentence_bert_config.json",
        "sentence_roberta_config.json",
        "sentence_distilbert_config.json",
    ):
        if (inner / name).is_file():
            length = int(read_json(inner / name, ModelError).get("max_seq_length") or 0)
    if _instructed(folder):
        return None
    return chosen[0], inner, length, "Normalize" in kinds


def _instructed(folder: Path) -> bool:
    """Whether the model puts a prompt of its own before every text."""
    file = folder / "config_sentence_transformers.json"
    return file.is_file() and bool(read_json(file, ModelError).get("default_prompt_name"))
