"""The LLM stage with its frozen weights split over two gloo ranks: one process's losses, checkpoints and adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.llm_files import read_encoder_config
from llm2clip.models.lora import base_model
from llm2clip.settings import FinetuneLLMSettings
from llm2clip.training import llm_setup
from llm2clip.training.llm_task import LLMTask
from llm2clip.training.run import finetune_llm
from llm2clip.training.world import World
from tests.test_mntp import settings_of as mntp_settings
from tests.test_training_distributed import exit_codes, start
from tests.test_training_llm import stage
from tests.tiny_models import save_tiny
from tests.training_kit import Kit, curve, make_kit, newest_tensors

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    root = tmp_path_factory.mktemp("kit")
    save_tiny(root / "causal", head=True, tie_word_embeddings=True)
    return make_kit(root)


def contrastive(kit: Kit, out: Path, parallel: str, **run: Any) -> FinetuneLLMSettings:
    change = {
        "token_budget": 120,
        "run": {"parallel": parallel},
        "loss": {"learn_scale": True},
        "optim": {"schedule": "constant"},
        "gradient_checkpointing": parallel == "fsdp",
    }
    return stage(kit, out, change, **{"dropout": 0.0, "steps": 4, "batch_size": 9, **run})


def masked(kit: Kit, out: Path, parallel: str, **run: Any) -> FinetuneLLMSettings:
    out.parent.mkdir(exist_ok=True)
    own: dict[str, Any] = {"out": str(out), "parallel": parallel, "steps": 4, "batch_size": 9}
    groups: dict[str, Any] = {"lora": {"dropout": 0.0}, "optim": {"lr": 1e-2, "schedule": "constant"}}
    return mntp_settings(kit.root / "causal", out.parent, token_budget=150, run=own | run, **groups)


def sharded_share(settings: FinetuneLLMSettings) -> Callable[[int], None]:
    """Lets a rank fail unless half of the frozen weights, and no more, are its own."""

    def prepare(rank: int) -> None:
        original = llm_setup.trained_encoder

        def checked(settings: FinetuneLLMSettings, world: World) -> CaptionEncoder:
            encoder = original(settings, world)
            frozen = [p for p in encoder.parameters() if not p.requires_grad]
            assert len(frozen) > 20 and all(isinstance(p, DTensor) for p in frozen)
            local = sum(p.to_local().numel() for p in frozen if isinstance(p, DTensor))
            assert abs(local / sum(p.numel() for p in frozen) - 0.5) < 0.02
            assert not any(isinstance(p, DTensor) for p in encoder.parameters() if p.requires_grad)
            return encoder

        from llm2clip.training import llm_task, mntp_task

        for module in (llm_task, mntp_task):
            module.trained_encoder = checked  # type: ignore[attr-defined]

    return prepare


@pytest.mark.parametrize("objective", [contrastive, masked])
def test_two_ranks_equal_one_process_and_one_goes_on(
    kit: Kit, tmp_path: Path, objective: Callable[..., FinetuneLLMSettings]
) -> None:
    finetune_llm(objective(kit, tmp_path / "one", "ddp"))
    half = objective(kit, tmp_path / "two", "fsdp", steps=2)
    assert exit_codes(start(half, sharded_share(half))) == [0, 0]
    # a plain peft directory, whose record knows the whole base model
    folder = tmp_path / "two" / "result"
    assert {f.name for f in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    llm = Path(half.llm.path)
    encoder = CaptionEncoder.from_pretrained(llm, adapter=folder)
    assert read_encoder_config(folder)["base"]["weights_bf16"]
    assert not torch.allclose(
        encoder.encode(["a red stone"]), CaptionEncoder.from_pretrained(llm).encode(["a red stone"])
    )

    # the run of two ranks goes on with one process, and again with two
    (folder / "DONE").unlink()
    finetune_llm(objective(kit, tmp_path / "two", "ddp", steps=3))
    (folder / "DONE").unlink()
    whole = objective(kit, tmp_path / "two", "fsdp")
    assert exit_codes(start(whole, sharded_share(whole))) == [0, 0]
    lines = [line for line in curve(tmp_path / "two") if "loss" in line]
    expected = [line for line in curve(tmp_path / "one") if "loss" in line]
    for line, other in zip(lines, expected, strict=True):
        for name in ("step", "loss", "grad_norm"):
            assert line[name] == pytest.approx(other[name], rel=1e-3), (other["step"], name)


@pytest.mark.parametrize("objective", [contrastive, masked])
def test_a_sharded_run_is_the_run_of_one_process(
    kit: Kit, tmp_path: Path, objective: Callable[..., FinetuneLLMSettings]
) -> None:
    finetune_llm(objective(kit, tmp_path / "one", "ddp"))
    for how in ("fsdp", "ddp"):
        assert exit_codes(start(objective(kit, tmp_path / how, how))) == [0, 0]
        for line, other in zip(curve(tmp_path / how), curve(tmp_path / "one"), strict=True):
            for name in (
                "step",
                "loss",
                "grad_norm",
                "lr",
                "scale",
                "val/perplexity",
                "val/short_to_long_r1",
            ):
                if name in other:
                    assert line[name] == pytest.approx(other[name], rel=1e-3), (how, line["step"], name)
        mine, theirs = newest_tensors(tmp_path / how), newest_tensors(tmp_path / "one")
        for name, tensor in theirs.items():
            torch.testing.assert_close(mine[name], tensor, rtol=1e-3, atol=3e-4, msg=f"{how} {name}")


def test_what_cannot_be_sharded_is_said_at_the_start(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = contrastive(kit, tmp_path / "run", "fsdp")
    padded = replace(settings, llm=replace(settings.llm, layout="padded"))
    assert exit_codes(start(padded)) == [2, 2]
    assert (
        "ranks must make equally many forward passes, which only packed captions do" in capfd.readouterr().err
    )


def test_one_rank_shards_nothing(kit: Kit, tmp_path: Path) -> None:
    task = LLMTask(contrastive(kit, tmp_path, "fsdp"), World(0, 1, torch.device("cpu")))
    assert not task.sharded
    assert not any(isinstance(p, DTensor) for p in base_model(task.encoder.model).parameters())
