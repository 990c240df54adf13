"""A decoder LLM as caption encoder: bidirectional attention, pooling, LoRA, fast encoding."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from llm2clip.errors import ModelError
from llm2clip.files import atomic_path, write_json
from llm2clip.models import bidirectional as attention
from llm2clip.models import lora, packed
from llm2clip.models.adapters import adapt, base_record
from llm2clip.models.fingerprint import tensors_digest, tokenizer_digest
from llm2clip.models.llm_files import DTYPES, ENCODER_CONFIG, load_llm, read_encoder_config, write_llm
from llm2clip.models.packed import PackedBatch
from llm2clip.models.pooling import pool
from llm2clip.models.quantization import is_quantized, require_unquantized
from llm2clip.models.templates import find_template
from llm2clip.models.tokens import CaptionBatch, CaptionTokenizer, Tokens, collate, token_batches
from llm2clip.progress import Progress
from llm2clip.settings import Layout, LLMSettings, LoraSettings, Pooling, Precision, Quantization, Template

log = logging.getLogger(__name__)

# CPU: products run at full speed from a few hundred tokens on, and their operands should stay in the cache
_TOKEN_BUDGETS = {"cpu": 1024}
_TOKEN_BUDGET = 8192
_DEFAULTS: dict[str, Any] = {
    "bidirectional": True, "pooling": "mean", "max_length": 512, "prompt": "", "template": "none"
}  # fmt: skip


class CaptionEncoder(nn.Module):
    """Embeds captions with a decoder LLM.

    Build it with `from_pretrained` or `from_settings`; the constructor takes loaded transformers objects.

    Attributes:
        model: the transformers base model, or the peft model around it once an adapter is there.
        tokenizer: the transformers tokenizer.
        dim: width of the embeddings.
        layout: how captions share a forward pass, `packed` (end to end, no padding) or `padded`.
        truncated: captions cut by `tokenize` and `encode` so far.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        bidirectional: bool = True,
        pooling: Pooling = "mean",
        max_length: int = 512,
        prompt: str = "",
        template: Template = "none",
        dim: int | None = None,
        layout: Layout = "auto",
    ) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ModelError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {pooling!r}")
        if pooling == "bos" and not bidirectional:
            raise ModelError(
                "pooling=bos takes the first token, which under causal attention has seen no other; use eos or last, "
                "or bidirectional=True"
            )
        chat = find_template(tokenizer, template)
        self.model = model
        self.tokenizer = tokenizer
        self.bidirectional, self.pooling, self.max_length, self.prompt, self.template = (
            bidirectional,
            pooling,
            max_length,
            prompt,
            chat.name,
        )
        width = int(lora.base_model(model).config.hidden_size)
        if dim is not None and not 1 <= dim <= width:
            raise ModelError(f"dim: expected 1 to {width}, the width of {type(model).__name__}, got {dim}")
        self.dim = width if dim is None else dim
        self.truncated = 0
        self._base_record: dict[str, Any] | None = None
        self._captions = CaptionTokenizer(
            tokenizer,
            max_length=max_length,
            prompt=prompt,
            needs_eos=pooling == "eos",
            needs_bos=pooling == "bos",
            template=chat,
        )
        base = lora.base_model(model)
        attention.set_attention(base, bidirectional=bidirectional)
        self.layout = _layout(base, layout, max_length, bidirectional)
        self._alone_above = packed.own_pack_above(base)
        attention.verify_attention(base, bidirectional=bidirectional)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        gguf_file: str | None = None,
        adapter: str | os.PathLike[str] | None = None,
        merge: Sequence[str | os.PathLike[str]] = (),
        dim: int | None = None,
        bidirectional: bool | None = None,
        pooling: Pooling | None = None,
        max_length: int | None = None,
        prompt: str | None = None,
        template: Template | None = None,
        layout: Layout = "auto",
        dtype: Precision = "fp32",
        quantization: Quantization = "none",
        device: str | torch.device = "cpu",
    ) -> CaptionEncoder:
        """Load an encoder from a local transformers directory or GGUF file.

        Args:
            path: model directory, or the folder of `gguf_file`.
            gguf_file: GGUF file inside `path`.
            adapter: peft LoRA directory to put on the model (frozen; `add_lora` makes it trainable).
            merge: peft LoRA directories that are merged into the weights before that, in order (LLM2Vec's chain:
                MNTP, then supervised).
            dim: only the first so many values of an embedding (Matryoshka); None: as recorded, else all.
            bidirectional, pooling, max_length, prompt, template: None takes what llm2clip_config.json (or LLM2Vec's
                llm2vec_config.json) beside the adapter, the last merged adapter or the model records, else True,
                "mean", 512, "" and "none". A value that differs from the record is used, with a warning.
            layout: `packed`, `padded`, or `auto`: packed where the model can (embeddings are the same).
            dtype: precision of the LLM's weights.
            quantization: `8bit` or `4bit` weights of the linear layers, through bitsandbytes.
            device: where the model goes.

        Raises:
            ModelError: the model or adapter cannot be used, the adapter was trained on another base, a layer
                does not follow the asked attention direction, or `packed` was asked for and is impossible.
        """
        model, tokenizer = load_llm(path, gguf_file, DTYPES[dtype], quantization=quantization, device=device)
        recorded = read_encoder_config(adapter or (merge[-1] if merge else path))
        given = {
            "bidirectional": bidirectional,
            "pooling": pooling,
            "max_length": max_length,
            "prompt": prompt,
            # `auto` was resolved when the model was trained
            "template": None if template == "auto" and "template" in recorded else template,
        }
        options = {name: _choose(name, value, recorded) for name, value in given.items()}
        model, record = adapt(model, merge, adapter)
        if not is_quantized(model):
            model = model.to(device)
        chosen = recorded.get("dim") if dim is None else dim
        encoder = cls(model, tokenizer, dim=chosen, layout=layout, **options).eval()
        encoder._base_record = record
        return encoder

    @classmethod
    def from_settings(cls, settings: LLMSettings, device: str | torch.device = "cpu") -> CaptionEncoder:
        """Load the encoder that a configuration describes."""
        return cls.from_pretrained(
            settings.path,
            gguf_file=settings.gguf_file,
            adapter=settings.adapter or None,
            merge=settings.merge,
            dim=settings.dim,
            bidirectional=settings.bidirectional,
            pooling=settings.pooling,
            max_length=settings.max_length,
            prompt=settings.prompt,
            template=settings.template,
            layout=settings.layout,
            dtype=settings.dtype,
            quantization=settings.quantization,
            device=device,
        )

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    def add_lora(self, settings: LoraSettings) -> None:
        """Add fresh LoRA adapters and freeze the rest; an adapter that is already loaded is trained on.

        Raises:
            ModelError: no target layer matches, or a loaded adapter has another rank or alpha.
        """
        if not lora.is_peft(self.model):
            self.model = lora.add_lora(self.model, settings)
            return
        loaded: Any = self.model
        config = loaded.peft_config["default"]
        if (config.r, float(config.lora_alpha)) != (settings.rank, float(settings.alpha)):
            raise ModelError(
                f"the loaded adapter has rank {config.r} and alpha {config.lora_alpha}, the settings ask "
                "for rank "
                f"{settings.rank} and alpha {settings.alpha}. Use the same, or merge it first "
                "(save_pretrained)."
            )
        config.inference_mode = False
        for name, parameter in loaded.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        lora.fuse(loaded, settings)

    def tokenize(
        self,
        texts: Sequence[str],
        prompts: Sequence[str] | None = None,
        windows: Sequence[float] | None = None,
    ) -> list[Tokens]:
        """Tokenise captions and count those that are cut.

        Args:
            texts: the captions.
            prompts: the instruction of each, instead of the encoder's own `prompt`.
            windows: what is kept of texts that are too long (`CaptionTokenizer`); None: their beginning.

        Raises:
            ValueError: an empty caption; the message names its index.
        """
        tokens = self._captions(texts, prompts, windows)
        self.truncated += sum(t.truncated for t in tokens)
        return tokens

    def collate(self, tokens: Sequence[Tokens], device: torch.device | str | None = None) -> CaptionBatch:
        """Pad captions on the right into one batch, on `device` (default: the model's)."""
        return collate(tokens, self._captions.pad_id, self.device if device is None else device)

    def forward(self, batch: CaptionBatch | PackedBatch) -> Tensor:
        """Embed a batch: (B, dim) fp32, not normalised, differentiable.

        A packed encoder takes padded batches too (and removes their padding); a padded one takes only those.
        """
        if self.layout == "packed":
            pack = packed.unpad(batch) if isinstance(batch, CaptionBatch) else batch
            return packed.pool_packed(self.token_states(pack), pack, self.pooling)[:, : self.dim]
        if isinstance(batch, PackedBatch):
            raise ModelError("a packed batch needs an encoder with layout=packed, this one has layout=padded")
        return pool(self.token_states(batch), batch.pool_mask, self.pooling)[:, : self.dim]

    def token_states(self, batch: CaptionBatch | PackedBatch) -> Tensor:
        """The LLM's last states of a batch in the encoder's layout: (T, dim) of a pack, (B, L, dim) of a padded one."""
        if isinstance(batch, PackedBatch):
            states: Tensor = self.model(**packed.model_inputs(batch)).last_hidden_state[0]
            return states
        base = lora.base_model(self.model)
        mask = attention.attention_mask(base, batch.attention_mask, bidirectional=self.bidirectional)
        with attention.attention_kernel(batch.input_ids):
            output = self.model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False)
        padded: Tensor = output.last_hidden_state
        return padded

    def embed(self, tokens: Sequence[Tokens], *, token_budget: int | None = None) -> Tensor:
        """Embed tokenised captions: (len(tokens), dim) fp32, not normalised, differentiable.

        Args:
            tokens: captions from `tokenize`.
            token_budget: as in `encode`.
        """
        if not tokens:
            return torch.zeros(0, self.dim, device=self.device)
        parts = list(self._embed_parts(tokens, token_budget))
        order = torch.tensor([i for indices, _ in parts for i in indices], device=self.device)
        return torch.cat([part for _, part in parts])[order.argsort()]

    def _embed_parts(
        self, tokens: Sequence[Tokens], token_budget: int | None
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Forward passes one after the other: the indices of their captions, and the embeddings of these."""
        budget = token_budget or _TOKEN_BUDGETS.get(self.device.type, _TOKEN_BUDGET)
        lengths = [len(t.ids) for t in tokens]
        if self.layout == "packed":
            for part in packed.make_packs(lengths, budget, self._alone_above):
                indices = part.tolist()
                yield indices, self(packed.flatten([tokens[i] for i in indices], self.device))
        else:
            for indices in token_batches(lengths, budget):
                yield indices, self(self.collate([tokens[i] for i in indices]))

    def encode(
        self,
        texts: Sequence[str],
        *,
        token_budget: int | None = None,
        normalize: bool = False,
        dim: int | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Embed captions without gradients, in evaluation mode.

        Captions are packed end to end, or batched by length, so that nothing or next to nothing is spent on
        padding; the result is in the order of `texts`. An embedding does not depend on what it shared a
        forward pass with, up to rounding.

        Args:
            texts: captions; one string is refused.
            token_budget: largest number of tokens in one forward pass, padding included; a longer caption
                has one of its own. None or 0: 1024 on a CPU, 8192 elsewhere.
            normalize: scale embeddings to unit length.
            dim: only the first so many values of each embedding (Matryoshka), cut before they are scaled; None: all.
            progress: counts captions as they are done.

        Returns:
            (len(texts), dim) fp32 on the CPU.

        Raises:
            ValueError: an empty caption (the message names its index), or a `dim` that is not 1 to `self.dim`.
        """
        if isinstance(texts, str):
            raise TypeError("encode takes a list of captions, got one string; write encode([caption])")
        tokens = self.tokenize(texts)
        return self.encode_tokens(
            tokens, token_budget=token_budget, normalize=normalize, dim=dim, progress=progress
        )

    @torch.no_grad()
    def encode_tokens(
        self,
        tokens: Sequence[Tokens],
        *,
        token_budget: int | None = None,
        normalize: bool = False,
        dim: int | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """`encode` for captions that `tokenize` has prepared (on another thread, say)."""
        width = self.dim if dim is None else dim
        if not 1 <= width <= self.dim:
            raise ValueError(f"dim: expected 1 to {self.dim}, the encoder's dimension, got {dim}")
        result = torch.empty(len(tokens), width, dtype=torch.float32)
        training = self.training
        self.eval()
        try:
            for indices, embeddings in self._embed_parts(tokens, token_budget):
                embeddings = embeddings[:, :width]
                if normalize:
                    embeddings = nn.functional.normalize(embeddings, dim=-1)
                result[indices] = embeddings.float().cpu()
                if progress is not None:
                    progress.update(len(indices))
        finally:
            self.train(training)
        return result

    def fingerprint(self) -> dict[str, Any]:
        """What the embeddings depend on; equal fingerprints mean equal embeddings. Hashes every weight."""
        return self._fingerprint(self.model)

    def _fingerprint(self, model: Any) -> dict[str, Any]:
        base = lora.base_model(model)
        options = self._options()
        if self.template == "none":
            del options["template"]  # as in stores that were made before there were templates
        return {
            "model_type": str(base.config.model_type),
            "dim": self.dim,
            "dtype": next(name for name, dtype in DTYPES.items() if dtype == next(base.parameters()).dtype),
            "weights": tensors_digest(lora.base_tensors(model)),
            "adapter": lora.adapter_digest(model),
            "tokenizer": tokenizer_digest(self.tokenizer),
            **options,
        }

    def base_record(self) -> dict[str, Any]:
        """What llm2clip_config.json says of the base model; hashes its weights, the first time."""
        if self._base_record is None:
            self._base_record = base_record(self.model)
        return self._base_record

    def save_adapter(self, path: str | os.PathLike[str], *, notes: Mapping[str, Any] | None = None) -> None:
        """Write the adapter as a plain peft directory plus llm2clip_config.json, atomically.

        The record has the options, the dimension, what it was trained on (`base`), the parts of the fingerprint that
        do not depend on the precision of the base, and `notes`.
        """
        if not lora.is_peft(self.model):
            raise ModelError("there is no adapter to save; call add_lora first or use save_pretrained")
        adapted: Any = self.model
        base = self.base_record()
        with atomic_path(path) as folder:
            folder.mkdir()
            # "auto" would look for the base model on the hub
            adapted.save_pretrained(folder, save_embedding_layers=False)
            parts = {
                "adapter": lora.adapter_digest(adapted),
                "tokenizer": tokenizer_digest(self.tokenizer),
            }
            record = {**self._options(), "dim": self.dim, **(notes or {}), "base": base, "fingerprint": parts}
            write_json(folder / ENCODER_CONFIG, record)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a plain transformers directory with the adapter merged in, atomically.

        It loads with `transformers.AutoModel` alone (the attention direction is in config.json) and with
        `from_pretrained`, which finds pooling, prompt, template, length limit and dimension in llm2clip_config.json.
        That file has the merged encoder's fingerprint, too.
        """
        model: Any = self.model
        require_unquantized(lora.base_model(model))
        if lora.is_peft(model):
            model = copy.deepcopy(model).merge_and_unload()
        record = {**self._options(), "dim": self.dim, "fingerprint": self._fingerprint(model)}
        write_llm(model, self.tokenizer, path, extra=record)

    def _options(self) -> dict[str, Any]:
        return {
            "bidirectional": self.bidirectional,
            "pooling": self.pooling,
            "max_length": self.max_length,
            "prompt": self.prompt,
            "template": self.template,
        }


def _layout(
    model: nn.Module, wanted: str, max_length: int, bidirectional: bool
) -> Literal["packed", "padded"]:
    """The layout a model gets; packed attention is installed where it is `packed`."""
    if wanted not in ("auto", "packed", "padded"):
        raise ModelError(f"layout must be auto, packed or padded, got {wanted!r}")
    if wanted == "padded":
        return "padded"
    reason = packed.refusal(model, max_length) or packed.install_tried(model, bidirectional=bidirectional)
    if reason and wanted == "packed":
        raise ModelError(f"layout=packed is not possible for {type(model).__name__}: {reason}")
    if reason:
        log.info("captions are padded, %s cannot run packed: %s", type(model).__name__, reason)
        return "padded"
    return "packed"


def _choose(name: str, given: Any, recorded: dict[str, Any]) -> Any:
    if given is None:
        return recorded.get(name, _DEFAULTS[name])
    if name in recorded and recorded[name] != given:
        warnings.warn(
            f"{name}={given!r} differs from {recorded[name]!r}, with which the model was trained",
            stacklevel=3,
        )
    return given
