"""A few samples of every benchmark, in the files and folders that it is published in."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.data_files import image_bytes, write_tar


def write_image(path: Path, number: int, kind: str = "JPEG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes((number * 37 % 256, number * 91 % 256, 40), (14, 10), kind))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_karpathy(root: Path, count: int, *, coco: bool) -> None:
    images = []
    for number in range(count):
        split = "test" if number % 4 else ("restval" if coco and number % 8 == 0 else "train")
        name = f"COCO_val2014_{number:012d}.jpg" if coco else f"{1007129816 + number}.jpg"
        sentences = [
            {"tokens": ["a"], "raw": f"Caption {c} of picture {number}. ", "imgid": number, "sentid": c}
            for c in range(6 if number == 1 else 5)
        ]
        entry = {"sentids": [0, 1], "imgid": number, "sentences": sentences, "split": split, "filename": name}
        if coco:
            entry |= {"filepath": "val2014", "cocoid": number}
        images.append(entry)
        if split == "test":
            write_image(root / ("val2014" if coco else "flickr30k-images") / name, number)
    write_json(
        root / f"dataset_{'coco' if coco else 'flickr30k'}.json", {"images": images, "dataset": "coco"}
    )


def write_sharegpt4v(root: Path, count: int) -> None:
    entries = []
    for number in range(count):
        image = f"coco/train2017/{number:012d}.jpg"
        write_image(root / "data" / image, number)
        turns = [
            {"from": "human", "value": "What do you see?\n<image>"},
            {"from": "gpt", "value": f"In picture {number}, a man.\nBehind him, [a wall]."},
        ]
        entries.append({"id": f"{number:012d}", "image": image, "conversations": turns})
    write_json(root / "data" / "share-captioner_coco_lcs_sam_1246k_1107.json", entries)


def write_urban1k(root: Path, count: int) -> None:
    for number in range(1, count + 1):
        write_image(root / "image" / f"{number}.jpg", number)
        write_lines(root / "caption" / f"{number}.txt", [f"Street {number}, with a café.", "not this line"])


def write_docci(root: Path, count: int) -> None:
    records = []
    for number in range(count):
        split = ("test", "test", "qual_dev")[number % 3]
        name = f"{split}_{number:05d}"
        write_image(root / "images" / f"{name}.jpg", number)
        records.append({
            "example_id": name, "split": split, "image_file": f"{name}.jpg", "description": f"A view of {name}."
        })  # fmt: skip
    write_lines(root / "docci_descriptions.jsonlines", [json.dumps(record) for record in records])


def write_dci(root: Path, count: int) -> None:
    base = root / "densely_captioned_images"
    splits: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for number in range(count):
        splits[("train", "valid", "test")[number % 3]].append(f"{number}.json")
        write_json(base / "annotations" / f"{number}.json", {
            "image": f"sa_{number}.jpg", "short_caption": f"Thing {number}.", "mask_keys": [], "mask_data": {},
            "extra_caption": "" if number == 1 else f"It is the {number}th thing.",
        })  # fmt: skip
        write_image(base / "photos" / f"sa_{number}.jpg", number)
    write_json(base / "splits.json", splits)


def write_flickr30k_cn(root: Path, count: int) -> None:
    lines = []
    for number in range(count):
        write_image(root / "flickr30k-images" / f"{1007129816 + number}.jpg", number)
        lines += [f"{1007129816 + number}#zhm#{c}\t第{number}张图片,{c}" for c in range(5)]
    write_lines(root / "test.txt", lines)


def write_coco_cn(root: Path, count: int) -> None:
    names = [f"COCO_{('val', 'train')[number % 2]}2014_{number:012d}" for number in range(count)]
    captions = [f"{name}#{c}\t图片 {name} {c}" for name in names for c in range(2)]
    for number, name in enumerate(names):
        write_image(root / name.split("_")[1] / f"{name}.jpg", number)
    base = root / "coco-cn-version1805v1.1"
    write_lines(base / "imageid.human-written-caption.txt", captions)
    write_lines(base / "coco-cn_test.txt", names[1:])
    write_lines(base / "coco-cn_train.txt", names[:1])


def write_chinese_clip(root: Path, count: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    rows, texts = [], []
    for number in range(count):
        code = base64.b64encode(image_bytes((number * 37 % 256, 9, 9), (14, 10), "JPEG")).decode()
        rows.append(f"{1000 + number}\t{code.replace('+', '-').replace('/', '_') if number % 2 else code}")
        for c in range(2):
            text = {"text_id": 2 * number + c, "text": f"第{number}张图片,{c}", "image_ids": [1000 + number]}
            texts.append(json.dumps(text, ensure_ascii=False))
    write_lines(root / "test_imgs.tsv", rows)
    write_lines(root / "test_texts.jsonl", texts)


def write_xm3600(root: Path, count: int, languages: tuple[str, ...] = ("en", "de", "quz")) -> None:
    records = []
    for number in range(count):
        key = f"{number:016x}"
        write_image(root / "images" / f"{key}.jpg", number)
        record: dict[str, Any] = {"image/key": key, "image/locale": languages[number % len(languages)]}
        for language in languages:
            own = [f"{language} caption {c} of {number}" for c in range(3 if number == 1 else 2)]
            record[language] = {"caption": own, "caption/tokenized": own, "caption/tokenized/lowercase": own}
        records.append(json.dumps(record))
    write_lines(root / "captions.jsonl", records)


def write_openstax(root: Path, count: int) -> None:
    members = []
    for number in range(count):
        record: dict[str, Any] = {
            "caption": f"Figure {number}.", "alt": f"A long description of figure {number}.",
            "credit": "", "book": "osbooks-psychology", "commit": "0" * 40, "source": f"media/{number}.jpg",
        }  # fmt: skip
        if number % 2:
            record["pl"] = {"caption": f"Rysunek {number}.", "alt": f"Opis rysunku {number}."}
        color = (number * 37 % 256, number * 91 % 256, 40)
        members += [
            (f"{number:04d}.jpg", image_bytes(color, (14, 10), "JPEG")),
            (f"{number:04d}.json", json.dumps(record).encode()),
        ]
    root.mkdir(parents=True, exist_ok=True)
    write_tar(root / "openstax-val-000000.tar", members)


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "flickr30k": lambda root, count: write_karpathy(root, count, coco=False),
    "coco": lambda root, count: write_karpathy(root, count, coco=True),
    "sharegpt4v": write_sharegpt4v,
    "urban1k": write_urban1k,
    "docci": write_docci,
    "dci": write_dci,
    "flickr30k-cn": write_flickr30k_cn,
    "coco-cn": write_coco_cn,
    "xm3600": write_xm3600,
    "openstax": write_openstax,
}
