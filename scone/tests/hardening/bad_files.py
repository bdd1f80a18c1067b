"""Every reader of the package with the bad inputs that it must survive; for the tests and benchmarks/hardening.py.

A ``Reader`` has a good input, a strategy for each kind of bad one, and what programs do with it. An input is the
files of a folder by name.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from scone.data.readers import read_documents
from scone.data.token_file import METADATA_NAME, TokenFile, TokenFileWriter, _metadata_checksum
from scone.inference import table_format
from scone.inference.embedding_table import EmbeddingTable
from scone.inference.precompute import verify_table
from scone.scripts.verify import verify
from scone.tests import tiny
from scone.tests.hardening.hostile import HOSTILE_VALUES, damaged, deep_json, forged
from scone.tests.inference.tables import write_table
from scone.tokenization import f_gram_file
from scone.tokenization.counting import count_f_grams
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.matcher import Matcher
from scone.utils.files import fingerprint_of

Files = dict[str, bytes]
BadInputs = Callable[[Files], st.SearchStrategy[Files]]

VOCABULARY = "f_grams.safetensors"
TABLE = "embeddings.cache"
ROWS = "".join(json.dumps({"text": f"line {n} ä", "id": n}) + "\n" for n in range(20)).encode()
TEXT_NAMES = ("a.jsonl", "a.txt", "a.tokens", "a.py", "a.jsonl.gz", "a.jsonl.xz", "a.txt.zst")


@dataclass(frozen=True)
class Reader:
    """``use(folder)`` raises SconeError or returns what it read. ``sealed``: checksums cover every byte, so whatever
    damage is let pass must have changed nothing.
    """

    name: str
    good: Callable[[Path], Files]
    kinds: dict[str, BadInputs]
    use: Callable[[Path], Any]
    sealed: bool = False


def files_below(folder: Path) -> Files:
    """Name and content of every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_files(folder: Path, files: Files) -> None:
    """The opposite."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def one_changed(change: Callable[[bytes], st.SearchStrategy[bytes]]) -> BadInputs:
    """One of the files is another."""
    return lambda good: st.sampled_from(sorted(good)).flatmap(
        lambda name: change(good[name]).map(lambda content: good | {name: content})
    )


def sealed(name: str, good: Callable[[Path], Files], use: Callable[[Path], Any], **forged: BadInputs) -> Reader:
    kinds = {"any bytes": one_changed(lambda _: st.binary(max_size=300)), "damaged": one_changed(damaged)}
    kinds |= {f"forged {part}": inputs for part, inputs in forged.items()}
    return Reader(name, good, kinds, use, sealed=True)


# ------------------------------------------------------------------ f-gram vocabularies


def good_vocabulary(folder: Path) -> Files:
    return {VOCABULARY: tiny.vocabulary().save(folder).read_bytes()}


def _vocabulary_of(header: Any, data: bytes) -> Files:
    """A file with this header, whose checksum is made to fit."""
    if isinstance(header, dict) and isinstance(header.get("__metadata__"), dict):
        header["__metadata__"].pop("header_sha256", None)
        header["__metadata__"]["header_sha256"] = fingerprint_of(f_gram_file._encoded(header))
    text = f_gram_file._encoded(header)
    return {VOCABULARY: len(text).to_bytes(8, "little") + text + data}


def _vocabulary_parts(good: Files) -> tuple[Any, bytes]:
    content = good[VOCABULARY]
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def vocabularies_with_a_forged_header(good: Files) -> st.SearchStrategy[Files]:
    header, data = _vocabulary_parts(good)
    return forged(header).map(lambda forgery: _vocabulary_of(forgery, data))


@st.composite
def vocabularies_with_forged_data(draw: st.DrawFn, good: Files) -> Files:
    """Whoever writes the file may write any numbers into it: they are read, or refused, but never out of bounds."""
    header, data = _vocabulary_parts(good)
    content = bytearray(data)
    for _ in range(draw(st.integers(1, 20))):
        at = draw(st.integers(0, len(content) - 1))
        content[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
    header["__metadata__"]["data_sha256"] = hashlib.sha256(content).hexdigest()
    return _vocabulary_of(header, bytes(content))


def use_vocabulary(folder: Path) -> str:
    """All that a program does with a vocabulary; every node that comes back exists."""
    vocabulary = FGramVocabulary.load(folder / VOCABULARY)
    nodes = Matcher(vocabulary).match(np.random.default_rng(0).integers(0, min(24, vocabulary.vocab_size), 200))
    assert ((nodes >= 0) & (nodes < vocabulary.num_nodes)).all()
    vocabulary.depth_first_order()
    vocabulary.verify()
    verify(folder / VOCABULARY)
    return vocabulary.fingerprint


# ------------------------------------------------------------------ tables


def good_table(folder: Path) -> Files:
    path = folder / TABLE
    write_table(path, torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), "int8")
    return {TABLE: path.read_bytes()}


def tables_with_a_forged_header(good: Files) -> st.SearchStrategy[Files]:
    content = good[TABLE]
    (size,) = struct.unpack("<Q", content[:8])

    def written(header: Any) -> Files:
        if isinstance(header, dict) and isinstance(header.get("__metadata__"), dict):
            header["__metadata__"].pop("header_checksum", None)
            header["__metadata__"]["header_checksum"] = table_format._metadata_checksum(header["__metadata__"])
        text = json.dumps(header, separators=(",", ":")).encode("ascii")
        length = -(-(8 + len(text)) // 4096) * 4096 - 8
        return {TABLE: struct.pack("<Q", length) + text.ljust(length) + content[4096:]}

    return forged(json.loads(content[8 : 8 + size])).map(written)


def use_table(folder: Path) -> str:
    """Open it in every placement, read rows, the first and the last among them, and check all; the rows' digest."""
    digest = hashlib.sha256()
    for placement in ("ram", "mmap", "direct"):
        with EmbeddingTable.open(folder / TABLE, placement) as table:
            if table.num_rows:
                digest.update(table.rows(torch.tensor([0, table.num_rows - 1, 0])).numpy().tobytes())
    verify_table(folder / TABLE)
    verify(folder / TABLE)
    return digest.hexdigest()


