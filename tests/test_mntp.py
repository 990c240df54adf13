"""Masked next-token prediction against transformers' own causal-LM loss, its masks, its runs and its bad input."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm2clip.config import from_tree
from llm2clip.errors import ConfigError, ModelError
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.llm_files import read_encoder_config
from llm2clip.models.lm_head import load_lm_head
from llm2clip.models.lora import base_model
from llm2clip.models.tokens import CaptionTokenizer, Tokens
from llm2clip.settings import FinetuneLLMSettings, MaskingSettings
from llm2clip.training import gradient_cache
from llm2clip.training.loop import train
from llm2clip.training.masking import MaskedText, Masker
from llm2clip.training.mntp_task import MaskedTexts, MaskedTokenModel, MNTPTask
from llm2clip.training.run import finetune_llm
from tests.test_training_tasks import interrupt
from tests.tiny_models import save_tiny, tiny_tokenizer
from tests.training_kit import ALONE, Interrupted, assert_same_run, curve, records, write_set

LINES = [f"line {n} tells of the {['cat', 'dog', 'cow'][n % 3]} that it saw {n % 7} times" for n in range(40)]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("causal"), tie_word_embeddings=True, head=True)


def settings_of(folder: Path, tmp_path: Path, **groups: Any) -> FinetuneLLMSettings:
    (tmp_path / "wiki.txt").write_text("\n".join(LINES))
    (tmp_path / "held.txt").write_text("\n".join(line.replace("line", "row") for line in LINES[:9]))
    run = {"out": str(tmp_path / "run"), "steps": 4, "batch_size": 8, "log_every": 1, "save_every": 2}
    tree = {
        "objective": "mntp",
        "data": {"train": [str(tmp_path / "wiki.txt")], "val": [str(tmp_path / "held.txt")]},
        "llm": {"path": str(folder)} | groups.pop("llm", {}),
        "lora": {"rank": 4, "dropout": 0.1} | groups.pop("lora", {}),
        "optim": {"lr": 1e-2, "warmup_steps": 1} | groups.pop("optim", {}),
        "run": run | {"device": "cpu", "peak_tflops": 0} | groups.pop("run", {}),
        **groups,
    }
    return from_tree(FinetuneLLMSettings, tree)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {"tie_word_embeddings": True}), ("qwen2", {"tie_word_embeddings": False}), ("gemma2", {})],
)
def test_equals_the_shifted_loss_of_the_causal_lm(
    tmp_path: Path, family: str, changes: dict[str, Any], layout: Any
) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_tiny(tmp_path / family, family, **changes, head=True)
    encoder = CaptionEncoder.from_pretrained(folder, layout=layout)
    model = MaskedTokenModel(encoder, load_lm_head(folder, None, base_model(encoder.model)))
    assert (model.head.softcap is not None) == (family == "gemma2")
    mask = Masker(encoder.tokenizer, MaskingSettings(probability=0.4))
    texts = [mask(t, np.random.default_rng(n)) for n, t in enumerate(encoder.tokenize(LINES[:5] + ["ab"]))]
    found = model(MaskedTexts(texts, 1))["losses"]
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    plain.config.is_causal = False
    expected = []
    for text in texts:
        ids = torch.tensor([text.tokens.ids])
        full = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
        types = set(getattr(plain.config, "layer_types", None) or ())
        window = getattr(plain.config, "sliding_window", None)
        near = (torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])).abs() <= (window or 10**6)
        masks = {"full_attention": full, "sliding_attention": full.masked_fill(~near, -1e9)}
        given = masks if types else masks["full_attention"]
        labels = torch.full_like(ids, -100)
        labels[0, text.places] = torch.tensor(text.targets, dtype=torch.long)
        logits = plain(input_ids=ids, attention_mask=given).logits
        losses = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="none")
        expected.append(losses[labels[0, 1:] != -100])
    assert len(found) == sum(map(len, expected)) > 20
    torch.testing.assert_close(found, torch.cat(expected), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_of_the_head(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to sum up scores, in blocks too, against the whole matrix in fp64."""
    from llm2clip.models import lm_head

    monkeypatch.setattr(lm_head, "_ROWS", 4)
    folder = save_tiny(tmp_path / family, family, head=True)
    encoder = CaptionEncoder.from_pretrained(folder)
    head = load_lm_head(folder, None, base_model(encoder.model).double())
    torch.manual_seed(1)
    states, targets = torch.randn(11, 32, dtype=torch.float64), torch.randint(0, 259, (11,))
    one, other = states.clone().requires_grad_(), states.clone().requires_grad_()
    weight = (
        head.weight if head.weight is not None else base_model(encoder.model).get_input_embeddings().weight
    )
    scores = one @ weight.detach().double().T
    if family == "gemma2":
        scores = 30.0 * torch.tanh(scores / 30.0)
    want = torch.nn.functional.cross_entropy(scores, targets, reduction="none")
    got = head.losses(other, targets)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    upstream = torch.linspace(1, 2, 11, dtype=torch.float64)
    (want * upstream).sum().backward()
    (got * upstream).sum().backward()
    torch.testing.assert_close(other.grad, one.grad, rtol=1e-9, atol=1e-11)
    assert head.losses(states[:0], targets[:0]).shape == (0,)


