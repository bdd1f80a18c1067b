"""Files that are complete or absent: atomic writes, JSON, fingerprints."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from scone.utils.errors import SconeError

if TYPE_CHECKING:
    import numpy as np


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Closing:
    """What is closed at the end of a ``with`` block."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release what it holds."""
        raise NotImplementedError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed to ``path``, on error removed.

    A reader therefore sees the old file or the new one, never half of one. What a killed process of this machine, or
    of this container, left of an earlier attempt is removed. Raises OSError (disk full, no permission), and SconeError
    where there is something that is no file: a rename would put one in the place of /dev/null.
    """
    path = Path(path)
    _refuse_what_is_no_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    ours = f".{path.name}.{platform.node()}-{_process_namespace()}-"
    for left in path.parent.glob(f"{glob.escape(ours)}*.part"):
        process = left.name.removeprefix(ours).partition("-")[0]
        if process.isdigit() and not _is_alive(int(process)):
            left.unlink(missing_ok=True)
    descriptor, name = tempfile.mkstemp(".part", f"{ours}{os.getpid()}-", path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno in _DISK_FULL:
            error.filename = error.filename or str(path)  # writing names none, and there are several disks
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise now what writing the file ``path`` would meet after long work; leaves nothing behind."""
    path = Path(path)
    _refuse_what_is_no_file(path)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    with tempfile.TemporaryFile(dir=folder):
        pass


def _refuse_what_is_no_file(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # /dev/stdout, too, where it leads to a file: the rename would take the link's place
    leads_out = path.is_symlink() and str(path.readlink()).startswith("/proc/")
    if leads_out or (path.exists() and not path.is_file()):
        raise SconeError(f"found a device or pipe at {path}; expected a file, or nothing; choose another path")


def _process_namespace() -> int:
    """In which process numbers mean something: containers may share a host name, and each has numbers of its own."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # no Linux
        return 0


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    return True


@contextmanager
def translate_disk_full(what: str, advice: str) -> Iterator[None]:
    """Turn the system's "disk full" while ``what`` is written into one line that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise SconeError(
            f"found no room for {what} ({error.strerror}); expected space for all of it; free some and {advice}"
        ) from error


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at ``path`` now: a lock on a file that was removed locks nobody out."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def sync_folder(folder: Path) -> None:
    """Make renames and new names in ``folder`` durable (a rename is not, until its folder is synced)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises SconeError when it is missing, unreadable or not JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        raise SconeError(f"cannot read {path} as JSON: {why}; check the path, or make the file again") from error


def fingerprint_of(*parts: str | bytes | np.ndarray) -> str:
    """Hex SHA-256 over ``parts``, each framed by its length so that different splits give different fingerprints."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            part = part.encode("utf-8")
        data = part if isinstance(part, bytes) else part.data
        view = memoryview(data).cast("B") if len(part) else memoryview(b"")
        digest.update(len(view).to_bytes(8, "little"))
        digest.update(view)
    return digest.hexdigest()


def give_umask_mode(folder: Path, pattern: str) -> None:
    """Give files of ``folder`` the mode that new files get. Libraries that write to a temporary file and rename it (as
    safetensors does) leave its 600, and nobody but its owner could read a model.
    """
    for path in folder.glob(pattern):
        path.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
