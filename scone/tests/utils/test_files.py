"""A file that is being written is its writer's alone, and what a killed writer left is removed."""

from __future__ import annotations

import os
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


def test_writers_leave_each_other_alone(tmp_path: Path) -> None:
    target = tmp_path / "[a].json"
    assert run(target, DIE) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    with atomic_path(target) as temporary:
        assert not left.exists()
        assert run(target, WRITE) == 0
        assert temporary.exists()
        temporary.write_text("1")
    assert [*tmp_path.iterdir()] == [target]
    assert target.read_text() == "1"


def test_so_do_containers_that_share_a_host_name(tmp_path: Path) -> None:
    try:
        subprocess.run([*CONTAINER, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system gives no process namespaces of one's own")
    target = tmp_path / "a.json"
    with atomic_path(target) as temporary:
        assert run(target, WRITE, *CONTAINER) == 0
        assert temporary.exists()
    assert os.stat(target).st_size == 0
