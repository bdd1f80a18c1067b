"""No hint of ours installs a stranger: on the package index ``scone`` is another project."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import scone

REPOSITORY = Path(scone.__file__).parents[1]
STRANGER = re.compile(r"pip install [^\n`;]*?(?<![\w./-])scone(?![\w./-])")
SUFFIXES = {".py", ".md", ".toml", ".yml", ".yaml", ".sh", ".cff", ".txt", ".js", ".html", ""}
NOT_OURS = re.compile(r"build|dist|node_modules|\.(?!ci$|github$).+")
"""Folders that are made, or hidden: environments, caches, what somebody keeps there."""


def texts(folder: Path) -> list[Path]:
    paths = folder.rglob("*")
    parts = (
        path for path in paths if not any(NOT_OURS.fullmatch(part) for part in path.relative_to(folder).parts[:-1])
    )
    return [path for path in parts if path.is_file() and path.suffix in SUFFIXES and path != Path(__file__)]


@pytest.mark.parametrize(
    ("line", "is_one"),
    [
        ("pip install scone", True),
        ('pip install "scone[serve]"', True),
        ("`pip install scone` first", True),
        ("pip install --quiet 'scone[tasks]'", True),
        ("pip install scone-lm", False),
        ('pip install "scone-lm[serve]"', False),
        ('pip install -e ".[serve]"', False),
        ("pip install build/wheel/scone_lm-*.whl", False),
    ],
)
def test_what_a_stranger_is(line: str, is_one: bool) -> None:
    assert bool(STRANGER.search(line)) == is_one


def test_no_hint_installs_the_stranger() -> None:
    root = REPOSITORY if (REPOSITORY / "pyproject.toml").exists() else Path(scone.__file__).parent
    files = texts(root)
    assert len(files) > 100
    found = [f"{path}: {match[0]}" for path in files for match in STRANGER.finditer(path.read_text("utf-8", "replace"))]
    assert found == []


def test_the_project_has_the_name_that_the_hints_say() -> None:
    if not (REPOSITORY / "pyproject.toml").exists():
        pytest.skip("an installed package has no pyproject.toml")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == "scone-lm"
    own = [line for extra in project["optional-dependencies"].values() for line in extra if line.startswith("scone")]
    assert all(line.startswith("scone-lm[") for line in own)
