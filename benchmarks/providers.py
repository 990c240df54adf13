"""Who is measured: a registry of providers of one operation, why one cannot run here, and who gave wrong results."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Provider:
    """One implementation of the measured operation.

    Attributes:
        name: as on the command line and in the tables.
        make: called once per case with what the suite calls it with; returns what is measured.
        needs: modules that must import.
        cuda_only: whether it has no CPU implementation.
        ours: whether a wrong result is a fault of this project; a peer's is only left out.
    """

    name: str
    make: Callable[..., Callable[..., Any]]
    needs: tuple[str, ...] = ()
    cuda_only: bool = False
    ours: bool = False

    def unavailable(self, device: str) -> str:
        """Returns why it cannot run on `device`, "" if it can."""
        if self.cuda_only and device != "cuda":
            return "needs a CUDA GPU"
        for module in self.needs:
            try:
                importlib.import_module(module)
            except Exception as error:  # a peer that fails to import in any way is one that is not there
                return f"{module} does not import: {type(error).__name__}: {error}".splitlines()[0][:200]
        return ""


@dataclass
class Registry:
    """Providers of one operation by name."""

    providers: dict[str, Provider] = field(default_factory=dict)

    def add(self, provider: Provider) -> None:
        """Adds a provider; raises ValueError if its name is taken."""
        if provider.name in self.providers:
            raise ValueError(f"provider {provider.name!r} is registered twice")
        self.providers[provider.name] = provider

    def __getitem__(self, name: str) -> Provider:
        if name not in self.providers:
            raise ValueError(f"no provider {name!r}; there are {', '.join(self.providers)}")
        return self.providers[name]

    def choose(self, names: Iterable[str], device: str) -> tuple[list[Provider], dict[str, str]]:
        """Returns the providers of these names that run on `device`, and the reasons of the others."""
        usable, reasons = [], {}
        for name in names:
            reason = self[name].unavailable(device)
            if reason:
                reasons[name] = reason
            else:
                usable.append(self[name])
        return usable, reasons


def relative_error(got: Tensor, want: Tensor) -> float:
    """Returns ‖got - want‖ / ‖want‖ in fp64; NaN where got is not finite."""
    difference = (got.detach().double() - want.double()).norm()
    return float(difference / want.double().norm().clamp_min(torch.finfo(torch.float64).tiny))


def wrong(errors: Mapping[str, float], limit: float) -> str:
    """Returns which of the errors is above the limit or not a number, "" if none: then a speed may be quoted."""
    bad = {name: error for name, error in errors.items() if not error <= limit}
    return ", ".join(f"{name} error {error:.1e} > {limit:.0e}" for name, error in bad.items())
