"""Names of the classes, from the files that benchmarks publish them in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.errors import DataError
from llm2clip.evaluation.datasets.labelled import LabelledImages
from llm2clip.evaluation.datasets.text_files import read_lines
from llm2clip.files import read_json

_WNID = re.compile(r"(n\d{8})[ \t]+(\S.*)")


def name_classes(data: LabelledImages, file: str, key: str) -> tuple[LabelledImages, list[str]]:
    """The images with their labels as indices into a list of names.

    Args:
        data: the images.
        file: .txt or .json with names (see `read_names`); "": what the images call their classes, with
            underscores read as blanks.
        key: entry of a .json that holds several data sets.

    Returns:
        The images (classes in the order of the names) and the names.

    Raises:
        DataError: there is not a name for every class.
    """
    if not file:
        return data, [folder.replace("_", " ") for folder in data.folders]
    names = read_names(file, key)
    if isinstance(names, dict):
        if lost := [folder for folder in data.folders if folder not in names]:
            raise DataError(
                f"{file} has no name for {len(lost)} of the {len(data.folders)} classes: {', '.join(lost[:10])}; "
                f"it names {', '.join(list(names)[:3])}, ..."
            )
        return data, [names[folder] for folder in data.folders]
    if data.numbered:
        if len(names) < len(data.folders):
            raise DataError(f"{file} has {len(names)} names, but the labels go up to {len(data.folders) - 1}")
        return data, names
    places = {name: number for number, name in enumerate(names)}
    if all(folder in places for folder in data.folders):  # labelled with the names themselves
        labels = np.array([places[folder] for folder in data.folders], np.int64)[data.labels]
        return LabelledImages(data.images, labels, names), names
    if len(names) != len(data.folders):
        raise DataError(
            f"{file} has {len(names)} names for {len(data.folders)} classes ({', '.join(data.folders[:3])}, ...); a "
            "list goes by the sorted folders and must have one name for each. For a part of the classes give a .json "
            "or LOC_synset_mapping.txt that says which folder has which name"
        )
    return data, names


def read_names(file: str, key: str) -> list[str] | dict[str, str]:
    """Class names by number (a list) or by folder.

    Read are: .txt with a name per line, or with `n01440764 tench, Tinca tinca` (the first synonym counts); .json
    with a list, `{"n01440764": "tench"}`, `{"0": ["n01440764", "tench"]}`, or `{"imagenet1k": [...]}`.

    Raises:
        DataError: the file has another form, or not the entry `key`.
    """
    path = Path(file).expanduser()
    if path.suffix.lower() != ".json":
        lines = [line for _, line in read_lines(path)]
        found = [_WNID.fullmatch(line) for line in lines]
        if lines and all(found):
            return {match[1]: match[2].split(",")[0].strip() for match in found if match}
        return _strings(lines, path)
    values = read_json(path, DataError)
    if isinstance(values, dict) and isinstance(values.get(key), (list, dict)) and not key.isdigit():
        values = values[key]
    if isinstance(values, list):
        return _strings(values, path)
    if isinstance(values, dict) and values and all(isinstance(name, str) for name in values.values()):
        if all(number.isdigit() for number in values):
            return [values[number] for number in sorted(values, key=int)]
        return values
    if isinstance(values, dict) and values and all(_is_pair(entry) for entry in values.values()):
        return {folder: name.replace("_", " ") for folder, name in values.values()}
    if isinstance(values, dict) and values and all(isinstance(entry, list) for entry in values.values()):
        raise DataError(
            f"{path} has no entry {key!r} (classes_key); entries found: {', '.join(list(values)[:12])}"
        )
    raise DataError(f"{path}: expected a list of names, or an object of folder -> name")


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)


def _strings(values: list[Any], path: Path) -> list[str]:
    if not values or not all(isinstance(value, str) and value.strip() for value in values):
        raise DataError(f"{path}: expected one class name after the other, found {values[:3]!r}")
    return [value.strip() for value in values]
