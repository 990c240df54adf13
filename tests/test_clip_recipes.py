"""Every recipe in configs/clip runs: as it is but for paths and sizes, from its stores to a model that loads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llm2clip.config import load_settings
from llm2clip.data.store import EmbeddingStore
from llm2clip.embed_clip import embed_images, embed_texts
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.settings import EmbedImagesSettings, EmbedTextsSettings, TrainSettings
from llm2clip.training.run import train_clip
from tests.tiny_models import save_tiny_clip
from tests.training_kit import CLIP_VISION, Kit, curve, make_kit

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(ROOT.glob("configs/clip/*.yaml"))
# what a recipe's directories are here
TOWER = {
    "models/clip-vit-large-patch14-336": "clip",
    "models/dinov2-large": "tower",
    "configs/clip/vit-b-16.json": "vit.json",
}


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    from tests.test_clip_teachers import save_tower

    kit = make_kit(tmp_path_factory.mktemp("kit"))
    save_tiny_clip(kit.root / "clip")
    save_tower(kit, kit.root)
    vit = {**CLIP_VISION, "model_type": "vit", "hidden_dropout_prob": 0.0}
    (kit.root / "vit.json").write_text(json.dumps(vit))
    return kit


def small(kit: Kit, out: Path, recipe: Path) -> list[str]:
    """Overrides that let a recipe run on the tiny data."""
    settings = load_settings(TrainSettings, recipe)
    train, val = kit.data()["train"], kit.data()["val"]
    fields = {"short": "name", "long": "description"}
    if settings.data.captions.roles:
        fields["roles.raw"] = "[name]"
    overrides = [f"data.train={json.dumps(train)}", f"store={kit.root / 'store'}", f"run.out={out}"]
    overrides += [f"data.captions.{name}={value}" for name, value in fields.items()]
    overrides += ["run.steps=3", "run.batch_size=8", "run.log_every=1", "run.device=cpu", "run.eval_every=0"]
    overrides += [
        "run.precision=fp32",
        "optim.warmup_steps=1",
        f"run.micro_batch={4 if settings.run.micro_batch else 0}",
    ]
    overrides += [f"data.val={json.dumps(val)}"] if settings.data.val else []
    dims = {768: 8, 1280: 12, 4096: EmbeddingStore.open(kit.root / "store").dim}
    if settings.model.init is None:
        overrides.append(f"model.embed_dim={dims.get(settings.model.embed_dim, 12)}")
    if settings.model.vision.kind == "transformers" and settings.model.init is None:
        overrides += [
            f"model.vision.path={kit.root / TOWER[str(settings.model.vision.path)]}",
            "model.vision.image_size=8",
        ]
    if settings.model.vision.kind == "efficientnet-lite0" and settings.model.init is None:
        overrides += ["model.vision.image_size=32", "model.vision.pretrained=false"]
    return overrides


def stores(kit: Kit, folder: Path, settings: TrainSettings) -> list[str]:
    """The stores that a recipe reads, made as its comment says."""
    common: dict[str, Any] = {"data.train": json.dumps(kit.data()["train"]), "device": "cpu"}
    made: list[str] = []

    def lines(options: dict[str, Any]) -> list[str]:
        return [f"{name}={value}" for name, value in options.items()]

    if settings.features:
        job = {
            **common,
            "vision.kind": "transformers",
            "vision.path": kit.root / "tower",
            "out": folder / "features",
        }
        embed_images(load_settings(EmbedImagesSettings, None, lines(job)))
        made.append(f"features={folder / 'features'}")
    if settings.teacher.images:
        job = {
            **common,
            "model": kit.root / "clip",
            "views": settings.teacher.views,
            "out": folder / "images",
        }
        embed_images(load_settings(EmbedImagesSettings, None, lines(job)))
        made.append(f"teacher.images={folder / 'images'}")
    if settings.teacher.texts:
        fields = {"data.captions.short": "name", "data.captions.long": "description"}
        job = {**common, **fields, "model": kit.root / "clip", "out": folder / "texts"}
        embed_texts(load_settings(EmbedTextsSettings, None, lines(job)))
        made.append(f"teacher.texts={folder / 'texts'}")
    return made


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs(kit: Kit, tmp_path: Path, recipe: Path) -> None:
    settings = load_settings(TrainSettings, recipe)
    if settings.optim.name == "lion":
        pytest.importorskip("lion_pytorch", reason="needs the extra lion")
    overrides = [*small(kit, tmp_path / "run", recipe), *stores(kit, tmp_path, settings)]
    if settings.model.init is not None:
        first = recipe.with_name("proclip-1-captions.yaml")
        before = [
            *small(kit, tmp_path / "first", first),
            *stores(kit, tmp_path, load_settings(TrainSettings, first)),
        ]
        overrides.append(f"model.init={train_clip(load_settings(TrainSettings, first, before))}")
    model = LLM2CLIP.from_pretrained(train_clip(load_settings(TrainSettings, recipe, overrides)))
    assert model.llm_dim == EmbeddingStore.open(kit.root / "store").dim
    lines = [line for line in curve(tmp_path / "run") if "loss" in line]
    assert len(lines) == 3 and all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)


def test_the_page_names_every_recipe_and_only_files_that_are_there() -> None:
    page = (ROOT / "docs" / "clip-stage.md").read_text()
    named = set(re.findall(r"configs/clip/([\w.-]+\.yaml)", page))
    assert named == {path.name for path in RECIPES}
    for recipe in RECIPES:
        assert recipe.name in recipe.read_text(), f"the comment of {recipe.name} does not show its command"
