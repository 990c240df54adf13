"""The benchmarks of embedding and of the LLM stage: they measure the same thing for all, and refuse what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from benchmarks import bench_embed, bench_llm_step, captions  # noqa: E402
from llm2clip.models import CaptionEncoder  # noqa: E402
from tests.tiny_models import save_tiny  # noqa: E402

NOWHERE = Path("/nonexistent")  # no OpenStax: random words stand in


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llm"))


def embed_options(model: Path, *more: str) -> list[str]:
    small = ["--captions", "9", "--probe", "5", "--rounds", "1", "--batch", "1", "2", "--sorted-batch", "3"]
    return [*small, "--model", str(model), "--data", str(NOWHERE), "--no-save", *more]


def test_embedding_is_measured_for_the_best_setting_of_each(model: Path) -> None:
    options = bench_embed.parse(embed_options(model, "--budget", "40"))
    encoders = [CaptionEncoder.from_pretrained(model, layout=layout) for layout in ("packed", "padded")]  # type: ignore[arg-type]
    texts = [text for pair in captions.pairs(5, NOWHERE)[0] for text in pair][:9]
    tokens = encoders[0].tokenize(texts)
    timed = bench_embed.providers(encoders[0], encoders[1], options)
    assert list(timed) == ["padded 1", "padded 2", "sorted 3", "packed 40"]
    want = encoders[1].encode_tokens(tokens)
    for name, run in timed.items():
        assert torch.allclose(run(tokens), want, atol=1e-5), name
    errors = bench_embed.embedding_errors(timed, encoders[1], tokens)
    rows = bench_embed.measure(timed, tokens, errors, options)
    assert [row["phase"] for row in rows] == ["probe"] * 4 + ["best"] * 3
    packed = rows[-1]
    assert packed["provider"] == "packed" and packed["captions"] == 9 and packed["padding_share"] == 0
    padded, by_length = rows[-3], rows[-2]
    assert padded["over_padded"] == 1 and by_length["over_sorted"] == 1
    assert packed["over_padded"] > 0 and packed["over_sorted"] > 0


def test_padding_is_counted(model: Path) -> None:
    tokens = CaptionEncoder.from_pretrained(model).tokenize(["a", "abcd", "ab", "abc"])
    # batches (1, 4) and (2, 3) of 8 and 6 places, then (4, 3) and (2, 1) of 8 and 4, for 10 tokens
    assert bench_embed.padding_share(tokens, 2, by_length=False) == pytest.approx(4 / 14)
    assert bench_embed.padding_share(tokens, 2, by_length=True) == pytest.approx(2 / 12)


def test_flops_are_those_that_torch_counts(model: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    encoder = CaptionEncoder.from_pretrained(model, layout="padded")
    batch = encoder.collate(encoder.tokenize(["abcdef"]))
    length = batch.input_ids.shape[1]
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # whose products are counted
    with FlopCounterMode(display=False) as counter, torch.no_grad(), math:
        encoder.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    assert captions.flops(encoder, [length]) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_wrong_embeddings_are_not_timed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = CaptionEncoder.encode_tokens
    monkeypatch.setattr(
        CaptionEncoder, "encode_tokens", lambda self, *a, **k: 1.01 * real(self, *a, **k), raising=True
    )
    with pytest.raises(SystemExit, match="wrong embeddings"):
        bench_embed.main(embed_options(model))


def step_options(model: Path, *more: str) -> list[str]:
    return ["--batch", "3", "--steps", "2", "--budget", "60", "--model", str(model), "--data", str(NOWHERE),
            "--no-save", "--no-memory", *more]  # fmt: skip


def test_all_trainers_follow_one_curve(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_llm_step.main(step_options(model, "--providers", *bench_llm_step.PROVIDERS))
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in bench_llm_step.PROVIDERS)
    assert "step 2:" in printed and "over_peft_grouped" in printed


def test_another_curve_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench_llm_step.Trainer.__init__

    def other_rate(self: Any, name: str, *args: Any) -> None:
        real(self, name, *args)
        if name == "packed":
            self.optimizer.param_groups[0]["lr"] = 0.5

    monkeypatch.setattr(bench_llm_step.Trainer, "__init__", other_rate)
    with pytest.raises(SystemExit, match="losses differ.*packed"):
        bench_llm_step.main(step_options(model, "--providers", "peft_padded", "packed"))


def test_the_memory_of_a_step_is_measured_with_the_stage_s_dropout(model: Path) -> None:
    options = bench_llm_step.parse(step_options(model))
    assert options.memory_dropout == 0.05
    texts = captions.pairs(3, NOWHERE)[0]
    trainer = bench_llm_step.Trainer("packed", options, options.memory_dropout)
    rates = {m.p for m in trainer.encoder.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.05}
    assert bench_llm_step.memory_setup("packed", options, texts)() > 0
