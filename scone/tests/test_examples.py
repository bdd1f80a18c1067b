"""Every example of the repository runs, is short, and does what it says."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="an installed package has no examples")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--row_optimizer"]])
def test_own_loop_teaches_rows(arguments, monkeypatch, capsys):
    path = EXAMPLES / "own_loop.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    monkeypatch.setattr(sys, "argv", [str(path), "--steps", "40", *arguments])
    runpy.run_path(str(path), run_name="__main__")
    lines = re.findall(r"loss ([\d.]+), ([\d,]+) rows", capsys.readouterr().out)
    assert float(lines[-1][0]) < float(lines[0][0]) - 1
    assert int(lines[-1][1].replace(",", "")) > 1000
