"""The linear probe against scikit-learn, neighbours against a plain vote, and the command end to end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llm2clip.cli import main
from llm2clip.errors import ConfigError, DataError
from llm2clip.evaluation import linear_probe
from llm2clip.evaluation.benchmark_probe import evaluate_linear_probe
from llm2clip.evaluation.features import FeatureCache, Features
from llm2clip.evaluation.linear_probe import Problem, StandardRows, choose_decay, split_rows, standard_of
from llm2clip.evaluation.neighbours import neighbour_ranks
from llm2clip.settings import LinearProbeSettings
from llm2clip.training.world import World
from tests.benchmark_files import write_image
from tests.evaluation_kit import Kit, build_kit

sys.path.insert(0, str(Path(__file__).parent))
from gloo import run_on_ranks  # noqa: E402

ALONE = World(0, 1, torch.device("cpu"))
CLASSES, DIM = 4, 7


def blobs(count: int, seed: int = 0) -> tuple[Tensor, np.ndarray]:
    """Overlapping classes, features of very different sizes, and one that is constant."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    centres = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(9))
    values = centres[labels] + 1.5 * torch.randn(count, DIM, generator=generator)
    values = values * torch.logspace(-2, 2, DIM) + 3
    values[:, 3] = 5
    return values, labels.numpy()


def stored(values: Tensor, root: Path, world: World = ALONE) -> Features:
    def produce(rows: Sequence[int]) -> Iterator[Tensor]:
        yield values[list(rows)]

    return FeatureCache(root, world, block_rows=64).array("f", {"n": len(values)}, len(values), produce)


def problem(
    root: Path, count: int = 300, seed: int = 0, world: World = ALONE
) -> tuple[StandardRows, np.ndarray, Tensor]:
    values, labels = blobs(count, seed)
    features = stored(values, root / str(seed), world)
    rows = np.arange(count)
    return StandardRows(features, rows, standard_of(features, rows, world)), labels, values


def test_standard_features(tmp_path: Path) -> None:
    rows, _, values = problem(tmp_path)
    plain = (values - values.mean(0)) / values.std(0, correction=0)
    plain[:, 3] = 0  # constant: nothing to scale
    got = rows[slice(0, 300)]
    assert rows.shape == (300, DIM + 1) and (got[:, -1] == 1).all()
    torch.testing.assert_close(got[:, :-1], plain, atol=1e-4, rtol=1e-4)
    assert torch.equal(rows[slice(70, 90)], got[70:90])


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("decay", [1e-3, 10.0])
def test_the_fit_is_the_minimum(
    tmp_path: Path, decay: float, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small:
        monkeypatch.setattr(linear_probe, "_SMALL", 0)
        monkeypatch.setattr(linear_probe, "_BLOCK", 100)
    rows, labels, _ = problem(tmp_path)
    weights = Problem(rows, labels, CLASSES, ALONE).fit(decay)
    x, target = rows[slice(0, 300)].double(), torch.from_numpy(labels)
    free = weights.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ free.T, target) + decay / 2 * free[:, :-1].square().sum()
    (gradient,) = torch.autograd.grad(loss, free)
    # large problems: the decay times the rounding of the weights, which enter the logits in fp32
    bound = 1e-7 if small else 1e-5 * max(1, decay)
    assert gradient.abs().max() < bound, "the gradient of the definition vanishes there"
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    peer = linear_model.LogisticRegression(C=1 / (decay * 300), tol=1e-8, max_iter=5000)
    peer.fit(x[:, :-1].numpy(), labels)
    theirs = peer.predict_proba(x[:, :-1].numpy())
    np.testing.assert_allclose((x @ weights.T).softmax(1).numpy(), theirs, atol=2e-4)


