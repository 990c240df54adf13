"""Chains of adapters, published layouts without their code, and adapters that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm2clip.errors import ModelError
from llm2clip.models import CaptionEncoder
from llm2clip.models.adapters import merge_adapters, read_adapter
from llm2clip.models.llm_files import read_encoder_config
from llm2clip.settings import LLMSettings, LoraSettings
from tests.published_llm import llm2clip_checkpoint, llm2vec_adapter, plain_checkpoint
from tests.tiny_models import FAMILIES, save_tiny, tiny_model

CAPTIONS = ["a dog", "two cats on a mat", "x", "the quick brown fox"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_checkpoint(tmp_path_factory.mktemp("llm") / "base")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """MNTP, supervised and a third adapter in LLM2Vec's layout."""
    root, model = tmp_path_factory.mktemp("chain"), tiny_model("llama")
    return [llm2vec_adapter(root / name, model, seed=seed) for seed, name in enumerate("abc", 1)]


def own_adapter(encoder: CaptionEncoder, folder: Path, seed: int = 5) -> Path:
    torch.manual_seed(seed)
    encoder.add_lora(LoraSettings(rank=4, alpha=8.0, dropout=0.0))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.05)
    encoder.save_adapter(folder)
    return folder


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Name of a weight -> scaling · B A, from the files alone."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            key = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[f"{key}.weight"] = (b.double() @ a.double()) * config["lora_alpha"] / config["r"]
    return found


def test_a_chain_is_the_sum_of_its_products(base: Path, chain: list[Path]) -> None:
    merged: Any = CaptionEncoder.from_pretrained(base, merge=chain).model
    plain = CaptionEncoder.from_pretrained(base).model.state_dict()
    assert not hasattr(merged, "peft_config")
    for name, tensor in merged.state_dict().items():
        expected = plain[name].double() + sum(deltas(f).get(name, torch.zeros(())) for f in chain)
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=1e-6, msg=name)


