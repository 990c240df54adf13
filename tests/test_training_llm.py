"""The contrastive LLM stage with a tiny model: exact gradients in packs, options of loss and memory, what is saved."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm2clip.config import from_tree, load_settings, to_tree
from llm2clip.errors import ConfigError, ModelError
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.llm_files import read_encoder_config
from llm2clip.models.lora import base_model
from llm2clip.settings import FinetuneLLMSettings
from llm2clip.training import gradient_cache
from llm2clip.training.llm_task import LLMTask, PairEmbedder, PairTokens
from llm2clip.training.loop import train
from llm2clip.training.run import finetune_llm
from tests.test_training_tasks import interrupt
from tests.tiny_models import save_tiny
from tests.training_kit import ALONE, Interrupted, Kit, assert_same_run, curve, make_kit, records, write_set


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return make_kit(tmp_path_factory.mktemp("kit"))


def merged(tree: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    for name, value in change.items():
        old = tree.get(name)
        # mappings that are no group of settings are replaced
        tree[name] = (
            merged(old, value) if isinstance(old, dict) and old and isinstance(value, dict) else value
        )
    return tree


def stage(kit: Kit, out: Path, change: dict[str, Any] | None = None, **run: Any) -> FinetuneLLMSettings:
    """A tiny LLM stage with some settings changed."""
    return from_tree(FinetuneLLMSettings, merged(to_tree(kit.llm_stage(out, **run)), change or {}))


def stir(module: torch.nn.Module) -> None:
    """Adapters that are not zero, which would hide gradients."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                torch.manual_seed(len(name))
                parameter.normal_(std=0.1)


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def pair_tokens(encoder: CaptionEncoder, short: list[str], long: list[str]) -> PairTokens:
    keys = torch.arange(3 * len(short)).reshape(-1, 3)
    return PairTokens(encoder.tokenize(short), encoder.tokenize(long), keys)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_pairs_keep_their_order_whatever_their_lengths(kit: Kit, layout: Any) -> None:
    encoder = CaptionEncoder.from_pretrained(kit.root / "llm", layout=layout)
    short = ["a much longer text than the next", "b", "of middle length", "c" * 60, "dd"]
    long = ["x", "y" * 50, "z" * 3, "w w w w w w", "v" * 20]
    tokens = replace(
        pair_tokens(encoder, short, long),
        negative=encoder.tokenize(["n" * 40, "m"]),
        negative_keys=torch.zeros(2, 3, dtype=torch.int64),
    )
    with torch.no_grad():
        out = PairEmbedder(encoder)(tokens)
        none = PairEmbedder(encoder)(replace(tokens, negative=[], negative_keys=tokens.keys[:0]))
    for name, texts in (("query", short), ("positive", long), ("negative", ["n" * 40, "m"])):
        one_by_one = torch.cat([encoder.encode([text]) for text in texts])
        torch.testing.assert_close(out[name], one_by_one, rtol=1e-4, atol=1e-5)
    assert none["negative"].shape == (0, 32) and out["truncated"].tolist() == [[0, 0]] * 5


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_packs_give_the_gradients_of_one_graph_in_fp64(kit: Kit, tmp_path: Path, dropout: float) -> None:
    """Hard negatives, masks and a learned scale included; with dropout both forwards of a pack draw the same masks."""
    change = {
        "llm": {"layout": "packed"},
        "pairs": {"negatives": "random"},
        "loss": {"learn_scale": True},
        "token_budget": 90,
    }
    task = LLMTask(stage(kit, tmp_path, change, dropout=dropout, batch_size=14), ALONE)
    module = task.module.double().train()
    stir(module)
    _, samples = next(task.batches(0, 0))
    chunks = task.chunks([*samples, samples[0]], 0)
    assert len(chunks) > 3 and sum(map(len, chunks)) == 15
    for chunk in chunks:
        tokens = sum(len(t.ids) for t in (*chunk.query, *chunk.positive, *(chunk.negative or ())))
        assert tokens <= 90 or len(chunk) == 1

    torch.manual_seed(5)
    parts = [module(chunk) for chunk in chunks]
    whole = {n: parts[0][n] if parts[0][n].dim() == 0 else torch.cat([p[n] for p in parts]) for n in parts[0]}
    expected, _ = task.loss(whole)
    expected.backward()
    want = gradients(module)
    module.zero_grad()
    torch.manual_seed(5)
    loss, _ = gradient_cache.backward(module, chunks, task.loss, ALONE.device)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    assert "logit_scale" in want and len(want) > 20
    for name, gradient in gradients(module).items():
        torch.testing.assert_close(
            gradient, want[name], rtol=1e-8, atol=1e-12 * want[name].abs().max().item()
        )
        assert gradient.abs().max() > 0


