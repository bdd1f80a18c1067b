"""What tests of benchmarks/ and experiments/ share: their modules, which are no package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[3]


def module(name: str) -> Any:
    """One of the repository's own, from benchmarks/ or experiments/; skips where only the package is installed."""
    folders = [REPOSITORY / "benchmarks", REPOSITORY / "experiments"]
    if not folders[0].is_dir():
        pytest.skip("benchmarks/ and experiments/ are in the repository, and this is an installed package")
    sys.path[:0] = [str(folder) for folder in folders if str(folder) not in sys.path]
    return importlib.import_module(name)
