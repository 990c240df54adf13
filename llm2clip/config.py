"""From YAML and dotted overrides to typed settings, and back.

    settings = load_settings(TrainSettings, "train.yaml", ["optim.lr=1e-3", "data.train=[a.tar,b.tar]"])

Unknown names are refused with the nearest known one, wrong types with what was expected. An override's
value is read as YAML, so `run.steps=null`, `data.train=[a, b]` and `optim.lr=3e-4` mean what they look like.
"""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from llm2clip.errors import ConfigError

S = TypeVar("S")
_SHOWN = 200  # characters of a text in an error
# PyYAML lets through what Python raises on impossible dates, numbers and depths
_NOT_YAML = (
    yaml.YAMLError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    OverflowError,
    RecursionError,
)


def load_settings(cls: type[S], path: str | Path | None = None, overrides: Sequence[str] = ()) -> S:
    """Build `cls` from a YAML file (or its defaults) and `name=value` overrides, which win.

    Raises:
        ConfigError: unreadable file, unknown name, wrong type, or an override without `=`.
    """
    tree = read_yaml(path) if path is not None else {}
    for override in overrides:
        name, found, text = override.partition("=")
        if not found or not name:
            raise ConfigError(f"override {override!r}: expected name=value, for example optim.lr=1e-3")
        try:
            value = yaml.safe_load(text)
        except _NOT_YAML as problem:
            raise ConfigError(
                f"override {override!r}: the value is not YAML ({_one_line(problem)})"
            ) from None
        _assign(tree, name.split("."), value)
    return from_tree(cls, tree, where=str(path) if path is not None else "")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; an empty file is an empty mapping."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"config file {path} cannot be read: {problem}") from None
    except _NOT_YAML as problem:
        raise ConfigError(f"config file {path} is not YAML: {_one_line(problem)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path}: expected `name: value` lines, got a {type(tree).__name__}")
    return tree


def from_tree(cls: type[S], tree: Mapping[str, Any], *, where: str = "") -> S:
    """Build the settings dataclass `cls` from nested plain values."""
    return typing.cast(S, _build(cls, tree, "", f" ({where})" if where else ""))


def to_tree(settings: Any) -> dict[str, Any]:
    """The nested plain values (dict, list, str, number, None) of a settings dataclass."""
    return typing.cast(dict[str, Any], _plain(settings))


def dump_yaml(settings: Any) -> str:
    """The resolved settings as YAML; loading it gives equal settings."""
    tree = to_tree(settings)
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    # rare line separators (U+0085) come back from YAML as spaces unless they are escaped
    return text if yaml.safe_load(text) == tree else yaml.safe_dump(tree, sort_keys=False)


def iter_fields(cls: type, prefix: str = "") -> typing.Iterator[tuple[str, Any, Any, str]]:
    """Yield `(dotted name, type, default, help)` of every leaf setting, for the reference pages."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from iter_fields(typing.cast(type, kind), f"{prefix}{field.name}.")
            continue
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield f"{prefix}{field.name}", kind, default, str(field.metadata.get("help", ""))


def type_name(kind: Any) -> str:
    """A setting's type as a user writes it: `integer`, `list of text`, `fp32 | bf16`."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(str(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else type_name(arg) for arg in args)
    if origin is tuple:
        many = len(args) == 2 and args[1] is Ellipsis
        return f"list of {type_name(args[0])}" if many else f"list of {len(args)} numbers"
    if origin is dict:
        return f"mapping of text to {type_name(args[1])}"
    return {int: "integer", float: "number", bool: "true or false", str: "text"}.get(kind, str(kind))


def _build(cls: Any, tree: Any, prefix: str, where: str) -> Any:
    if not isinstance(tree, Mapping):
        raise ConfigError(
            f"{prefix.rstrip('.') or 'config'}{where}: expected a group of settings, got {_shown(tree)}"
        )
    names = [field.name for field in dataclasses.fields(cls)]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if name not in names:
            shown = name if isinstance(name, str) and len(name) < _SHOWN else _shown(name)
            near = difflib.get_close_matches(shown, names, n=1, cutoff=0.4)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(names)}"
            raise ConfigError(f"unknown setting {prefix}{shown}{where}; {hint}")
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            values[name] = _build(kind, value if value is not None else {}, f"{prefix}{name}.", where)
        else:
            values[name] = _convert(kind, value, f"{prefix}{name}", where)
    return cls(**values)


def _convert(kind: Any, value: Any, name: str, where: str) -> Any:
    expected = type_name(kind)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (kind,) = [arg for arg in args if arg is not type(None)]
        origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value in args:
            return value
    elif origin is tuple:
        many = len(args) == 2 and args[1] is Ellipsis
        if many and isinstance(value, str):
            value = [value]  # one path where a list is expected
        if isinstance(value, (list, tuple)) and (many or len(value) == len(args)):
            kinds = [args[0]] * len(value) if many else args
            return tuple(
                _convert(k, v, f"{name}[{i}]", where)
                for i, (k, v) in enumerate(zip(kinds, value, strict=True))
            )
    elif origin is dict:
        if isinstance(value, Mapping):
            return {str(k): _convert(args[1], v, f"{name}.{k}", where) for k, v in value.items()}
    elif kind is bool or kind is str:
        if isinstance(value, kind):
            return value
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif kind is float:
        # YAML reads 1e-4 (without a dot) as text
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except (ValueError, OverflowError):
                pass
    raise ConfigError(f"{name}{where}: expected {expected}, got {_shown(value)}")


def _shown(value: Any) -> str:
    """A value in an error: aliases may make a few lines of YAML a value of gigabytes."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _SHOWN
    return short.repr(value)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _assign(tree: dict[str, Any], names: list[str], value: Any) -> None:
    for name in names[:-1]:
        branch = tree.get(name)
        if not isinstance(branch, dict):
            branch = tree[name] = {}
        tree = branch
    tree[names[-1]] = value


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split())