def test_packs_give_the_gradients_of_one_padded_batch(kit: Kit, tmp_path: Path) -> None:
    found: dict[str, dict[str, Tensor]] = {}
    for name, layout, budget in (("padded", "padded", 0), ("whole", "packed", 0), ("cached", "packed", 90)):
        change = {"llm": {"layout": layout}, "token_budget": budget}
        task = LLMTask(stage(kit, tmp_path / name, change, dropout=0.0, batch_size=10), ALONE)
        assert task.encoder.layout == layout
        task.module.double()
        stir(task.module)
        _, samples = next(task.batches(0, 0))
        gradient_cache.backward(task.module, task.chunks(samples, 0), task.loss, ALONE.device)
        found[name] = gradients(task.module)
    for name, gradient in found["padded"].items():
        for other in ("whole", "cached"):
            torch.testing.assert_close(
                found[other][name], gradient, rtol=1e-8, atol=1e-12 * gradient.abs().max().item()
            )


@pytest.mark.slow
def test_a_batch_of_2048_pairs_needs_the_memory_of_a_pack(kit: Kit, tmp_path: Path) -> None:
    path = write_set(tmp_path / "many.tar", records(2100))
    change = {"data": {"train": [str(path)]}, "token_budget": 600}
    task = LLMTask(stage(kit, tmp_path / "run", change, batch_size=2048), ALONE)
    widest: list[int] = []
    base_model(task.encoder.model).layers[0].register_forward_pre_hook(
        lambda module, args: widest.append(args[0].shape[1])
    )
    _, samples = next(task.batches(0, 0))
    assert len(samples) == 2048
    loss, _ = gradient_cache.backward(task.module, task.chunks(samples, 0), task.loss, ALONE.device)
    assert max(widest) <= 600 and len(widest) > 400
    assert 0 < loss.item() < 48 and gradients(task.module)


@pytest.mark.parametrize(
    "change", [{"token_budget": 120}, {"loss": {"learn_scale": True}}, {"objective": "simcse"}]
)
def test_runs_resume_bitwise(kit: Kit, tmp_path: Path, change: dict[str, Any]) -> None:
    def settings(out: Path) -> FinetuneLLMSettings:
        return stage(kit, out, change | {"pairs": {"negatives": "random"}}, steps=4, save_every=2)

    finetune_llm(settings(tmp_path / "whole"))
    part = settings(tmp_path / "parts")
    with pytest.raises(Interrupted):
        train(interrupt(LLMTask(part, ALONE), 3), part.run, part.optim, ALONE)
    finetune_llm(part)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_learned_scale_moves_and_keeps_its_bounds(kit: Kit, tmp_path: Path) -> None:
    change = {"loss": {"learn_scale": True, "scale": 30.0, "max_scale": 40.0}, "optim": {"weight_decay": 0.5}}
    task = LLMTask(stage(kit, tmp_path, change), ALONE)
    assert [name for name, _ in task.groups()["logit_scale"]] == ["logit_scale"]
    assert all("lora_" in name for name, _ in task.groups()["lora"])
    scale: Any = task.module.logit_scale
    for value, bounded in ((9.0, 40.0), (-1.0, 1.0), (3.0, 20.0855)):
        with torch.no_grad():
            scale.fill_(value)
        task.after_step()
        assert scale.exp().item() == pytest.approx(bounded, rel=1e-4)
    finetune_llm(stage(kit, tmp_path / "run", change, steps=3, lr=1e-2))
    scales = [line["scale"] for line in curve(tmp_path / "run") if "scale" in line]
    assert scales[0] == pytest.approx(30.0) and len(set(scales)) == 3


