"""The process group of a run: restarting it, destroying it, and reporting lost ranks."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from scone.utils.command_line import one_line
from scone.utils.errors import SconeError

_GLOO_SAYS = ("gloo", "Connection closed by peer", "Connection reset by peer", "Socket Timeout")


def reinit_process_group(backend: str | None) -> None:
    """Reinitialise the process group after torchrun restarted the processes.

    Its store lives on through a restart (torch 2.13), with the addresses of the killed processes in it, and whoever
    comes first would read those: each restart gets names of its own. ``backend`` as for ``init_process_group``.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or dist.is_initialized():
        return
    store, rank, world_size = next(rendezvous("env://"))
    store = dist.PrefixStore(f"restart {restarts}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def destroy_process_group() -> None:
    """Destroy the process group, if there is one, at the end of the program, when no model is held any more.

    What is left of a group of gloo's can abort a process that exits (pytorch issue 190489), and its launcher then ends
    the others, who may still be saving. A sharded model holds the group, and is held by cycles of the trainer's.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


@contextmanager
def report_lost_ranks() -> Iterator[None]:
    """Raise SconeError instead of the communication library's error when another rank is lost."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise SconeError(
                f"a process that prepares batches ended or was killed ({one_line(str(error))[:120]}), most often for "
                "want of memory; expected it to live; give a lower --num_workers, and go on with "
                "--resume_from_checkpoint"
            ) from error
        if not is_lost_rank(error):
            raise
        raise SconeError(
            "lost the connection to another process of this run, which ended or was killed (its own message is above "
            "or in its log); expected all of them; start again with --resume_from_checkpoint to go on from the last "
            "checkpoint (torchrun --max_restarts N does so by itself)"
        ) from error


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a communication library failed, and not the computation."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return isinstance(error, dist.DistError) or any(words in str(error) for words in _GLOO_SAYS)
