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
from scone.tests.hardening.bad_files import READERS, good_tokens, use_tokens
from scone.tests.hardening.bad_inputs import READ, REFUSED, judge_files
from scone.utils.errors import SconeError

KINDS = [(reader, kind) for reader in READERS for kind in READERS[reader].kinds]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_bad_inputs_are_refused_or_read(tmp_path, name, kind):
    reader = READERS[name]
    (tmp_path / "good").mkdir()
    good = reader.good(tmp_path / "good")
    judge = judge_files(reader, kind, good, tmp_path / "input")

    examples = 40 if kind.startswith("forged") else 25

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(reader.kinds[kind](good))
    def law(files):
        assert judge(files) in (READ, REFUSED)

    law()


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.sealed])
def test_damaged_file_is_refused(tmp_path, name):
    """A bit changed anywhere, in steps through every region of each file; cut anywhere; longer."""
    reader = READERS[name]
    (tmp_path / "good").mkdir()
    good = reader.good(tmp_path / "good")
    judge = judge_files(reader, "damaged", good, tmp_path / "input")
    for file, content in good.items():
        size = len(content)
        for at in sorted({*range(16), *range(0, size, max(1, size // 120)), *range(size - 8, size)}):
            changed = content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]
            assert judge(good | {file: changed}) == REFUSED, (file, at)
        for changed in (*(content[:length] for length in (0, 1, 7, 8, 200, size // 2, size - 2)), content + b"\0"):
            assert judge(good | {file: changed}) == REFUSED, (file, len(changed))


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