def test_options_are_recorded_and_held_out_recall_is_logged(kit: Kit, tmp_path: Path) -> None:
    change = {"loss": {"matryoshka": [8, 16]}, "llm": {"max_length": 40}}
    result = finetune_llm(stage(kit, tmp_path, change, steps=2))
    notes = read_encoder_config(result)
    assert notes["matryoshka"] == [32, 16, 8] and notes["objective"] == "contrastive"
    first, last = curve(tmp_path)[0], curve(tmp_path)[-1]
    assert 0.3 < first["truncated"] < 0.7  # descriptions are longer than 40 bytes, names are not
    assert last["val/pairs"] == 12
    encoder = CaptionEncoder.from_pretrained(kit.root / "llm", adapter=result)
    held = [(r["name"], r["description"]) for r in records(12, 100)]
    short, long = (encoder.encode([pair[i] for pair in held], normalize=True) for i in range(2))
    found = ((short @ long.T).argmax(1) == torch.arange(12)).double().mean().item()
    assert last["val/short_to_long_r1"] == pytest.approx(100 * found)


def test_held_out_data_without_captions_does_not_lose_the_run(
    kit: Kit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "held.txt").write_text("only text\n")
    with caplog.at_level(logging.WARNING, "llm2clip.training"):
        result = finetune_llm(
            stage(kit, tmp_path / "run", {"data": {"val": [str(tmp_path / "held.txt")]}}, steps=1)
        )
    assert (result / "adapter_model.safetensors").exists() and "no evaluation on data.val" in caplog.text


def test_matryoshka_wider_than_the_model_is_refused_at_the_start(kit: Kit, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="64 dimensions are more than the 32"):
        finetune_llm(stage(kit, tmp_path, {"loss": {"matryoshka": [64]}}))


def test_instructions_reach_the_model_and_not_the_pooling(kit: Kit, tmp_path: Path) -> None:
    change = {"pairs": {"instructions": {"short": "find: ", "long": "name: "}}, "llm": {"prompt": "all "}}
    task = LLMTask(stage(kit, tmp_path, change, batch_size=20), ALONE)
    _, samples = next(task.batches(0, 0))
    (chunk,) = task.chunks(samples, 0)
    decode = task.encoder.tokenizer.decode
    heads = {decode(t.ids[: t.pool_start]) for t in chunk.query}
    assert heads == {"all find: ", "all name: "}
    assert {decode(t.ids[: t.pool_start]) for t in chunk.positive} == {"all "}
    texts = sorted(decode(t.ids[t.pool_start :]) for t in chunk.query)
    assert texts == sorted(pair.query for pair in samples)


def test_checkpointing_changes_no_gradient(kit: Kit, tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        change = {"gradient_checkpointing": checkpointing, "token_budget": 150}
        task = LLMTask(stage(kit, tmp_path, change, dropout=0.3), ALONE)
        layer = base_model(task.encoder.model).layers[0]
        calls: list[int] = []
        # before it runs: checkpointing leaves off as soon as it has what the backward needs
        layer.mlp.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        task.module.train()
        stir(task.module)
        _, samples = next(task.batches(0, 0))
        torch.manual_seed(1)
        chunks = task.chunks(samples, 0)
        gradient_cache.backward(task.module, chunks, task.loss, ALONE.device)
        assert len(calls) == (3 if checkpointing else 2) * len(chunks)
        found.append(gradients(task.module))
    for name, gradient in found[0].items():
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item()
        )


def test_attention_dropout_pads_and_makes_simcse_pairs_differ(kit: Kit, tmp_path: Path) -> None:
    change = {"objective": "simcse", "attention_dropout": 0.3}
    task = LLMTask(stage(kit, tmp_path, change, dropout=0.0), ALONE)
    assert task.encoder.layout == "padded"
    _, samples = next(task.batches(0, 0))
    (chunk,) = task.chunks(samples, 0)
    for training in (True, False):
        out = task.module.train(training)(chunk)
        assert torch.allclose(out["query"], out["positive"], atol=1e-4) is not training
    with pytest.raises(ConfigError, match="packed attention has none"):
        LLMTask(stage(kit, tmp_path, change | {"llm": {"layout": "packed"}}), ALONE)


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "eos", "last", "bos"])
def test_every_pooling_trains(kit: Kit, tmp_path: Path, pooling: str) -> None:
    result = finetune_llm(stage(kit, tmp_path, {"llm": {"pooling": pooling}}, steps=2))
    assert read_encoder_config(result)["pooling"] == pooling


