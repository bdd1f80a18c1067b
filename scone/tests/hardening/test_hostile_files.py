"""Vocabularies, tables, token files and half-done work that are damaged or forged: one line, or read safely."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scone.data.token_file import METADATA_NAME, TOKENS_NAME, TokenFile, TokenFileWriter, _metadata_checksum
from scone.inference import table_format
from scone.inference.embedding_table import EmbeddingTable
from scone.inference.table_check import verify_table
from scone.scripts.verify import verify
from scone.tests import tiny
from scone.tests.hardening.hostile import HOSTILE_VALUES, damaged, forged, refused_or_read
from scone.tests.inference.tables import write_table
from scone.tokenization import f_gram_file
from scone.tokenization.counting import count_f_grams
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.matcher import Matcher
from scone.utils.files import fingerprint_of

FUZZ = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def use_vocabulary(path: Path) -> None:
    """All that a program does with a vocabulary; every node that comes back exists."""
    vocabulary = FGramVocabulary.load(path)
    nodes = Matcher(vocabulary).match(np.random.default_rng(0).integers(0, min(24, vocabulary.vocab_size), 200))
    assert ((nodes >= 0) & (nodes < vocabulary.num_nodes)).all()
    vocabulary.depth_first_order()
    vocabulary.verify()


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny.vocabulary().save(tmp_path_factory.mktemp("vocabulary")).read_bytes()


@FUZZ
@given(data=st.data())
def test_vocabularies_of_any_bytes(tmp_path: Path, vocabulary: bytes, data: st.DataObject) -> None:
    path = tmp_path / "f_grams.safetensors"
    path.write_bytes(data.draw(damaged(vocabulary) | st.binary(max_size=100)))
    refused_or_read(lambda: use_vocabulary(path))
    refused_or_read(lambda: verify(path))


@settings(FUZZ, max_examples=200)
@given(data=st.data())
def test_vocabularies_with_a_forged_header_and_a_checksum_that_fits(
    tmp_path: Path, vocabulary: bytes, data: st.DataObject
) -> None:
    size = int.from_bytes(vocabulary[:8], "little")
    header = data.draw(forged(json.loads(vocabulary[8 : 8 + size])))
    if isinstance(header, dict) and isinstance(header.get("__metadata__"), dict):
        header["__metadata__"].pop("header_sha256", None)
        header["__metadata__"]["header_sha256"] = fingerprint_of(f_gram_file._encoded(header))
    text = f_gram_file._encoded(header)
    path = tmp_path / "f_grams.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + vocabulary[8 + size :])
    refused_or_read(lambda: use_vocabulary(path))
    refused_or_read(lambda: verify(path))


@FUZZ
@given(data=st.data())
def test_vocabularies_with_forged_data_and_a_checksum_that_fits(
    tmp_path: Path, vocabulary: bytes, data: st.DataObject
) -> None:
    """Whoever writes the file may write any numbers into it: they are read, or refused, but never out of bounds."""
    size = 8 + int.from_bytes(vocabulary[:8], "little")
    content = bytearray(vocabulary[size:])
    for _ in range(data.draw(st.integers(1, 20))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
    header = json.loads(vocabulary[8:size])
    header["__metadata__"]["data_sha256"] = hashlib.sha256(content).hexdigest()
    del header["__metadata__"]["header_sha256"]
    header["__metadata__"]["header_sha256"] = fingerprint_of(f_gram_file._encoded(header))
    text = f_gram_file._encoded(header)
    path = tmp_path / "f_grams.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    refused_or_read(lambda: use_vocabulary(path))


def use_table(path: Path) -> None:
    """Open it in every placement and read rows, the first and the last among them."""
    for placement in ("ram", "mmap", "direct"):
        with EmbeddingTable.open(path, placement) as table:
            if table.num_rows:
                table.rows(torch.tensor([0, table.num_rows - 1, 0]))
    verify_table(path)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("table") / "embeddings.cache"
    write_table(path, torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), "int8")
    return path.read_bytes()


@FUZZ
@given(data=st.data())
def test_tables_of_any_bytes(tmp_path: Path, table: bytes, data: st.DataObject) -> None:
    path = tmp_path / "embeddings.cache"
    path.write_bytes(data.draw(damaged(table) | st.binary(max_size=100)))
    refused_or_read(lambda: use_table(path))
    refused_or_read(lambda: verify(path))


@settings(FUZZ, max_examples=200)
@given(data=st.data())
def test_tables_with_a_forged_header_and_a_checksum_that_fits(
    tmp_path: Path, table: bytes, data: st.DataObject
) -> None:
    (size,) = struct.unpack("<Q", table[:8])
    header = data.draw(forged(json.loads(table[8 : 8 + size])))
    if isinstance(header, dict) and isinstance(header.get("__metadata__"), dict):
        header["__metadata__"].pop("header_checksum", None)
        header["__metadata__"]["header_checksum"] = table_format._metadata_checksum(header["__metadata__"])
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    size = -(-(8 + len(text)) // 4096) * 4096 - 8
    path = tmp_path / "embeddings.cache"
    path.write_bytes(struct.pack("<Q", size) + text.ljust(size) + table[4096:])
    refused_or_read(lambda: use_table(path))
    refused_or_read(lambda: verify(path))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    writer = TokenFileWriter(folder, vocab_size=100, separator_id=0)
    for document in range(5):
        writer.add_document(np.arange(document + 1, document + 20))
    writer.finish({"tokenizer_fingerprint": "abc"})
    return folder


def use_tokens(folder: Path) -> None:
    opened = TokenFile.open(folder, check_content=True)
    if opened.num_tokens:
        assert int(opened.tokens[-1]) >= 0
        count_f_grams(
            [opened.tokens], vocab_size=opened.vocab_size, max_n=2, separator_ids=[opened.separator_id], quiet=True
        )


@FUZZ
@given(data=st.data(), name=st.sampled_from([METADATA_NAME, TOKENS_NAME]))
def test_token_files_of_any_bytes(tmp_path: Path, tokens: Path, name: str, data: st.DataObject) -> None:
    for each in (METADATA_NAME, TOKENS_NAME):
        (tmp_path / each).write_bytes((tokens / each).read_bytes())
    (tmp_path / name).write_bytes(data.draw(damaged((tokens / name).read_bytes()) | st.binary(max_size=100)))
    refused_or_read(lambda: use_tokens(tmp_path))
    refused_or_read(lambda: verify(tmp_path))


@settings(FUZZ, max_examples=200)
@given(data=st.data())
def test_token_files_with_forged_facts_and_a_checksum_that_fits(
    tmp_path: Path, tokens: Path, data: st.DataObject
) -> None:
    facts = data.draw(forged(json.loads((tokens / METADATA_NAME).read_text())))
    if isinstance(facts, dict):
        facts["metadata_sha256"] = _metadata_checksum(facts)
    (tmp_path / METADATA_NAME).write_text(json.dumps(facts), encoding="utf-8")
    (tmp_path / TOKENS_NAME).write_bytes((tokens / TOKENS_NAME).read_bytes())
    refused_or_read(lambda: use_tokens(tmp_path))


def test_tokens_beyond_the_vocabulary_are_refused_wherever_they_would_index_memory(tmp_path: Path) -> None:
    writer = TokenFileWriter(tmp_path, vocab_size=60_000, separator_id=0)
    writer.add_document([59_999] * 50)
    writer.finish({"tokenizer_fingerprint": "abc"})
    facts = json.loads((tmp_path / METADATA_NAME).read_text()) | {"vocab_size": 10}
    facts["metadata_sha256"] = _metadata_checksum(facts)
    (tmp_path / METADATA_NAME).write_text(json.dumps(facts), encoding="utf-8")
    assert refused_or_read(lambda: use_tokens(tmp_path)) is None
    assert refused_or_read(lambda: Matcher(tiny.vocabulary()).match(np.full(50, 59_999))) is None


@pytest.mark.parametrize("value", HOSTILE_VALUES, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("place", ["corpus.json", "splits"])
def test_a_corpus_folder_cannot_lead_outside_itself(tmp_path: Path, tokens: Path, place: str, value: Any) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in (METADATA_NAME, TOKENS_NAME):
        (outside / name).write_bytes((tokens / name).read_bytes())
    folder = tmp_path / "corpus"
    folder.mkdir()
    for splits in ([value], value, ["../outside"], [str(outside)]):
        content = {"splits": splits} if place == "splits" else splits
        (folder / "corpus.json").write_text(json.dumps(content), encoding="utf-8")
        assert refused_or_read(lambda: verify(folder)) in (None, [])


CLAIMS = """
import resource, sys
from pathlib import Path
from scone.scripts.verify import verify
import scone.tokenization.f_gram_vocabulary, scone.inference.table_check, scone.data.token_file
from scone.utils.errors import SconeError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
for path in sys.argv[1:]:
    try:
        print("read", verify(Path(path)))
    except SconeError as error:
        print("refused", error)
