"""LLM2CLIP: a decoder LLM teaches CLIP's visual encoder.

Importing the package is light: neither torch nor transformers is loaded until a module that needs it is.
"""

from __future__ import annotations

from importlib import metadata

try:
    __version__ = metadata.version("llm2clip")
except metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0.0.0+checkout"

__all__ = ["__version__"]
