"""Learned rows: one trainable vector per f-gram, read and updated only where a batch touches them; shared out
over the processes of a run, each is with its owner, and rows and gradients travel.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import re
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from scone.kernels.common import pin, to_device, triton_is_installed
from scone.utils.errors import SconeError
from scone.utils.text import human_bytes

logger = logging.getLogger(__name__)

MOST_PASSES_PER_STEP = 4096
"""How many backward passes may wait for one step of a row optimizer: far more than anybody accumulates."""

_NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux, which Python 3.11 has no name for


def number_of_ranks() -> int:
    """Processes of the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass(frozen=True)
class RowShards:
    """R rows over W ranks: row r belongs to rank r mod W, where it is the r div W-th.

    By either ranking the first rows are read more than the last, so contiguous ranges would make one process do most of
    the work.
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


class Pass(NamedTuple):
    """What a backward pass left."""

    row_ids: np.ndarray
    """int64 ``[r]``, distinct, on the host."""
    gradients: Tensor
    """``[r, D]``."""
    route: Route | None
    """On which rows that are shared out came."""


class LearnedRows(nn.Module):
    """R rows of width D, zero at the start; an f-gram's vector is the sum over its suffix chain (back-off).

    The weight is a parameter like any other: it gets a dense gradient, and any optimizer in any loop trains it, at the
    price of R rows a step. A row optimizer (``training.optimizer.RowOptimizer``) makes that the price of the rows that
    a step touches: it has the rows `collect_for` it, and finds in ``pending`` what each backward pass left.

    Rows in bf16 are summed in fp32, and a row optimizer rounds them stochastically. With ``on_host`` they stay in host
    memory wherever the model goes: a GPU reads and writes there what a step touches.

    Once they are `share_out` over the processes of a run, each holds every W-th row. A pass fetches the rows of its
    batch from their owners, so all processes have to make as many passes; only a row optimizer trains them; and a state
    dictionary is without them (``row_files`` writes and reads them). Loading whole rows loads this process's share.

    Attributes:
        num_rows: R.
        weight: fp32 or bf16 ``[R, D]``, or the share of this process. Rows train if it requires a gradient, whoever
            updates them.
        shards: which of the rows ``weight`` has.
        exchange: with the other processes; None where this one has all rows.
        pending: each backward pass since the last step of the row optimizer, which empties it.
    """

    def __init__(self, num_rows: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.shards = RowShards(num_rows)
        self.exchange: Exchange | None = None
        self.weight = nn.Parameter(untouched_zeros(num_rows, width, torch.get_default_device(), dtype))
        self.on_host = False
        self._pinned: tuple[int, Any] | None = None
        self.pending: list[Pass] = []
        self._optimizer: weakref.ref[Any] | None = None

    def share_out(self) -> None:
        """Share the rows out over the processes of the default group, all of which have to do so.

        Before anything holds the weight: optimizers, ``DistributedDataParallel``. One process alone keeps all.
        """
        assert self.exchange is None, "shared out already"
        if number_of_ranks() == 1:
            return
        self.shards = RowShards(self.num_rows, dist.get_rank(), number_of_ranks())
        self.exchange = Exchange(self.shards)
        weight = self.weight.detach()
        if is_untouched(weight):
            own = untouched_zeros(self.shards.num_own, weight.shape[1], weight.device, weight.dtype)
        else:
            own = self.shards.own(weight).clone()
        self.weight = nn.Parameter(own, self.weight.requires_grad)

    def collect_for(self, optimizer: Any) -> None:
        """From now on, and as long as ``optimizer`` lives, gradients go to ``pending`` and not to the weight."""
        self._optimizer = weakref.ref(optimizer)
        self.pending.clear()
        self.weight.grad = None

    def release(self) -> None:
        """The weight gets its gradients itself again."""
        self._optimizer = None
        self.pending.clear()

    @property
    def are_collected(self) -> bool:
        """Whether a row optimizer takes the gradients."""
        return self._optimizer is not None and self._optimizer() is not None

    def __getstate__(self) -> dict[str, Any]:
        """A copy is nobody's: the optimizer of the original would not update it."""
        self.wait()
        return self.__dict__ | {"pending": [], "_optimizer": None, "_pinned": None}

    def reset(self) -> None:
        """Every row at its start. Memory that is zero already is only read: pages that nobody wrote to take no room."""
        self.wait()
        if self.weight.device.type == "meta" or (not is_untouched(self.weight) and self.weight.any()):
            nn.init.zeros_(self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedRows:
        """What ``to``, ``cuda``, ``half`` … do to a module; rows on the host neither move nor change their type."""
        if self.on_host:
            return self
        if is_untouched(self.weight):
            with torch.no_grad():
                like = fn(self.weight[:0])
            if like.device.type == "cuda":  # zeros need not travel
                self.weight.data = like.new_zeros(self.weight.shape)
                return self
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, misc]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.wait()
        if self.exchange is None:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Of whole rows the share of this process; what has none leaves them as they are, where they are shared out."""
        self.wait()
        if self.exchange is None:
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        found = state_dict.get(f"{prefix}weight")
        if found is None:
            return
        width = self.weight.shape[1]
        if tuple(found.shape) == (self.num_rows, width):
            found = self.shards.own(found)
        if found.shape != self.weight.shape:
            raise ValueError(f"found {prefix}weight {tuple(found.shape)}; expected {(self.num_rows, width)}")
        with torch.no_grad():
            self.weight.copy_(found)

    def forward(self, row_ids: np.ndarray, row_chains: Tensor) -> Tensor:
        """Sums over the suffix chains, ``[M, D]``.

        Args:
            row_ids: int64 ``[R_batch]`` distinct ranks, on the host, so that rows can be read there without waiting
                for the accelerator.
            row_chains: int64 ``[M, N - 1]``, 1 + index into ``row_ids``; 0 adds nothing.
        """
        trains = self.weight.requires_grad and torch.is_grad_enabled()
        route = None if self.exchange is None else self.exchange.route(row_ids)
        if route is not None:
            rows = route.fetch(self._own(route.wanted, row_chains.device))
        else:
            rows = self._own(row_ids, row_chains.device, trains and not self.are_collected)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if trains and self.are_collected:
            rows.requires_grad_().register_post_accumulate_grad_hook(partial(self._collect, row_ids, route))
        elif trains and self.exchange is not None:
            raise SconeError(
                f"found learned rows that are shared out over {self.shards.world_size} processes, without a row "
                "optimizer; expected one, since each process has gradients for other rows; make a scone.RowOptimizer, "
                "or freeze the rows"
            )
        # row 0 of the bag is the zero vector that padding points to
        table = torch.cat([rows.new_zeros(1, rows.shape[1]), rows])
        if rows.is_leaf:  # its place in the graph is all that is wanted of it; `table` goes before the backward pass
            rows.untyped_storage().resize_(0)
        return nn.functional.embedding_bag(row_chains, table, mode="sum", padding_idx=0)

    def _own(self, indices: np.ndarray, device: torch.device, with_history: bool = False) -> Tensor:
        """Copies of rows of ``weight`` on ``device``."""
        ids = torch.from_numpy(indices)
        if with_history:
            return self.weight.index_select(0, to_device(ids, self.weight.device)).to(device)
        weight = self.weight.detach()
        if not self.are_pinned_for(device):
            self.wait()
            return weight.index_select(0, to_device(ids, weight.device)).to(device)
        from scone.kernels.rows_triton import gather_rows_triton

        row_type, width = {torch.float32: "fp32", torch.bfloat16: "bf16"}[weight.dtype], weight.shape[1]
        return gather_rows_triton(weight.view(torch.uint8), to_device(ids, device), row_type, width, 0, weight.dtype)

    def are_pinned_for(self, device: torch.device) -> bool:
        """Whether kernels on ``device`` read and write rows that stay on the host where they lie, so that no step waits
        for the host. They are pinned when they are first asked for, which brings all their memory in.
        """
        if not self.on_host or device.type != "cuda" or not triton_is_installed():
            return False
        weight = self.weight.detach()
        if weight.dtype not in (torch.float32, torch.bfloat16) or not weight.nbytes:
            return False
        address = weight.data_ptr()
        if self._pinned is None or self._pinned[0] != address:
            keep_from_children(weight)
            weight.view(-1)[:: mmap.PAGESIZE // weight.element_size()].mul_(1)  # by all threads; pinning would by one
            self._pinned = (address, pin(self.weight, address, weight.nbytes, device))
            if self._pinned[1] is None:
                size = human_bytes(weight.nbytes)
                logger.warning("this system does not pin the %s of learned rows: every step waits for the host", size)
        return self._pinned[1] is not None

    def wait(self) -> None:
        """Until kernels are through that write to rows on the host, which then may be read or written there."""
        if self._pinned is not None and self._pinned[1] is not None:
            torch.cuda.synchronize()

    def _collect(self, row_ids: np.ndarray, route: Route | None, rows: Tensor) -> None:
        """Keep what a backward pass found for its copies of rows. A pass without one leaves nothing behind."""
        if len(self.pending) >= MOST_PASSES_PER_STEP:
            raise RuntimeError(
                f"found the learned rows' gradients of {len(self.pending):,} backward passes and no step; expected a "
                "step of their row optimizer; call its step() and zero_grad() wherever the other optimizer's are "
                "called, or delete it, and the rows are trained by any optimizer of model.parameters()"
            )
        assert rows.grad is not None, "called when a gradient was accumulated"
        self.pending.append(Pass(row_ids, rows.grad, route))
        if route is not None:
            _ = route.sums  # now, while an accelerator is still at the backward pass
        rows.grad = None  # a graph that is kept may be gone through again


_MAPPINGS = Path("/proc/self/smaps")


def untouched_zeros(num_rows: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros ``[R, D]``; on the host, memory that the system provides page by page as it is written to.

    Huge pages are declined: rows are touched here and there, and each would bring two megabytes of zeros along.
    """
    if device.type != "cpu" or not num_rows or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(num_rows, width, device=device, dtype=dtype)
    # not reserved: before rows are shared out there may be more than this machine has room for
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_NO_RESERVE if sys.platform == "linux" else 0)
    memory = mmap.mmap(-1, dtype.itemsize * num_rows * width, flags=flags)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(num_rows, width)


