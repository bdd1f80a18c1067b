"""A corpus is tokenised once, completely, and to the same tokens, whatever happens on the way."""

from __future__ import annotations

import json
import os
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.data import prepare
from scone.data.prepare import CorpusEncoder, prepare_corpus, prepare_tokenizer
from scone.data.token_file import TokenFile
from scone.tokenization.tokenizers import document_separator_id, tokenizer_fingerprint
from scone.utils.errors import SconeError

TEXTS = [f"the cat {number} sat on the mat, number {number * number}.\n" * (number % 7) for number in range(300)]


def corpus(folder, texts=TEXTS, files=3):
    folder.mkdir(exist_ok=True)
    for index in range(files):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[index::files])
        (folder / f"part-{index}.jsonl").write_text(rows, encoding="utf-8")
    return str(folder)


def contents(files: dict[str, TokenFile]) -> dict[str, list[int]]:
    return {split: file.tokens.tolist() for split, file in files.items()}


def test_every_document_is_there_once_whatever_the_threads_batches_and_commits(tmp_path, tiny_tokenizer, monkeypatch):
    name = corpus(tmp_path / "c")
    files = prepare_corpus(name, tiny_tokenizer, cache_dir=tmp_path / "cache", num_threads=1)
    assert list(files) == ["train", "validation", "test"]
    found = []
    for file in files.values():
        assert file.tokens[-1] == document_separator_id(tiny_tokenizer)
        texts = tiny_tokenizer.decode(file.tokens.tolist()).split("<|endoftext|>")[:-1]
        assert file.num_documents == len(texts)
        found += texts
        assert file.metadata["tokenizer_fingerprint"] == tokenizer_fingerprint(tiny_tokenizer)
        assert [unit["name"] for unit in file.metadata["units"]] == ["part-0.jsonl", "part-1.jsonl", "part-2.jsonl"]
    assert sorted(found) == sorted(text for text in TEXTS if text)
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 100)
    monkeypatch.setattr(prepare, "COMMIT_CHARACTERS", 300)
    again = prepare_corpus(name, tiny_tokenizer, cache_dir=tmp_path / "again", num_threads=3)
    assert contents(again) == contents(files)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(max_size=50), min_size=1, max_size=20))
def test_tokens_of_any_text_decode_to_it(tmp_path_factory, tiny_tokenizer, texts):
    folder = tmp_path_factory.mktemp("law")
    name = corpus(folder / "c", texts, files=1)
    if not any(text.strip() for text in texts):
        with pytest.raises(SconeError, match="holds no text"):
            prepare_corpus(name, tiny_tokenizer, cache_dir=folder)
        return
    (file,) = prepare_corpus(name, tiny_tokenizer, splits=("all",), cache_dir=folder).values()
    expected = [[*tiny_tokenizer.encode(text, add_special_tokens=False), 0] for text in texts if text.strip()]
    assert file.tokens.tolist() == list(chain.from_iterable(expected))


def test_the_same_corpus_and_tokenizer_are_tokenised_once(tmp_path, tiny_tokenizer, monkeypatch):
    name = corpus(tmp_path / "c")
    first = prepare_corpus(name, tiny_tokenizer, cache_dir=tmp_path / "cache")
    (tmp_path / "moved").mkdir()
    (tmp_path / "c").rename(tmp_path / "moved" / "c")
    monkeypatch.setattr(prepare, "CorpusEncoder", None)  # would be needed to tokenise
    again = prepare_corpus(
        str(tmp_path / "moved" / "c"), tiny_tokenizer, cache_dir=tmp_path / "cache", splits=("test", "train")
    )
    assert list(again) == ["test", "train"]
    assert again["train"].folder.name == first["train"].folder.name
    assert contents(again) == {split: contents(first)[split] for split in again}


