"""The lookup as an operator that PyTorch's compiler knows: tokens in, rows of the embedding table in place of vectors.

A graph holds the operator whole, wherever it runs: on an accelerator that finds f-grams and reads the rows itself, or
on the host, to which the tokens of a batch and of its cache come down. It finds vocabulary and table by a number, which
the compiler takes for a constant.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from scone.kernels.common import GPUReadableRows, to_device, triton_is_installed
from scone.kernels.longest_match import FIRST_BIT
from scone.models.token_history import TokenHistory, check_count, tensors_of
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.matcher import Matcher

if TYPE_CHECKING:
    from scone.kernels.table_lookup_triton import DeviceLookup

LARGEST_SHARE = 0.02
"""Of an accelerator's memory that the index may take (about 15 bytes an f-gram): beyond it, the host matches."""


class RowSource(Protocol):
    """What the model needs of an embedding table: any placement, any row type. ``device``: where it gives its rows."""

    num_rows: int
    width: int
    device: torch.device

    def rows(self, ranks: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows ``[n, D]`` for int64 ranks ``[n]`` on the host."""
        ...

    def gpu_rows(self, device: torch.device) -> GPUReadableRows | None:
        """The rows, where kernels on ``device`` read them by themselves; None where the host has to."""
        ...


class TableLookup(nn.Module):
    """The serving layer: a matched position reads one precomputed row, any other keeps its token's own embedding.

    Looks tokens up in ``table``, by the f-grams of ``matcher``. Attributes: ``handle``, by which the operator finds it
    while it lives; ``device``, the table's; ``on_device``, what looks up there by itself, None where the host has to.
    """

    def __init__(self, table: RowSource, matcher: Matcher) -> None:
        super().__init__()
        self.table, self.matcher = table, matcher
        vocabulary, device = matcher.vocabulary, table.device
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        # now, since within a compiled call its memory would belong to the call
        rows = table.gpu_rows(device)
        self.on_device: DeviceLookup | None = None
        if rows is not None and fits_on(device, vocabulary):
            from scone.kernels.table_lookup_triton import DeviceLookup

            self.on_device = DeviceLookup(vocabulary.index, vocabulary.vocab_size, vocabulary.longest, rows, device)
        self.is_by_device = self.on_device is not None  # what a compiled call guards on, as on the handle
        self.handle = next(_HANDLES)
        _LOOKUPS[self.handle] = self
        self._num_positions = self._num_rows = 0

    def forward(self, vectors: Tensor, tokens: Tensor, history: TokenHistory | None) -> Tensor:
        """Token embeddings ``[B, T, D]`` of ``tokens`` int64 ``[B, T]``, as `marked` writes them → input vectors."""
        by = BY_DEVICE if self.is_by_device else BY_HOST
        output, _ = by(vectors, tokens, *tensors_of(history), self.handle)
        return output  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> TableLookup:
        """A copy looks up by itself: this one holds compiled kernels, which cannot be copied."""
        return TableLookup(copy.deepcopy(self.table, memo), self.matcher)

    def __reduce__(self) -> tuple[Any, ...]:
        """What is unpickled has a handle of its own: in another process this one's may be another lookup's."""
        return TableLookup, (self.table, self.matcher)

    def look_up(self, vectors: Tensor, tokens: Tensor, *history: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `table_lookup`."""
        if self.on_device is not None and vectors.device == self.device:
            return self.on_device(vectors, tokens, *history[:2])
        vocabulary = self.matcher.vocabulary
        nodes = looked_up(find_with(self.matcher), tokens, vocabulary.max_n - 1, *history)
        output = vectors.clone(memory_format=torch.contiguous_format)
        self.put_rows(nodes.reshape(-1), output.view(-1, vectors.shape[-1]))
        found = torch.from_numpy(nodes >= vocabulary.vocab_size)
        return output, to_device(found, vectors.device)

    def put_rows(self, nodes: np.ndarray, output: Tensor) -> None:
        """Put the rows of those of ``nodes`` int64 ``[P]`` that are f-grams into their places of ``output`` [P, D]."""
        ranks = torch.from_numpy(nodes) - self.matcher.vocabulary.vocab_size
        positions = (ranks >= 0).nonzero().squeeze(1)
        if len(positions):
            rows = self.table.rows(ranks[positions], output.dtype).to(output.device)
            output.index_copy_(0, to_device(positions, output.device), rows)
        self._num_positions += len(ranks)
        self._num_rows += len(positions)

    def reads(self) -> list[Tensor]:
        """Positions looked up so far, padding too, and rows read: int64 ``[2]``, in parts that are to be added up.

        The first part is the host's, the other (where there is one) an accelerator's, which is not waited for.
        """
        counts = [torch.tensor([self._num_positions, self._num_rows])]
        return counts if self.on_device is None else [*counts, self.on_device.counts.clone()]


def fits_on(device: torch.device, vocabulary: FGramVocabulary) -> bool:
    """Whether the index can and may lie on ``device``: a CUDA device with Triton, and memory to spare."""
    if device.type != "cuda" or not triton_is_installed() or vocabulary.keys.dtype != np.uint32:
        return False
    size = vocabulary.keys.nbytes + vocabulary.index.slots.nbytes
    return size <= LARGEST_SHARE * torch.cuda.get_device_properties(device).total_memory


_LOOKUPS: weakref.WeakValueDictionary[int, TableLookup] = weakref.WeakValueDictionary()
_HANDLES = itertools.count()


def table_lookup(
    vectors: Tensor,
    tokens: Tensor,
    past: Tensor | None,
    places: Tensor | None,
    count: Tensor | None,
    handle: int,
) -> tuple[Tensor, Tensor]:
    """Vectors with the rows of the f-grams that end at positions in place of their own, and which these are.

    Args:
        vectors: ``[B, T, D]``, the token embeddings, which get the gradient of the positions that keep them.
        tokens: int64 ``[B, T]``, as `token_history.marked` writes them.
        past, places, count: see `looked_up`.
        handle: of a `TableLookup`.

    Returns:
        ``[B, T, D]`` and bool ``[B, T]``.
    """
    return _LOOKUPS[handle].look_up(vectors, tokens, past, places, count)


def _fake(vectors: Tensor, tokens: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    output = torch.empty_like(vectors, memory_format=torch.contiguous_format)
    return output, tokens.new_empty(tokens.shape, dtype=torch.bool)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (found,) = ctx.saved_tensors
    return gradient.masked_fill(found.unsqueeze(-1), 0), None, None, None, None, None


def _operator(name: str, tags: tuple[torch.Tag, ...]) -> Any:
    operator = torch.library.custom_op(f"scone::{name}", table_lookup, mutates_args=(), tags=tags)
    operator.register_fake(_fake)
    operator.register_autograd(_differentiate, setup_context=_keep_for_backward)
    return operator


BY_DEVICE = _operator("table_lookup", ())
BY_HOST = _operator("table_lookup_by_host", (torch.Tag.cudagraph_unsafe,))
"""The same where the host looks up: it reads the tokens, which a CUDA graph cannot wait for, so PyTorch cuts there."""


def find_with(matcher: Matcher) -> Find:
    """The nodes of the longest f-grams, for `looked_up`."""

    def find(tokens: np.ndarray, valid: np.ndarray, starts: np.ndarray) -> np.ndarray:
        return matcher.match(tokens, None if valid.all() else valid, starts=starts if starts.any() else None)

    return find


Find = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Takes tokens int64 ``[B, L]``, which are no padding, and which begin an example, both bool; gives ``[B, L, …]``."""


def looked_up(
    find: Find,
    tokens: Tensor,
    context: int,
    past: Tensor | None = None,
    places: Tensor | None = None,
    count: Tensor | None = None,
) -> np.ndarray:
    """What ``find`` says of new positions, ``[B, T, …]``, when it sees at most ``context`` tokens before them.

    Args:
        tokens: int64 ``[B, T]``, as `token_history.marked` writes them.
        past: int64 ``[B, P]``, the tokens before those, likewise.
        places, count: int64 ``[]``, of a static history (whose ``past`` has unused places): positions that the cache
            holds, and how many of them came with tokens.

    Raises ValueError for a static cache without the tokens of all its positions.
    """
    new = tokens.shape[1]
    if past is None:
        return _answers(find, tokens.cpu().numpy(), np.zeros((len(tokens), 0), np.int64), context)
    if places is None or count is None:
        length = past.shape[1]
        window = torch.cat([past[:, max(length - context, 0) :], tokens], dim=1).cpu().numpy()
    else:
        # one transfer from an accelerator: the two counts, the last tokens, the new ones
        at = torch.arange(-context, 0, device=tokens.device) + places
        counts = torch.stack([places, count]).expand(len(tokens), 2)
        fetched = torch.cat([counts, past[:, at.clamp(min=0)], tokens], dim=1).cpu().numpy()
        length, known = (int(fetched[0, 0]), int(fetched[0, 1])) if len(fetched) else (0, 0)
        check_count(length, known)
        window = fetched[:, 2 + max(context - length, 0) :]
    last, fresh = np.split(window, [window.shape[1] - new], axis=1)
    if length > context and (last < 0).any():  # further back there may be tokens that padding kept away
        last = past[:, :length].cpu().numpy()
    return _answers(find, fresh, last, context)


def _answers(find: Find, tokens: np.ndarray, before: np.ndarray, context: int) -> np.ndarray:
    """As `looked_up`, of tokens ``[B, T]`` and all that may matter of those ``before`` them."""
    if (before < 0).any():
        before = _padding_first(before)[0]
    before = before[:, max(before.shape[1] - context, 0) :]
    whole = np.concatenate([before, tokens], axis=1)
    if (whole >= 0).all():
        return find(whole & (FIRST_BIT - 1), whole >= 0, whole >= FIRST_BIT)[:, before.shape[1] :]
    whole, order = _padding_first(whole)
    valid = whole >= 0
    found = find(np.where(valid, whole, ~whole) & (FIRST_BIT - 1), valid, whole >= FIRST_BIT)
    in_place = np.empty_like(found)
    in_place[np.arange(len(order))[:, None], order] = found
    return in_place[:, before.shape[1] :]


def _padding_first(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each sequence of ``tokens`` [B, L] with its padding moved to the front, and the columns that they came from."""
    order = np.argsort(tokens >= 0, axis=1, kind="stable")
    return np.take_along_axis(tokens, order, axis=1), order
