"""What the processes of one run know of each other: that another one is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from scone.utils.errors import SconeError

_GLOO_SAYS = ("gloo", "Connection closed by peer", "Connection reset by peer", "Socket Timeout")


@contextmanager
def one_line_for_lost_processes() -> Iterator[None]:
    """Where another process of the run is gone, raise SconeError instead of what the communication library says."""
    try:
        yield
    except RuntimeError as error:
        if not tells_of_a_lost_process(error):
            raise
        raise SconeError(
            "lost the connection to another process of this run, which ended or was killed (its own message is above "
            "or in its log); expected all of them; start again with --resume_from_checkpoint to go on from the last "
            "checkpoint (torchrun --max_restarts N does so by itself)"
        ) from error


def tells_of_a_lost_process(error: RuntimeError) -> bool:
    """Whether a communication library failed, and not the computation."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return isinstance(error, dist.DistError) or any(words in str(error) for words in _GLOO_SAYS)
