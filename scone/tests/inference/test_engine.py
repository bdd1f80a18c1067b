"""Generating text: batches equal single prompts, and what cannot be continued is refused in one line."""

from __future__ import annotations

import copy
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from scone.inference.embedding_table import EmbeddingTable
from scone.inference.engine import GenerationOptions, SconeInferenceEngine
from scone.inference.loading import LoadedModel, choose_device, load_model
from scone.inference.precompute import precompute_table
from scone.inference.streaming import GeneratedSequence
from scone.models.language_model import SconeForCausalLM
from scone.tests import tiny
from scone.tests.kernels import reference
from scone.tokenization.tokenizers import train_tokenizer

WORDS = "<|endoftext|> the a cat dog sat ran on under mat hill and then it slept . ,".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.word_tokenizer(WORDS, ".", eos_token="<|endoftext|>")


def tiny_model(positions: int = 64) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=2, n_positions=positions, bos_token_id=0, eos_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def engine(tokenizer):
    return SconeInferenceEngine(LoadedModel(tiny_model(), None, None), tokenizer)


PROMPTS = ["the cat", "a dog ran under the hill and then", "it"]


def test_a_text_that_begins_with_the_end_of_another_brings_no_warning(tokenizer, tmp_path, monkeypatch):
    """transformers takes that token for padding, and leaves masks of ones out."""
    model = tiny_model()
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    warned: list[str] = []
    monkeypatch.setattr("transformers.modeling_utils.logger.warning_once", lambda text, *_: warned.append(text))
    engine = SconeInferenceEngine.from_pretrained(tmp_path, device="cpu")
    engine.run([engine.sequence([0, 3], GenerationOptions(max_new_tokens=3))], GenerationOptions())
    tokens = torch.tensor([[0, 3, 4]])
    engine.model(input_ids=tokens, labels=tokens)
    assert warned == []


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("positions", [64, 20])
def test_batched_generation_equals_one_prompt_at_a_time(tokenizer, num_beams, positions):
    """With 20 positions the padded batch would not fit, though every prompt does."""
    engine = SconeInferenceEngine(LoadedModel(tiny_model(positions), None, None), tokenizer)
    options = GenerationOptions(max_length=20, num_beams=num_beams)
    together, stats = engine.generate(PROMPTS, options)
    for generation in together:
        alone, _ = engine.generate(generation.prompt, options)
        if num_beams == 1:
            assert alone == [generation]
        assert generation.texts[0].startswith(generation.prompt)
        assert generation.num_prompt_tokens < len(generation.token_ids[0]) <= 20
    assert stats.num_prompt_tokens == 2 + 8 + 1
    assert stats.num_new_tokens == sum(len(g.token_ids[0]) for g in together) - stats.num_prompt_tokens
    assert stats.model_bytes > 0
    assert "tokens/s" in str(stats)


def test_sampling_is_repeatable_and_leaves_the_global_generator_alone(engine):
    options = GenerationOptions(max_length=16, do_sample=True, temperature=0.7, top_p=0.9, num_return_sequences=3)
    state = torch.get_rng_state()
    first, _ = engine.generate("the cat", options)
    assert torch.equal(state, torch.get_rng_state())
    again, _ = engine.generate("the cat", options)
    other, _ = engine.generate("the cat", GenerationOptions(**{**vars(options), "seed": 7}))
    assert first == again != other
    assert len(first[0].texts) == 3


def test_lengths_hold_for_every_prompt_and_max_new_tokens_wins(engine):
    generations, _ = engine.generate(PROMPTS, GenerationOptions(max_length=30, min_length=25))
    assert all(len(generation.token_ids[0]) >= 25 for generation in generations)
    generations, _ = engine.generate("the cat", GenerationOptions(max_length=3, max_new_tokens=5, min_length=7))
    assert len(generations[0].token_ids[0]) == 7


