"""Group ids: sizes and sums against the dense comparison."""

from __future__ import annotations

import pytest
import torch

from llm2clip_kernels.contrastive.groups import group_logit_sums, group_sizes, group_sums


@pytest.mark.parametrize("rows, others", [(1, 1), (7, 3), (3, 40), (64, 65)])
def test_sizes_and_sums(rows: int, others: int) -> None:
    ids = torch.randint(-2, 9, (rows,))
    other_ids = torch.randint(-2, 9, (others,)) * 3
    values = torch.randn(others, 5, dtype=torch.float64, requires_grad=True)
    same = ((ids[:, None] == other_ids) & (ids >= 0)[:, None]).double()
    assert torch.equal(group_sizes(ids, other_ids), same.sum(1).long())
    got = group_sums(values, other_ids, ids)
    torch.testing.assert_close(got, same @ values)
    weight = torch.randn_like(got)
    (grad,) = torch.autograd.grad((got * weight).sum(), values)
    torch.testing.assert_close(grad, same.T @ weight)


@pytest.mark.parametrize("paired", [False, True])
def test_logit_sums(paired: bool) -> None:
    x, y = torch.randn(11, 4).double(), torch.randn(11, 4).double()
    x_ids, y_ids = torch.randint(-1, 4, (11,)), torch.randint(-1, 4, (11,))
    same = ((x_ids[:, None] == y_ids) & (x_ids >= 0)[:, None]).double()
    if paired:
        same.fill_diagonal_(0)
    logits = 3.0 * x @ y.T
    rows, columns = group_logit_sums(x, y, torch.tensor(3.0).double(), x_ids, y_ids, paired)
    torch.testing.assert_close(rows, (same * logits).sum(1))
    torch.testing.assert_close(columns, (same * logits).sum(0))


def test_a_group_of_one_leaves_exact_zeros() -> None:
    x, y, ids = torch.randn(9, 6), torch.randn(9, 6), torch.arange(9)
    rows, columns = group_logit_sums(x, y, torch.tensor(1e4), ids, ids, paired=True)
    assert not rows.any() and not columns.any()
