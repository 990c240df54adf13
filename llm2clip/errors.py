"""Errors a user can act on.

Every message says what was expected, what came, and what to do. The command line prints the message
alone, without a traceback, and exits with status 2; in library use they are ordinary exceptions.
"""

from __future__ import annotations


class UserError(Exception):
    """Base of all errors caused by input, configuration or the machine's state."""


class ConfigError(UserError, ValueError):
    """A setting is unknown, has the wrong type, or contradicts another."""


class DataError(UserError, ValueError):
    """A source, shard or caption file cannot be used."""


class BadSampleError(DataError):
    """One sample cannot be read; loaders count it, name it in the log and skip it."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"sample {key!r}: {reason}")
        self.key = key
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadSampleError], tuple[str, str]]:
        # the default would pickle the message alone, which data-loader workers cannot rebuild from
        return type(self), (self.key, self.reason)


class StoreError(UserError, ValueError):
    """An embedding store is missing, damaged, or made by another encoder than expected."""


class ModelError(UserError, ValueError):
    """A model directory or configuration cannot be used."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint is missing, damaged, or of another shape."""


class TrainingError(UserError, RuntimeError):
    """Training cannot go on, for example after a loss that is not finite."""