def test_the_sweep_finds_the_best_decay_and_refines_around_it(tmp_path: Path) -> None:
    rows, labels, _ = problem(tmp_path, 60)
    validating, val_labels, _ = problem(tmp_path, 400, seed=1)
    own = StandardRows(validating.features, validating.rows, rows.standard)
    grid = [1e-6, 1e-3, 1.0, 1e3]
    sweep, weights = choose_decay(Problem(rows, labels, CLASSES, ALONE), own, val_labels, ALONE, grid=grid)
    assert sweep.decays[:4] == grid[::-1] and len(sweep.decays) == 8
    first = max(zip(sweep.accuracies[:4], sweep.decays[:4], strict=True))[1]
    assert sweep.decays[4:6] == pytest.approx([first * 1000**0.5, first / 1000**0.5])
    assert max(sweep.accuracies) == sweep.accuracies[sweep.decays.index(sweep.best())]
    said = (own[slice(0, 400)] @ weights.float().T).argmax(1).numpy()
    assert (said == val_labels).mean() == pytest.approx(max(sweep.accuracies))
    assert sweep.sorted()[0] == sorted(sweep.decays)


def test_every_class_gives_the_same_share_to_validation() -> None:
    labels = np.repeat([0, 1, 2], [50, 20, 3])
    rows = np.arange(100, 173)
    train, val = split_rows(labels, rows, 0.2, seed=0)
    assert sorted([*train, *val]) == rows.tolist()
    assert np.bincount(labels[val - 100], minlength=3).tolist() == [10, 4, 0]
    assert not np.array_equal(val, split_rows(labels, rows, 0.2, seed=1)[1])


def test_neighbours_vote(tmp_path: Path) -> None:
    values, labels = blobs(120)
    test_values, test_labels = blobs(30, seed=1)
    train, test = stored(values, tmp_path / "a").rows(), stored(test_values, tmp_path / "b").rows()
    found = neighbour_ranks(
        train, labels, test, test_labels, classes=CLASSES, ks=(1, 5), temperature=0.1, world=ALONE
    )
    x, y = (torch.nn.functional.normalize(v.double(), dim=1) for v in (test_values, values))
    similar = (x @ y.T).numpy()
    for k, ranks in found.items():
        for number, row in enumerate(similar):
            near = np.argsort(-row)[:k]
            votes = np.bincount(labels[near], np.exp(row[near] / 0.1), minlength=CLASSES)
            own = votes[test_labels[number]]
            assert ranks.above[number] == (votes > own * (1 + 1e-6)).sum()
            assert ranks.tied_wrong[number] == (np.abs(votes - own) <= own * 1e-6).sum() - 1
    # nobody votes for three of four classes: their order is chance
    assert (found[1].tied_wrong[found[1].above == 1] == CLASSES - 2).all()


def check_ranks(rank: int, world: int, root: str) -> None:
    here = World(rank, world, torch.device("cpu"))
    rows, labels, _ = problem(Path(root) / "ranks", world=here)
    alone, _, _ = problem(Path(root) / "alone")
    assert torch.allclose(rows[slice(0, 300)], alone[slice(0, 300)], atol=1e-5)
    weights = Problem(rows, labels, CLASSES, here).fit(1.0)
    torch.testing.assert_close(weights, torch.load(Path(root) / "weights.pt"), atol=1e-4, rtol=1e-4)
    values, test_labels = blobs(31, seed=1)
    test = stored(values, Path(root) / "test", here).rows()
    found = neighbour_ranks(
        rows.features.rows(), labels, test, test_labels, classes=CLASSES, ks=(3,), temperature=0.1, world=here
    )
    assert np.array_equal(found[3].expected_rank(), np.load(Path(root) / "ranks.npy"))


@pytest.mark.dist
def test_ranks_share_the_rows(tmp_path: Path) -> None:
    rows, labels, _ = problem(tmp_path / "alone")
    torch.save(Problem(rows, labels, CLASSES, ALONE).fit(1.0), tmp_path / "weights.pt")
    values, test_labels = blobs(31, seed=1)
    test = stored(values, tmp_path / "test_alone").rows()
    found = neighbour_ranks(
        rows.features.rows(),
        labels,
        test,
        test_labels,
        classes=CLASSES,
        ks=(3,),
        temperature=0.1,
        world=ALONE,
    )
    np.save(tmp_path / "ranks.npy", found[3].expected_rank())
    run_on_ranks(2, check_ranks, str(tmp_path))


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return build_kit(tmp_path_factory.mktemp("kit"))


