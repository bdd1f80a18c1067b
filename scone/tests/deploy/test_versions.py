"""The versions that we ask for: the lowest ones are those that are tested, and the pinned ones are allowed."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import scone

REPOSITORY = Path(scone.__file__).parents[1]
pytestmark = pytest.mark.skipif(not (REPOSITORY / "constraints.txt").exists(), reason="a package has no constraints")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def pinned(name: str) -> dict[str, str]:
    lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
    return {normal(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}


def required() -> list[str]:
    """What the project asks for, extras included."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]


def floors() -> dict[str, str]:
    """Lowest version by package."""
    found = {}
    for line in required():
        match = re.match(r"([\w.-]+)(?:\[[\w,]+\])?\s*>=\s*([\w.]+)", line)
        if match:
            found[normal(match[1])] = match[2]
    return found


def test_the_lowest_versions_are_those_that_make_test_minimum_installs():
    assert pinned("constraints-minimum.txt") == floors()
    named = {normal(re.match(r"[\w.-]+", line)[0]) for line in required()}  # type: ignore[index]
    assert named - {"scone-lm"} == set(floors()), "every requirement has a lowest version"


def test_the_pinned_versions_are_allowed():
    lowest = floors()
    for name, version in pinned("constraints.txt").items():
        assert numbers(version) >= numbers(lowest.get(name, "0")), name


def test_the_readme_and_the_makefile_say_the_lowest_versions():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    python, lowest = project["requires-python"].removeprefix(">="), floors()
    readme = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    assert f"Python {python} or later and `pip`" in readme
    assert (
        f"the floor is Python {python}, PyTorch {lowest['torch']} and transformers {lowest['transformers']}." in readme
    )
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert f"v >= {numbers(python)}" in makefile
    assert f"expected {python} or later" in makefile


def test_the_list_of_licences_names_what_we_ask_for_in_the_versions_that_we_pin():
    """But for what tests, builds the site, or asks for zero-shot tasks."""
    text = (REPOSITORY / "docs" / "licences.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| ([\w.-]+) \| ([\w.]+) \| (.+) \|$", text, re.MULTILINE)
    versions = {name: version for name, version, _ in found}
    tools = "lm-eval mkdocs mkdocs-material mypy openai peft pytest pytest-xdist ruff hypothesis trl types-pyyaml"
    for name in set(floors()) - set(tools.split()):
        assert versions[name] == pinned("constraints.txt")[name], name
    assert not [name for name, _, licence in found if re.search(r"unknown|(?<!L)GPL", licence)]