def test_pooling_the_first_token_needs_attention_to_both_sides(kit: Kit, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="pooling=bos takes the first token"):
        LLMTask(stage(kit, tmp_path, {"llm": {"pooling": "bos", "bidirectional": False}}), ALONE)


def test_query_files_and_captions_train_together(kit: Kit, tmp_path: Path) -> None:
    rows = [{"query": f"ask {n}", "positive": f"say {n}", "negative": f"not {n}"} for n in range(30)]
    (tmp_path / "e5.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = kit.data() | {"train": [*kit.data()["train"], str(tmp_path / "e5.jsonl")]}
    change = {
        "data": data,
        "pairs": {"instructions": {"e5": "find: "}},
        "loss": {"kind": "hard_negative", "scale": 50},
    }
    finetune_llm(stage(kit, tmp_path / "run", change, steps=8, batch_size=8))
    assert len([line for line in curve(tmp_path / "run") if "loss" in line]) == 8


@pytest.mark.parametrize("name", ["smollm2-openstax", "llama3-8b-paper"])
def test_recipes_are_valid_settings(name: str) -> None:
    folder = Path(__file__).resolve().parents[1] / "configs" / "llm"
    assert {path.stem for path in folder.iterdir()} == {"smollm2-openstax", "llama3-8b-paper"}
    settings = load_settings(FinetuneLLMSettings, folder / f"{name}.yaml", ["run.out=runs/x"])
    assert settings.objective == "contrastive" and settings.lora.rank == 16


def test_quantisation_without_bitsandbytes_says_what_to_install(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a)
    )
    with pytest.raises(ModelError, match=r"pip install 'llm2clip\[quantized\]'"):
        CaptionEncoder.from_pretrained(kit.root / "llm", quantization="4bit")
    with pytest.raises(ModelError, match="does not go with a GGUF file"):
        (tmp_path / "a.gguf").write_bytes(b"GGUF")
        CaptionEncoder.from_pretrained(tmp_path, gguf_file="a.gguf", quantization="4bit")
    with pytest.raises(ConfigError, match="quantised weights cannot be split"):
        stage(kit, tmp_path, {"llm": {"quantization": "8bit"}, "run": {"parallel": "fsdp"}})


def test_quantised_weights_train_and_their_adapter_loads(kit: Kit, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="quantised weights need bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}  # whole blocks of 64
    llm = save_tiny(tmp_path / "llm", **sizes)

    def change(kind: str) -> dict[str, Any]:
        return {"llm": {"quantization": kind, "dtype": "bf16", "path": str(llm)}}

    with pytest.raises(ConfigError, match="no gradients for 4-bit weights on a CPU"):
        LLMTask(stage(kit, tmp_path / "none", change("4bit")), ALONE)
    result = finetune_llm(
        stage(kit, tmp_path / "run", change("8bit"), steps=40, batch_size=20, lr=2e-2, dropout=0.0)
    )
    losses = [line["loss"] for line in curve(tmp_path / "run") if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    plain = CaptionEncoder.from_pretrained(llm, adapter=result).encode(["a red stone"])
    kinds: tuple[Any, ...] = ("8bit", "4bit")
    prints: set[str] = set()
    for kind in kinds:
        encoder = CaptionEncoder.from_pretrained(llm, adapter=result, dtype="bf16", quantization=kind)
        modules = {type(p).__module__.split(".")[0] for p in base_model(encoder.model).parameters()}
        assert "bitsandbytes" in modules
        assert 0.8 < torch.cosine_similarity(encoder.encode(["a red stone"]), plain).item() < 0.99999
        prints.add(json.dumps(encoder.fingerprint()))
        with pytest.raises(ModelError, match="cannot be merged and exported"):
            encoder.save_pretrained(tmp_path / "export")
    assert len(prints) == 2
