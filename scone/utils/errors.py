"""The error that a user caused and can fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class SconeError(Exception):
    """A user's mistake in one line: what was found, what was expected, what to do.

    The command line prints the line and exits with status 2; ``--debug`` shows the traceback instead.
    Programming errors are ``assert`` or ``ValueError`` and always come with a traceback.
    """


@contextmanager
def library_refusal(what: str, advice: str = "") -> Iterator[None]:
    """Around a library that reads somebody's files: what it raises for them becomes one line, ``what (why); advice``.
    Without advice it is a clause, for a line that has its own.

    Libraries raise anything at all for damaged files, bare ``Exception`` included. Ours and want of memory pass.
    """
    try:
        yield
    except (SconeError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise SconeError(f"{what} ({reason})" + (f"; {advice}" if advice else "")) from error
