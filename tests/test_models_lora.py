"""LoRA adapters: targets, gradients, saving, loading, merging, and adapters that do not fit."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from llm2clip.errors import ModelError
from llm2clip.models import CaptionEncoder, no_decay, parameter_groups
from llm2clip.models.lora import lora_targets
from llm2clip.settings import LoraSettings
from tests.tiny_models import FAMILIES, save_tiny, tiny_model, tiny_tokenizer

CAPTIONS = ["a dog", "two cats on a mat", "x", "the quick brown fox"]
PLAIN = LoraSettings(rank=4, alpha=8.0, dropout=0.0)


def trained(folder: Path, settings: LoraSettings = PLAIN, **options: object) -> CaptionEncoder:
    """An encoder whose adapter is no longer zero."""
    encoder = CaptionEncoder.from_pretrained(folder, **options)  # type: ignore[arg-type]
    torch.manual_seed(5)
    encoder.add_lora(settings)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.05)
    return encoder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llm") / "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_only_lora_is_trainable_and_every_layer_learns(family: str) -> None:
    encoder = CaptionEncoder(tiny_model(family), tiny_tokenizer())
    before = encoder.encode(CAPTIONS)
    encoder.add_lora(PLAIN)
    torch.testing.assert_close(encoder.encode(CAPTIONS), before, atol=1e-6, rtol=1e-6)
    trainable = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    assert trainable and all(".lora_" in name for name in trainable)
    encoder(encoder.collate(encoder.tokenize(CAPTIONS))).square().sum().backward()
    learning = [
        n for n, p in trainable.items() if ".lora_B" in n and p.grad is not None and p.grad.abs().sum() > 0
    ]
    assert len(learning) == len([n for n in trainable if ".lora_B" in n])
    layers = {n.split(".layers.")[1].split(".")[0] for n in learning}
    assert layers == {"0", "1", "2"}
    frozen = [p for p in encoder.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)
    assert set(parameter_groups(encoder)) == {"lora"}


def test_fused_projections_stand_for_their_parts() -> None:
    defaults = LoraSettings().targets
    assert lora_targets(tiny_model("phi3"), defaults) == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert lora_targets(tiny_model("llama"), ("q_proj", "absent")) == ["q_proj"]
    with pytest.raises(ModelError, match=r"none of lora.targets \(nothing\).*down_proj"):
        lora_targets(tiny_model("llama"), ("nothing",))
    with pytest.raises(ModelError, match="lora.rank"):
        CaptionEncoder(tiny_model("llama"), tiny_tokenizer()).add_lora(LoraSettings(rank=0))


def test_gradient_in_pieces_equals_gradient_at_once(llama: Path) -> None:
    # the gradient cache embeds without gradients, then embeds each piece again with them
    whole = trained(llama)
    pieces = copy.deepcopy(whole)
    target = torch.randn(4, whole.dim, generator=torch.Generator().manual_seed(1))

    def loss(embeddings: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.normalize(embeddings, dim=-1) @ target.t()
        return torch.nn.functional.cross_entropy(logits, torch.arange(4))

    loss(whole(whole.collate(whole.tokenize(CAPTIONS)))).backward()
    tokens = pieces.tokenize(CAPTIONS)
    with torch.no_grad():
        cached = torch.cat([pieces(pieces.collate(tokens[i : i + 2])) for i in (0, 2)])
    cached.requires_grad_()
    loss(cached).backward()
    assert cached.grad is not None
    for i in (0, 2):
        pieces(pieces.collate(tokens[i : i + 2])).backward(cached.grad[i : i + 2])
    for (name, one), two in zip(whole.named_parameters(), pieces.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(two.grad, one.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_bf16_autocast_gives_nearly_the_same_gradient(llama: Path) -> None:
    full, half = trained(llama), trained(llama)
    full(full.collate(full.tokenize(CAPTIONS))).square().mean().backward()
    with torch.autocast("cpu", torch.bfloat16):
        half(half.collate(half.tokenize(CAPTIONS))).square().mean().backward()
    exact = torch.cat([p.grad.flatten() for p in full.parameters() if p.grad is not None])
    rounded = torch.cat([p.grad.flatten() for p in half.parameters() if p.grad is not None])
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.98
    assert rounded.dtype == torch.float32


def test_adapter_round_trip(llama: Path, tmp_path: Path) -> None:
    encoder = trained(llama, pooling="weighted_mean", prompt="p ")
    encoder.save_adapter(tmp_path / "adapter")
    again = CaptionEncoder.from_pretrained(llama, adapter=tmp_path / "adapter")
    assert (again.pooling, again.prompt) == ("weighted_mean", "p ")
    assert torch.equal(again.encode(CAPTIONS), encoder.encode(CAPTIONS))
    assert again.fingerprint() == encoder.fingerprint()
    assert not any(p.requires_grad for p in again.parameters())
    base = CaptionEncoder.from_pretrained(llama, pooling="weighted_mean", prompt="p ")
    assert not torch.allclose(base.encode(CAPTIONS), again.encode(CAPTIONS), atol=1e-4)
    assert base.fingerprint()["weights"] == again.fingerprint()["weights"]
    again.add_lora(PLAIN)
    assert set(parameter_groups(again)) == {"lora"}
    with pytest.raises(ModelError, match="rank 4 and alpha 8"):
        again.add_lora(LoraSettings(rank=8))


def test_adapter_directory_is_plain_peft(llama: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    encoder = trained(llama, bidirectional=False)
    encoder.save_adapter(tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(llama), tmp_path / "adapter").eval()
    ids = encoder.tokenizer(["two cats on a mat"], return_tensors="pt")
    states = model(**ids).last_hidden_state.detach().mean(1)
    torch.testing.assert_close(states, encoder.encode(["two cats on a mat"]), atol=1e-5, rtol=1e-5)


def test_adapter_of_a_causal_lm_loads(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    encoder = trained(llama)
    encoder.save_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "llm2clip_config.json").unlink()
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    renamed = {n.replace("base_model.model.", "base_model.model.model.", 1): t for n, t in tensors.items()}
    save_file(renamed, file, metadata={"format": "pt"})
    again = CaptionEncoder.from_pretrained(llama, adapter=tmp_path / "adapter")
    assert torch.equal(again.encode(CAPTIONS), encoder.encode(CAPTIONS))


def test_adapter_fits_its_base_in_another_precision(llama: Path, tmp_path: Path) -> None:
    trained(llama).save_adapter(tmp_path / "adapter")
    CaptionEncoder.from_pretrained(llama, adapter=tmp_path / "adapter", dtype="bf16")


def test_fingerprint_sees_adapter_weights_and_scaling(llama: Path) -> None:
    one, two, three = (
        trained(llama),
        trained(llama),
        trained(llama, LoraSettings(rank=4, alpha=9.0, dropout=0.0)),
    )
    assert one.fingerprint() == two.fingerprint() != three.fingerprint()
    with torch.no_grad():
        next(p for n, p in two.named_parameters() if ".lora_A" in n).view(-1)[0] += 1e-6
    assert one.fingerprint() != two.fingerprint()


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_merged_export_gives_the_same_embeddings(family: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    encoder = trained(save_tiny(tmp_path / "base", family))
    expected = encoder.encode(CAPTIONS)
    encoder.save_pretrained(tmp_path / "merged")
    assert torch.equal(encoder.encode(CAPTIONS), expected)  # exporting does not touch the encoder
    again = CaptionEncoder.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again.encode(CAPTIONS), expected, atol=1e-4, rtol=1e-4)
    _, report = AutoModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_adapter_of_another_base(llama: Path, tmp_path: Path) -> None:
    trained(llama).save_adapter(tmp_path / "adapter")
    other = save_tiny(tmp_path / "other", "llama", seed=1)
    with pytest.raises(ModelError, match="trained on another base model"):
        CaptionEncoder.from_pretrained(other, adapter=tmp_path / "adapter")
    # without our record only names and shapes can tell
    (tmp_path / "adapter" / "llm2clip_config.json").unlink()
    wider = save_tiny(tmp_path / "wider", "llama", hidden_size=64)
    with pytest.raises(ModelError, match="another model"):
        CaptionEncoder.from_pretrained(wider, adapter=tmp_path / "adapter")
    deeper = save_tiny(tmp_path / "deeper", "llama", num_hidden_layers=4)
    with pytest.raises(ModelError, match="14 weights missing"):
        CaptionEncoder.from_pretrained(deeper, adapter=tmp_path / "adapter")


def test_unusable_adapter_directories(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a peft adapter directory"):
        CaptionEncoder.from_pretrained(llama, adapter=tmp_path)
    trained(llama).save_adapter(tmp_path / "cut")
    file = tmp_path / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ModelError, match="cannot read the adapter"):
        CaptionEncoder.from_pretrained(llama, adapter=tmp_path / "cut")
    trained(llama).save_adapter(tmp_path / "kind")
    config = json.loads((tmp_path / "kind" / "adapter_config.json").read_text())
    config["peft_type"] = "NO_SUCH"
    (tmp_path / "kind" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot read the adapter"):
        CaptionEncoder.from_pretrained(llama, adapter=tmp_path / "kind")
    with pytest.raises(ModelError, match="no adapter to save"):
        CaptionEncoder.from_pretrained(llama).save_adapter(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_no_decay_rule() -> None:
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    assert not no_decay("text_adapter.adaptor.0.fn.0.weight", matrix)
    assert no_decay("text_adapter.adaptor.0.fn.0.bias", vector)
    assert no_decay("text_adapter.adaptor.0.ln.weight", vector)
    assert no_decay("logit_scale", torch.nn.Parameter(torch.tensor(1.0)))
    assert no_decay("vision_model.model.model.embeddings.position_embedding.weight", matrix)


def test_adapted_layers_are_fused_unless_the_settings_say_off(llama: Path, tmp_path: Path) -> None:
    from llm2clip.integrations.peft import FusedLoraLinear

    off = LoraSettings(rank=4, alpha=8.0, dropout=0.0, fused="off")
    fused, plain = trained(llama), trained(llama, off)
    count = [sum(isinstance(m, FusedLoraLinear) for m in e.modules()) for e in (fused, plain)]
    assert count == [3 * 7, 0]
    torch.testing.assert_close(fused.encode(CAPTIONS), plain.encode(CAPTIONS), atol=1e-5, rtol=1e-5)
    fused.save_adapter(tmp_path / "fused")
    plain.save_adapter(tmp_path / "plain")
    for name in ("adapter_model.safetensors", "adapter_config.json", "llm2clip_config.json"):
        assert (tmp_path / "fused" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    resumed = CaptionEncoder.from_pretrained(llama, adapter=tmp_path / "plain")
    resumed.add_lora(PLAIN)
    assert sum(isinstance(m, FusedLoraLinear) for m in resumed.modules()) == 21
    torch.testing.assert_close(resumed.encode(CAPTIONS), plain.encode(CAPTIONS), atol=1e-5, rtol=1e-5)
