"""Labelled images in every layout, names of classes in every published file, and prompts made of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from llm2clip.data.images import decode_image
from llm2clip.errors import BadSampleError, ConfigError, DataError
from llm2clip.evaluation.class_names import name_classes, read_names
from llm2clip.evaluation.datasets.labelled import LabelledImages, first_images, open_labelled
from llm2clip.evaluation.prompts import imagenet_templates, prompt_sets
from tests.benchmark_files import write_image, write_json, write_lines
from tests.data_files import image_bytes, write_tar

WNIDS = ["n01440764", "n01443537", "n02123045"]


def write_folders(root: Path, per_class: int = 3, folders: list[str] = WNIDS) -> Path:
    for label, folder in enumerate(folders):
        for number in range(per_class):
            write_image(root / folder / f"ILSVRC2012_val_{label}{number}.JPEG", 10 * label + number)
    return root


def read_all(data: LabelledImages) -> list[tuple[str, int]]:
    assert all(decode_image(data.images.read(row)).size == (14, 10) for row in range(len(data.images)))
    return [(data.images.key(row), int(data.labels[row])) for row in range(len(data.images))]


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "val")
    write_lines(root / WNIDS[0] / "notes.txt", ["no image"])
    (root / "empty").mkdir()
    write_image(root / WNIDS[1] / "deeper" / "x.png", 5, "PNG")
    data = open_labelled(str(root))
    assert data.folders == WNIDS and not data.numbered
    found = read_all(data)
    assert len(found) == 10 and found[0] == ("n01440764/ILSVRC2012_val_00.JPEG", 0)
    assert ("n01443537/deeper/x.png", 1) in found and found[-1][1] == 2
    assert data.images.missing() == []
    with pytest.raises(DataError, match="found 1 folders of which 0 hold images"):
        (tmp_path / "other" / "class").mkdir(parents=True)
        open_labelled(str(tmp_path / "other"))


def members(labels: list[str], suffix: str = "webp") -> list[tuple[str, bytes]]:
    out = []
    for number, label in enumerate(labels):
        color = (number * 37 % 256, number * 91 % 256, 40)
        kind = "WEBP" if suffix == "webp" else "JPEG"
        out += [
            (f"s{number:07d}.{suffix}", image_bytes(color, (14, 10), kind)),
            (f"s{number:07d}.cls", label.encode()),
        ]
    return out


def test_tar_shards_with_numbers_or_names(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    write_tar(tmp_path / "test" / "0.tar", members(["0", "2", "1"]))
    write_tar(tmp_path / "test" / "1.tar", members(["2", "2"], "jpg")[::-1])
    data = open_labelled(str(tmp_path / "test"))
    assert data.numbered and data.folders == ["0", "1", "2"]
    assert [label for _, label in read_all(data)] == [0, 2, 1, 2, 2]
    assert data.images.key(4) == "1/s0000000"
    named = write_tar(tmp_path / "named.tar", members(["dog", "cat", "dog"]))
    data = open_labelled(str(named))
    assert data.folders == ["cat", "dog"] and data.labels.tolist() == [1, 0, 1] and not data.numbered
    # a damaged image is a bad sample, a cut shard no benchmark
    write_tar(tmp_path / "bad.tar", [("a.jpg", b"no image"), ("a.cls", b"0"), *members(["1"])])
    with pytest.raises(BadSampleError):
        decode_image(open_labelled(str(tmp_path / "bad.tar")).images.read(0))
    cut = tmp_path / "cut.tar"
    cut.write_bytes(named.read_bytes()[:900])
    with pytest.raises(DataError, match="a benchmark needs all of it"):
        open_labelled(str(cut))
    with pytest.raises(DataError, match=r"expected members <name>\.jpg with <name>\.cls.*1 \.json"):
        open_labelled(str(write_tar(tmp_path / "none.tar", [("a.json", b"{}")])))


def test_a_csv_of_paths_and_labels(tmp_path: Path) -> None:
    for number in range(3):
        write_image(tmp_path / "img" / f"{number}.jpg", number)
    rows = [f"img/{number}.jpg,{label}" for number, label in enumerate(("dog", "cat", "dog"))]
    write_lines(tmp_path / "a.csv", ["path,label", *rows])
    data = open_labelled(str(tmp_path / "a.csv"))
    assert data.folders == ["cat", "dog"] and read_all(data)[1] == ("img/1.jpg", 0)
    write_lines(tmp_path / "b.csv", ["image,y", "img/0.jpg,1", "img/9.jpg,0"])
    data = open_labelled(str(tmp_path / "b.csv"))
    assert data.numbered and data.labels.tolist() == [1, 0] and data.images.missing() == ["img/9.jpg"]
    write_lines(tmp_path / "c.csv", ["path,caption", *rows])
    with pytest.raises(DataError, match="columns found: path, caption"):
        open_labelled(str(tmp_path / "c.csv"))
    write_lines(tmp_path / "d.csv", ["path,label", "img/0.jpg,"])
    with pytest.raises(DataError, match="no label in 1 rows, the first in line 2"):
        open_labelled(str(tmp_path / "d.csv"))
    with pytest.raises(DataError, match="no labelled images given"):
        open_labelled("")


def test_a_quick_look_sees_every_class(tmp_path: Path) -> None:
    data = open_labelled(str(write_folders(tmp_path / "val", per_class=4)))
    some = first_images(data, 6)
    assert np.bincount(some.labels).tolist() == [2, 2, 2] and len(read_all(some)) == 6
    assert some.images.identity() != data.images.identity() and first_images(data, 99) is data


@pytest.mark.parametrize("form", ["mapping.txt", "dict.json", "index.json"])
def test_names_by_folder(tmp_path: Path, form: str) -> None:
    names = ["tench", "goldfish", "tabby cat"]
    file = tmp_path / form
    if form == "mapping.txt":
        lines = [f"{wnid} {name}, another name" for wnid, name in zip(WNIDS, names, strict=True)]
        write_lines(file, [*lines[::-1], "n99999999 not here"])
    elif form == "dict.json":
        write_json(file, dict(zip(WNIDS[::-1], names[::-1], strict=True)))
    else:
        write_json(
            file,
            {str(n): [w, v.replace(" ", "_")] for n, (w, v) in enumerate(zip(WNIDS, names, strict=True))},
        )
    data = open_labelled(str(write_folders(tmp_path / "val")))
    assert name_classes(data, str(file), "imagenet1k")[1] == names
    part = open_labelled(str(write_folders(tmp_path / "part", folders=WNIDS[1:])))
    assert name_classes(part, str(file), "imagenet1k")[1] == names[1:]
    other = open_labelled(str(write_folders(tmp_path / "other", folders=["n01440764", "n00000000"])))
    with pytest.raises(DataError, match="no name for 1 of the 2 classes: n00000000"):
        name_classes(other, str(file), "imagenet1k")


def test_names_by_number(tmp_path: Path) -> None:
    write_lines(tmp_path / "names.txt", ["tench", "goldfish", "tabby cat"])
    write_json(
        tmp_path / "sets.json", {"mnist": ["0", "1"], "imagenet1k": ["tench", "goldfish", "tabby cat"]}
    )
    write_json(tmp_path / "numbers.json", {"1": "goldfish", "0": "tench", "2": "tabby cat"})
    data = open_labelled(str(write_folders(tmp_path / "val")))
    for file in ("names.txt", "sets.json", "numbers.json"):
        assert name_classes(data, str(tmp_path / file), "imagenet1k")[1] == ["tench", "goldfish", "tabby cat"]
    with pytest.raises(DataError, match="has 2 names for 3 classes.*LOC_synset_mapping"):
        name_classes(data, str(tmp_path / "sets.json"), "mnist")
    with pytest.raises(
        DataError, match=r"no entry 'cifar10' \(classes_key\); entries found: mnist, imagenet1k"
    ):
        read_names(str(tmp_path / "sets.json"), "cifar10")
    numbered = open_labelled(str(write_tar(tmp_path / "a.tar", members(["0", "1"]))))
    assert len(name_classes(numbered, str(tmp_path / "names.txt"), "")[1]) == 3  # a class without images
    with pytest.raises(DataError, match="has 3 names, but the labels go up to 7"):
        name_classes(
            open_labelled(str(write_tar(tmp_path / "b.tar", members(["7", "1"])))),
            str(tmp_path / "names.txt"),
            "",
        )
    # images labelled with the names themselves: the order of the list wins over the alphabet
    named = open_labelled(str(write_tar(tmp_path / "c.tar", members(["tench", "goldfish"]))))
    labelled, names = name_classes(named, str(tmp_path / "names.txt"), "")
    assert [names[label] for label in labelled.labels] == ["tench", "goldfish"]
    assert name_classes(data, "", "")[1] == WNIDS
    write_json(tmp_path / "bad.json", [1, 2])
    with pytest.raises(DataError, match="expected one class name after the other"):
        read_names(str(tmp_path / "bad.json"), "")


def test_the_templates_are_openais() -> None:
    templates = imagenet_templates()
    assert len(templates) == len(set(templates)) == 80 and all("{c}" in template for template in templates)
    assert {"a photo of a {c}.", "itap of my {c}.", "a {c} in a video game.", "art of the {c}."} <= set(
        templates
    )
    open_clip = importlib.util.find_spec("open_clip")
    if open_clip is not None:
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        assert {template("{c}") for template in OPENAI_IMAGENET_TEMPLATES} == set(templates)


def test_prompts(tmp_path: Path) -> None:
    write_json(tmp_path / "cupl.json", {"imagenet1k": {"dog": [" A dog barks.", "Dogs."], "cat": ["A cat."]}})
    write_lines(tmp_path / "own.txt", ["a sketch of a {}.", "{c}!"])
    kinds = ("single", "name", "ensemble", "cupl", "cupl+ensemble", str(tmp_path / "own.txt"))
    sets = prompt_sets(kinds, ["cat", "dog"], str(tmp_path / "cupl.json"), "imagenet1k")
    titles = {one.title: one.prompts for one in sets}
    assert titles["single prompt"] == [["a photo of a cat."], ["a photo of a dog."]]
    assert titles["name alone"] == [["cat"], ["dog"]]
    assert titles["CuPL"] == [["A cat."], ["A dog barks.", "Dogs."]]
    assert titles["own"] == [["a sketch of a cat.", "cat!"], ["a sketch of a dog.", "dog!"]]
    assert len(titles["80 prompts"][1]) == 80 and titles["CuPL and 80 prompts"][1][:2] == [
        "A dog barks.",
        "Dogs.",
    ]
    with pytest.raises(DataError, match="no sentences for 1 of 2 classes: cow; it has them for dog, cat"):
        prompt_sets(("cupl",), ["cat", "cow"], str(tmp_path / "cupl.json"), "imagenet1k")
    with pytest.raises(ConfigError, match="cupl needs cupl"):
        prompt_sets(("cupl",), ["cat"], "", "")
    with pytest.raises(ConfigError, match="'nothing' is neither a file nor one of single"):
        prompt_sets(("nothing",), ["cat"], "", "")
    write_lines(tmp_path / "own.txt", ["a photo"])
    with pytest.raises(DataError, match="'a photo' has no"):
        prompt_sets((str(tmp_path / "own.txt"),), ["cat"], "", "")


@pytest.mark.skipif(
    importlib.util.find_spec("clip_benchmark") is None, reason="clip-benchmark is not installed"
)
def test_the_files_of_clip_benchmark() -> None:
    spec = importlib.util.find_spec("clip_benchmark")
    assert spec is not None and spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "datasets"
    names = read_names(str(folder / "en_classnames.json"), "imagenet1k")
    assert isinstance(names, list) and len(names) == 1000 and names[0] == "tench"
    (cupl,) = prompt_sets(("cupl",), names, str(folder / "cupl_prompts.json"), "imagenet1k")
    assert all(len(own) == 150 for own in cupl.prompts)
    published = json.loads((folder / "en_zeroshot_classification_templates.json").read_text())["imagenet1k"]
    assert sorted(published) == sorted(imagenet_templates())
