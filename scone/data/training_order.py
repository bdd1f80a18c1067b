"""The order in which a run reads its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class TrainingOrder(Sampler[int]):
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
        self.steps_done = steps_done
        blocks_a_round = batch_size * processes
        rounds = -(-num_blocks // blocks_a_round)
        self._length = num_blocks if processes == 1 else rounds * blocks_a_round
        self.steps_per_epoch = -(-rounds // accumulation)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        epoch = self.steps_done() // self.steps_per_epoch
        order = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
        for number in range(self._length):
            yield order[number % self.num_blocks]