def keep_from_children(weight: Tensor) -> None:
    """Processes that are forked get none of this memory: of pinned pages each would be given a copy at once."""
    if sys.platform == "linux":
        first = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (weight.data_ptr() + weight.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(max(size, 0)), mmap.MADV_DONTFORK)


def is_untouched(weight: Tensor) -> bool:
    """Whether the system has provided none of the memory of ``weight`` yet, so that all of it is zero: known without
    reading it, which takes seconds for tens of gigabytes. False where that cannot be told, and for a mapped file.
    """
    if weight.device.type != "cpu" or weight.nbytes < 1 << 20 or not _MAPPINGS.exists():
        return False
    first, last, inside, known = weight.data_ptr(), weight.data_ptr() + weight.nbytes, False, False
    for line in _MAPPINGS.read_text(encoding="ascii", errors="replace").splitlines():
        name, *values = line.split()
        if bounds := re.fullmatch(r"([0-9a-f]+)-([0-9a-f]+)", name):
            of_no_file = values[3] == "0"  # inode; in a file's pages, a loaded model's say, lie its values
            inside = of_no_file and int(bounds[1], 16) <= first and last <= int(bounds[2], 16)
        elif inside and name in ("Anonymous:", "Swap:"):  # pages that were written to
            known = name == "Anonymous:" or known
            if int(values[0]):
                return False
    return known
