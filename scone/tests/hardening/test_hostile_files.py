"""Every reader of files with bad inputs of every kind: one line, or read safely, and the files stay as they were."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings

from scone.data.token_file import METADATA_NAME, TokenFileWriter, _metadata_checksum
from scone.scripts.verify import verify
from scone.tests.hardening.bad_files import (
    READERS,
    TABLE,
    VOCABULARY,
    good_table,
    good_tokens,
    good_vocabulary,
    use_tokens,
)
from scone.tests.hardening.bad_inputs import READ, REFUSED, judge_files
from scone.tokenization import f_gram_file
from scone.utils.errors import SconeError
from scone.utils.files import fingerprint_of

KINDS = [(reader, kind) for reader in READERS for kind in READERS[reader].kinds]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_bad_inputs_are_refused_or_read(tmp_path, name, kind):
    reader = READERS[name]
    (tmp_path / "good").mkdir()
    good = reader.good(tmp_path / "good")
    judge = judge_files(reader, kind, good, tmp_path / "input")

    examples = 80 if kind.startswith("forged") else 40

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(reader.kinds[kind](good))
    def law(files):
        assert judge(files) in (READ, REFUSED)

    law()


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return good_vocabulary(tmp_path_factory.mktemp("vocabulary"))[VOCABULARY]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return good_table(tmp_path_factory.mktemp("table"))[TABLE]


def test_tokens_beyond_the_vocabulary_are_refused_wherever_they_would_index_memory(tmp_path):
    """The file's checksums fit; its vocabulary is smaller than its tokens."""
    writer = TokenFileWriter(tmp_path, vocab_size=60_000, separator_id=0)
    writer.add_document([59_999] * 50)
    writer.finish({"tokenizer_fingerprint": "abc"})
    facts = json.loads((tmp_path / METADATA_NAME).read_text()) | {"vocab_size": 10}
    facts["metadata_sha256"] = _metadata_checksum(facts)
    (tmp_path / METADATA_NAME).write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(SconeError, match=r"59,?999"):
        use_tokens(tmp_path)


@pytest.mark.parametrize("splits", [["../outside"], ["{outside}"], "../outside", ["train", ".."], None, [None]])
def test_a_corpus_folder_cannot_lead_outside_itself(tmp_path, splits):
    """Where a whole token file lies."""
    (tmp_path / "outside").mkdir()
    good_tokens(tmp_path / "outside")
    (tmp_path / "corpus").mkdir()
    text = json.dumps({"splits": splits}).replace("{outside}", str(tmp_path / "outside"))
    (tmp_path / "corpus" / "corpus.json").write_text(text, encoding="utf-8")
    with pytest.raises(SconeError):
        verify(tmp_path / "corpus")


BOMB = """
import sys
from pathlib import Path
from scone.data import readers
from scone.utils.errors import SconeError
readers.LONGEST_LINE = 1 << 24
try:
    list(readers.read_documents(Path(sys.argv[1]), "text"))
except SconeError as error:
    print(error)
print(next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_a_bomb_of_a_compressed_line_is_refused_before_it_fills_memory(tmp_path):
    """A GiB of one line in a few kilobytes; the limit is lowered here so that the test is quick."""
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    piece = bytes(1 << 24)
    content = b"".join(compressor.compress(piece) for _ in range(64)) + compressor.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    assert len(content) < 1 << 20
    command = [sys.executable, "-c", BOMB, str(tmp_path / "a.jsonl.zst")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    line, peak_mebibytes = done.stdout.strip().split("\n")
    assert "longer than" in line
    assert int(peak_mebibytes) < 300


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


def test_sizes_in_headers_are_checked_before_anything_is_allocated(tmp_path, vocabulary, table):
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
