"""Files of weights, and the names that a tower's weights have in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llm2clip.errors import ModelError
from llm2clip.models.hf_files import load_named, published_names
from llm2clip.models.weights import check_names, load_weights, not_allowed, one_tensor, skip_random_init
from tests.vision_kit import CONVOLUTIONAL, VITS, hf_vision_model


@pytest.mark.parametrize("kind", [*VITS, *CONVOLUTIONAL])
def test_names_are_those_of_files_on_the_hub(kind: str, tmp_path: Path) -> None:
    hf_vision_model(kind).save_pretrained(tmp_path)
    from llm2clip.models.hf_files import load_hf_vision

    model = load_hf_vision(tmp_path).model
    names = published_names(model)
    stored = load_file(tmp_path / "model.safetensors")
    assert {name.removeprefix("vision_model.") for name in names} == {
        name.removeprefix("vision_model.") for name in stored
    }
    # every name is understood again: the hub's, with and without its half's prefix, and the installed version's own
    for state in (names, stored, model.state_dict()):
        other = hf_vision_model(kind)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        load_named(other, state, "file")
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in other.state_dict().items())


@pytest.mark.filterwarnings("ignore:mean is more than 2 std")
def test_building_without_random_values() -> None:
    with skip_random_init():
        for fill in (nn.init.normal_, nn.init.kaiming_uniform_, nn.init.xavier_uniform_, nn.init.uniform_):
            assert fill(torch.full((4, 4), float("nan"))).unique().numel() == 1
        # rejection sampling must end, wherever its bounds are
        for mean, low, high in ((0.0, -2.0, 2.0), (5.0, 4.9, 6.0), (0.0, 3.0, 4.0), (0.0, -0.01, 0.01)):
            drawn = nn.init.trunc_normal_(torch.full((4, 4), float("nan")), mean, 1.0, low, high)
            assert ((drawn >= low) & (drawn <= high)).all()
        assert torch.equal(nn.LayerNorm(3).weight, torch.ones(3))
    assert nn.init.normal_(torch.zeros(4, 4)).any()


def test_differences_are_listed_by_kind(tmp_path: Path) -> None:
    expected = {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}
    with pytest.raises(ModelError) as error:
        check_names(expected, {"a": torch.ones(2), "b": torch.ones(4), "d": torch.ones(1)}, "file")
    text = str(error.value)
    assert "1 missing (c)" in text and "1 unexpected (d)" in text
    assert "1 of another shape (b: file (4,), model (3,))" in text
    check_names(expected, dict(expected), "file")
    assert not_allowed(["text_model.a", "b", "text_modelx"], ["text_model.*", "c"]) == ["b", "text_modelx"]
    layer = nn.Linear(2, 3)
    torch.save({"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, tmp_path / "layer.pt")
    load_weights(layer, tmp_path / "layer.pt")
    assert torch.equal(layer.weight, torch.ones(3, 2))
    assert one_tensor(tmp_path, "weight") is None
