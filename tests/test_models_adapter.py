"""TextAdapter's fused forward against its own modules: values, gradients, memory, dropout, compile, DDP, fallbacks."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

sys.path.insert(0, str(Path(__file__).parent))
from gloo import run_on_ranks  # noqa: E402

from llm2clip.models import TextAdapter  # noqa: E402
from llm2clip.models import adapter as module  # noqa: E402


def trained(depth: int = 2, dim: int = 24, out: int = 10, **options: Any) -> TextAdapter:
    """An adapter whose every parameter matters: fresh ones have LayerNorms of ones and zeros."""
    adapter = TextAdapter(dim, out, depth=depth, **options)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return adapter


def run(
    adapter: TextAdapter, forward: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor
) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    adapter.zero_grad()
    y = forward(x)
    y.backward(upstream.to(y.dtype))
    gradients = [x.grad, *(p.grad for p in adapter.parameters())]
    assert all(g is not None for g in gradients)
    return [t.detach().double() for t in (y, *gradients) if t is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("depth", [0, 1, 4])
def test_equals_the_plain_modules(depth: int, dtype: torch.dtype) -> None:
    """Outputs and every gradient: error against fp64 at most twice that of torch's modules."""
    adapter = trained(depth).to(dtype)
    exact = copy.deepcopy(adapter).double()
    x, upstream = (5 * torch.randn(70, 24)).to(dtype), torch.randn(70, 10, dtype=torch.float64)
    true = run(exact, exact.forward_plain, x.double(), upstream)
    plain = run(adapter, adapter.forward_plain, x, upstream)
    ours = run(adapter, adapter, x, upstream)
    assert len(ours) == 2 + 6 * depth + 4
    noise = {torch.float64: 1e-14, torch.float32: 4e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for i, (t, p, o) in enumerate(zip(true, plain, ours, strict=True)):
        assert (o - t).norm() <= 2 * (p - t).norm() + noise * t.abs().max() * t.numel() ** 0.5, i


def test_the_ops_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("adapter_block", "layer_norm_linear", "l2_normalize"):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, _r=real, _n=name, **k: (calls.append(_n), _r(*a, **k))[1]
        )
    trained(3)(torch.randn(4, 24))
    assert calls == ["l2_normalize"] + 3 * ["adapter_block"] + ["layer_norm_linear"]


def test_saves_half_of_what_the_modules_save() -> None:
    adapter = trained(4)
    own = {p.untyped_storage().data_ptr() for p in adapter.parameters()}

    def saved(forward: Callable[[Tensor], Tensor]) -> int:
        kept: dict[int, Tensor] = {}

        def pack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in own:
                kept[t.untyped_storage().data_ptr()] = t
            return t

        x = torch.randn(64, 24)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = forward(x)
        assert y.requires_grad
        return sum(t.untyped_storage().nbytes() for t in kept.values())

    assert 0 < 2 * saved(adapter) <= saved(adapter.forward_plain)


