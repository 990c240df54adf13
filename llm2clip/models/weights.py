"""Files of weights: read without running what is in them, and compared with the model name by name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llm2clip.errors import ModelError
from llm2clip.files import read_json

SAFETENSORS, TORCH_FILE = "model.safetensors", "pytorch_model.bin"
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
# where trainers put the weights among other things
_INSIDE = ("state_dict", "model", "module")
_WRAPPERS = ("module.", "_orig_mod.")
_RANDOM_INITS = (nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, nn.init.xavier_uniform_)


class skip_random_init(TorchFunctionMode):  # noqa: N801 - a context manager
    """Inside, modules are built with constants for their random initial values, which take longer than reading a file.

    Only for modules all of whose weights are loaded afterwards.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Fills where values would be drawn: with the least or the mean, which rejection sampling accepts."""
        kwargs = kwargs or {}
        with torch.no_grad():
            if func in _RANDOM_INITS:
                return (args[0] if args else kwargs["tensor"]).zero_()
            if func in (torch.Tensor.uniform_, torch.Tensor.normal_):
                first = "from" if func is torch.Tensor.uniform_ else "mean"
                return args[0].fill_(args[1] if len(args) > 1 else kwargs.get(first, 0.0))
        return func(*args, **kwargs)


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Every tensor of a file, or of a model directory (safetensors first, also in shards).

    A `.pt` file may hold the tensors under `state_dict`, `model` or `module`, and their names may begin with
    `module.` (DataParallel). It is unpickled with tensors alone allowed.

    Raises:
        ModelError: missing, damaged, or a pickle that holds more than tensors and plain values.
    """
    place = Path(path)
    if place.is_dir():
        return _read_directory(place)
    if not place.is_file():
        raise ModelError(f"{place} does not exist; the model directory is incomplete")
    if place.suffix in _PICKLES:
        return _read_pickle(place)
    return _read_safetensors(place)


def _read_directory(place: Path) -> dict[str, Tensor]:
    for name in (SAFETENSORS, TORCH_FILE):
        if (place / name).is_file():
            return read_tensors(place / name)
        index = place / f"{name}.index.json"
        if index.is_file():
            content = read_json(index, ModelError)
            shards = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise ModelError(f"{index} is damaged: expected a weight_map from names to files")
            tensors: dict[str, Tensor] = {}
            for shard in sorted(set(shards.values())):
                if os.path.basename(shard) != shard:
                    raise ModelError(f"{index} names {shard!r}, which is not a file beside it")
                tensors.update(read_tensors(place / shard))
            return tensors
    raise ModelError(f"{place} has neither {SAFETENSORS} nor {TORCH_FILE}")


def _read_safetensors(place: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(place)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{place} is damaged or half-copied: {error}") from error


def _read_pickle(place: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(place, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{place} is refused: it holds more than tensors, and reading that could run code of whoever made it "
            f"({reason}). Save the state dict alone, as safetensors, where the file comes from."
        ) from None
    except Exception as error:  # a damaged pickle ends in nearly any exception
        raise ModelError(
            f"{place} is damaged or half-copied: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    for key in _INSIDE:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        raise ModelError(f"{place} holds a {type(content).__name__}, expected tensors by name")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if len(tensors) != len(content) or not tensors:
        others = [str(name) for name in content if str(name) not in tensors]
        raise ModelError(
            f"{place}: expected tensors by name, got other things under {', '.join(others[:10]) or 'no name'}"
        )
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name[len(wrapper) :]: tensor for name, tensor in tensors.items()}
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The files of weights of a transformers directory."""
    return [file for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern)]


def require_plausible(config: Any, files: Sequence[Path], where: str) -> None:
    """Refuse a configuration of a larger model than the files can hold, before anything is built from it.

    A layer has at least one vector of the model's width, the vocabulary one row a token, a weight at least one bit.

    Raises:
        ModelError: the sizes contradict each other.
    """
    text = config.get_text_config()
    size = sum(file.stat().st_size for file in files)
    width = getattr(text, "hidden_size", 1)
    for name in ("num_hidden_layers", "vocab_size"):
        count = getattr(text, name, 0)
        if size and isinstance(count, int) and isinstance(width, int) and count * max(width, 1) > 8 * size:
            raise ModelError(
                f"{where} says that its model has {name}={count} and a width of {width}, more than its {size} bytes of "
                "weights can hold; the configuration is damaged or belongs to another model"
            )


def one_tensor(folder: Path, name: str) -> Tensor | None:
    """One tensor of a directory's safetensors file, fp32; None where there is no such name or file."""
    file = folder / "model.safetensors"
    if not file.is_file():
        return None
    from safetensors import safe_open

    with safe_open(file, "pt") as handle:
        return handle.get_tensor(name).float() if name in handle.keys() else None  # noqa: SIM118


def load_weights(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Load a file strictly.

    Raises:
        ModelError: unreadable, or names and shapes differ; every kind of difference is counted and shown.
    """
    tensors = read_tensors(file)
    check_names(model.state_dict(), tensors, os.fspath(file))
    model.load_state_dict(tensors)


def check_names(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise ModelError unless names and shapes of `tensors` are exactly those of `expected`."""
    parts = listing(
        missing=sorted(expected.keys() - tensors.keys()),
        unexpected=sorted(tensors.keys() - expected.keys()),
        shapes=other_shapes(expected, tensors),
    )
    if parts:
        raise ModelError(
            f"{source} does not fit the model: {parts}. Load it with the configuration it was saved with."
        )


def other_shapes(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Names that both have, with different shapes, as lines for a message."""
    return [
        f"{name}: file {tuple(tensors[name].shape)}, model {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != expected[name].shape
    ]


def listing(*, missing: Sequence[str], unexpected: Sequence[str], shapes: Sequence[str]) -> str:
    """The differences in words, ten names of each kind; empty without any."""
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return ", ".join(
        f"{len(items)} {kind} ({'; '.join(items[:10])}{'; ...' if len(items) > 10 else ''})"
        for kind, items in kinds
        if items
    )


def not_allowed(names: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """Names that no pattern of `allowed` (as `text_model.*`) matches."""
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in allowed)]
