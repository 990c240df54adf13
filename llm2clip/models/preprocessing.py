"""What a tower expects of its images: size, normalisation, fit and resampling, as preprocessor_config.json has them."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from llm2clip.data.images import CLIP_MEAN, CLIP_STD, ImageTransform
from llm2clip.errors import ModelError
from llm2clip.files import read_json
from llm2clip.settings import Fit, Interpolation, VisionSettings

PREPROCESSOR = "preprocessor_config.json"
Triple = tuple[float, float, float]
# PIL's numbers, which the file uses; box and Hamming filters are in no published processor
_RESAMPLE: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Preprocessing:
    """How images become the tower's input.

    Attributes:
        image_size: side of the square input in pixels.
        mean, std: per-channel normalisation of pixels in [0, 1].
        fit: how an image that is not square becomes square (`data.images.ImageTransform`).
        interpolation: how pixels are resampled.
        resize: crop: the short side in pixels before the centre is cut out; 0: `image_size`.
    """

    image_size: int
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD
    fit: Fit = "pad"
    interpolation: Interpolation = "adaptive"
    resize: int = 0

    def transform(self, *, train: bool = False, **options: Any) -> ImageTransform:
        """The transform of a data loader; `options` are further arguments of `ImageTransform`."""
        return ImageTransform(
            self.image_size,
            self.mean,
            self.std,
            train=train,
            fit=self.fit,
            interpolation=self.interpolation,
            resize=self.resize,
            **options,
        )

    def at_size(self, image_size: int) -> Preprocessing:
        """The same for another input size; the share that a crop cuts off stays."""
        resize = round(self.resize * image_size / self.image_size)
        return dataclasses.replace(self, image_size=image_size, resize=resize)

    def chosen(self, settings: VisionSettings) -> Preprocessing:
        """The same with what the settings say otherwise."""
        given = {"fit": settings.fit, "interpolation": settings.interpolation}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self, **changes)

    def to_config(self) -> dict[str, Any]:
        """Every field, as JSON."""
        return {**dataclasses.asdict(self), "mean": list(self.mean), "std": list(self.std)}

    def to_preprocessor(self) -> dict[str, Any]:
        """The content of preprocessor_config.json, readable for transformers' CLIP processor.

        transformers has no padding to a square; `llm2clip_fit` says so to readers that know it.
        """
        side = {"height": self.image_size, "width": self.image_size}
        crop = self.fit == "crop"
        numbers = {name: number for number, name in _RESAMPLE.items()}
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": self.resize or self.image_size} if crop else side,
            "resample": numbers.get(self.interpolation, 3),
            "do_center_crop": crop,
            "crop_size": side,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": True,
            "llm2clip_fit": self.fit,
            "llm2clip_interpolation": self.interpolation,
        }


def preprocessing_from_config(config: dict[str, Any]) -> Preprocessing:
    """What `Preprocessing.to_config` wrote; models saved before there was a choice padded, adaptively.

    Raises:
        ModelError: a value is missing or of the wrong kind.
    """
    try:
        fit, interpolation = config.get("fit", "pad"), config.get("interpolation", "adaptive")
        return Preprocessing(
            int(config["image_size"]),
            triple(config["mean"]),
            triple(config["std"]),
            _one_of("fit", fit, get_args(Fit)),
            _one_of("interpolation", interpolation, get_args(Interpolation)),
            int(config.get("resize", 0)),
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"the vision part of config.json is damaged: {type(error).__name__} {error}"
        ) from error


def read_preprocessor(path: str | os.PathLike[str], image_size: int) -> Preprocessing:
    """What a model directory (or the directory of a file in it) says in preprocessor_config.json.

    Args:
        path: model directory, or a file in it.
        image_size: side of the square input, where the file does not say it.

    Returns:
        Of the size that the file says; without a file, CLIP's normalisation, padding and adaptive resampling.

    Raises:
        ModelError: the file is damaged, or asks for what there is not.
    """
    place = Path(path)
    file = (place if place.is_dir() else place.parent) / PREPROCESSOR
    if not file.is_file():
        return Preprocessing(image_size)
    values = read_json(file, ModelError)
    if not isinstance(values, dict):
        raise ModelError(f"{file} must hold a JSON object, got {type(values).__name__}")
    try:
        return _from_preprocessor(values, image_size)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{file} cannot be used: {error}") from None


def _from_preprocessor(values: dict[str, Any], image_size: int) -> Preprocessing:
    size, crop = values.get("size"), values.get("crop_size")
    sides = _side(size)
    short = size.get("shortest_edge") if isinstance(size, dict) else size if isinstance(size, int) else None
    cut = _side(crop) if values.get("do_center_crop") else None
    fit: Fit = "pad"
    if cut:
        fit, image_size = "crop", cut
    elif sides or short:
        # a processor that only resizes to a square changes the aspect; one that keeps it leaves no square
        fit, image_size = ("squash" if sides else "crop"), int(sides or short or image_size)
    resample = values.get("resample")
    if resample is None:
        interpolation: Interpolation = "bicubic" if sides or short else "adaptive"
    elif resample in _RESAMPLE:
        interpolation = _RESAMPLE[resample]
    else:
        raise ModelError(f"resample {resample!r} is none of {', '.join(map(str, _RESAMPLE))}")
    return Preprocessing(
        image_size,
        triple(values.get("image_mean") or CLIP_MEAN),
        triple(values.get("image_std") or CLIP_STD),
        _one_of("llm2clip_fit", values.get("llm2clip_fit", fit), get_args(Fit)),
        _one_of(
            "llm2clip_interpolation",
            values.get("llm2clip_interpolation", interpolation),
            get_args(Interpolation),
        ),
        int(short) if cut and short and int(short) != cut else 0,
    )


def _side(value: Any) -> int | None:
    if isinstance(value, int):
        return value
    if not isinstance(value, dict) or "height" not in value:
        return None
    if value["height"] != value["width"]:
        raise ModelError(f"towers take square images, the file asks for {value['height']} x {value['width']}")
    return int(value["height"])


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise ModelError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    return value


def triple(values: Any) -> Triple:
    """Three numbers, one per channel."""
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise ModelError(f"expected three numbers per channel, got {values!r}")
    red, green, blue = (float(v) for v in values)
    return red, green, blue