"""


def test_sizes_in_headers_are_checked_before_anything_is_allocated(
    tmp_path: Path, vocabulary: bytes, table: bytes
) -> None:
    """With 64 MiB to spare, files that claim thousands of times that are refused in one line each."""
    paths = []
    for number, (name, content) in enumerate(_claims(vocabulary, table)):
        path = tmp_path / str(number) / name
        path.parent.mkdir()
        path.write_bytes(content)
        paths.append(str(path))
    done = subprocess.run(
        [sys.executable, "-c", CLAIMS, *paths], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["refused"] * len(paths), done.stdout


def _claims(vocabulary: bytes, table: bytes) -> list[tuple[str, bytes]]:
    huge = [(2**63).to_bytes(8, "little"), (2**34).to_bytes(8, "little"), (2**24).to_bytes(8, "little")]
    files = [(name, size + content[8:]) for size in huge for name, content in _both(vocabulary, table)]
    for old, new in (
        (b'"num_rows":"40"', b'"num_rows":"99999999999999999"'),
        (b'"width":"16"', b'"width":"10000000000"'),
    ):
        files.append(("embeddings.cache", table.replace(old, new)))
    size = int.from_bytes(vocabulary[:8], "little")
    header = json.loads(vocabulary[8 : 8 + size])
    header["counts"]["shape"], header["counts"]["data_offsets"][1] = [2**40], 2**43
    del header["__metadata__"]["header_sha256"]
    header["__metadata__"]["header_sha256"] = fingerprint_of(f_gram_file._encoded(header))
    text = f_gram_file._encoded(header)
    files.append(("f_grams.safetensors", len(text).to_bytes(8, "little") + text + vocabulary[8 + size :]))
    return files


def _both(vocabulary: bytes, table: bytes) -> list[tuple[str, bytes]]:
    return [("f_grams.safetensors", vocabulary), ("embeddings.cache", table)]
