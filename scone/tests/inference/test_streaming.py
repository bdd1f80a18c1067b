"""Streamed pieces together are what decoding all tokens at once adds to the prompt, whatever the tokenizer."""

from __future__ import annotations

import functools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from scone.inference.streaming import TextPieces, decode

WORDS = ["[UNK]", "it", "'", "s", "a", "dog", ".", "n", "t", "##n", "##s", ",", "re", "ve", "m", "!", "?", "##'", "don"]


@functools.cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerBase:
    if kind.startswith("WordPiece"):
        backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(cleanup="decoder" in kind)
    elif kind.startswith("bytes"):
        vocabulary = {
            piece: i for i, piece in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "\u0120a", "\u0120."])
        }
        backend = Tokenizer(models.BPE(vocabulary, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        pieces = ["<unk>", "\u2581", "\u2581a", "\u2581it", "'", "s", "\u2581.", ".", "n", "t", "\u2581'", "\u2581dog"]
        backend = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    unknown = "[UNK]" if kind.startswith("WordPiece") else None
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unknown, clean_up_tokenization_spaces=True)


@pytest.mark.parametrize("kind", ["WordPiece", "WordPiece decoder", "bytes", "pieces"])
def test_pieces_join_to_the_whole(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    size = len(tokenizer)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, size - 1), max_size=30), st.integers(1, 8))
    @example([1, 2, 3, 4, 5, 6], 1)
    @example([4, 7, 2, 8, 6], 1)
    @example([1, 2, 3], 2)
    def law(ids: list[int], prompt_length: int) -> None:
        prompt, whole = (decode(tokenizer, part) for part in (ids[:prompt_length], ids))
        if not whole.startswith(prompt):
            return  # a prompt that ends within a character
        pieces = TextPieces(tokenizer, ids[:prompt_length])
        parts = [pieces.add(token) for token in ids[prompt_length:]]
        parts.append(pieces.rest())
        assert "".join(parts) == whole[len(prompt) :]

    law()
