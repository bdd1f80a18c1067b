"""No hint of ours installs a stranger: on the package index ``scone`` is another project."""

from __future__ import annotations

import re
from pathlib import Path

import scone

REPOSITORY = Path(scone.__file__).parents[1]
STRANGER = re.compile(r"pip install [^\n`;]*?(?<![\w./-])scone(?![\w./-])")
SUFFIXES = {".py", ".md", ".toml", ".yml", ".yaml", ".sh", ".cff", ".txt", ".js", ".html", ""}
NOT_OURS = re.compile(r"build|dist|node_modules|\.(?!ci$|github$).+")
"""Folders that are made, or hidden: environments, caches, what somebody keeps there."""


def test_what_a_stranger_is():
    strangers = ["scone", '"scone[serve]"', "--quiet 'scone[tasks]'", "scone` first"]
    ours = ["scone-lm", '"scone-lm[serve]"', '-e ".[serve]"', "build/wheel/scone_lm-*.whl"]
    assert [bool(STRANGER.search(f"`pip install {words}`")) for words in strangers + ours] == [True] * 4 + [False] * 4


def test_no_hint_installs_the_stranger():
    root = REPOSITORY if (REPOSITORY / "pyproject.toml").exists() else Path(scone.__file__).parent
    files = [
        path
        for path in root.rglob("*")
        if path.suffix in SUFFIXES and path != Path(__file__) and path.is_file()
        and not any(NOT_OURS.fullmatch(part) for part in path.relative_to(root).parts[:-1])
    ]  # fmt: skip
    assert len(files) > 100
    found = [f"{path}: {match[0]}" for path in files for match in STRANGER.finditer(path.read_text("utf-8", "replace"))]
    assert found == []
    if (root / "pyproject.toml").exists():
        assert '\nname = "scone-lm"' in (root / "pyproject.toml").read_text(encoding="utf-8")
