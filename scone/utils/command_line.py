"""Shared by all commands: one-line errors, exit codes, suggestions for misspelt words."""

from __future__ import annotations

import difflib
import errno
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence

from scone.utils.errors import SconeError

EXIT_UNEXPECTED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

_PERMISSIONS, _PATH = "check the permissions, or choose another path", "check the path"
_ADVICE = {
    errno.ENOSPC: "free some disk space and run again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) and run again",
    errno.EDQUOT: "free some of the disk quota and run again",
    errno.EROFS: "choose a path that can be written",
    errno.EISDIR: "give a file, not a folder",
    **dict.fromkeys((errno.EACCES, errno.EPERM), _PERMISSIONS),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), _PATH),
}
_SEE_TRACEBACK = "run again with --debug for the traceback"


def run_main(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run ``main(argv)`` and return the exit status; every failure becomes one line on the error stream.

    0 success (or what ``main`` returns), 1 a defect, 2 a user's mistake or a file system error, 130 Ctrl-C,
    141 the reader of our output went away. ``--debug`` anywhere in ``argv`` is taken out and shows tracebacks;
    ``--quiet`` is too, and leaves only results and errors.
    """
    arguments, debug = _take(sys.argv[1:] if argv is None else argv, "--debug")
    arguments, quiet = _take(arguments, "--quiet")
    if quiet:
        os.environ["SCONE_PROGRESS"] = "0"  # for the processes that this one starts, too
        logging.disable(logging.WARNING)
    if not debug:
        _quiet_optional_libraries()
    if {"-h", "--help", "help"} & set(arguments) and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # help is for reading, whatever the terminal can show
    try:
        for word in arguments:  # Python lets bytes of no character pass as half of one
            if any("\ud800" <= character <= "\udfff" for character in word):
                expected = (
                    f"is no text in {sys.getfilesystemencoding()}; expected UTF-8; rename it, or set PYTHONUTF8=1"
                )
                raise SconeError(f"found the argument {one_line(word)}, which {expected}")
        status = int(main(arguments) or 0)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        _report(
            "interrupted; what was finished is kept: run again to go on (train: with --resume_from_checkpoint)", debug
        )
        return EXIT_INTERRUPTED
    except Exception as error:
        line, status = describe_error(error)
        _report(f"error: {line}", debug)
        return status


def _quiet_optional_libraries() -> None:
    """Keep libraries of quantisation from reporting kernels that they lack: transformers imports torchao wherever it is
    installed, and peft, which imports bitsandbytes.
    """
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def describe_error(error: Exception) -> tuple[str, int]:
    """One line for ``error``, and its exit status."""
    if isinstance(error, SconeError):
        return one_line(str(error)), EXIT_USER_ERROR
    if isinstance(error, OSError):
        where = f": {one_line(str(error.filename))}" if error.filename else ""
        what = error.strerror or one_line(str(error)) or type(error).__name__
        advice = _ADVICE.get(error.errno or 0, _SEE_TRACEBACK)
        if error.errno in (errno.EACCES, errno.EPERM) and not error.filename:
            advice = _SEE_TRACEBACK  # no path to check: shared memory, a semaphore
        return f"{what}{where}; {advice}", EXIT_USER_ERROR
    if isinstance(error, UnicodeEncodeError):
        around = error.object[max(0, error.start - 40) : error.end + 40]
        return (
            f"found the text {around!a}, which {error.encoding} cannot hold; expected UTF-8; rename what is called so, "
            "or set PYTHONIOENCODING=utf-8 and run again",
            EXIT_USER_ERROR,
        )
    full = _disk_error_of_a_library(error)
    if full is not None:
        return f"{os.strerror(full)} while a library wrote a file; {_ADVICE[full]}", EXIT_USER_ERROR
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({one_line(str(error))[:200]}); use a smaller batch size or model", EXIT_USER_ERROR
    return (
        f"unexpected {type(error).__name__}: {one_line(str(error))}; "
        "run again with --debug for the traceback, and please report it",
        EXIT_UNEXPECTED,
    )


def _disk_error_of_a_library(error: Exception) -> int | None:
    """The number of the disk's error that a library's error of its own kind stands for, None for any other."""
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", str(error))):
        return int(found[1]) if int(found[1]) in _ADVICE else None
    # what torch.save says, whatever the disk said to it
    wrote = re.search(r"PytorchStreamWriter failed|inline_container.*unexpected pos", str(error), re.DOTALL)
    return errno.ENOSPC if isinstance(error, RuntimeError) and wrote else None


def is_first_process() -> bool:
    """Whether this process speaks for its run: the only one, or the first that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def one_line(text: str) -> str:
    """``text`` with every run of white space made one space, and what a terminal would obey written out: files that
    strangers wrote are quoted in messages.
    """
    words = " ".join(text.split())
    if words.isprintable():
        return words
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in words)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "did you mean X?" for the known word nearest to ``word``, or that begins so; "" when none is near."""
    by_lower = {name.lower(): name for name in known}
    nearest = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.6)
    nearest += [name for name in by_lower if len(word) > 2 and name.startswith(word.lower())]
    return f"did you mean {by_lower[nearest[0]]}?" if nearest else ""


def _take(argv: Sequence[str], flag: str) -> tuple[list[str], bool]:
    """``argv`` without ``flag`` (up to a ``--``), and whether it was there."""
    end = argv.index("--") if "--" in argv else len(argv)
    kept = [word for word in argv[:end] if word != flag]
    return [*kept, *argv[end:]], len(kept) < end


def _report(line: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(line, file=sys.stderr)