@pytest.mark.parametrize("replace_", ["bert", "all"])
def test_masks_have_their_shares(replace_: Any) -> None:
    tokenizer = tiny_tokenizer()
    mask = Masker(tokenizer, MaskingSettings(replace=replace_))
    ids = [7 + n % 200 for n in range(5000)] + [tokenizer.eos_token_id]
    text = mask(Tokens(ids, 100, False), np.random.default_rng(0))
    places = np.asarray(text.places)
    assert places.min() >= 100 and 5000 not in places  # neither the header nor special tokens
    assert len(places) / 4900 == pytest.approx(0.2, abs=0.02)
    assert text.targets == [ids[place] for place in places]
    read = np.asarray(text.tokens.ids)
    untouched = np.setdiff1d(np.arange(len(ids)), places)
    assert np.array_equal(read[untouched], np.asarray(ids)[untouched])
    kinds = Counter(
        "mask" if new == mask.mask_id else "kept" if new == old else "random"
        for new, old in zip(read[places], text.targets, strict=True)
    )
    wanted = (
        {"mask": 1.0, "random": 0.0, "kept": 0.0}
        if replace_ == "all"
        else {"mask": 0.8, "random": 0.1, "kept": 0.1}
    )
    for kind, share in wanted.items():
        assert kinds[kind] / len(places) == pytest.approx(share, abs=0.04), kind
    again = mask(Tokens(ids, 100, False), np.random.default_rng(0))
    assert again == text != mask(Tokens(ids, 100, False), np.random.default_rng(1))


def test_the_first_token_is_never_masked() -> None:
    mask = Masker(tiny_tokenizer(), MaskingSettings(probability=1.0))
    assert mask(Tokens([9, 10, 11], 0, False), np.random.default_rng(0)).places == [1, 2]
    assert mask(Tokens([9], 0, False), np.random.default_rng(0)).places == []


def test_mask_tokens() -> None:
    tokenizer = tiny_tokenizer()
    assert Masker(tokenizer, MaskingSettings()).mask_id == tokenizer.convert_tokens_to_ids("_")
    assert Masker(tokenizer, MaskingSettings(token="eos")).mask_id == tokenizer.eos_token_id
    with pytest.raises(ModelError, match="no mask token; use masking.token=blank or eos"):
        Masker(tokenizer, MaskingSettings(token="mask"))
    with pytest.raises(ModelError, match="no eos token; use masking.token=blank"):
        Masker(tiny_tokenizer(eos=False), MaskingSettings(token="eos"))
    with pytest.raises(ConfigError, match="masking.probability"):
        MaskingSettings(probability=0.0)


def test_long_texts_give_windows_from_everywhere() -> None:
    captions = CaptionTokenizer(tiny_tokenizer(bos=True), max_length=11)
    text = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"  # no token occurs twice
    whole = captions.tokenizer(text, add_special_tokens=False)["input_ids"]
    for share, start in ((0.0, 0), (0.5, 26), (0.999, 52)):
        (tokens,) = captions([text], windows=[share])
        assert tokens.truncated and tokens.ids == [1, *whole[start : start + 10]]
    (short,) = captions(["abc"], windows=[0.9])
    assert not short.truncated and len(short.ids) == 4


