"""The order in which a run reads its blocks, and the position of each in the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler


class BlockIndex(NamedTuple):
    """The position of a training block in the run. It travels with the block to the loader's workers."""

    block: int
    epoch: int
    step: int  # of the optimizer, from 0


class TrainingOrder(Sampler[BlockIndex]):
    """All blocks, shuffled anew for every epoch.

    The order depends on seed and epoch alone (that of accelerate's seedable sampler: PyTorch's permutation with the
    seed ``seed + epoch``), so every process has the same one, whoever takes which batch of it. Several processes need
    whole rounds of batches: the last round of an epoch is filled up from the epoch's beginning.

    Args:
        num_blocks: of the training split.
        seed: the run's.
        batch_size: blocks of a batch of one process.
        processes: how many take turns with the batches.
        accumulation: batches of a process that make one optimizer step; an epoch's last step may have fewer.
        steps_done: optimizer steps so far, read when an epoch begins: it says which one, after a resume too.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        seed: int,
        batch_size: int,
        processes: int = 1,
        accumulation: int = 1,
        steps_done: Callable[[], int] = lambda: 0,
    ) -> None:
        self.num_blocks = num_blocks
        self.seed = seed
        self.accumulation = accumulation
        self.steps_done = steps_done
        self.round = batch_size * processes
        rounds = -(-num_blocks // self.round)
        self._length = num_blocks if processes == 1 else rounds * self.round
        self.steps_per_epoch = -(-rounds // accumulation)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[BlockIndex]:
        epoch = self.steps_done() // self.steps_per_epoch
        order = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
        for number in range(self._length):
            step = epoch * self.steps_per_epoch + number // self.round // self.accumulation
            yield BlockIndex(order[number % self.num_blocks], epoch, step)
