"""The native forward's library."""

from __future__ import annotations

import ctypes
from pathlib import Path

from dots_align.model.native.build import Unavailable, cache_directory, openmp
from dots_align.model.native.build import load as load_source

__all__ = ["Unavailable", "cache_directory", "load", "openmp"]


def load() -> ctypes.CDLL:
    """As `dots_align.model.native.build.load`."""
    return load_source(Path(__file__).parent / "forward.cpp", "rollout forward")
