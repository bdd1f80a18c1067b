"""The list of licences: it names all that we ask for, and nothing in it needs a lawyer's look."""

from __future__ import annotations

import re

import pytest

from scone.tests.deploy.test_versions import REPOSITORY, floors, normal, pinned

LIST = REPOSITORY / "docs" / "licences.md"
pytestmark = pytest.mark.skipif(not LIST.exists(), reason="an installed package has no documentation")
NOT_LISTED = {
    *(
        "lm-eval",
        "mkdocs",
        "mkdocs-material",
        "mypy",
        "openai",
        "peft",
        "pytest",
        "pytest-xdist",
        "ruff",
        "hypothesis",
        "trl",
    )
}
"""For who tests, builds the site, or asks for zero-shot tasks."""


def rows(text: str) -> dict[str, tuple[str, str]]:
    """Version and licence by package."""
    found = re.findall(r"^\| ([\w.-]+) \| ([\w.]+) \| (.+) \|$", text, re.MULTILINE)
    return {name: (version, licence) for name, version, licence in found}


def test_the_list_names_what_we_ask_for_in_the_versions_that_we_pin() -> None:
    listed = rows(LIST.read_text(encoding="utf-8"))
    versions = pinned("constraints.txt")
    for name in set(floors()) - NOT_LISTED - {"types-pyyaml"}:
        assert listed[normal(name)][0] == versions[normal(name)], name
    assert not [name for name, (_, licence) in listed.items() if re.search(r"unknown|(?<!L)GPL", licence)]
