"""Names of models, tokenizers and datasets: what means a path of this machine, and whether the hub can be asked."""

from __future__ import annotations

import functools
from pathlib import Path

from scone.utils.errors import SconeError

PROBE_SECONDS = 5.0
OFFLINE = "HF_HUB_OFFLINE is set"


def refuse_missing_path(name: str, expected: str) -> None:
    """Raise SconeError where nothing is at ``name`` and it can only mean a path: it is no name that the hub could have
    (``name`` or ``owner/name``).
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if Path(name).expanduser().exists():
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise SconeError(f"found no file or folder {name!r}; expected {expected} there; check the path") from error


def within_reach(name: str | Path, expected: str) -> str:
    """A name that libraries load from without waiting: a path that exists, a name that the hub can be asked for, or,
    where it does not answer, the folder of its cache that holds a copy (its client would retry for most of a minute
    for every file, some even when told to look only on this machine).

    Raises SconeError: a path that is not there, or a name that is neither here nor in reach.
    """
    path = Path(name).expanduser()
    if path.exists():
        return str(path)
    refuse_missing_path(str(name), expected)
    problem = why_hub_is_unreachable()
    if problem is None:
        return str(name)
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(str(name), local_files_only=True))
    except OSError as error:
        raise SconeError(
            f"found {str(name)!r} neither as a folder here nor in the hub's cache, and the Hugging Face hub cannot be "
            f"reached ({problem}); expected {expected}; check the path"
        ) from error


def refuse_unreachable_dataset(what: str, advice: str) -> None:
    """Raise SconeError where the hub does not answer; with ``HF_HUB_OFFLINE`` a copy in its cache is used."""
    problem = why_hub_is_unreachable()
    if problem and problem != OFFLINE:
        raise SconeError(
            f"{what}, and the Hugging Face hub cannot be reached ({problem}); {advice}, or set HF_HUB_OFFLINE=1 to use "
            "a copy downloaded before"
        )


@functools.cache
def why_hub_is_unreachable() -> str | None:
    """The reason why the hub cannot be used, or None when it answers (asked once a process).

    The hub's own client retries an unreachable host for most of a minute, once for every file that it looks for;
    one question with a short limit beforehand turns that into an immediate answer. ``HF_HUB_OFFLINE`` is respected.
    Any answer counts, an error status or a certificate that only the hub's client accepts included.
    """
    import ssl
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return OFFLINE
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        reason = getattr(error, "reason", error)
        return None if isinstance(reason, ssl.SSLError) else f"{constants.ENDPOINT} does not answer: {reason}"
    return None