# ------------------------------------------------------------------ token files


def good_tokens(folder: Path) -> Files:
    writer = TokenFileWriter(folder, vocab_size=100, separator_id=0)
    for document in range(5):
        writer.add_document(np.arange(document + 1, document + 20))
    writer.finish({"tokenizer_fingerprint": "abc"})
    return files_below(folder)


def tokens_with_forged_facts(good: Files) -> st.SearchStrategy[Files]:
    def written(facts: Any) -> Files:
        if isinstance(facts, dict):
            facts["metadata_sha256"] = _metadata_checksum(facts)
        return good | {METADATA_NAME: json.dumps(facts).encode()}

    return forged(json.loads(good[METADATA_NAME])).map(written)


def use_tokens(folder: Path) -> str:
    """Open, check and count."""
    opened = TokenFile.open(folder, check_content=True)
    if opened.num_tokens:
        assert int(opened.tokens[-1]) >= 0
        count_f_grams(
            [opened.tokens], vocab_size=opened.vocab_size, max_n=2, separator_ids=[opened.separator_id], quiet=True
        )
    verify(folder)
    return hashlib.sha256(np.asarray(opened.tokens)).hexdigest()


# ------------------------------------------------------------------ texts


def compressed(content: bytes, name: str) -> bytes:
    """``content`` as the ending of ``name`` says."""
    import zstandard

    ways = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
    return ways.get(Path(name).suffix, bytes)(content)


def _texts(change: Callable[[bytes], st.SearchStrategy[bytes]]) -> BadInputs:
    def inputs(_: Files) -> st.SearchStrategy[Files]:
        return st.sampled_from(TEXT_NAMES).flatmap(
            lambda name: change(compressed(ROWS, name)).map(lambda content: {name: content})
        )

    return inputs


def forged_rows(_: Files) -> st.SearchStrategy[Files]:
    """JSON lines of hostile values, compressed or not."""
    values = st.sampled_from([*map(json.dumps, HOSTILE_VALUES), deep_json(5000), "1" * 5000, '"\\ud800"', "NaN", "[1]"])
    rows = st.lists(values.map(lambda value: f'{{"text": {value}}}'), min_size=1, max_size=4).map("\n".join)
    names = st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json"])
    return st.builds(lambda name, text: {name: compressed(text.encode(), name)}, names, rows)


def use_text(folder: Path) -> list[str]:
    (path,) = (path for path in folder.iterdir() if path.is_file())
    found = list(read_documents(path, "text"))
    assert all(isinstance(text, str) and text.encode("utf-8") is not None for text in found)
    return found


READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        sealed(
            "f-gram vocabulary",
            good_vocabulary,
            use_vocabulary,
            header=vocabularies_with_a_forged_header,
            data=vocabularies_with_forged_data,
        ),
        sealed("embedding table", good_table, use_table, header=tables_with_a_forged_header),
        sealed("token file", good_tokens, use_tokens, header=tokens_with_forged_facts),
        Reader(
            "text, JSON lines, compressed",
            lambda _: {"a.jsonl": ROWS},
            {"any bytes": _texts(lambda _: st.binary(max_size=200)), "damaged": _texts(damaged), "forged": forged_rows},
            use_text,
        ),
    )
}
