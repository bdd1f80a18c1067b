"""What comes before a captured decoding step where the host has to look up its input vectors."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from scone.models.cuda_graphs import CaptureError, Captures, capture, wait_for
from scone.models.token_history import StaticTokenHistory, hidden, known_past

if TYPE_CHECKING:
    from scone.models.embedded_trunk import EmbeddedTrunk
    from scone.models.language_model import SconeForCausalLM

WARM_UP_CALLS = 2
"""Ordinary calls before one is captured: they compile, and make what libraries make at their first use."""


class StepLookUp(Protocol):
    """The look-up of one kind of step, whose arguments always lie in the same memory."""

    def prepare(self) -> None:
        """Everything that cannot be captured, for the arguments that are there now."""
        ...

    def vectors(self) -> Tensor:
        """The rest, which can: input vectors ``[B, 1, D]``."""
        ...


class OrdinaryLookUp:
    """All of it is an ordinary call of the model's own."""

    def __init__(self, model: EmbeddedTrunk, inputs: Mapping[str, Any]) -> None:
        self._model, self._inputs = model, inputs
        self._vectors: Tensor | None = None

    def prepare(self) -> None:
        inputs = self._inputs
        cache, mask = inputs["past_key_values"], inputs.get("token_mask")
        vectors = self._model.input_vectors(inputs["input_ids"], mask, cache, inputs.get("trie"))
        if self._vectors is None:
            self._vectors = torch.empty_like(vectors)
        self._vectors.copy_(vectors)

    def vectors(self) -> Tensor:
        assert self._vectors is not None, "prepare comes first"
        return self._vectors


@runtime_checkable
class RawRows(Protocol):
    """What more of an embedding table lets the host write its rows to memory that stays where it is."""

    row_bytes: int

    def raw_rows_into(self, ranks: np.ndarray, out: np.ndarray, targets: np.ndarray) -> None:
        """Row ``ranks[i]`` as it is stored into ``out[targets[i]]``, uint8 ``[m, row_bytes]``."""
        ...

    def num_held_by(self, device: torch.device) -> int:
        """How many rows, from rank 0 on, need not come from the host."""
        ...

    def decoded(self, raw: Tensor, ranks: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ``[n, D]`` on the device of ``raw`` uint8 ``[n, row_bytes]`` and ``ranks`` int64 ``[n]``: its own where
        it holds them, else those of ``raw``. Anything where a rank is negative.
        """
        ...


class RowsByHost:
    """Tokens come down and rows go up through page-locked memory: one short graph fetches the tokens and those before
    them, the host matches and reads, and the step's own graph begins with the rows.
    """

    def __init__(self, model: SconeForCausalLM, table: RawRows, inputs: Mapping[str, Any]) -> None:
        """Raises ValueError for a cache without the history of its tokens."""
        assert model.vocabulary is not None
        self._model, self._table = model, table
        self._tokens: Tensor = inputs["input_ids"]
        self._mask: Tensor | None = inputs.get("token_mask")
        history = known_past(inputs["past_key_values"], may_wait=False)
        assert isinstance(history, StaticTokenHistory), "a step follows a prompt, in a static cache"
        self._history = history
        self._context, self._size = model.vocabulary.max_n - 1, model.vocabulary.vocab_size
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0
        device, num_rows = self._tokens.device, len(self._tokens)
        self._device, self._held = device, table.num_held_by(device)
        pinned = device.type == "cuda"
        self._asked = torch.empty(num_rows, 2 + self._context + 1, dtype=torch.int64, pin_memory=pinned)
        self._ranks = torch.full((num_rows,), -1, pin_memory=pinned)
        self._raw = torch.zeros(num_rows, table.row_bytes, dtype=torch.uint8, pin_memory=pinned)
        self._ranks_there, self._raw_there = self._ranks.to(device), self._raw.to(device)
        self._arrays = self._asked.numpy(), self._ranks.numpy(), self._raw.numpy()

    def prepare(self) -> None:
        self._calls += 1
        if self._graph is None and self._calls > WARM_UP_CALLS and not Captures.gave_up:
            with suppress(CaptureError):  # which was told of
                self._graph, _ = capture(self._device, self._ask)
        if self._graph is None:
            self._ask()
        else:
            self._graph.replay()
        wait_for(self._device)
        self._answer()

    def _ask(self) -> None:
        window = self._history.window(hidden(self._tokens, self._mask), self._context)
        self._asked.copy_(window, non_blocking=True)

    def _answer(self) -> None:
        asked, ranks, raw = self._arrays
        tokens, past = self._history.unpacked(asked, self._context)
        nodes = self._model.match_step(tokens, past, self._history)
        np.maximum(nodes[:, 0] - self._size, -1, out=ranks)
        wanted = np.flatnonzero(ranks >= self._held)
        if len(wanted):
            self._table.raw_rows_into(ranks[wanted], raw, wanted)
        layer = self._model.table_embedding
        assert layer is not None
        layer.count(len(ranks), int(np.count_nonzero(ranks >= 0)))

    def vectors(self) -> Tensor:
        self._ranks_there.copy_(self._ranks, non_blocking=True)
        self._raw_there.copy_(self._raw, non_blocking=True)
        vectors = self._model.get_input_embeddings()(self._tokens)
        rows = self._table.decoded(self._raw_there, self._ranks_there, vectors.dtype)
        return self._model.scaled(torch.where((self._ranks_there >= 0)[:, None, None], rows[:, None], vectors))
