"""The built-in corpus: the sources of the running interpreter's standard library, which are on every machine."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from scone.utils.errors import SconeError

NAME = "python-stdlib"
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "lib-dynload", "__phello__"}
)


def stdlib_files() -> list[Path]:
    """The ``.py`` files of the standard library in a fixed order, without tests and installed packages.

    Raises SconeError when the interpreter came without sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(_python_files(root), key=lambda path: path.relative_to(root).as_posix())
    if not files:
        raise SconeError(
            f"found no .py files in {root}; expected the standard library; give a corpus by --dataset_name"
        )
    return files


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        # Build settings differ from machine to machine and say nothing; they live in config-* and _sysconfigdata*.
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(folder, name)
