"""How settings are declared: typed frozen dataclasses whose fields carry their help text."""

from __future__ import annotations

from dataclasses import MISSING, field
from typing import Any, TypeVar

from llm2clip.errors import ConfigError

T = TypeVar("T")


def setting(default: T | Any = MISSING, help: str = "", *, factory: Any = None) -> T:
    """A dataclass field with a help text; `factory` for mutable or nested defaults."""
    metadata = {"help": help}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)  # type: ignore[no-any-return]
    return field(default=default, metadata=metadata)  # type: ignore[no-any-return]


def at_least(group: str, settings: Any, least: int, *names: str) -> None:
    """Refuse settings below `least` (and NaN); null passes.

    Raises:
        ConfigError: naming the setting.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{group}.{name}: expected at least {least}, got {value!r}")
