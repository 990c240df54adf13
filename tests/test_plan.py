"""The planner against published sizes, and what it proposes; test_plan_measure.py has its measuring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llm2clip.cli import main
from llm2clip.config import from_tree, load_settings, to_tree
from llm2clip.data.store_format import bytes_per_caption
from llm2clip.errors import ConfigError
from llm2clip.plan.decoders import decoder_size
from llm2clip.plan.fit import changes_of, fitted, remedies, with_setting
from llm2clip.plan.measure import LiveBytes
from llm2clip.plan.run import render
from llm2clip.plan.shapes import GPUS, decoder, decoder_config, find_gpu, vision_tower
from llm2clip.plan.stages import GIB, Planner, StagePlan, _features
from llm2clip.plan.towers import ClipModel
from llm2clip.settings import (
    LLMSettings,
    LoraSettings,
    PlanSettings,
    TrainSettings,
    VisionSettings,
)
from llm2clip.training.flops import OWN_OPS
from tests.tiny_models import tiny_config
from tests.vision_kit import vision_json

# parameters of the published weights, the head left out where it is a matrix of its own
PUBLISHED_LLMS = {
    "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248 - 128256 * 4096,
    "mistral-7b": 7_248_023_552 - 32768 * 4096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
}


# of OpenAI's towers without their projection
PUBLISHED_TOWERS = {
    "clip-vit-b-32": 87_849_216 - 768 * 512,
    "clip-vit-b-16": 86_192_640 - 768 * 512,
    "clip-vit-l-14": 303_966_208 - 1024 * 768,
}


TOKENS = 8


LLM = LLMSettings(layout="packed", max_length=64)


@pytest.fixture(scope="module")
def llm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    tiny_config("llama", num_hidden_layers=6).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plan_tree(llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    tower = vision_json(tmp_path_factory.mktemp("tower"))
    train = {
        "model": {
            "vision": {"kind": "transformers", "path": str(tower), "pretrained": False},
            "embed_dim": 12, "adapter_depth": 1,
        },
        "run": {"batch_size": 64, "micro_batch": 16},
    }  # fmt: skip
    finetune = {"lora": {"rank": 4}, "token_budget": 512, "run": {"batch_size": 64}}
    return {
        "llm": str(llm_dir), "pairs": 6400, "caption_tokens": TOKENS, "gpu": "L4", "train": train, "finetune": finetune,
    }  # fmt: skip


MEASURED: dict[str, dict[Any, Any]] = {name: {} for name in ("_sizes", "_captions", "_models")}


def planner(tree: dict[str, Any], **more: Any) -> Planner:
    """A planner of the same models; what one has measured the next one finds."""
    plan = Planner(from_tree(PlanSettings, {**tree, **more}))
    for name, known in MEASURED.items():
        setattr(plan, name, known)
    return plan


@pytest.mark.parametrize("name", PUBLISHED_LLMS)
def test_llms_have_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in decoder(decoder_config(name)).parameters()) == PUBLISHED_LLMS[name]


def test_lora_of_llama_and_quantised_weights() -> None:
    config = decoder_config("llama-3.1-8b")
    size = decoder_size(config, LLMSettings(dtype="bf16"), LoraSettings(rank=16))
    assert size.trained == 41_943_040 and size.dim == 4096  # as peft prints for all seven layers
    assert size.frozen_bytes == 2 * size.parameters
    four = decoder_size(config, LLMSettings(dtype="bf16", quantization="4bit"), None)
    embedding = 128256 * 4096
    assert 2 * embedding + 0.5 * (size.parameters - embedding) < four.frozen_bytes < 0.33 * size.frozen_bytes


@pytest.mark.parametrize("name", PUBLISHED_TOWERS)
def test_towers_have_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        tower = vision_tower(name, VisionSettings())
    assert sum(p.numel() for p in tower.parameters()) == PUBLISHED_TOWERS[name]


def test_unknown_names_are_listed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"llm: 'gpt'.*llama-3\.1-8b"):
        decoder_config("gpt")
    with pytest.raises(ConfigError, match="tower: 'vit'.*clip-vit-l-14"):
        vision_tower("vit", VisionSettings())
    with pytest.raises(ConfigError, match="gpu: 'H999'.*gpu_memory_gib"):
        find_gpu("H999")
    assert find_gpu("a100 80gb") is GPUS["A100-80GB"]


def test_the_clip_model_takes_what_it_takes_with_values(plan_tree: dict[str, Any]) -> None:
    from llm2clip.plan.towers import _outputs

    settings = from_tree(TrainSettings, plan_tree["train"])
    model = ClipModel(settings, "", 32)
    found = model.images_through(16, "fp32")
    real = model._build(settings.model.vision).train()
    parameters = list(real.parameters())
    assert model.size.parameters == sum(p.numel() for p in parameters)
    assert model.size.trained == sum(p.numel() for p in parameters if p.requires_grad)
    for count in (16, 8):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        with LiveBytes() as live:
            _outputs(real, model._batch(count)).sum().backward()
        assert found.peak(count) == pytest.approx(live.peak, rel=0.03)
    with FlopCounterMode(display=False, custom_mapping=OWN_OPS) as counter:
        _outputs(real, model._batch(16)).sum().backward()
    assert 16 * (found.forward_flops + found.backward_flops) == counter.get_total_flops()


def test_checkpointing_is_not_counted_among_the_flops(plan_tree: dict[str, Any]) -> None:
    settings = from_tree(TrainSettings, plan_tree["train"])
    again = with_setting(settings, "model.vision.grad_checkpointing", True)
    plain, less = (ClipModel(s, "", 32).images_through(16, "fp32") for s in (settings, again))
    assert plain.forward_flops == less.forward_flops and plain.backward_flops == less.backward_flops
    assert less.each < plain.each


def test_features_of_a_batch() -> None:
    assert _features(8, 2, 32, 5, False, False) == 8 * 2 * 5 * 4
    assert _features(8, 2, 32, 5, True, True) == 2 * 8 * 2 * 5 * 4 + 2 * 32 * 5 * 4


def test_store_and_steps(plan_tree: dict[str, Any]) -> None:
    plan = planner(plan_tree, embed={"dtype": "int8"})
    assert plan.store_bytes() == 6400 * 2 * bytes_per_caption(32, "int8")
    stage = plan.settings.train
    assert plan.train(stage).steps == 100
    assert plan.train(with_setting(stage, "run.epochs", 2.5)).steps == 250
    assert plan.train(with_setting(stage, "run.steps", 7)).steps == 7


def test_recomputed_flops_and_measured_shares(plan_tree: dict[str, Any]) -> None:
    plan = planner(plan_tree)
    stage = plan.settings.train
    cached, whole = plan.train(stage), plan.train(with_setting(stage, "run.micro_batch", 0))
    model, cost = plan._images(stage, 16, "fp32")
    assert whole.flops == whole.model_flops == cached.model_flops
    assert cached.flops - cached.model_flops == 6400 * cost.forward_flops
    assert whole.hours == pytest.approx(whole.flops / (GPUS["L4"].fp32_tflops * 1e12 * 0.4) / 3600)
    measured = planner(plan_tree, train_mfu=0.2, gpus=2).train(stage)
    assert measured.measured and not cached.measured
    assert measured.hours == pytest.approx(measured.model_flops / (2 * 30.3e12 * 0.2) / 3600)
    half = plan.train(with_setting(stage, "run.precision", "bf16"))
    assert half.tflops == GPUS["L4"].tflops


def test_several_gpus_share_what_they_can(plan_tree: dict[str, Any]) -> None:
    one, eight = planner(plan_tree), planner(plan_tree, gpus=8)
    stage = one.settings.train
    alone, ddp = one.train(stage), eight.train(stage)
    sharded = eight.train(with_setting(stage, "run.parallel", "fsdp"))
    assert ddp.memory["gradients in DDP's buckets"] == alone.memory["gradients"] == ddp.memory["gradients"]
    assert sharded.memory["gradients"] == alone.memory["gradients"] / 8
    assert sharded.memory["gathered blocks"] == 2 * eight.sizes()[1].size.largest_block_bytes > 0
    llm = eight.settings.finetune
    size = eight.sizes()[0]
    whole = eight.finetune(llm).memory["frozen LLM"]
    parts = eight.finetune(with_setting(llm, "run.parallel", "fsdp")).memory["frozen LLM"]
    assert whole == size.frozen_bytes and parts == size.frozen_bytes / 8 + 2 * size.largest_layer_bytes


def overridden(settings: Any, command: str) -> Any:
    """The settings after the words of a remedy, read as the command line would."""
    import yaml

    for word in command.split():
        name, _, value = word.partition("=")
        settings = with_setting(settings, name, yaml.safe_load(value))
    return from_tree(type(settings), to_tree(settings))


@pytest.mark.parametrize("stage", ["finetune", "train"])
def test_remedies_fit_when_they_are_taken(plan_tree: dict[str, Any], stage: str) -> None:
    roomy = planner(plan_tree, reserve_gib=0)
    settings, plan_of = getattr(roomy.settings, stage), getattr(roomy, stage)
    whole = plan_of(settings)
    assert fitted(settings, plan_of, roomy) == (whole, [])
    # less than the step takes, more than it takes in small parts
    biggest = max(whole.memory.values())
    tight = planner(plan_tree, reserve_gib=0, gpu_memory_gib=(whole.total - 0.5 * biggest) / GIB)
    plan, found = fitted(settings, getattr(tight, stage), tight)
    assert plan.total > tight.gpu.memory_gib * GIB and found
    for remedy in found:
        again = getattr(tight, stage)(overridden(settings, remedy.command()))
        assert remedy.fits and again.total == remedy.plan.total <= tight.gpu.memory_gib * GIB


def test_what_cannot_fit_is_said_with_everything_tried(plan_tree: dict[str, Any]) -> None:
    tiny = planner(plan_tree, reserve_gib=0, gpu_memory_gib=1e-6)
    for stage in ("finetune", "embed", "train"):
        _, (last,) = fitted(getattr(tiny.settings, stage), getattr(tiny, stage), tiny)  # type: ignore[misc]
        assert not last.fits and len(last.changes) > 1


def test_several_changes_together_keep_the_first_as_mild_as_can_be() -> None:
    """Checkpointing halves what an image takes, bf16 halves it again."""

    def plan_of(stage: TrainSettings) -> StagePlan:
        each = 100.0 / (1 + stage.model.vision.grad_checkpointing) / (1 + (stage.run.precision == "bf16"))
        return StagePlan("train", {"all": 50 + each * stage.run.micro_batch}, 0, 0, 1, 1, False, 0)

    stage = from_tree(TrainSettings, {"run": {"micro_batch": 16}})
    small = [("run.micro_batch", n) for n in (8, 4, 2, 1)]
    kinds = [small, [("model.vision.grad_checkpointing", True)], [("run.precision", "bf16")]]
    single = remedies(stage, plan_of, kinds, 900.0)
    assert [r.command() for r in single] == [
        "run.micro_batch=8",
        "model.vision.grad_checkpointing=true",
        "run.precision=bf16",
    ]
    (both,) = remedies(stage, plan_of, kinds, 149)
    assert both.command() == "run.micro_batch=1 model.vision.grad_checkpointing=true" and both.fits
    (three,) = remedies(stage, plan_of, kinds, 99)
    assert three.command() == "run.micro_batch=1 model.vision.grad_checkpointing=true run.precision=bf16"
    (never,) = remedies(stage, plan_of, kinds, 60)
    assert not never.fits and len(never.changes) == 3
    assert remedies(stage, plan_of, [[], []], 60) == []


def test_changes_that_exclude_each_other_are_passed_over(plan_tree: dict[str, Any]) -> None:
    plan = planner(plan_tree, gpus=2)
    stage = plan.settings.finetune
    kinds = changes_of(stage, plan)
    assert [("run.parallel", "fsdp")] in kinds and [
        ("llm.quantization", "8bit"),
        ("llm.quantization", "4bit"),
    ] in kinds
    (last,) = remedies(stage, plan.finetune, kinds, 1.0)
    assert ("run.parallel", "fsdp") in last.changes and "quantization" not in last.command()


@pytest.mark.slow
def test_the_command(plan_tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "plan.yaml"
    config.write_text(json.dumps(plan_tree))  # JSON is YAML
    assert main(["plan", "--config", str(config), f"out={tmp_path / 'plan.json'}"]) == 0
    shown = capsys.readouterr().out
    assert "Memory of one GPU" in shown and "40 % of the peak" in shown and "DOES NOT FIT" not in shown
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [step["command"] for step in plan["steps"]] == ["finetune-llm", "embed", "train"]
    for step in plan["steps"]:
        assert step["total_bytes"] == pytest.approx(sum(step["memory"].values())) and step["hours"] > 0
    assert plan["captions"] == 12800 and plan["store_bytes"] > 12800 * 32 * 2
    assert main(["plan", "--config", str(config), "gpu_memory_gib=2.0001"]) == 1
    assert "train DOES NOT FIT" in (shown := capsys.readouterr().out) and "run.micro_batch=" in shown
    for step in plan["steps"]:
        step |= {"measured": True, "share": 0.3}
    shown = render(plan)
    assert "of the peak where" not in shown and "30 (measured)" in shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["llm=''"], "llm is empty"),
        (["pairs=0"], "number of training images"),
        (["gpu=''"], "gpu is empty"),
        (["train_mfu=1.5"], "plan.train_mfu: expected a share"),
        (["finetune.objective=mntp"], "finetune.objective"),
        (["train.text.source=online", "train.text.llm.path=x"], "captions from a store"),
    ],
)
def test_bad_input(
    plan_tree: dict[str, Any],
    tmp_path: Path,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "plan.yaml"
    config.write_text(json.dumps(plan_tree))
    assert main(["plan", "--config", str(config), *more]) == 2
    assert message in capsys.readouterr().err


def test_settings_of_the_stages_are_their_own(plan_tree: dict[str, Any]) -> None:
    settings = load_settings(PlanSettings, None, ["train.optim.ema=0.99", "finetune.lora.rank=8"])
    assert settings.train.optim.ema == 0.99 and settings.finetune.lora.rank == 8
