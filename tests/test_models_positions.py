"""Position embeddings of another size, and the choice of patches that a training step sees."""

from __future__ import annotations

import pytest
import torch

from llm2clip.errors import ModelError
from llm2clip.models.patch_dropout import keep_rotations, keep_tokens, kept_patches
from llm2clip.models.positions import resize_grid, resized_state


def test_resizing_keeps_prefix_constants_and_slopes() -> None:
    side, new, dim = 6, 9, 3
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    grid = torch.stack([torch.full((6, 6), 2.5), rows, columns], dim=-1).reshape(36, dim)
    prefix = torch.randn(2, dim)
    table = torch.cat([prefix, grid])
    out = resize_grid(table, side, new, prefix=2)
    assert out.shape == (2 + 81, dim) and torch.equal(out[:2], prefix)
    patches = out[2:].reshape(new, new, dim)
    torch.testing.assert_close(patches[..., 0], torch.full((new, new), 2.5))
    # away from the border a slope stays a slope: the centre of new patch i lies at (i + 0.5) * 6 / 9 - 0.5
    places = (torch.arange(new) + 0.5) * side / new - 0.5
    inner = slice(3, 6)
    torch.testing.assert_close(patches[inner, 4, 1], places[inner], atol=1e-4, rtol=0)
    torch.testing.assert_close(patches[4, inner, 2], places[inner], atol=1e-4, rtol=0)
    # rows and columns are not mixed up
    assert not torch.allclose(patches[..., 1], patches[..., 2])


def test_resizing_to_the_same_grid_changes_nothing() -> None:
    table = torch.randn(1, 17, 5)
    assert resize_grid(table, 4, 4, prefix=1) is table


def test_smaller_grids_are_smoothed_and_half_precision_is_kept() -> None:
    # a checkerboard has no meaning on a grid half as fine: antialiasing leaves its mean
    checkers = ((torch.arange(8)[:, None] + torch.arange(8)) % 2).float().reshape(64, 1)
    out = resize_grid(checkers, 8, 4)
    torch.testing.assert_close(out, torch.full((16, 1), 0.5), atol=0.05, rtol=0)
    assert resize_grid(checkers.to(torch.bfloat16), 8, 4).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="64 position embeddings are not 1 tokens and a grid of 8 x 8"):
        resize_grid(checkers, 8, 4, prefix=1)


def test_state_is_resized_by_shape_alone() -> None:
    state = {"a.pos": torch.randn(1, 1 + 16, 4), "b.table": torch.randn(16, 4), "w": torch.randn(3, 3)}
    shapes = {"a.pos": torch.Size((1, 1 + 9, 4)), "b.table": torch.Size((9, 4)), "w": torch.Size((3, 3))}
    out = resized_state(state, shapes, 4, 3, "Model")
    assert {name: tensor.shape for name, tensor in out.items()} == shapes
    assert out["w"] is state["w"] and torch.equal(out["a.pos"][:, :1], state["a.pos"][:, :1])
    torch.testing.assert_close(out["b.table"], resize_grid(state["b.table"], 4, 3))
    # a relative position bias has (2n - 1)² rows
    with pytest.raises(ModelError, match="Model cannot change its image size: bias is"):
        resized_state({"bias": torch.randn(49, 2)}, {"bias": torch.Size((25, 2))}, 4, 3, "Model")


def test_kept_patches_are_different_random_ones_of_each_image() -> None:
    kept = kept_patches(200, 9, 0.5, torch.device("cpu"))
    assert kept.shape == (200, 4) and kept.min() == 0 and kept.max() == 8
    assert all(len(set(row)) == 4 for row in kept.tolist())
    assert len({tuple(sorted(row)) for row in kept.tolist()}) > 60  # of 126 there are
    counts = torch.bincount(kept.flatten(), minlength=9)
    assert counts.min() > 0.6 * counts.float().mean()
    assert kept_patches(3, 9, 0.99, torch.device("cpu")).shape == (3, 1)


def test_tokens_and_rotations_follow_the_same_patches() -> None:
    tokens = torch.arange(2 * 5.0).reshape(2, 5, 1)
    kept = torch.tensor([[2, 0], [1, 2]])
    assert keep_tokens(tokens, kept, 2).flatten().tolist() == [0, 1, 4, 2, 5, 6, 8, 9]
    table = torch.tensor([[0.0], [1.0], [2.0]])
    assert keep_rotations(table, kept).flatten().tolist() == [2, 0, 1, 2]
    assert keep_rotations(table, kept).shape == (2, 1, 2, 1)
