"""transformers' Trainer with the fused losses: accumulated and over ranks, its weights are those of plain torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")

from transformers import Trainer, TrainingArguments  # noqa: E402

from llm2clip.integrations.peft import FusedLoraLinear, fuse_lora  # noqa: E402
from llm2clip.integrations.transformers import (  # noqa: E402
    ContrastiveLoss,
    ContrastiveTrainerMixin,
    fuse_clip_loss,
)
from tests.gloo import run_on_ranks  # noqa: E402
from tests.test_integrations_transformers import assert_same as assert_same_gradients  # noqa: E402
from tests.test_integrations_transformers import step  # noqa: E402
from tests.tiny_dual_encoders import dual_encoder, inputs  # noqa: E402

RATE = 0.5


class Towers(nn.Module):
    """Two linear towers whose output has embeddings and no loss, as models of one's own do."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Linear(6, 4), nn.Linear(5, 4)
        self.logit_scale = nn.Parameter(torch.tensor(1.3))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0)) if bias else None

    def forward(self, image: Tensor, text: Tensor, **unused: Any) -> dict[str, Tensor]:
        return {"image_embeds": self.first(image), "text_embeds": self.second(text)}


def pairs(count: int, labels: bool) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    rows = [
        {"image": torch.randn(6, generator=generator), "text": torch.randn(5, generator=generator)}
        for _ in range(count)
    ]
    if labels:
        for index, row in enumerate(rows):
            row["labels"] = torch.tensor(index % 3)
    return rows


class InOrder(Trainer):
    """Batches in the order of the data."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Contrastive(ContrastiveTrainerMixin, InOrder):
    pass


def arguments(folder: Path, batch: int, accumulate: int, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, per_device_eval_batch_size=batch,
        gradient_accumulation_steps=accumulate, num_train_epochs=1, learning_rate=RATE, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, remove_unused_columns=False, **more,
    )  # fmt: skip


def plain_loss(model: Towers, rows: list[dict[str, Tensor]]) -> Tensor:
    """The loss of one micro-batch, written out."""
    out = model(torch.stack([r["image"] for r in rows]), torch.stack([r["text"] for r in rows]))
    image, text = F.normalize(out["image_embeds"], dim=1), F.normalize(out["text_embeds"], dim=1)
    logits = model.logit_scale.exp() * image @ text.T
    if model.logit_bias is not None:
        signs = 2 * torch.eye(len(rows)) - 1
        return -F.logsigmoid(signs * (logits + model.logit_bias)).sum() / len(rows)
    target = torch.arange(len(rows))
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def trained_plainly(
    model: Towers, rows: list[dict[str, Tensor]], batch: int, accumulate: int, last: int | None = None
) -> list[float]:
    """Losses of the steps of SGD on the mean over a step's micro-batches; `last`: divisor of a shorter last step."""
    micro = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    losses = []
    for start in range(0, len(micro), accumulate):
        part = micro[start : start + accumulate]
        divisor = len(part) if last is None or len(part) == accumulate else last
        loss = sum(plain_loss(model, m) for m in part) / divisor
        model.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        losses.append(float(loss))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
    return losses


