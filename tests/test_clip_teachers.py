"""Teachers of the CLIP stage: their stores, their features in a batch, and what a student learns from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.config import from_tree
from llm2clip.data.image_address import image_address, view_rng
from llm2clip.data.images import ImageTransform, decode_image
from llm2clip.data.sources import open_source
from llm2clip.data.store import EmbeddingStore
from llm2clip.embed_clip import embed_images, embed_texts
from llm2clip.errors import ConfigError, DataError, ModelError, StoreError
from llm2clip.models.clip_teacher import ClipTeacher
from llm2clip.models.vision import build_vision_tower
from llm2clip.settings import EmbedImagesSettings, EmbedTextsSettings
from llm2clip.training.clip_task import ClipTask
from llm2clip.training.loop import train
from llm2clip.training.run import train_clip
from tests.data_files import members_of, write_tar
from tests.tiny_models import save_tiny, save_tiny_clip
from tests.training_kit import ALONE, Kit, assert_same_run, curve, make_kit, picture, write_set


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    kit = make_kit(tmp_path_factory.mktemp("kit"))
    save_tiny_clip(kit.root / "clip")
    return kit


def images_job(kit: Kit, out: Path, **more: Any) -> EmbedImagesSettings:
    tree = {
        "data": {"train": kit.data()["train"]},
        "model": str(kit.root / "clip"),
        "out": str(out),
        "device": "cpu",
    }
    return from_tree(
        EmbedImagesSettings, tree | {"dtype": "fp32", "precision": "fp32", "batch_size": 7} | more
    )


def texts_job(kit: Kit, out: Path) -> EmbedTextsSettings:
    tree = {
        "data": kit.data(),
        "model": str(kit.root / "clip"),
        "out": str(out),
        "device": "cpu",
        "dtype": "fp32",
    }
    return from_tree(EmbedTextsSettings, tree | {"batch_size": 9})


@pytest.fixture(scope="module")
def stores(kit: Kit) -> dict[str, str]:
    """Image and caption features of the tiny CLIP model, and image features in two views."""
    found = {
        "images": kit.root / "teacher-images",
        "texts": kit.root / "teacher-texts",
        "views": kit.root / "views",
    }
    embed_images(images_job(kit, found["images"]))
    embed_texts(texts_job(kit, found["texts"]))
    embed_images(images_job(kit, found["views"], views=2))
    return {name: str(path) for name, path in found.items()}


def test_stored_image_features_are_the_models_own(kit: Kit, stores: dict[str, str]) -> None:
    from transformers import CLIPModel

    store = EmbeddingStore.open(stores["images"])
    source = open_source(kit.data()["train"])
    assert len(store) == len(source) == 40 and store.complete and store.dim == 8
    model = CLIPModel.from_pretrained(kit.root / "clip").eval()
    mean, std = (0.5, 0.4, 0.3), (0.3, 0.2, 0.25)
    transform = ImageTransform(8, mean, std, fit="crop", interpolation="bicubic")
    samples = [source[i] for i in (0, 7, 39)]
    pixels = torch.stack([transform(decode_image(sample.image or b"")) for sample in samples])
    with torch.no_grad():
        features: Any = model.get_image_features(pixel_values=pixels)
    want = F.normalize(getattr(features, "pooler_output", features), dim=1)
    got = store.get([image_address(sample.image or b"") for sample in samples])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("siglip", [False, True])
def test_stored_caption_features_are_the_models_own(tmp_path: Path, kit: Kit, siglip: bool) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = save_tiny_clip(tmp_path / "model", siglip=siglip)
    job = replace(texts_job(kit, tmp_path / "store"), model=str(folder))
    store = embed_texts(job)
    texts = ["red stone 0", "This is the old coat with number 1, of 1 kinds."]
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for text in texts:
        padding: Any = {"padding": "max_length", "max_length": 24} if siglip else {"max_length": 24}
        tokens = tokenizer([text], truncation=True, return_tensors="pt", **padding)
        with torch.no_grad():
            features: Any = model.get_text_features(**tokens)
        want = F.normalize(getattr(features, "pooler_output", features), dim=1)
        torch.testing.assert_close(store.get([text]), want, rtol=1e-4, atol=1e-5)
    assert store.fingerprint["features"] == "clip texts" and store.dim == 8


def test_stored_views_are_what_the_student_sees(kit: Kit, stores: dict[str, str]) -> None:
    store = EmbeddingStore.open(stores["views"])
    assert len(store) == 80 and store.fingerprint["views"] == 2
    teacher = ClipTeacher(kit.root / "clip")
    source = open_source(kit.data()["train"])
    transform = ImageTransform(8, train=True)
    for view in range(2):
        address = image_address(source[3].image or b"", view)
        pixels = transform.pixels(decode_image(source[3].image or b""), view_rng(address))
        torch.testing.assert_close(store.get([address]), teacher.images(pixels[None]), rtol=1e-4, atol=1e-5)
    settings = kit.clip_stage(kit.root / "unused", more=teach(stores, {"image": {"mse": 1.0}}, views=True))
    task = ClipTask(settings, ALONE)
    _, samples = next(task.batches(0, 0))
    (chunk,) = task.chunks(samples, 0)
    # a teacher of the student's resolution sees the very pixels of the batch
    assert chunk.pixels is not None and chunk.teacher_image is not None
    torch.testing.assert_close(chunk.teacher_image, teacher.images(chunk.pixels), rtol=1e-4, atol=1e-5)


def test_workers_embed_the_same(kit: Kit, stores: dict[str, str], tmp_path: Path) -> None:
    data = {"train": kit.data()["train"], "workers": 2}
    store = embed_images(images_job(kit, tmp_path / "store", data=data, views=2))
    views = EmbeddingStore.open(stores["views"])
    source = open_source(kit.data()["train"])
    addresses = [image_address(source[i].image or b"", view) for i in range(40) for view in range(2)]
    torch.testing.assert_close(store.get(addresses), views.get(addresses), rtol=1e-4, atol=1e-5)


def test_an_interrupted_image_job_goes_on(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = ClipTeacher.images

    def counted(self: ClipTeacher, pixels: Tensor) -> Tensor:
        calls.append(len(pixels))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, pixels)

    monkeypatch.setattr(ClipTeacher, "images", counted)
    job = images_job(kit, tmp_path / "store", commit_rows=7)
    with pytest.raises(KeyboardInterrupt):
        embed_images(job)
    assert len(embed_images(job)) == 40
    # what was committed is not computed again
    assert sum(calls[:3]) == 21 and sum(calls[4:]) == 19
    with pytest.raises(StoreError, match="views"):
        embed_images(replace(job, views=3))


def test_images_that_cannot_be_used(kit: Kit, tmp_path: Path) -> None:
    members = members_of([f"{number:03d}" for number in range(60)])
    for number in range(0, 60, 4):
        members[2 * number] = (f"{number:03d}.png", b"a JPEG that is a text file")
    path = str(write_tar(tmp_path / "a.tar", members))
    bad = {"data": {"train": [path]}}
    with pytest.raises(
        DataError, match=r"\d+ of \d+ samples read from .* cannot be used .* allowed are 5\.0 %"
    ):
        embed_images(images_job(kit, tmp_path / "store", **bad))
    bad["data"]["max_bad_share"] = 0.5  # type: ignore[assignment]
    assert len(embed_images(images_job(kit, tmp_path / "store", **bad))) > 0
    with pytest.raises(ConfigError, match="out is empty"):
        embed_images(replace(images_job(kit, tmp_path), out=""))
    with pytest.raises(ConfigError, match=r"data\.train is empty"):
        embed_images(images_job(kit, tmp_path / "b", data={}))
    with pytest.raises(ConfigError, match="model is empty"):
        embed_texts(replace(texts_job(kit, tmp_path), model=""))


def test_models_that_are_no_teachers(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="it has no config.json"):
        ClipTeacher(tmp_path)
    with pytest.raises(ModelError, match="LlamaModel; expected a model with an image and a text tower"):
        ClipTeacher(save_tiny(tmp_path / "llm"))
    folder = save_tiny_clip(tmp_path / "clip")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="has no tokenizer: expected one of tokenizer.json"):
        ClipTeacher(folder).texts(["a"])
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match="cannot load the model"):
        ClipTeacher(folder)


def teach(
    stores: dict[str, str], distill: dict[str, Any], *, views: bool = False, kind: str = "softmax"
) -> dict[str, Any]:
    """Settings that learn from stores of image and caption features."""
    teacher: dict[str, Any] = {}
    if "image" in distill or "similarity" in distill:
        teacher |= {"images": stores["views"], "views": 2} if views else {"images": stores["images"]}
    if "text" in distill or "similarity" in distill:
        teacher["texts"] = stores["texts"]
    return {"teacher": teacher, "loss": {"kind": kind, "distill": distill}}


def losses(out: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in curve(out) if name in line]


EVERYTHING = {"image": {"mse": 0.5}, "text": {"cosine": 0.5, "structure": 1.0}, "similarity": 0.5}


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_a_student_learns_from_stored_features(
    kit: Kit, stores: dict[str, str], tmp_path: Path, micro_batch: int
) -> None:
    options: dict[str, Any] = {"steps": 12, "lr": 1e-2, "dropout": 0.0, "save_every": 50}
    settings = kit.clip_stage(tmp_path, more=teach(stores, EVERYTHING), micro_batch=micro_batch, **options)
    train_clip(settings)
    for name in ("loss", "loss_distill_image", "loss_distill_text", "loss_similarity", "loss_contrastive"):
        values = losses(tmp_path, name)
        assert len(values) == 12 and sum(values[-3:]) < sum(values[:3]), name


def test_the_gradient_cache_and_resume_change_nothing_with_teachers(
    kit: Kit, stores: dict[str, str], tmp_path: Path
) -> None:
    from tests.test_training_tasks import interrupt
    from tests.training_kit import Interrupted

    distill = EVERYTHING | {"tower": {"mse": 1.0}}
    more = teach(stores, distill, views=True)
    more["teacher"]["start"] = True
    for size in (0, 3):
        train_clip(kit.clip_stage(tmp_path / f"micro{size}", more=more, micro_batch=size, dropout=0.0))
    for one, other in zip(curve(tmp_path / "micro0"), curve(tmp_path / "micro3"), strict=True):
        assert one == pytest.approx(other, rel=2e-4, abs=2e-5)
    cut = kit.clip_stage(tmp_path / "cut", more=more, dropout=0.0, workers=1)
    with pytest.raises(Interrupted):
        train(interrupt(ClipTask(cut, ALONE), 3), cut.run, cut.optim, ALONE)
    train_clip(cut)
    assert_same_run(tmp_path / "micro0", tmp_path / "cut")


def test_a_model_beside_the_student_gives_what_its_stores_hold(
    kit: Kit, stores: dict[str, str], tmp_path: Path
) -> None:
    more = teach(stores, EVERYTHING, views=True)
    stored = ClipTask(kit.clip_stage(tmp_path / "a", more=more), ALONE)
    more = {**more, "teacher": {"model": str(kit.root / "clip")}}
    running = ClipTask(kit.clip_stage(tmp_path / "b", more=more), ALONE)
    _, samples = next(stored.batches(0, 0))
    (kept,) = stored.chunks(samples, 0)
    (made,) = running.chunks(replace(samples, teacher_image=None, teacher_text=None), 0)
    for name in ("teacher_image", "teacher_text"):
        one, other = getattr(kept, name), getattr(made, name)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        assert not other.requires_grad and torch.allclose(other.norm(dim=1), torch.ones(8), atol=1e-4)
    train_clip(kit.clip_stage(tmp_path / "b", more=more, steps=2))
    assert {"loss_distill_image", "loss_similarity"} <= set(curve(tmp_path / "b")[0])


def test_the_tower_is_held_by_how_it_began(kit: Kit, tmp_path: Path) -> None:
    moved = {}
    for weight in (0.0, 50.0):
        more: dict[str, Any] = {}
        if weight:
            more = {"teacher": {"start": True}, "loss": {"distill": {"tower": {"mse": weight}}}}
        out = tmp_path / str(weight)
        settings = kit.clip_stage(out, more=more, steps=15, lr=1e-2, dropout=0.0)
        task = ClipTask(settings, ALONE)
        before = task.model.vision_model.requires_grad_(True)
        start = build_features(before, kit)
        train(task, settings.run, settings.optim, ALONE)
        end = build_features(task.model.vision_model, kit)
        moved[weight] = (1 - (start * end).sum(1)).mean().item()
        if weight:
            values = losses(out, "loss_distill_tower")
            assert values[0] == pytest.approx(0.0, abs=1e-5) and values[-1] > 0
    assert moved[50.0] < 0.3 * moved[0.0]


def build_features(vision: Any, kit: Kit) -> Tensor:
    source = open_source(kit.data()["train"])
    transform = ImageTransform(8, vision.mean, vision.std)
    pixels = torch.stack([transform(decode_image(source[i].image or b"")) for i in range(20)])
    with torch.no_grad():
        return F.normalize(vision.eval()(pixels), dim=1)


def test_the_adapter_learns_clips_captions_without_images(
    kit: Kit, stores: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # ProCLIP's first stage: captions alone, and only the adapter moves
    monkeypatch.setattr("llm2clip.training.clip_reader.decode_image", lambda *a, **k: pytest.fail("decoded"))
    more = teach(stores, {"text": {"mse": 1.0, "structure": 1.0}}, kind="none")
    more["data"] = {"val": []}
    settings = kit.clip_stage(tmp_path, more=more, steps=40, batch_size=20, lr=1e-2, dropout=0.0)
    task = ClipTask(settings, ALONE)
    assert {n for n, p in task.model.named_parameters() if p.requires_grad} == {
        n for n, _ in task.model.named_parameters() if n.startswith("text_adapter.")
    }
    before = {n: p.clone() for n, p in task.model.named_parameters()}
    result = train(task, settings.run, settings.optim, ALONE)
    values = losses(tmp_path)
    assert values[-1] < 0.5 * values[0] and (result / "model.safetensors").exists()
    for name, parameter in task.model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("text_adapter."), name
    store, texts = EmbeddingStore.open(settings.store), EmbeddingStore.open(stores["texts"])
    captions = ["red stone 0", "old coat 1", "fast car 2"]
    with torch.no_grad():
        learned = F.normalize(task.model.eval().get_text_features(store.get(captions)), dim=1)
    assert (learned * texts.get(captions)).sum(1).min() > 0.8


def test_images_learn_to_point_at_fixed_embeddings(kit: Kit, tmp_path: Path) -> None:
    # LIFT: cosine alone, the LLM's embeddings as they are
    dim = EmbeddingStore.open(kit.root / "store").dim
    more = {"loss": {"kind": "cosine"}, "optim": {"freeze": ["adapter"], "lr": 1e-2}}
    settings = kit.clip_stage(tmp_path / "a", more=more, embed_dim=dim, steps=15, dropout=0.0)
    settings = replace(settings, model=replace(settings.model, adapter_depth=0))
    task = ClipTask(settings, ALONE)
    embeddings = EmbeddingStore.open(kit.root / "store").get(["red stone 0", "old coat 1"])
    with torch.no_grad():
        text = task.model.get_text_features(embeddings)
    torch.testing.assert_close(
        text, F.layer_norm(F.normalize(embeddings, dim=1), (dim,)), rtol=1e-3, atol=1e-3
    )
    train(task, settings.run, settings.optim, ALONE)
    assert losses(tmp_path / "a")[-1] < losses(tmp_path / "a")[0] - 0.2
    with torch.no_grad():
        torch.testing.assert_close(task.model.get_text_features(embeddings), text)
    with pytest.raises(ConfigError, match=rf"optim\.freeze=\[adapter\].*model\.embed_dim={dim}"):
        ClipTask(kit.clip_stage(tmp_path / "b", loss={"kind": "cosine"}), ALONE)


def test_heads_train_on_stored_features_of_a_frozen_tower(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = kit.clip_stage(tmp_path / "run", steps=12, lr=1e-2, dropout=0.0, loss={"kind": "sigmoid"})
    # a random tower is another one each time; a saved one stays what it is
    tower = save_tower(kit, tmp_path)
    vision = replace(settings.model.vision, path=str(tower))
    job = replace(images_job(kit, tmp_path / "features"), model="", vision=vision)
    store = embed_images(job)
    assert store.dim == 16 and store.fingerprint["features"] == "vision tower"
    source = open_source(kit.data()["train"])
    want = build_vision_tower(vision).eval()
    transform = ImageTransform(8, want.mean, want.std)
    with torch.no_grad():
        features = want(transform(decode_image(source[5].image or b""))[None])
    torch.testing.assert_close(
        store.get([image_address(source[5].image or b"")]), features, rtol=1e-4, atol=1e-5
    )
    settings = replace(
        settings, features=str(tmp_path / "features"), model=replace(settings.model, vision=vision)
    )
    monkeypatch.setattr("llm2clip.training.clip_reader.decode_image", lambda *a, **k: pytest.fail("decoded"))
    task = ClipTask(settings, ALONE)
    before = {n: p.clone() for n, p in task.model.vision_model.named_parameters()}
    assert not any(p.requires_grad for p in task.model.vision_model.parameters())
    result = train(task, settings.run, settings.optim, ALONE)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    from llm2clip.models.llm2clip import LLM2CLIP

    model = LLM2CLIP.from_pretrained(result)
    assert all(torch.equal(p, before[n]) for n, p in model.vision_model.named_parameters())


def save_tower(kit: Kit, folder: Path) -> Path:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from tests.training_kit import CLIP_VISION

    torch.manual_seed(0)
    config = {name: value for name, value in CLIP_VISION.items() if name != "model_type"}
    CLIPVisionModel(CLIPVisionConfig(**config)).save_pretrained(folder / "tower")
    return folder / "tower"


def test_what_does_not_fit_is_refused_at_the_start(kit: Kit, stores: dict[str, str], tmp_path: Path) -> None:
    def start(more: dict[str, Any], **options: Any) -> None:
        ClipTask(kit.clip_stage(tmp_path / "run", more=more, **options), ALONE)

    image = {"image": {"mse": 1.0, "structure": 1.0}}
    with pytest.raises(ConfigError, match=r"mse compare features directly.* 8 dimensions .*embed_dim is 12"):
        start(teach(stores, image), embed_dim=12)
    start(teach(stores, {"image": {"structure": 1.0}}), embed_dim=12)
    wrong = teach(stores, image)
    wrong["teacher"] |= {"images": stores["views"]}
    with pytest.raises(StoreError, match=r"made with views=2, but teacher\.views is 0"):
        start(wrong)
    other = write_set(tmp_path / "other.tar", json.loads(json.dumps(records_again())), 500)
    with pytest.raises(StoreError, match="no features of 10 of 10 images .*other/0500, .*other/0509"):
        start(teach(stores, image), data={"train": [str(other)]})
    with pytest.raises(ConfigError, match="features of width 8, the vision tower's have 16"):
        start({"features": stores["images"]})


def records_again() -> list[dict[str, Any]]:
    """Captions that the stores know, of pictures that they do not."""
    from tests.training_kit import records

    return records(10)


def test_the_commands(kit: Kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llm2clip.cli import main

    train_data, clip = f"data.train=[{kit.data()['train'][0]}]", f"model={kit.root / 'clip'}"
    common = [train_data, clip, "device=cpu"]
    assert main(["embed", "images", *common, f"out={tmp_path / 'i'}", "views=1"]) == 0
    fields = ["data.captions.short=name", "data.captions.long=description"]
    assert main(["embed", "texts", *common, *fields, f"out={tmp_path / 't'}"]) == 0
    shown = capsys.readouterr().out
    assert "20 image features of dimension 8" in shown and "40 caption features of dimension 8" in shown
    assert image_address(picture(0)) not in shown
