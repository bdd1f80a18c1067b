"""Whether the Hugging Face hub is reachable, checked once and quickly."""

from __future__ import annotations

import functools

PROBE_SECONDS = 5.0


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
        return "HF_HUB_OFFLINE is set"
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        reason = getattr(error, "reason", error)
        return None if isinstance(reason, ssl.SSLError) else f"{constants.ENDPOINT} does not answer: {reason}"
    return None
