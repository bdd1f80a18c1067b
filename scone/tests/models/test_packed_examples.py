"""Packed examples, several in one sequence whose positions start again, are what they are apart.

For every kind of model, however it is told of them, with caches, and in training.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache, Trainer

from scone.data.dataset import Collator
from scone.models.embedded_trunk import EmbeddedTrunk
from scone.models.token_history import starts_of_examples
from scone.tests import tiny
from scone.tests.models import kinds

KINDS = ["live", "rows", "table", "over-encoding"]
lengths = st.lists(st.integers(1, 7), min_size=1, max_size=5)
seeds = st.integers(0, 10**6)


@cache
def model_of(kind: str, trunk: str = "llama") -> EmbeddedTrunk:
    return kinds.model_of(kind, trunk).double()


def examples_of(lengths: Sequence[int], seed: int) -> list[torch.Tensor]:
    return list(torch.from_numpy(tiny.corpus(sum(lengths), seed)).split(list(lengths)))


def packed(examples: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and positions int64 ``[1, T]``."""
    return torch.cat(list(examples))[None], torch.cat([torch.arange(len(one)) for one in examples])[None]


@torch.no_grad()
def apart(model: EmbeddedTrunk, examples: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logits ``[1, T, V]`` of each by itself."""
    return torch.cat([model(one[None], use_cache=False).logits for one in examples], dim=1)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trunk", ["gpt2", "llama"])
@settings(max_examples=12, deadline=None)
@given(lengths=lengths, seed=seeds)
def test_packed_examples_equal_examples_apart(kind, trunk, lengths, seed):
    """Logits, which attention of transformers keeps apart by the same positions."""
    model, examples = model_of(kind, trunk), examples_of(lengths, seed)
    tokens, positions = packed(examples)
    with torch.no_grad():
        same(model(tokens, position_ids=positions, use_cache=False).logits, apart(model, examples))


def test_packing_without_positions_is_another_text():
    """Or the laws here would say little."""
    for kind in KINDS:
        model, examples = model_of(kind), examples_of([5, 6, 4], 0)
        tokens, positions = packed(examples)
        difference = model.input_vectors(tokens) - model.input_vectors(tokens, position_ids=positions)
        assert (difference.abs().amax(-1)[0, [5, 11]] > 0.01).any(), kind
        assert (difference[0, :5] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(lengths=lengths, seed=seeds, how=st.sampled_from(["cu_seq_lens_q", "seq_idx"]))
def test_collators_may_say_it_in_other_words(kind, lengths, seed, how):
    model, examples = model_of(kind), examples_of(lengths, seed)
    tokens, positions = packed(examples)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    said = {"cu_seq_lens_q": bounds, "seq_idx": numbers}
    seen: dict[str, torch.Tensor] = {}
    handle = model.trunk.register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(tokens, **{how: said[how]}, use_cache=False)
    handle.remove()
    same(seen["inputs_embeds"], model.input_vectors(tokens, position_ids=positions))


def block_mask(lengths: Sequence[int], following: int = 0) -> torch.Tensor:
    """bool ``[1, 1, T, T]``: each example sees itself; ``following`` tokens belong to the last."""
    numbers = torch.repeat_interleave(
        torch.arange(len(lengths)), torch.tensor([*lengths[:-1], lengths[-1] + following])
    )
    return ((numbers[:, None] == numbers[None]) & torch.ones(len(numbers), len(numbers)).tril().bool())[None, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_static", [False, True])
@settings(max_examples=10, deadline=None)
@given(lengths=lengths, seed=seeds, cuts=st.lists(st.integers(1, 40), max_size=3), following=st.integers(1, 4))
def test_a_packed_prefill_goes_on_with_its_last_example(kind, is_static, lengths, seed, cuts, following):
    """In pieces cut anywhere, then token by token: what is cached of other examples is not seen."""
    model, examples = model_of(kind), examples_of([*lengths[:-1], lengths[-1] + following], seed)
    tokens, positions = packed(examples)
    length = tokens.shape[1]
    room = length if is_static else 0
    config = model.config.get_text_config()
    cache = StaticCache(config=config, max_cache_len=room) if is_static else DynamicCache(config=config)
    mask = block_mask(lengths, following)
    edges = sorted({0, *(cut for cut in cuts if cut < length - following), *range(length - following, length + 1)})
    found = []
    with torch.no_grad():
        for start, stop in itertools.pairwise(edges):
            visible = mask[:, :, start:stop, : length if is_static else stop]
            step = {"attention_mask": visible, "position_ids": positions[:, start:stop]}
            output = model(tokens[:, start:stop], cache=cache, use_cache=True, **step)
            found.append(output.logits)
    same(torch.cat(found, dim=1), apart(model, examples))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), first=st.sampled_from([0, 1, 9]))
def test_padding_is_no_start(data, batch, first):
    """One example a sequence, padding anywhere, whose positions say anything: as `generate` counts (over what is no
    padding) and as trunks count (all).
    """
    width = data.draw(st.integers(1, 8))
    mask = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=batch * width, max_size=batch * width)))
    mask = mask.view(batch, width)
    junk = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=batch * width, max_size=batch * width)))
    by_tokens = torch.where(mask.bool(), mask.cumsum(1) - 1 + first, junk.view(batch, width))
    for positions in (by_tokens, torch.arange(width).expand(batch, width), torch.arange(width)[None]):
        assert not (starts_of_examples(positions, mask, has_past=False) & mask.bool()).any()


@settings(max_examples=50, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS), seed=seeds)
def test_packed_and_padded(data, kind, seed):
    """Padding before, between, in and after the examples changes none of their vectors."""
    model = model_of(kind)
    examples = examples_of(data.draw(lengths), seed)
    tokens, positions = packed(examples)
    gaps = data.draw(st.lists(st.integers(0, 2), min_size=tokens.shape[1] + 1, max_size=tokens.shape[1] + 1))
    padded: dict[str, list[int]] = {"tokens": [], "positions": [], "mask": []}
    for gap, token, position in zip(gaps, [*tokens[0].tolist(), None], [*positions[0].tolist(), None], strict=True):
        for name, filling in (("tokens", 5), ("positions", 1), ("mask", 0)):
            padded[name] += [filling] * gap
        if token is not None:
            for name, value in (("tokens", token), ("positions", position), ("mask", 1)):
                padded[name].append(value)
    words, places, mask = (torch.tensor(values)[None] for values in padded.values())
    found = model.input_vectors(words, mask, position_ids=places)[mask.bool()]
    same(found, torch.cat([model.input_vectors(one[None])[0] for one in examples]))


@pytest.mark.parametrize("kind", ["live", "over-encoding"])
def test_a_batch_of_the_loader_may_be_packed(kind):
    model, examples = model_of(kind), examples_of([5, 3, 6], 1)
    tokens, positions = packed(examples)
    hashed = model.grams if kind == "over-encoding" else None
    items = [{"input_ids": tokens[0], "position_ids": positions[0]}, {"input_ids": tokens[0, :4]}]
    batch = Collator(
        None if hashed else model.vocabulary, num_rows=0 if hashed else model.config.learned_rows, hashed=hashed
    )(items)
    assert batch["position_ids"][1].tolist()[:4] == [0, 1, 2, 3]
    with torch.no_grad():
        found = model.input_vectors(batch["input_ids"], batch["attention_mask"], trie=batch["trie"])
        same(found[0], torch.cat([model.input_vectors(one[None])[0] for one in examples]))


@pytest.mark.parametrize("kind", ["live", "rows", "over-encoding"])
def test_a_trainer_that_flattens_its_batches_learns_what_one_that_pads_does(kind, tmp_path: Path):
    """The same loss of the same examples, through transformers' trainer and collator."""
    examples = examples_of([7, 4, 9, 6], 2)
    data: list[dict[str, Any]] = [{"input_ids": one.tolist(), "labels": one.tolist()} for one in examples]
    model = copy.deepcopy(model_of(kind)).train()
    options = tiny.training_arguments(
        tmp_path, per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=1
    )
    trainer = Trainer(model, options, train_dataset=data, data_collator=DataCollatorWithFlattening())
    found = trainer.evaluate(data)["eval_loss"]
    losses, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for one in examples:
            logits = model(one[None], use_cache=False).logits[0, :-1]
            losses += float(torch.nn.functional.cross_entropy(logits, one[1:], reduction="sum"))
            count += len(one) - 1
    assert abs(found - losses / count) < 1e-6
    trainer.train()