def gradients(task: MNTPTask, budget: int, size: int) -> tuple[float, dict[str, torch.Tensor], int]:
    _, samples = next(task.batches(0, 0))
    task.token_budget = budget
    task.module.zero_grad()
    chunks = task.chunks(samples, size)
    loss, _ = gradient_cache.accumulate(task.module, chunks, task.loss, ALONE.device)
    return (
        loss.item(),
        {n: p.grad.clone() for n, p in task.module.named_parameters() if p.grad is not None},
        len(chunks),
    )


def test_any_cut_into_chunks_gives_the_same_gradients(llm: Path, tmp_path: Path) -> None:
    task = MNTPTask(settings_of(llm, tmp_path, lora={"dropout": 0.0}), ALONE)
    with torch.no_grad():
        for name, parameter in task.module.named_parameters():
            if "lora_B" in name:
                torch.manual_seed(len(name))
                parameter.normal_(std=0.1)
    loss, whole, count = gradients(task, 0, 0)
    assert count == 1
    for budget, size in ((120, 0), (0, 3)):
        other, parts, count = gradients(task, budget, size)
        assert count > 2 and other == pytest.approx(loss, rel=1e-5)
        for name, gradient in whole.items():
            torch.testing.assert_close(
                parts[name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item()
            )


def test_a_run_learns_and_says_so(llm: Path, tmp_path: Path) -> None:
    settings = settings_of(
        llm, tmp_path, run={"steps": 30, "batch_size": 20, "save_every": 50}, lora={"dropout": 0.0}
    )
    result = finetune_llm(settings)
    last = curve(tmp_path / "run")[-1]
    assert last["val/perplexity"] < 0.7 * last["val/perplexity_base"]
    assert read_encoder_config(result)["objective"] == "mntp"
    # the adapter goes on as the first step of the contrastive stage
    encoder = CaptionEncoder.from_pretrained(llm, adapter=result)
    assert not torch.allclose(
        encoder.encode(LINES[:1]), CaptionEncoder.from_pretrained(llm).encode(LINES[:1])
    )


def test_a_run_resumes_bitwise_over_captions_and_text(llm: Path, tmp_path: Path) -> None:
    shard = write_set(tmp_path / "a.tar", records(20))

    def settings(out: Path) -> FinetuneLLMSettings:
        base = settings_of(llm, tmp_path, token_budget=150)
        captions = from_tree(type(base.data.captions), {"short": "name", "long": "description"})
        data = replace(base.data, train=(*base.data.train, str(shard)), captions=captions)
        return replace(base, data=data, run=replace(base.run, out=str(out)))

    finetune_llm(settings(tmp_path / "whole"))
    part = settings(tmp_path / "parts")
    with pytest.raises(Interrupted):
        train(interrupt(MNTPTask(part, ALONE), 9), part.run, part.optim, ALONE)
    assert (tmp_path / "parts" / "checkpoints" / "latest").exists()
    finetune_llm(part)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_batch_without_masks_is_no_error(llm: Path, tmp_path: Path) -> None:
    task = MNTPTask(settings_of(llm, tmp_path), ALONE)
    nothing = MaskedText(Tokens([5, 6, 7], 0, False), [], [])
    loss, _ = gradient_cache.accumulate(task.module, [MaskedTexts([nothing], 0)], task.loss, ALONE.device)
    assert loss.item() == 0.0


def test_texts_that_need_a_pack_of_their_own_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    original = {"original_max_position_embeddings": 64}
    changes = {"rope_parameters": rope | original, **original, "sliding_window": None}
    folder = save_tiny(tmp_path / "phi3", "phi3", head=True, **changes)
    with pytest.raises(ConfigError, match="texts beyond 64 tokens need a pack of their own.*it is 65"):
        MNTPTask(settings_of(folder, tmp_path, llm={"max_length": 65}), ALONE)
    MNTPTask(settings_of(folder, tmp_path, llm={"max_length": 64}), ALONE)


def test_a_model_saved_without_its_head_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "untied", tie_word_embeddings=False, head=True)
    CaptionEncoder.from_pretrained(folder).save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match=r"no language-model head \(lm_head.weight\)"):
        MNTPTask(settings_of(tmp_path / "bare", tmp_path), ALONE)
    with pytest.raises(ConfigError, match="set llm.bidirectional=true"):
        settings_of(folder, tmp_path, llm={"bidirectional": False})