def assert_trained_alike(got: nn.Module, want: nn.Module) -> None:
    start = Towers(bias=getattr(want, "logit_bias", None) is not None)
    moved = [(w - s).abs().max() for w, s in zip(want.parameters(), start.parameters(), strict=True)]
    assert min(moved) > 1e-3, "the training must have moved every parameter"
    for (name, g), w in zip(got.named_parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("bias", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("labels", [False, True], ids=["unlabelled", "labelled"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_mixin(bias: bool, labels: bool, accumulate: int, tmp_path: Path) -> None:
    """Five micro-batches: with two to a step, the last step has one."""
    rows, model, want = pairs(20, labels), Towers(bias), Towers(bias)
    trainer = Contrastive(model=model, args=arguments(tmp_path, 4, accumulate), train_dataset=rows)
    trainer.train()
    losses = trained_plainly(want, rows, 4, accumulate)
    assert_trained_alike(model, want)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[:2] == pytest.approx(losses[:2], abs=2e-4)
    # evaluation: no gradients, no accumulation
    evaluated = trainer.evaluate(rows[:8])["eval_loss"]
    with torch.no_grad():
        assert evaluated == pytest.approx(
            float(plain_loss(model, rows[:4]) + plain_loss(model, rows[4:8])) / 2
        )


@pytest.mark.parametrize("labels", [False, True], ids=["unlabelled", "labelled"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_function(labels: bool, accumulate: int, tmp_path: Path) -> None:
    rows, model, want = pairs(20, labels), Towers(), Towers()
    settings = arguments(tmp_path, 4, accumulate)
    trainer = InOrder(
        model=model, args=settings, train_dataset=rows, compute_loss_func=ContrastiveLoss(model, settings)
    )
    trainer.train()
    # the lone last micro-batch counts as one of `accumulate`
    trained_plainly(want, rows, 4, accumulate, last=accumulate)
    assert_trained_alike(model, want)


def test_names_of_the_embeddings(tmp_path: Path) -> None:
    class Other(Towers):
        def forward(self, image: Tensor, text: Tensor, **unused: Any) -> dict[str, Tensor]:
            return {"a": self.first(image), "b": self.second(text)}

    class Named(Contrastive):
        embeddings = ("a", "b")

    rows, model, want = pairs(8, False), Other(), Towers()
    Named(model=model, args=arguments(tmp_path, 4, 1), train_dataset=rows).train()
    trained_plainly(want, rows, 4, 1)
    assert_trained_alike(model, want)
    trainer = Contrastive(model=model, args=arguments(tmp_path, 4, 1), train_dataset=rows)
    with pytest.raises(
        ValueError, match=r"\['image_embeds', 'text_embeds'\] are not in \['a', 'b', 'logit_scale'\]"
    ):
        trainer.train()
    # a scale that the model returns is taken as it is, and without any there is no loss
    out = want(torch.randn(3, 6), torch.randn(3, 5))
    loss = trainer.contrastive_loss({**out, "logit_scale": want.logit_scale.exp()})
    assert loss.ndim == 0 and loss.isfinite()
    with pytest.raises(ValueError, match="needs a scale"):
        trainer.contrastive_loss(out)
    with pytest.raises(ValueError, match="returns a dict with .* got tuple"):
        trainer.contrastive_loss(tuple(out.values()))


def clip_rows(name: str, count: int) -> list[dict[str, Any]]:
    given = inputs(name, batch=count)
    return [{key: value[row] for key, value in given.items()} for row in range(count)]


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
def test_a_dual_encoder_under_the_plain_trainer(name: str, tmp_path: Path) -> None:
    """`return_loss` in the batch, as transformers' own example does; and the mixin, which needs no such thing."""

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]} | {"return_loss": True}

    rows, results = clip_rows(name, 12), []
    for way in ("original", "fused", "mixin"):
        model = dual_encoder(name)
        if way == "fused":
            fuse_clip_loss(model)
        kind = Contrastive if way == "mixin" else InOrder
        more = {} if way == "mixin" else {"data_collator": collate}
        trainer = kind(model=model, args=arguments(tmp_path, 4, 2), train_dataset=rows, **more)
        torch.manual_seed(11)
        trainer.train()
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((logged, trainer.evaluate(rows[:4])["eval_loss"], model.state_dict()))
        assert len(logged) == 2
    for logged, evaluated, weights in results[1:]:
        assert logged == pytest.approx(results[0][0], rel=1e-3) and evaluated == pytest.approx(
            results[0][1], rel=1e-3
        )
        for key, true in results[0][2].items():
            torch.testing.assert_close(weights[key], true, rtol=1e-2, atol=1e-3, msg=key)


def test_the_loss_function_with_outputs_of_transformers(tmp_path: Path) -> None:
    """Embeddings in an output object, to which the scale is added; the function's loss is the model's own."""
    rows, settings = clip_rows("CLIPModel", 4), arguments(tmp_path, 4, 1)
    model = dual_encoder("CLIPModel").eval()
    function = ContrastiveLoss(model, settings)
    given = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    outputs = model(**given, return_loss=True)
    torch.testing.assert_close(function(outputs), outputs.loss, rtol=1e-5, atol=1e-6)


def test_mixed_precision_keeps_the_model_fused(tmp_path: Path) -> None:
    """accelerate puts its autocast around forward, and takes it off when the model is saved."""
    rows, model = clip_rows("CLIPModel", 12), dual_encoder("CLIPModel")
    seen: list[bool] = []

    class Watching(Contrastive):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            seen.append("logits_per_text" not in outputs and outputs["image_embeds"].dtype == torch.float32)
            return loss

    trainer = Watching(model=model, args=arguments(tmp_path, 4, 1, bf16=True), train_dataset=rows)
    trainer.train()
    assert seen == [True] * 3
    trainer.save_model(str(tmp_path / "saved"))
    again = type(dual_encoder("CLIPModel")).from_pretrained(tmp_path / "saved")
    for (name, got), want in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(got, want), name
    with torch.no_grad():
        batch = {key: torch.stack([row[key] for row in rows[:4]]) for key in rows[0]}
        assert trainer.accelerator.unwrap_model(model)(**batch, return_loss=True).logits_per_text is None


def test_fused_lora_under_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft's layers fused, the contrastive loss fused, both under Trainer: the losses of neither."""
    peft = pytest.importorskip("peft")
    import llm2clip.integrations.peft as integration

    monkeypatch.setattr(integration, "_FEW", 0)
    rows, results = clip_rows("CLIPModel", 12), []
    for fused in (False, True):
        torch.manual_seed(6)
        settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "fc1"])
        model = peft.get_peft_model(dual_encoder("CLIPModel"), settings)
        if fused:
            assert fuse_lora(model).fused == 12
        trainer = (Contrastive if fused else InOrder)(
            model=model, args=arguments(tmp_path, 4, 1), train_dataset=rows,
            data_collator=None if fused else lambda found: {
                **{key: torch.stack([row[key] for row in found]) for key in found[0]}, "return_loss": True
            },
        )  # fmt: skip
        trainer.train()
        assert any(isinstance(module, FusedLoraLinear) for module in model.modules()) is fused
        trainer.save_model(str(tmp_path / str(fused)))
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((logged, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-3) and len(results[0][0]) == 3
    assert results[0][1].keys() == results[1][1].keys()
    for name, true in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], true, rtol=1e-2, atol=1e-4, msg=name)
    files = [sorted(path.name for path in (tmp_path / str(fused)).iterdir()) for fused in (False, True)]
    assert files[0] == files[1] and "adapter_model.safetensors" in files[0]


def check_fused_over_ranks(rank: int, world: int) -> None:
    """Dual encoders that gather: value and gradients of one process with everybody's pairs."""
    for name, modes in (
        ("CLIPModel", (True, "ring")),
        ("SiglipModel", (True, "ring")),
        ("ClapModel", (True,)),
    ):
        model, whole = dual_encoder(name).eval(), inputs(name, batch=4 * world)
        want, gradients = step(model, whole)
        mine = {key: value[4 * rank :][:4] for key, value in whole.items()}
        local, _ = step(model, mine)
        for mode in modes:
            with fuse_clip_loss(model, gather=mode):  # type: ignore[arg-type]
                got, fused = step(model, mine)
            torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
            for gradient in fused.values():
                dist.all_reduce(gradient)
                gradient /= world
            assert_same_gradients(fused, gradients)
        # without, the negatives are the rank's, as in transformers
        with fuse_clip_loss(model):
            torch.testing.assert_close(step(model, mine)[0].loss, local.loss, rtol=1e-5, atol=1e-6)
        assert (local.loss - want.loss).abs() > 1e-2


def check_ranks(rank: int, world: int, folder: Path) -> None:
    """Ranks with four rows each, two micro-batches to a step: one process with eight rows."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
    for labels in (False, True):
        rows, want = pairs(4 * world * 4, labels), Towers()
        losses = trained_plainly(want, rows, 4 * world, 2)
        for way in ("mixin", "function"):
            model, settings = Towers(), arguments(folder, 4, 2, ddp_backend="gloo")
            assert settings.world_size == world
            if way == "mixin":
                trainer: Trainer = Contrastive(model=model, args=settings, train_dataset=rows)
            else:
                function = ContrastiveLoss(model, settings)
                trainer = InOrder(model=model, args=settings, train_dataset=rows, compute_loss_func=function)
            trainer.train()
            assert_trained_alike(model, want)
            # the function's loss is scaled as Trainer wants it, and so is what Trainer logs of it; without labels in
            # the signature of forward Trainer evaluates no loss that is not the model's
            if way == "function":
                continue
            logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            assert logged == pytest.approx(losses, abs=2e-4)
            evaluated = trainer.evaluate(rows[: 4 * world])["eval_loss"]
            assert evaluated == pytest.approx(float(plain_loss(want, rows[: 4 * world])), rel=1e-3)
    check_fused_over_ranks(rank, world)
    dist.barrier()


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    run_on_ranks(2, check_ranks, tmp_path)
