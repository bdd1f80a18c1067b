"""A file that is being written is its writer's alone, and what a killed writer left is removed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from scone.utils.errors import SconeError
from scone.utils.files import atomic_path, check_writable, write_json

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


def test_a_full_disk_is_named_by_the_file(tmp_path: Path) -> None:
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from scone.utils.command_line import run_main; from scone.utils.files import write_json\n"
        "sys.exit(run_main(lambda argv: write_json(argv[0], 'x' * 9000)))"
    )
    target = tmp_path / "a.json"
    target.write_text("before")
    ended = subprocess.run([sys.executable, "-c", code, target], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"error: File too large: {target}; raise the limit")
    assert [*tmp_path.iterdir()] == [target]
    assert target.read_text() == "before"


@pytest.mark.parametrize("write", [check_writable, lambda path: write_json(path, 1)])
def test_what_is_no_file_stays_what_it_is(write: Callable[[Path], None], tmp_path: Path) -> None:
    """A rename would put a file in the place of a device: for root, of /dev/null."""
    pipe, link, stdout = (tmp_path / name for name in ("pipe", "link", "stdout"))
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    with tempfile.TemporaryFile() as redirected:
        stdout.symlink_to(f"/proc/self/fd/{redirected.fileno()}")  # as /dev/stdout is
        for path in (pipe, link, stdout):
            with pytest.raises(SconeError, match="found a device or pipe at"):
                write(path)
    with pytest.raises(IsADirectoryError):
        write(tmp_path)
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert stdout.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "link", "stdout"}
