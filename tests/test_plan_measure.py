"""What the planner measures on modules without values: the same as on modules with values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from llm2clip.models.lora import add_lora
from llm2clip.plan.decoders import captions_through
from llm2clip.plan.measure import LiveBytes, Valueless, line_through
from llm2clip.plan.shapes import decoder, decoder_config, layer_period
from llm2clip.plan.stages import GIB, _trained
from llm2clip.plan.towers import loss_workspace
from llm2clip.settings import (
    LLMSettings,
    LoraSettings,
    OptimSettings,
)
from llm2clip.training.flops import OWN_OPS
from llm2clip.training.optim import build_optimizer
from llm2clip_kernels.checks import is_plain
from llm2clip_kernels.similarity_lse import chunked
from tests.tiny_models import tiny_config

TOKENS = 8


LLM = LLMSettings(layout="packed", max_length=64)


LORA = LoraSettings(rank=4, dropout=0.0)


@pytest.fixture(scope="module")
def llm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    tiny_config("llama", num_hidden_layers=6).save_pretrained(folder)
    return folder


class Blocks(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(16, 64) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(64, 16) for _ in range(4))
        self.first, self.checkpointed = nn.Linear(16, 16), checkpointed

    def block(self, i: int, x: Tensor) -> Tensor:
        return x + self.down[i](F.gelu(self.up[i](x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i in range(4):
            x = checkpoint(self.block, i, x, use_reentrant=False) if self.checkpointed else self.block(i, x)
        return x


@pytest.mark.parametrize("checkpointed", [False, True])
def test_memory_without_values_is_that_with_values(checkpointed: bool) -> None:
    real = Blocks(checkpointed)
    for parameter in real.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as live:
        real(torch.zeros(500, 16)).sum().backward()
    runner = Valueless(lambda: Blocks(checkpointed))
    peak = runner.peak(lambda: torch.zeros(500, 16), lambda module, x: module(x))
    assert peak == live.peak > 500 * 16 * 4
    assert live.now == 0, "everything that was made has been let go"
    assert next(runner.module.parameters()).grad is None


def test_live_bytes_follow_what_is_kept() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(100)
        torch.zeros(50) + 1.0
        view = kept[:10].view(5, 2)
    assert live.now == 400 and live.peak == 800
    del kept, view
    assert live.now == 0


def real_decoder(config: Any) -> Any:
    from llm2clip.models import bidirectional, packed

    model: Any = decoder(config).requires_grad_(False)
    bidirectional.set_attention(model, bidirectional=True)
    packed.install(model)
    return add_lora(model, LORA).train()


def real_forward(model: Any, captions: int) -> Tensor:
    from llm2clip.models.packed import PackedBatch, model_inputs, pool_packed

    edges = torch.arange(0, (captions + 1) * TOKENS, TOKENS, dtype=torch.int32)
    ids = torch.zeros(captions * TOKENS, dtype=torch.int64)
    batch = PackedBatch(ids, torch.arange(TOKENS).repeat(captions), edges, edges[:-1].long(), TOKENS)
    return pool_packed(model(**model_inputs(batch)).last_hidden_state[0], batch, "mean").sum()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_decoder_takes_what_it_takes_with_values(llm_dir: Path, checkpointing: bool) -> None:
    """All six layers, run for real; the plan runs two and three of them."""
    config = decoder_config(str(llm_dir))
    count = 128
    found = captions_through(
        config,
        LLM,
        LORA,
        tokens=TOKENS,
        count=count,
        precision="fp32",
        train=True,
        checkpointing=checkpointing,
    )
    model = real_decoder(decoder_config(str(llm_dir)))
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    for captions in (count, count // 2):
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.grad = torch.zeros_like(parameter)
        with LiveBytes() as live:
            real_forward(model, captions).backward()
        assert found.peak(captions) == pytest.approx(live.peak, rel=0.03)


def test_flops_of_a_decoder(llm_dir: Path) -> None:
    config = decoder_config(str(llm_dir))
    found = captions_through(config, LLM, LORA, tokens=TOKENS, count=4, precision="fp32", train=True)
    model = real_decoder(decoder_config(str(llm_dir)))
    with FlopCounterMode(display=False, custom_mapping=OWN_OPS) as counter:
        loss = real_forward(model, 3)
        forward = counter.get_total_flops()
        loss.backward()
    assert 3 * found.forward_flops == forward
    assert 3 * found.backward_flops == counter.get_total_flops() - forward
    # by hand: two for each weight of a product and token, and attention's two products
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n)
    attention = 6 * 4 * 32 * TOKENS * TOKENS
    assert found.forward_flops == 2 * weights * TOKENS + attention


def test_layers_of_several_types_are_run_in_whole_periods() -> None:
    assert layer_period(tiny_config("llama")) == 1
    mixed = tiny_config("gemma3_text", num_hidden_layers=8)
    assert mixed.layer_types[0] != mixed.layer_types[1] and layer_period(mixed) == 2
    mixed.layer_types = ["full_attention"] + ["sliding_attention"] * 7
    assert layer_period(mixed) == 8
    with torch.device("meta"):
        assert len(decoder(mixed, 4).layers) == 4  # type: ignore[arg-type]
    assert mixed.num_hidden_layers == 8


def test_a_depthwise_convolution_costs_its_backward_twice_its_forward() -> None:
    layer = nn.Conv2d(8, 8, 3, groups=8)
    with FlopCounterMode(display=False, custom_mapping=OWN_OPS) as counter:
        output = layer(torch.zeros(2, 8, 9, 9, requires_grad=True))
        forward = counter.get_total_flops()
        output.sum().backward()
    assert forward == 2 * 2 * 8 * 7 * 7 * 9
    assert counter.get_total_flops() == 3 * forward


def test_the_loss_takes_what_it_takes_with_values() -> None:
    rows, columns, dim = 300, 700, 16
    x, y = torch.randn(rows, dim), torch.randn(columns, dim)
    groups = torch.arange(rows), torch.arange(columns)
    rest = torch.ones(rows), torch.ones(columns), torch.ones(rows)
    with LiveBytes() as live:
        lse = chunked.forward(x, y, torch.tensor(2.0), True, 0, *groups)
        chunked.backward(*rest, x, y, torch.tensor(2.0), *lse, 0, *groups, True, True, True)
    assert loss_workspace(rows, columns, dim) == pytest.approx(live.peak, rel=0.03)
    # bounded, where a matrix of all pairs would have 16 GiB
    assert loss_workspace(65536, 65536, 512) < GIB


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_state_of_the_optimizer(name: str) -> None:
    pytest.importorskip("lion_pytorch" if name == "lion" else "torch")
    model = nn.Linear(30, 40)
    settings = OptimSettings(name=name)  # type: ignore[arg-type]
    optimizer = build_optimizer({"all": list(model.named_parameters())}, settings)
    model(torch.zeros(1, 30)).sum().backward()
    optimizer.step()
    state = [
        t for of in optimizer.state.values() for t in of.values() if isinstance(t, Tensor) and t.dim() > 0
    ]
    held = _trained(30 * 40 + 40, settings, ddp=False)
    assert held[f"{name} state"] == sum(t.nbytes for t in state)
    assert held["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    more = _trained(10, OptimSettings(ema=0.99), ddp=True)
    assert more["average of the weights"] == more["gradients in DDP's buckets"] == 40


def test_a_line_never_begins_below_zero() -> None:
    assert line_through({4: 90.0, 8: 130.0}) == (50.0, 10.0)
    assert line_through({8: 80.0}) == (0.0, 10.0)
    assert line_through({4: 10.0, 8: 80.0}) == (0.0, 10.0)


def test_tensors_without_values_are_plain_and_subclasses_are_not() -> None:
    class Quantised(Tensor):
        pass

    runner = Valueless(lambda: nn.Linear(2, 2))
    assert all(is_plain(t) for t in (torch.zeros(1), nn.Parameter(torch.zeros(1)), runner.module.weight))
    assert not is_plain(torch.zeros(1).as_subclass(Quantised))