def test_a_changed_corpus_column_or_tokenizer_is_tokenised_anew(tmp_path, tiny_tokenizer):
    name = corpus(tmp_path / "c")
    first = prepare_corpus(name, tiny_tokenizer, cache_dir=tmp_path / "cache")["train"]
    path = tmp_path / "c" / "part-0.jsonl"
    times = path.stat()
    path.write_text(path.read_text().replace("cat", "dog"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same time, other text
    second = prepare_corpus(name, tiny_tokenizer, cache_dir=tmp_path / "cache")["train"]
    assert second.folder != first.folder
    assert "dog" in tiny_tokenizer.decode(second.tokens.tolist())
    other_tokenizer = prepare_tokenizer("train", name, vocab_size=270, cache_dir=tmp_path / "cache")
    assert prepare_corpus(name, other_tokenizer, cache_dir=tmp_path / "cache")["train"].folder != second.folder


def test_named_splits_are_prepared_one_by_one(tmp_path, tiny_tokenizer):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text(f"text of {split}")
    files = prepare_corpus(str(tmp_path), tiny_tokenizer, splits=("test",), cache_dir=tmp_path / ".cache")
    assert tiny_tokenizer.decode(files["test"].tokens.tolist()) == "text of test<|endoftext|>"
    assert len(list((tmp_path / ".cache" / "tokens").glob("[!.]*"))) == 1
    with pytest.raises(SconeError, match="gives no document to its 'validation' split"):
        prepare_corpus(str(tmp_path), tiny_tokenizer, splits=("validation",), cache_dir=tmp_path / ".cache")


def test_a_damaged_cache_is_refused_and_made_again_once_deleted(tmp_path, tiny_tokenizer):
    name = corpus(tmp_path / "c")
    first = prepare_corpus(name, tiny_tokenizer, cache_dir=tmp_path / "cache")
    before = contents(first)
    folder = first["train"].folder
    (folder / "tokens.npy").write_bytes(b"")
    with pytest.raises(SconeError, match="delete its folder to make it again"):
        prepare_corpus(name, tiny_tokenizer, cache_dir=tmp_path / "cache")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    assert contents(prepare_corpus(name, tiny_tokenizer, cache_dir=tmp_path / "cache")) == before


def test_what_cannot_be_read_or_written_is_named_and_leaves_no_corpus(tmp_path, tiny_tokenizer):
    name = corpus(tmp_path / "c")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SconeError, match=r"cannot write .*choose another folder by cache_dir"):
        prepare_corpus(name, tiny_tokenizer, cache_dir=tmp_path / "file")
    with (tmp_path / "c" / "part-2.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(SconeError, match=r"part-2\.jsonl, line 101 is not JSON"):
        prepare_corpus(name, tiny_tokenizer, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("corpus.json"))


def test_a_corpus_that_changes_while_it_is_read_is_refused(tmp_path, tiny_tokenizer, monkeypatch):
    name = corpus(tmp_path / "c")

    def append(self, texts):
        with (tmp_path / "c" / "part-2.jsonl").open("a") as file:
            file.write('{"text": "late"}\n')
        return original(self, texts)

    original = CorpusEncoder.encode
    monkeypatch.setattr(CorpusEncoder, "encode", append)
    with pytest.raises(SconeError, match="changed while it was read"):
        prepare_corpus(name, tiny_tokenizer, cache_dir=tmp_path / "cache")


def test_a_trained_tokenizer_is_made_once_per_corpus_and_size(tmp_path):
    name = corpus(tmp_path / "c")
    first = prepare_tokenizer("train", name, vocab_size=280, cache_dir=tmp_path)
    (folder,) = (tmp_path / "tokenizers").glob("[!.]*")
    time = (folder / "tokenizer.json").stat().st_mtime_ns
    again = prepare_tokenizer("train", name, vocab_size=280, cache_dir=tmp_path)
    assert (folder / "tokenizer.json").stat().st_mtime_ns == time
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(again)
    assert len(prepare_tokenizer("train", name, vocab_size=270, cache_dir=tmp_path)) == 270


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab \né", max_size=200))
def test_a_long_text_has_the_tokens_of_its_whole(tiny_tokenizer, text):
    """Where words end; inside of a word as long as a piece at least its text is whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "LONGEST_TEXT_CHARACTERS", 20)
        assert tiny_tokenizer.decode(CorpusEncoder(tiny_tokenizer).encode([text])[0]) == text
        text = "the cat sat on the mat\nand the dog, too. " * 50
        expected = tiny_tokenizer.encode(text, add_special_tokens=False)
        assert CorpusEncoder(tiny_tokenizer).encode([text, "end"])[0].tolist() == expected


def test_truncation_and_padding_of_a_tokenizer_do_not_reach_a_corpus(tiny_tokenizer):
    tiny_tokenizer.backend_tokenizer.enable_truncation(3)
    tiny_tokenizer.backend_tokenizer.enable_padding(length=20)
    try:
        tokens = CorpusEncoder(tiny_tokenizer).encode(["one two three four five six seven"])[0]
        assert tiny_tokenizer.decode(tokens) == "one two three four five six seven"
        assert 0 not in tokens
        assert tiny_tokenizer.backend_tokenizer.truncation is not None
    finally:
        tiny_tokenizer.backend_tokenizer.no_truncation()
        tiny_tokenizer.backend_tokenizer.no_padding()
