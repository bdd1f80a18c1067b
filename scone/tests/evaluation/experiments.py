"""What tests of benchmarks/ and experiments/ share: their modules, which are no package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[3]


def module(name: str) -> Any:
    """One of the repository's own, from benchmarks/ or experiments/; skips where only the package is installed."""
    folders = [REPOSITORY / "benchmarks", REPOSITORY / "experiments"]
    if not folders[0].is_dir():
        pytest.skip("benchmarks/ and experiments/ are in the repository, and this is an installed package")
    sys.path[:0] = [str(folder) for folder in folders if str(folder) not in sys.path]
    return importlib.import_module(name)


def run(name: str, flops: float, loss: float, noise: np.ndarray | None = None, seed: int = 1, **changes: float) -> dict:
    """A finished run of the ladder: the same blocks of windows on both texts, a tenth apart but for ``changes``."""
    noise = np.zeros(4) if noise is None else noise  # [n] of mean 0
    losses = {text: loss + changes.get(text, shift) for text, shift in (("novels", -0.1), ("c4", 0.1))}
    tests = {text: {"loss": each, "block_losses": list(each + noise)} for text, each in losses.items()}
    return {"run": name, "seed": seed, "tokens": 1, "cost": {"training_flops": flops}, "tests": tests}
