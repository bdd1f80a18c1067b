"""Learned rows shared out over the processes of a run: who owns which, and how rows and gradients travel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from scone.kernels.common import to_device


def number_of_ranks() -> int:
    """Processes of the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass(frozen=True)
class RowShards:
    """R rows over W ranks: row r belongs to rank r mod W, where it is the r div W-th.

    Ranks of f-grams are sorted by frequency, so contiguous ranges would make one process do most of the work.
    """

    num_rows: int
    rank: int = 0
    world_size: int = 1

    @property
    def num_own(self) -> int:
        return len(range(self.rank, self.num_rows, self.world_size))

    def own(self, rows: Tensor) -> Tensor:
        """A view of this rank's share of whole ``rows`` ``[R, …]``."""
        return rows[self.rank :: self.world_size]


@dataclass
class Route:
    """How rows travel from their owners to this rank, and their gradients back."""

    wanted: np.ndarray
    """int64 ``[g]``: which of its own rows this rank gives, those for rank 0 first."""
    given: list[int]
    """How many it gives to each rank."""
    taken: list[int]
    """How many it gets from each rank."""
    in_all: int
    """Rows that travel between all ranks; 0: nothing to do for anybody."""

    order: np.ndarray
    """int64 ``[r]``: which of the rows that were asked for is the first, the second … in the order of owners."""

    def fetch(self, given: Tensor) -> Tensor:
        """Rows ``[g, D]`` that this rank gives → those that it asked for, ``[r, D]``, in the order it asked."""
        taken = _all_to_all(given, self.given, self.taken)
        back = np.empty_like(self.order)
        back[self.order] = np.arange(len(back))
        return _picked(taken, back)

    @cached_property
    def sums(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Which of its own rows this rank gives to any rank, sorted; and the places among them of those for each."""
        distinct, places = np.unique(self.wanted, return_inverse=True)
        return distinct, np.split(places.reshape(-1), np.cumsum(self.given)[:-1])

    def give_back(self, gradients: Tensor) -> tuple[np.ndarray, Tensor]:
        """Gradients of the rows that this rank asked for → which of its own rows were asked for, sorted, and the sums
        of their gradients, added up in the order of ranks.
        """
        ours = _all_to_all(_picked(gradients, self.order), self.taken, self.given)
        row_ids, places = self.sums
        return row_ids, sum_parts(len(row_ids), places, ours.split(self.given))


def sum_parts(num_rows: int, places: Sequence[np.ndarray], parts: Sequence[Tensor]) -> Tensor:
    """``[num_rows, D]``: the rows of each part, which has distinct places, are added there one part after the other, so
    the sums are the same bits wherever they are computed.
    """
    first = parts[0]
    total = first.new_zeros(num_rows, first.shape[1])
    everywhere = to_device(torch.from_numpy(np.concatenate(places)), first.device)
    for at, part in zip(everywhere.split([len(each) for each in places]), parts, strict=True):
        total.index_add_(0, at, part)
    return total


def _picked(rows: Tensor, indices: np.ndarray) -> Tensor:
    return rows.index_select(0, to_device(torch.from_numpy(indices), rows.device))


def _all_to_all(sent: Tensor, sent_counts: list[int], received_counts: list[int]) -> Tensor:
    received = sent.new_empty(sum(received_counts), *sent.shape[1:])
    dist.all_to_all_single(received, sent, received_counts, sent_counts)
    return received


@dataclass
class Exchange:
    """Talk about rows between all ranks of the default group.

    Which rows travel is known on the hosts, and they tell each other while accelerators are at work: in the default
    group where that is gloo's, else in one of their own, which all ranks make at the same time.
    """

    shards: RowShards
    hosts: dist.ProcessGroup | None = field(default_factory=lambda: group_of_hosts())

    def route(self, row_ids: np.ndarray) -> Route:
        """Of distinct rows, int64 ``[r]``. All ranks have to ask at once."""
        shards = self.shards
        owners = row_ids % shards.world_size
        order = np.argsort(owners, kind="stable")
        taken = torch.from_numpy(np.bincount(owners, minlength=shards.world_size))
        counts = [torch.empty_like(taken) for _ in range(shards.world_size)]
        dist.all_gather(counts, taken, group=self.hosts)
        given = [int(count[shards.rank]) for count in counts]
        wanted = torch.empty(sum(given), dtype=torch.int64)
        in_all = int(torch.stack(counts).sum())
        if in_all:
            asked = torch.from_numpy(row_ids[order] // shards.world_size)
            dist.all_to_all_single(wanted, asked, given, taken.tolist(), group=self.hosts)
        return Route(wanted.numpy(), given, taken.tolist(), in_all, order)

    def all_agree(self, agrees: bool) -> bool:
        """Whether all ranks say yes; all have to ask at once."""
        answers = [torch.zeros(1, dtype=torch.bool) for _ in range(self.shards.world_size)]
        dist.all_gather(answers, torch.tensor([agrees]), group=self.hosts)
        return all(map(bool, answers))

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        return self  # connections are not copied


def group_of_hosts() -> dist.ProcessGroup | None:
    """Where hosts talk to each other; made by all ranks together. None: the default group."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
