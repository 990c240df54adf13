"""Properties of every setting, of shards and packing, and of the losses; `--hypothesis-profile=long` tries more."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm2clip.config import dump_yaml, from_tree, load_settings, to_tree
from llm2clip.data.shards import ShardWriter
from llm2clip.data.sources import open_source
from llm2clip.errors import ConfigError
from llm2clip.packing import pack
from llm2clip.reference import COMMANDS
from llm2clip_kernels import infonce_loss, sigmoid_loss, similarity_topk

quick = settings(deadline=None, suppress_health_check=list(HealthCheck))
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Plain values of a setting's type, as YAML may hold them."""
    origin, args = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.fixed_dictionaries({}, optional={name: values(hint) for name, hint in hints.items()})
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (Union, types.UnionType):
        return st.one_of(*(st.none() if arg is type(None) else values(arg) for arg in args))
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return st.lists(values(args[0]), max_size=3)
        return st.tuples(*map(values, args)).map(list)
    if origin is dict:
        return st.dictionaries(TEXT, values(args[1]), max_size=3)
    plain = {bool: st.booleans(), int: st.integers(0, 2**40), str: TEXT, float: st.floats(0, 1, width=32)}
    return plain[kind]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
@settings(quick, max_examples=max(15, settings.default.max_examples // 8))
@given(data=st.data())
def test_any_settings_survive_dump_and_load(
    command: type, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tree = data.draw(values(command))
    try:
        chosen = from_tree(command, tree)
    except ConfigError as problem:  # values that contradict each other
        assert str(problem)
        return
    file = tmp_path_factory.mktemp("config") / "a.yaml"
    file.write_text(dump_yaml(chosen), encoding="utf-8")
    assert load_settings(command, file) == chosen
    assert from_tree(command, to_tree(chosen)) == chosen


words = TEXT.map(str.strip).filter(bool)


@settings(quick)
@given(texts=st.lists(words, min_size=1, max_size=9), size=st.integers(1, 4))
def test_shards_give_back_what_was_written(
    texts: list[str], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(folder, "train", size)
    for number, text in enumerate(texts):
        writer.add(f"{number:04d}", text.encode(), "png", {"caption": text, "n": number})
    assert len(writer.close()) == -(-len(texts) // size)
    source = open_source(str(folder))
    found = [source[index] for index in range(len(source))]
    assert [(sample.captions["caption"], sample.image) for sample in found] == [
        ((text,), text.encode()) for text in texts
    ]
    assert json.dumps([sample.meta["n"] for sample in found]) == json.dumps(list(range(len(texts))))


@settings(quick)
@given(lengths=st.lists(st.integers(1, 99), max_size=60), budget=st.integers(1, 120), data=st.data())
def test_packing_knows_no_order(lengths: list[int], budget: int, data: st.DataObject) -> None:
    """The same lengths in another order fill bins of the same lengths."""
    order = data.draw(st.permutations(range(len(lengths))))
    sizes = np.array(lengths, np.int64)

    def filled(values: np.ndarray[Any, Any]) -> list[list[int]]:
        return sorted(sorted(values[group].tolist()) for group in pack(values, budget))

    assert filled(sizes) == filled(sizes[list(order)])


def unit(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=1)


@settings(quick, max_examples=max(25, settings.default.max_examples // 4))
@given(st.integers(2, 70), st.integers(1, 33), st.floats(0, 100, width=32), st.integers(0, 2**31))
def test_gradients_move_with_their_rows(n: int, d: int, scale: float, seed: int) -> None:
    """Another order of the batch gives the same gradients in that order; so do the towers exchanged."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))

    def gradients(loss: Any, a: Tensor, b: Tensor) -> list[Tensor]:
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        return list(torch.autograd.grad(loss(a, b), (a, b)))

    x, y = unit(n, d, seed), unit(n, d, seed + 1)
    limit = 1e-5 * max(1.0, scale)
    for loss in (
        lambda a, b: infonce_loss(a, b, scale, method="recompute"),
        lambda a, b: infonce_loss(a, b, scale, method="cached"),
        lambda a, b: sigmoid_loss(a, b, scale, -5.0),
    ):
        dx, dy = gradients(loss, x, y)
        moved = gradients(loss, x[order], y[order])
        swapped = gradients(loss, y, x)
        for got, want in zip((*moved, *swapped), (dx[order], dy[order], dy, dx), strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=limit)


@settings(quick)
@given(st.integers(1, 40), st.integers(2, 90), st.integers(1, 20), st.integers(0, 2**31), st.data())
def test_the_best_of_parts_are_the_best(m: int, n: int, d: int, seed: int, data: st.DataObject) -> None:
    """The k best of all candidates are among the k best of two parts of them."""
    x, y = unit(m, d, seed), unit(n, d, seed + 1)
    cut, k = data.draw(st.integers(1, n - 1)), data.draw(st.integers(1, min(n, 9)))
    whole = similarity_topk(x, y, k)[0]
    parts = [similarity_topk(x, part, min(k, len(part)))[0] for part in (y[:cut], y[cut:])]
    assert torch.equal(torch.cat(parts, 1).sort(1, descending=True).values[:, :k], whole)