def test_autocast_rounds_no_more_than_the_modules() -> None:
    adapter, x, upstream = trained(3), torch.randn(40, 24), torch.randn(40, 10, dtype=torch.float64)
    exact = copy.deepcopy(adapter).double()
    true = run(exact, exact.forward_plain, x.double(), upstream)

    def cast(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def inner(t: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return forward(t)

        return inner

    plain = run(adapter, cast(adapter.forward_plain), x, upstream)
    ours = run(adapter, cast(adapter), x, upstream)
    for t, p, o in zip(true, plain, ours, strict=True):
        assert (o - t).norm() <= 2 * (p - t).norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapter(x).dtype == adapter.forward_plain(x).dtype == torch.bfloat16


def test_dropout_is_unbiased_and_repeats_with_the_seed() -> None:
    adapter = trained(1, dropout=0.5)
    x = torch.randn(3, 24)
    with torch.no_grad():
        mean = torch.stack([adapter.train().adaptor[0](x) for _ in range(2000)]).mean(0)
        spread = torch.stack([adapter.adaptor[0](x) for _ in range(200)]).std(0).max()
        want = adapter.eval().adaptor[0](x)
    assert (mean - want).abs().max() < 5 * spread / 2000**0.5
    adapter.train()
    torch.manual_seed(5)
    first = adapter(x)
    torch.manual_seed(5)
    assert torch.equal(adapter(x), first) and not torch.equal(adapter(x), first)


def test_dropout_gradients_belong_to_the_mask_that_was_drawn() -> None:
    adapter = trained(2, dropout=0.3).double().train()
    x = torch.randn(4, 24, dtype=torch.float64, requires_grad=True)

    def seeded(t: Tensor) -> Tensor:
        torch.manual_seed(1)
        return adapter(t)

    assert torch.autograd.gradcheck(seeded, (x,))


@pytest.mark.parametrize("normalize", [True, False])
def test_noise_has_the_length_asked_for_in_every_direction(normalize: bool) -> None:
    adapter = TextAdapter(24, 5, depth=0, normalize_input=normalize, noise=0.5).double().train()
    seen: list[Tensor] = []
    adapter.adaptor.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    x = 3 * torch.randn(4, 24, dtype=torch.float64)
    for _ in range(4000):
        adapter(x)
    length = 1.0 if normalize else x.norm(dim=1)
    start = x / x.norm(dim=1, keepdim=True) if normalize else x
    added = torch.stack(seen) - start
    torch.testing.assert_close(
        added.square().sum(2).mean(0).sqrt(), 0.5 * length * torch.ones(4).double(), rtol=0.02, atol=0
    )
    each = added.square().mean((0, 1)).sqrt()
    assert each.max() / each.min() < 1.05 and (added.mean((0, 1)) / each).abs().max() < 5 / 16000**0.5


def test_noise_repeats_with_the_seed_and_acts_in_training_only() -> None:
    adapter, x = trained(1, noise=1.0), torch.randn(3, 24)
    torch.manual_seed(5)
    first = adapter.train()(x)
    torch.manual_seed(5)
    torch.testing.assert_close(adapter.forward_plain(x), first)
    assert not torch.equal(adapter(x), first)
    quiet = trained(1)
    quiet.load_state_dict(adapter.state_dict())
    assert torch.equal(adapter.eval()(x), quiet.eval()(x)) and torch.equal(adapter(x), adapter(x))


def test_only_what_trains_gets_a_gradient() -> None:
    adapter = trained(2)
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    adapter.adaptor[1].fn[3].weight.requires_grad_()
    adapter(torch.randn(5, 24)).sum().backward()
    got = [name for name, p in adapter.named_parameters() if p.grad is not None]
    assert got == ["adaptor.1.fn.3.weight"]


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("place", ["block", "last"])
def test_replaced_modules_are_called(place: str) -> None:
    """As peft, quantisation and parametrisations replace them."""
    adapter, x = trained(2), torch.randn(5, 24)
    before = adapter(x)
    if place == "block":
        adapter.adaptor[0].fn[0] = Doubled(24, 48)
    else:
        adapter.adaptor[3] = Doubled(24, 10)
    assert torch.allclose(adapter(x), adapter.forward_plain(x), atol=1e-5)
    assert not torch.allclose(adapter(x), before, atol=1e-2)


def test_hooks_are_called() -> None:
    adapter, x = trained(2), torch.randn(5, 24)
    seen: list[str] = []
    adapter.adaptor[0].fn[1].register_forward_hook(lambda *_: seen.append("gelu"))
    adapter.adaptor[1].ln.register_forward_pre_hook(lambda *_: seen.append("norm"))
    adapter.adaptor[1].register_forward_hook(lambda *_: seen.append("block"))
    adapter.adaptor[3].register_full_backward_hook(lambda *_: seen.append("last, backward"))
    adapter(x).sum().backward()
    assert seen == ["gelu", "norm", "block", "last, backward"]


class Marked(nn.Parameter):
    """Stands for a quantised or sharded weight: a subclass that torch's own layers can multiply with."""


@pytest.mark.parametrize("place", ["first", "last", "adaptor", "forward"])
def test_what_is_not_plain_is_called_itself(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, x = trained(1), torch.randn(5, 24)
    want, seen = adapter(x).detach(), []
    monkeypatch.setattr(nn.Linear, "forward", noting(nn.Linear.forward, seen))
    adapter(x)
    assert not seen
    if place == "adaptor":
        adapter.adaptor.register_forward_hook(lambda *_: seen.append("adaptor"))
    elif place == "forward":
        layer = adapter.adaptor[2]
        layer.forward = noting(layer.forward, seen)
    else:
        layer = adapter.adaptor[0].fn[0] if place == "first" else adapter.adaptor[2]
        layer.weight = Marked(layer.weight.detach())
    assert torch.allclose(adapter(x), want, atol=1e-5)
    assert len(seen) == {"first": 2, "last": 1, "adaptor": 2, "forward": 2}[place]


def noting(function: Any, seen: list[str]) -> Any:
    def noted(*args: Any) -> Any:
        seen.append("called")
        return function(*args)

    return noted


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
def test_embeddings_of_half_precision_under_any_autocast(stored: torch.dtype, kind: torch.dtype) -> None:
    adapter, x = trained(1), torch.randn(5, 24).to(stored)
    with torch.autocast("cpu", kind):
        got, want = adapter(x), adapter.forward_plain(x)
    assert got.dtype == want.dtype
    true = adapter.double().forward_plain(x.double())
    assert (got - true).norm() <= 2 * (want - true).norm() + 1e-3 * true.norm()
    adapter.float()
    with torch.autocast("cpu", kind):
        adapter(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())


def test_parametrised_weights_are_used() -> None:
    adapter, x = trained(1), torch.randn(5, 24)
    torch.nn.utils.parametrizations.weight_norm(adapter.adaptor[0].fn[0])
    with torch.no_grad():
        adapter.adaptor[0].fn[0].parametrizations.weight.original0.mul_(3)
    assert torch.allclose(adapter(x), adapter.forward_plain(x), atol=1e-5)


def test_compiles_whole_and_once() -> None:
    adapter = trained(2, dropout=0.1).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(adapter, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for n in (11, 17, 29):
        x = torch.randn(n, 24)
        got = torch.autograd.grad(compiled(x).square().sum(), list(adapter.parameters()))
        want = torch.autograd.grad(adapter.forward_plain(x).square().sum(), list(adapter.parameters()))
        counts.append(counter.frame_count)
        for g, w in zip(got, want, strict=True):
            assert torch.allclose(g, w, rtol=1e-4, atol=1e-4)
    assert counts[0] == counts[-1] > 0
    adapter.train()
    assert torch.compile(adapter, fullgraph=True, backend="aot_eager")(torch.randn(5, 24)).shape == (5, 10)


def ddp_rank(rank: int, world: int) -> None:
    torch.manual_seed(0)
    adapter = trained(2)
    parallel = nn.parallel.DistributedDataParallel(adapter)
    x = torch.randn(12, 24)
    parallel(x[rank::world]).square().sum().backward()
    single = copy.deepcopy(adapter)
    single.zero_grad()
    (single.forward_plain(x).square().sum() / world).backward()
    for got, want in zip(adapter.parameters(), single.parameters(), strict=True):
        assert got.grad is not None and want.grad is not None
        assert torch.allclose(got.grad, want.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.dist
def test_distributed_data_parallel() -> None:
    run_on_ranks(2, ddp_rank)


def test_state_dict_and_new_parameters_are_unchanged() -> None:
    """Names, shapes, order, and the first random numbers: runs begin as before."""
    torch.manual_seed(0)
    state = TextAdapter(6, 4, depth=1).state_dict()
    torch.manual_seed(0)
    norm, first, last, top_norm, top = (
        nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6), nn.LayerNorm(6), nn.Linear(6, 4),
    )  # fmt: skip
    want = {
        f"{name}.{kind}": value
        for name, layer in (
            ("adaptor.0.ln", norm), ("adaptor.0.fn.0", first), ("adaptor.0.fn.3", last),
            ("adaptor.1", top_norm), ("adaptor.2", top),
        )
        for kind, value in layer.state_dict().items()
    }  # fmt: skip
    assert list(state) == list(want)
    assert all(torch.equal(state[name], want[name]) for name in want)
