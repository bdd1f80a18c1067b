"""Training batches: blocks of a token file, their order, and what input vectors need, found in the loader's workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from scone.data.token_file import TokenFile
from scone.kernels.trie_batch import build_trie_batch
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.matcher import HashedGrams, Matcher
from scone.utils.errors import SconeError


class BlockDataset(Dataset):
    """Item i is ``{"input_ids": int64 [T]}``: tokens i·T … (i+1)·T−1 of the file, T = ``max_length``.

    ``drop_last`` leaves the last block out when it is short (training); otherwise it is kept if it has two tokens or
    more (evaluation: one token alone predicts nothing). ``max_tokens`` takes the file's beginning only (None: all of
    it). Blocks run on over document separators.
    Pickles as the file's path. Raises SconeError when the file does not fill one block.
    """

    def __init__(
        self, token_file: TokenFile, max_length: int, drop_last: bool = False, max_tokens: int | None = None
    ) -> None:
        if max_length < 2:
            raise SconeError(f"found max_length {max_length}; expected at least 2; give a larger --max_length")
        self.token_file = token_file
        self.max_length = max_length
        self._available = min(token_file.num_tokens, token_file.num_tokens if max_tokens is None else max_tokens)
        whole, rest = divmod(self._available, max_length)
        self._length = whole + (0 if drop_last or rest < 2 else 1)
        if not self._length:
            raise SconeError(
                f"{token_file.folder} has {self._available} tokens; expected at least one block of {max_length}; "
                "give more text or a smaller --max_length"
            )

    def __len__(self) -> int:
        return self._length

    @property
    def num_tokens(self) -> int:
        """Tokens in all blocks together."""
        return min(self._length * self.max_length, self._available)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -self._length <= index < self._length:
            raise IndexError(index)
        start = index % self._length * self.max_length
        block = self.token_file.tokens[start : min(start + self.max_length, self._available)]
        return {"input_ids": torch.from_numpy(block.astype(np.int64))}


class TrainingOrder(Sampler[int]):
    """All blocks, shuffled anew for every epoch.

    The order depends on seed and epoch alone (that of accelerate's seedable sampler: PyTorch's permutation with the
    seed ``seed + epoch``), so every process has the same one, whoever takes which batch of it. Several processes need
    whole rounds of batches: the last round of an epoch is filled up from the epoch's beginning.

    A run of 2.6 epochs reads 0.6 of one first and two whole ones then, each in an order of its own: learned rows start
    again with each, and those that are kept should have read all of the text once (`trainer.RowPasses`). What the
    trainer takes for an epoch then ends in the middle of one of these.

    Args:
        num_blocks: of the training split.
        seed: the run's.
        batch_size: blocks of a batch of one process.
        processes: how many take turns with the batches.
        accumulation: batches of a process that make one optimizer step; an epoch's last step may have fewer.
        steps_done: optimizer steps so far, read when an epoch begins: it says which one, after a resume too.
        max_steps: optimizer steps of the run; 0: of ``num_epochs``.
        num_epochs: of the run.
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
        max_steps: int = 0,
        num_epochs: float = 1.0,
    ) -> None:
        self.num_blocks = num_blocks
        self.seed = seed
        self.steps_done = steps_done
        blocks_a_round = batch_size * processes
        rounds = -(-num_blocks // blocks_a_round)
        self._length = num_blocks if processes == 1 else rounds * blocks_a_round
        self.steps_per_epoch = -(-rounds // accumulation)
        steps = max_steps if max_steps > 0 else math.ceil(num_epochs * self.steps_per_epoch)
        rest = steps % self.steps_per_epoch if steps > self.steps_per_epoch else 0
        self._first = rest * accumulation * blocks_a_round

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        epoch = self.steps_done() // self.steps_per_epoch
        if not self._first:
            yield from self._order(epoch)
            return
        order, whole = self._order(epoch), self._length - self._first
        yield from order[whole:] if epoch else order[: self._first]
        yield from self._order(epoch + 1)[:whole]

    def _order(self, epoch: int) -> list[int]:
        order = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
        return [order[number % self.num_blocks] for number in range(self._length)]


IGNORED_LABEL = -100


class Collator:
    """Stacks blocks of tokens into a batch; with a vocabulary, matches them and adds the batch's trie.

    Args:
        vocabulary: the f-grams, or None for a plain model.
        num_rows: how many f-grams have a learned row.
        pad_token_id: fills blocks that are shorter than the longest; any id does, padding is masked.
        hashed: the hashed n-grams of an over-encoding model, in place of a vocabulary.
    """

    def __init__(
        self,
        vocabulary: FGramVocabulary | None,
        num_rows: int = 0,
        pad_token_id: int = 0,
        *,
        hashed: HashedGrams | None = None,
    ) -> None:
        assert vocabulary is None or hashed is None, "a batch has f-grams or hashed n-grams"
        self.matcher = Matcher(vocabulary) if vocabulary is not None else None
        self.num_rows = num_rows
        self.pad_token_id = pad_token_id
        self.hashed = hashed

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Items with ``input_ids`` int64 [≤ T] → a batch.

        An item of several examples has ``position_ids`` too, which start again with each; so has the batch then.
        It has ``input_ids`` and ``labels`` [B, T], ``attention_mask`` [B, T] only where a block is short (without one,
        attention takes its fastest path), and ``trie`` (see ``TrieBatch``; of hashed n-grams what
        ``HashedGrams.lookups`` gives).
        """
        blocks = [np.asarray(item["input_ids"], dtype=np.int64) for item in items]
        longest = max(len(block) for block in blocks)
        tokens = np.full((len(blocks), longest), self.pad_token_id, np.int64)
        mask = np.zeros(tokens.shape, bool)
        for index, block in enumerate(blocks):
            tokens[index, : len(block)] = block
            mask[index, : len(block)] = True
        labels = np.where(mask, tokens, IGNORED_LABEL)
        labels[:, 0] = IGNORED_LABEL  # nothing predicts it; the trainer counts labels to normalise the loss
        batch: dict[str, Any] = {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}
        if not mask.all():
            batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        starts = None
        if any("position_ids" in item for item in items):
            positions = np.zeros_like(tokens)
            for index, item in enumerate(items):
                length = len(blocks[index])
                positions[index, :length] = item.get("position_ids", range(length))
            batch["position_ids"] = torch.from_numpy(positions)
            starts = np.diff(positions, axis=1, prepend=positions[:, :1] - 1) != 1
        if self.matcher is not None:
            # one thread: the workers already share out the cores, and a forked worker must not start a thread pool
            nodes = self.matcher.match(tokens, mask, num_threads=1, starts=starts)
            known = self.matcher.vocabulary
            sizes = (known.vocab_size, known.max_n, self.num_rows)
            batch["trie"] = build_trie_batch(nodes, known.keys, known.suffixes, *sizes).fields(torch.from_numpy)
        elif self.hashed is not None:
            batch["trie"] = self.hashed.lookups(self.hashed.rows(tokens, mask, starts), torch.from_numpy)
        return batch