def test_merged_or_on_top_gives_the_same_embeddings(base: Path, chain: list[Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    whole = CaptionEncoder.from_pretrained(base, merge=chain)
    on_top = CaptionEncoder.from_pretrained(base, merge=chain[:2], adapter=chain[2])
    torch.testing.assert_close(on_top.encode(CAPTIONS), whole.encode(CAPTIONS), atol=1e-5, rtol=1e-5)
    # peft's own way, one after the other
    model = AutoModel.from_pretrained(base)
    for folder in chain:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    for one, two in zip(whole.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)


def test_a_chain_in_half_precision_is_rounded_once(base: Path, chain: list[Path]) -> None:
    half = CaptionEncoder.from_pretrained(base, merge=chain, dtype="bf16").model.state_dict()
    plain = CaptionEncoder.from_pretrained(base, dtype="bf16").model.state_dict()
    name = "layers.1.mlp.up_proj.weight"
    exact = plain[name].double() + sum(deltas(folder)[name] for folder in chain)
    assert half[name].dtype == torch.bfloat16
    assert (half[name].double() - exact).abs().max() <= exact.abs().max() * 2.0**-8
    assert torch.equal(half[name], exact.float().bfloat16())


def test_settings_name_a_chain(base: Path, chain: list[Path]) -> None:
    settings = LLMSettings(
        path=str(base), merge=tuple(map(str, chain[:2])), adapter=str(chain[2]), pooling="weighted_mean",
        max_length=400, dim=7,
    )  # fmt: skip
    encoder = CaptionEncoder.from_settings(settings)
    assert encoder.dim == 7
    expected = CaptionEncoder.from_pretrained(base, merge=chain[:2], adapter=chain[2]).encode(CAPTIONS)
    assert torch.equal(encoder.encode(CAPTIONS), expected[:, :7])


@pytest.mark.parametrize(
    "prefix", ["base_model.model.", "base_model.model.model.", "base_model.model.language_model."]
)
@pytest.mark.parametrize("task", [None, "CAUSAL_LM", "FEATURE_EXTRACTION"])
def test_adapters_of_other_classes_fit_the_decoder(
    base: Path, tmp_path: Path, prefix: str, task: str | None
) -> None:
    model = tiny_model("llama")
    plain = llm2vec_adapter(tmp_path / "plain", model)
    other = llm2vec_adapter(tmp_path / "other", model, prefix=prefix, task_type=task)
    expected = CaptionEncoder.from_pretrained(base, adapter=plain).encode(CAPTIONS)
    assert torch.equal(CaptionEncoder.from_pretrained(base, adapter=other).encode(CAPTIONS), expected)


def test_llm2vecs_options_are_taken_from_its_file(base: Path, chain: list[Path], tmp_path: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(base, merge=chain)
    assert (encoder.pooling, encoder.max_length, encoder.bidirectional) == ("weighted_mean", 400, True)
    folder = llm2vec_adapter(tmp_path / "a", tiny_model("llama"))
    file = folder / "llm2vec_config.json"
    for mode, ours in (("eos_token", "eos"), ("last_token", "last"), ("bos_token", "bos")):
        file.write_text(json.dumps({"pooling_mode": mode}))
        assert read_encoder_config(folder) == {"bidirectional": True, "pooling": ours, "max_length": 512}
    file.write_text(json.dumps({"pooling_mode": "latent_attention"}))
    with pytest.raises(ModelError, match="latent_attention"):
        CaptionEncoder.from_pretrained(base, adapter=folder)
    file.write_text("[1]")
    with pytest.raises(ModelError, match="JSON object"):
        CaptionEncoder.from_pretrained(base, adapter=folder)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prefix": "model."},
        {"architectures": ["LlamaBiModel"], "auto_map": {"AutoModel": "modeling_llama.LlamaBiModel"}},
        {"auto_map": {"AutoConfig": "c.C", "AutoModel": "m.LlamaEncoderModel", "AutoTokenizer": ["t.T", None]}},
        {"model_type": "llama_bidirec", "architectures": ["LlamaBidirectionalModel"],
         "auto_map": {"AutoConfig": "c.LlamaBidirectionalConfig", "AutoModel": "m.LlamaBidirectionalModel"}},
    ],
    ids=["as published", "prefix", "LlamaBiModel", "own configuration", "own model type"],
)  # fmt: skip
def test_a_checkpoint_with_its_own_code_loads_without_it(
    base: Path, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    folder = llm2clip_checkpoint(tmp_path / "cc", **changes)
    encoder = CaptionEncoder.from_pretrained(folder)
    assert encoder.bidirectional
    assert torch.equal(encoder.encode(CAPTIONS), CaptionEncoder.from_pretrained(base).encode(CAPTIONS))


def test_code_of_an_unknown_family_is_not_run(tmp_path: Path) -> None:
    folder = llm2clip_checkpoint(
        tmp_path / "cc", model_type="newmodel", architectures=["NewModelEncoderModel"]
    )
    with pytest.raises(ModelError, match="'newmodel', which this version of transformers does not know"):
        CaptionEncoder.from_pretrained(folder)


def test_an_adapter_directory_is_no_model(chain: list[Path], tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"no weights of a model.*meta-llama/Meta-Llama-3-8B-Instruct.*llm\.merge"
    ):
        CaptionEncoder.from_pretrained(chain[0])
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="no weights of a model"):
        CaptionEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("how", ["adapter", "merge"])
def test_adapters_that_do_not_fit(base: Path, tmp_path: Path, how: str) -> None:
    def load(folder: Path, path: Path = base) -> None:
        CaptionEncoder.from_pretrained(path, **{how: folder if how == "adapter" else [folder]})  # type: ignore[arg-type]

    wide = llm2vec_adapter(tmp_path / "wide", tiny_model("llama", hidden_size=64))
    shapes = r"lora_A.weight is \(4, 64\), expected \(4, 32\)"
    with pytest.raises(
        ModelError, match=rf"another model than LlamaModel.*{shapes}.*made for meta-llama/Meta"
    ):
        load(wide)
    deep = llm2vec_adapter(tmp_path / "deep", tiny_model("llama", num_hidden_layers=4))
    with pytest.raises(ModelError, match=r"14 unexpected \(.*layers.3"):
        load(deep)
    short = llm2vec_adapter(tmp_path / "short", tiny_model("llama"))
    file = short / "adapter_model.safetensors"
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if "layers.2.mlp.up_proj" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"2 weights missing \(.*layers.2.mlp.up_proj"):
        load(short)
    save_file(tensors | {"base_model.model.extra.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 unexpected \(base_model.model.extra.weight"):
        load(short)
    phi = save_tiny(tmp_path / "phi", "phi3")
    with pytest.raises(ModelError, match="another model|does not fit"):
        load(llm2vec_adapter(tmp_path / "llama", tiny_model("llama")), phi)
    with pytest.raises(ModelError, match=r"llm\.merge the directory"):
        load(tmp_path)
    kind = llm2vec_adapter(tmp_path / "kind", tiny_model("llama"), peft_type="IA3")
    with pytest.raises(ModelError, match="IA3|cannot read"):
        load(kind)


def test_our_adapter_knows_its_base_and_what_was_merged(
    base: Path, chain: list[Path], tmp_path: Path
) -> None:
    trained = CaptionEncoder.from_pretrained(base, merge=chain[:2])
    own = own_adapter(trained, tmp_path / "own")
    record = json.loads((own / "llm2clip_config.json").read_text())
    assert len(record["base"]["merged"]) == 2 and record["dim"] == 32 and record["template"] == "none"
    assert record["pooling"] == "weighted_mean" and set(record["fingerprint"]) == {"adapter", "tokenizer"}
    assert record["fingerprint"]["adapter"] == trained.fingerprint()["adapter"]
    again = CaptionEncoder.from_pretrained(base, merge=chain[:2], adapter=own)
    torch.testing.assert_close(again.encode(CAPTIONS), trained.encode(CAPTIONS), atol=1e-6, rtol=1e-6)
    CaptionEncoder.from_pretrained(
        base, merge=chain[:2], adapter=own, dtype="bf16"
    )  # another precision is no other base
    # as a link of the chain it is checked, too
    CaptionEncoder.from_pretrained(base, merge=[*chain[:2], own], adapter=chain[2])
    for merge in ([], chain[:1], chain[1::-1], [*chain[:2], own]):
        with pytest.raises(ModelError, match=r"2 other adapters merged.*the same adapters in the same order"):
            CaptionEncoder.from_pretrained(base, merge=merge, adapter=own)
    with pytest.raises(ModelError, match="the same adapters in the same order"):
        CaptionEncoder.from_pretrained(base, merge=[own, *chain])
    other = plain_checkpoint(tmp_path / "other", seed=9)
    with pytest.raises(ModelError, match="trained on another base model"):
        CaptionEncoder.from_pretrained(other, merge=chain[:2], adapter=own)
    with pytest.raises(ModelError, match="trained on another base model"):
        CaptionEncoder.from_pretrained(other, merge=[*chain[:2], own])


def test_dora_links_use_the_weights_before_them(base: Path, chain: list[Path], tmp_path: Path) -> None:
    # DoRA scales by the norm of W + BA: the order of merging counts, and sums would not do
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModel

    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], use_dora=True)
    made = get_peft_model(AutoModel.from_pretrained(base), config)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    made.save_pretrained(tmp_path / "dora", save_embedding_layers=False)
    model = AutoModel.from_pretrained(base)
    for folder in (chain[0], tmp_path / "dora"):
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    merged = CaptionEncoder.from_pretrained(base, merge=[chain[0], tmp_path / "dora"]).model
    for one, two in zip(merged.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_quantised_weights_are_not_merged_into(base: Path, chain: list[Path]) -> None:
    model = CaptionEncoder.from_pretrained(base).model
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    with pytest.raises(ModelError, match="quantised weights"):
        merge_adapters(model, [read_adapter(chain[0])])
    assert merge_adapters(model, []) is model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_export_needs_no_code_of_ours(family: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    encoder = CaptionEncoder.from_pretrained(save_tiny(tmp_path / "base", family))
    own_adapter(encoder, tmp_path / "own")
    expected = encoder.encode(CAPTIONS)
    encoder.save_pretrained(tmp_path / "merged")
    model = AutoModel.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        # bidirectional, one caption without padding included: the case in which masks are dropped
        for caption, embedding in zip(CAPTIONS, expected, strict=True):
            ids = encoder.tokenizer([caption], return_tensors="pt", return_token_type_ids=False)
            states = model(**ids).last_hidden_state.mean(1)[0]
            torch.testing.assert_close(states, embedding, atol=2e-4, rtol=2e-4)
    record = json.loads((tmp_path / "merged" / "llm2clip_config.json").read_text())
    again = CaptionEncoder.from_pretrained(tmp_path / "merged")
    assert record["fingerprint"] == again.fingerprint() and record["dim"] == encoder.dim


def test_prefixes_of_embeddings(base: Path, tmp_path: Path) -> None:
    full = CaptionEncoder.from_pretrained(base)
    expected = full.encode(CAPTIONS)
    short = CaptionEncoder.from_pretrained(base, dim=8)
    assert short.dim == 8 and torch.equal(short.encode(CAPTIONS), expected[:, :8])
    assert torch.equal(full.encode(CAPTIONS, dim=8), expected[:, :8])
    unit = full.encode(CAPTIONS, dim=8, normalize=True)
    torch.testing.assert_close(unit, torch.nn.functional.normalize(expected[:, :8], dim=1))
    padded = CaptionEncoder.from_pretrained(base, dim=8, layout="padded")
    torch.testing.assert_close(padded.embed(padded.tokenize(CAPTIONS)), expected[:, :8], atol=1e-5, rtol=1e-5)
    changed = {k for k, v in short.fingerprint().items() if full.fingerprint()[k] != v}
    assert changed == {"dim"}
    short.save_pretrained(tmp_path / "short")
    assert CaptionEncoder.from_pretrained(tmp_path / "short").dim == 8
    assert CaptionEncoder.from_pretrained(tmp_path / "short", dim=16).dim == 16
    for bad in (0, 33):
        with pytest.raises(ModelError, match="1 to 32"):
            CaptionEncoder.from_pretrained(base, dim=bad)
    with pytest.raises(ValueError, match="1 to 8"):
        short.encode(CAPTIONS, dim=9)