def test_padding_is_no_repetition(tokenizer):
    """Even where it is the token that the model would say next."""
    engine = SconeInferenceEngine(LoadedModel(tiny_model(), None, None), copy.deepcopy(tokenizer))
    options = GenerationOptions(max_length=20, repetition_penalty=10.0)
    first = engine.generate("it", options)[0][0].token_ids[0][1]
    engine.tokenizer.pad_token = WORDS[first]
    for generation in engine.generate(PROMPTS, options)[0]:
        assert engine.generate(generation.prompt, options)[0] == [generation]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "found no prompt"),
        ("", {}, "found an empty prompt"),
        ("  ", {}, "turns into no tokens"),
        ("the cat sat", {"max_length": 3}, "a prompt of 3 tokens with --max_length 3"),
        ("the cat sat", {"max_length": 65}, "the model has 64 positions"),
        ("the cat sat", {"max_new_tokens": 62}, "the model has 64 positions"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(engine, prompts, options, message):
    assert message in tiny.refusal(engine.generate, prompts, GenerationOptions(**options))


def test_tokens_outside_the_vocabulary_are_refused(tokenizer):
    config = GPT2Config(vocab_size=3, n_embd=8, n_layer=1, n_head=1, n_positions=32, bos_token_id=0, eos_token_id=0)
    engine = SconeInferenceEngine(LoadedModel(GPT2LMHeadModel(config).eval(), None, None), tokenizer)
    said = tiny.refusal(engine.generate, "the dog", GenerationOptions(max_length=10))
    assert "found token 4 in the prompt; the model's vocabulary has 3 tokens" in said


def test_what_is_not_a_model_is_refused(tmp_path):
    assert "found no file or folder" in tiny.refusal(load_model, tmp_path / "missing")
    assert "found no config.json" in tiny.refusal(load_model, tmp_path)
    for text, message in (("{broken", "as JSON"), ('{"model_type": "nothing"}', "cannot load a causal language model")):
        (tmp_path / "config.json").write_text(text)
        assert message in tiny.refusal(load_model, tmp_path)
    assert "found the file" in tiny.refusal(load_model, tmp_path / "config.json")
    assert "neither as a folder here nor in the hub's cache" in tiny.refusal(load_model, "no-such-model")
    tiny_model().save_pretrained(tmp_path / "plain")
    said = tiny.refusal(load_model, tmp_path / "plain", table_path=tmp_path / "embeddings.cache")
    assert "a model without f-grams" in said


def test_unknown_devices_are_refused():
    for device in ("warp", "cuda:99"):
        assert "use --device cpu" in tiny.refusal(choose_device, device)


def tiny_scone(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Path:
    """A saved SCONE model with f-gram model and learned rows, and its table; `seed` decides the rows."""
    vocabulary = reference.vocabulary_of(
        {(1, 3): 9, (3, 5): 8, (1, 3, 5): 7, (2, 4): 6}, vocab_size=len(WORDS), max_n=3, separator_ids=(0,)
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = SconeForCausalLM.from_trunk(tiny_model(), vocabulary, f_gram_model=sizes, learned_rows=4).eval()
    torch.manual_seed(seed)
    assert model.f_gram_embedding is not None
    with torch.no_grad():
        model.f_gram_embedding.rows.weight.normal_()
        model.f_gram_embedding.gain.fill_(0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    precompute_table(model, folder / "embeddings.cache", quiet=True)
    return folder


def test_table_of_another_model_is_refused(tmp_path, tokenizer):
    folder = tiny_scone(tmp_path / "this", tokenizer)
    other = tiny_scone(tmp_path / "other", tokenizer, seed=1)
    said = [
        tiny.refusal(load_model, folder, table) for table in (other / "embeddings.cache", tmp_path / "missing.cache")
    ]
    assert "the table of another model" in said[0]
    assert "cannot open the embedding table" in said[1]


@pytest.mark.parametrize("how", ["from_pretrained", "load_model"])
def test_a_table_of_other_f_grams_or_weights_is_refused_however_it_is_given(how, tmp_path):
    """As many f-grams of another corpus, and the same of a model that was trained on: each table fits by its shape."""
    for name, corpus, seed in (("ours", 0, 0), ("of other f-grams", 1, 0), ("of other weights", 0, 1)):
        counts = reference.count_n_grams([tiny.corpus(seed=corpus)], 3, [tiny.SEPARATOR])
        vocabulary = reference.vocabulary_of(
            counts, max_n=3, max_f_grams=100, vocab_size=tiny.VOCAB_SIZE, separator_ids=(tiny.SEPARATOR,)
        )
        model = SconeForCausalLM.from_trunk(tiny.trunk("qwen2"), vocabulary, f_gram_model=None, learned_rows=100)
        assert model.f_gram_embedding is not None
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.f_gram_embedding.rows.weight)
        model.save_pretrained(tmp_path / name)
        precompute_table(model, tmp_path / name / "embeddings.cache", quiet=True)

    def served(name: str) -> Any:
        path = tmp_path / name / "embeddings.cache"
        if how == "load_model":
            return load_model(tmp_path / "ours", path, device="cpu").model
        return SconeForCausalLM.from_pretrained(
            tmp_path / "ours", table=EmbeddingTable.open(path), dtype=torch.bfloat16
        )

    assert served("ours") is not None
    assert re.search("other f-grams|other vocabulary", tiny.refusal(served, "of other f-grams"))
    assert "the table of another model" in tiny.refusal(served, "of other weights")


def test_streamed_text_equals_generated_text(tmp_path, tokenizer):
    folder = tiny_scone(tmp_path, tokenizer)
    engine = SconeInferenceEngine.from_pretrained(folder, folder / "embeddings.cache", device="cpu")
    for options in (GenerationOptions(max_length=24), GenerationOptions(max_length=24, do_sample=True, seed=3)):
        for prompt in PROMPTS:
            pieces = list(engine.stream(prompt, options))
            assert len(pieces) > 1
            assert prompt + "".join(pieces) == engine.generate(prompt, options)[0][0].texts[0]


def test_streams_are_refused_before_they_start(engine):
    assert "found an empty prompt" in tiny.refusal(engine.stream, "")
    assert "found 2 beams" in tiny.refusal(engine.stream, "the cat", GenerationOptions(num_beams=2))


def test_a_stream_that_nobody_reads_on_ends(engine):
    pieces = engine.stream("the cat", GenerationOptions(max_length=60))
    next(pieces)
    pieces.close()  # waits for the thread that generates
    assert not [thread for thread in threading.enumerate() if thread.name == "scone-stream"]


def test_rows_end_at_their_own_limits_and_stop_strings(engine):
    options = GenerationOptions(max_length=40)
    whole = [engine.generate(prompt, options)[0][0] for prompt in PROMPTS]
    rows = [engine.sequence(prompt, options) for prompt in PROMPTS]
    first_words = whole[1].texts[0][len(PROMPTS[1]) :].split()
    rows[0].max_new_tokens, rows[1].stop, rows[2].wants_text = 3, (f" {first_words[2]} ",), True
    rows[2].cancel()
    engine.run(rows, options)
    assert [row.finish_reason for row in rows] == ["length", "stop", "cancelled"]
    assert rows[0].prompt_ids + rows[0].token_ids == whole[0].token_ids[0][:5]
    assert rows[1].text.split() == first_words[: first_words.index(first_words[2])]
    assert len(rows[2].token_ids) == 1
    assert PROMPTS[2] + rows[2].text == engine.text_of(whole[2].token_ids[0][:2])


@settings(max_examples=50, deadline=None)
@given(
    text=st.text(st.characters(codec="utf-8"), max_size=30),
    seed=st.integers(0, 99),
    stop=st.text("ab\U0001f600é", max_size=2),
)
def test_pieces_of_text_are_the_text(byte_tokenizer, text, seed, stop):
    """Characters of several tokens included; nothing of a stop string or after it is passed on."""
    prompt, ids = byte_tokenizer("bé ").input_ids, byte_tokenizer(text).input_ids
    ids += np.random.default_rng(seed).integers(1, 200, 5).tolist()  # bytes that are no characters
    pieces: list[str] = []
    row = GeneratedSequence(prompt, len(ids), stop=(stop,) if stop else (), on_text=pieces.append)
    row.begin(byte_tokenizer)
    for token in ids:
        row.add(token, set(), 0.0)
    whole = byte_tokenizer.decode(prompt + ids)[len("bé ") :]
    assert "".join(pieces) == row.text == (whole.partition(stop)[0] if stop else whole)


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    return train_tokenizer(iter(["ab é ab \U0001f600 ab"] * 9), 280, tmp_path_factory.mktemp("tokenizer"))


def test_stats_count_what_was_read(tmp_path, tokenizer):
    folder = tiny_scone(tmp_path, tokenizer)
    engine = SconeInferenceEngine.from_pretrained(folder, folder / "embeddings.cache", device="cpu")
    assert engine.model.f_gram_embedding is None, "a served model holds no f-gram model"
    prompts = ["a cat sat on", "the cat sat"]  # one token of padding
    engine.generate(prompts, GenerationOptions(max_new_tokens=4))  # what an earlier call read is not this one's
    generations, stats = engine.generate(prompts, GenerationOptions(max_new_tokens=4))
    matches = sum(int((engine.model.match(torch.tensor(g.token_ids))[:, :-1] >= len(WORDS)).sum()) for g in generations)
    assert stats.reads == (4 + 3 + 2 * 3, matches)
    assert matches >= 2
    assert stats.num_new_tokens == 4 + 4
    assert stats.first_token_seconds is not None
    assert 0 < stats.first_token_seconds <= stats.seconds
    assert "table reads: " in str(stats)
    assert "an f-gram ended at" in str(stats)
