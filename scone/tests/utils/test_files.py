"""A file that is being written is its writer's alone, and what a killed writer left is removed."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scone.utils.files import atomic_path

WRITE = "import sys; from scone.utils.files import write_json; write_json(sys.argv[1], 2)"
DIE = "import os, sys; from scone.utils.files import *; w = atomic_path(sys.argv[1]); w.__enter__(); os.kill(0, 9)"
CONTAINER = ["unshare", "--user", "--map-root-user", "--pid", "--fork"]
"""Process numbers of its own under the same host name, and the same files."""


def run(target: Path, code: str, *within: str) -> int:
    return subprocess.run([*within, sys.executable, "-c", code, str(target)], process_group=0, check=False).returncode


@pytest.mark.parametrize("within", [[], CONTAINER], ids=["processes", "containers that share a host name"])
def test_writers_leave_each_other_alone(within: list[str], tmp_path: Path) -> None:
    if within and (not shutil.which("unshare") or subprocess.run([*within, "true"], capture_output=True).returncode):
        pytest.skip("this system gives no process namespaces of one's own")
    target = tmp_path / "[a].json"
    assert run(target, DIE) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    with atomic_path(target) as temporary:
        assert not left.exists()
        assert run(target, WRITE, *within) == 0
        assert temporary.exists()
        temporary.write_text("1")
    assert [*tmp_path.iterdir()] == [target]
    assert target.read_text() == "1"
