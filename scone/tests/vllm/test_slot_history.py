"""What came before a chunk is found by KV slot: after shared blocks, forks, preemption and refused drafts alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.utils.errors import SconeError
from scone.vllm.lookups import SlotHistory

BLOCK = 4


class Cache:
    """A KV cache as a scheduler sees it: requests' texts, blocks handed out anywhere, full blocks shared by prefix."""

    def __init__(self, num_blocks: int, random: np.random.Generator) -> None:
        self.free = random.permutation(num_blocks).tolist()
        self.texts: list[list[int]] = []
        self.blocks: list[list[int]] = []
        self.computed: list[int] = []
        self.full: dict[tuple[int, ...], int] = {}

    def add(self, text: list[int]) -> None:
        """A request, whose longest known prefix of whole blocks is taken from others; its last token never is."""
        blocks = []
        while (end := BLOCK * (len(blocks) + 1)) < len(text) and tuple(text[:end]) in self.full:
            blocks.append(self.full[tuple(text[:end])])
        self.texts.append(text)
        self.computed.append(BLOCK * len(blocks))
        self.blocks.append(blocks)

    def step(self, history: SlotHistory, lengths: list[int], context: int) -> None:
        """Compute so many tokens more of each request, and compare what is said to be before them."""
        width = max([1, *(-(-len(text) // BLOCK) for text in self.texts)])
        table = np.zeros((len(self.texts), width), np.int32)
        tokens, slots, starts, before = [], [], [0], []
        for r, (text, length) in enumerate(zip(self.texts, lengths, strict=True)):
            new = text[self.computed[r] : self.computed[r] + length]
            for at in range(self.computed[r], self.computed[r] + len(new)):
                if at // BLOCK == len(self.blocks[r]):
                    self.blocks[r].append(self.free.pop())
                slots.append(self.blocks[r][at // BLOCK] * BLOCK + at % BLOCK)
            table[r, : len(self.blocks[r])] = self.blocks[r]
            known = text[max(self.computed[r] - context, 0) : self.computed[r]]
            before.append([-1] * (context - len(known)) + known)
            tokens += new
            starts.append(len(tokens))
        computed = np.array(self.computed, np.int64)
        new_tokens, their_slots = np.array(tokens, np.int32), np.array(slots, np.int64)
        step = history.exchange(new_tokens, their_slots, np.array(starts), computed, table, BLOCK)
        assert step.before.tolist() == before
        assert (step.tokens.tolist(), step.query_starts.tolist()) == (tokens, starts)
        for r, text in enumerate(self.texts):
            self.computed[r] = min(self.computed[r] + lengths[r], len(text))
            for number, block in enumerate(self.blocks[r][: self.computed[r] // BLOCK]):
                self.full.setdefault(tuple(text[: BLOCK * (number + 1)]), block)

    def drop(self, r: int) -> None:
        """A request ends, or is preempted: its blocks go to others, unless they are shared; what is in them stays."""
        kept = {block for number, blocks in enumerate(self.blocks) if number != r for block in blocks}
        gone = [block for block in self.blocks[r] if block not in kept]
        self.full = {prefix: block for prefix, block in self.full.items() if block not in gone}
        self.free = gone + self.free
        for part in (self.texts, self.blocks, self.computed):
            del part[r]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 4), st.data())
def test_the_tokens_before_any_chunk(seed: int, context: int, data: st.DataObject) -> None:
    random = np.random.default_rng(seed)
    cache, history = Cache(60, random), SlotHistory(context)
    beginning = random.integers(1, 9, 12).tolist()
    for _ in range(data.draw(st.integers(1, 12))):
        if len(cache.texts) < 4 and data.draw(st.booleans()):
            own = random.integers(1, 9, data.draw(st.integers(1, 14))).tolist()
            cache.add(beginning[: data.draw(st.integers(0, 12))] + own)
        if cache.texts and data.draw(st.booleans()):
            cache.drop(data.draw(st.integers(0, len(cache.texts) - 1)))
        if cache.texts and data.draw(st.booleans()):  # drafts were refused: other tokens come to the same slots
            r = data.draw(st.integers(0, len(cache.texts) - 1))
            back = min(data.draw(st.integers(1, 3)), cache.computed[r] % BLOCK)
            cache.computed[r] -= back
            cut = cache.computed[r]
            cache.texts[r][cut:] = random.integers(1, 9, len(cache.texts[r]) - cut).tolist()
        cache.step(history, [data.draw(st.integers(0, 7)) for _ in cache.texts], context)


def test_slots_of_another_kind_are_refused() -> None:
    arrays = (np.array([5], np.int32), np.array([9]), np.array([0, 1]), np.array([0]), np.array([[1]]))
    with pytest.raises(SconeError, match="KV slots that do not lie in blocks of 4"):
        SlotHistory(2).exchange(*arrays, 4)


def test_slots_that_somebody_else_filled_are_refused() -> None:
    arrays = (np.array([5], np.int32), np.array([6]), np.array([0, 1]), np.array([2]), np.array([[1]]))
    with pytest.raises(SconeError, match="KV slots that were filled without their tokens"):
        SlotHistory(2).exchange(*arrays, 4)