@pytest.fixture
def settings(kit: Kit, tmp_path: Path) -> LinearProbeSettings:
    """Dark and bright images in three classes that any feature of their colour tells apart."""
    for part, count in (("train", 20), ("test", 5)):
        for label, folder in enumerate(("a_dark", "b_grey", "c_light")):
            for number in range(count):
                path = tmp_path / part / folder / f"{number}.png"
                write_image(path, 0)
                shade = 80 * label + 3 * number + (1 if part == "test" else 0)
                from PIL import Image

                Image.new("RGB", (9, 9), (shade, shade, shade)).save(path)
    return LinearProbeSettings(
        models={"start": f"transformers:{kit.clip}", "ours": str(kit.first)}, train=str(tmp_path / "train"),
        test=str(tmp_path / "test"), out=str(tmp_path / "out"), device="cpu", sweep=2, iterations=50,
        neighbours=(1, 5), resamples=50,
    )  # fmt: skip


def test_classes_that_differ_are_told_apart(settings: LinearProbeSettings, tmp_path: Path) -> None:
    results = evaluate_linear_probe(settings)
    for row in results["linear_probe"]:
        assert row["scores"]["recall"]["1"] > 0.8 and row["scores"]["chance"]["1"] == pytest.approx(1 / 3)
        assert row["scores"]["queries"] == 15
    assert [row["classifier"] for row in results["linear_probe"]][::2] == [
        "linear probe", "1 nearest neighbour", "5 nearest neighbours"
    ]  # fmt: skip
    assert results["classes"] == ["a dark", "b grey", "c light"]
    assert len(results["sweeps"]["ours"]["decays"]) == 6
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        "Validation accuracy of the linear probe by weight decay" in page
        and "Images and the classes that ours" in page
    )
    before = len(list((tmp_path / "out" / "features").iterdir()))
    evaluate_linear_probe(replace(settings, layer="tower"))
    assert len(list((tmp_path / "out" / "features").iterdir())) == 2 * before, "other features of two sets"


def test_labels_go_by_name_whatever_the_split_holds(settings: LinearProbeSettings, tmp_path: Path) -> None:
    one = {"ours": settings.models["ours"]}
    results = evaluate_linear_probe(replace(settings, models=one))
    (tmp_path / "test" / "a_dark").rename(tmp_path / "elsewhere")  # test images of the last two classes alone
    fewer = evaluate_linear_probe(replace(settings, models=one, out=str(tmp_path / "fewer")))
    assert fewer["linear_probe"][0]["scores"]["per_class"][0] is None
    assert (
        fewer["linear_probe"][0]["scores"]["per_class"][1:]
        == results["linear_probe"][0]["scores"]["per_class"][1:]
    )
    with_val = replace(settings, models=one, val=str(tmp_path / "test"))
    assert evaluate_linear_probe(with_val)["datasets"]["val"]["images"] == 10
    (tmp_path / "elsewhere").rename(tmp_path / "test" / "d_unknown")
    with pytest.raises(DataError, match="1 classes that the training images have not: d_unknown"):
        evaluate_linear_probe(replace(settings, models=one))


def test_the_command_and_bad_settings(
    settings: LinearProbeSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = settings.models["ours"]
    status = main(
        ["evaluate", "linear-probe", f"models.ours={model}", f"train={settings.train}", f"test={settings.test}",
         f"out={tmp_path / 'out'}", "device=cpu", "sweep=2", "decay_min=10", "decay_max=100", "neighbours=[]"]
    )  # fmt: skip
    shown = capsys.readouterr()
    assert status == 0 and "Linear probe and nearest neighbours" in shown.out
    assert "is at the edge of the sweep" in shown.err
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["linear_probe"]) == 1
    with pytest.raises(ConfigError, match="train or test is empty"):
        evaluate_linear_probe(replace(settings, train=""))
    with pytest.raises(DataError, match="leaves no image to choose"):
        evaluate_linear_probe(replace(settings, val_share=0.01))
    for name, value in (("neighbours", (65,)), ("val_share", 1.0), ("decay_min", 0.0), ("temperature", 0.0)):
        with pytest.raises(ConfigError, match=name):
            replace(settings, **{name: value})
