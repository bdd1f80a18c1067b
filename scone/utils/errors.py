"""The error that a user caused and can mend."""

from __future__ import annotations


class SconeError(Exception):
    """A user's mistake, told in one line: what was found, what was expected, what to do.

    The command line prints the line and exits with status 2; ``--debug`` shows the traceback instead.
    Programming errors are ``assert`` or ``ValueError`` and always come with a traceback.
    """
