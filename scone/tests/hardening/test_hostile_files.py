"""Every reader of files with bad inputs of every kind: one line, or read safely, and the files stay as they were."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scone.data.token_file import METADATA_NAME, TOKENS_NAME, TokenFileWriter, _metadata_checksum
from scone.scripts.verify import verify
from scone.tests import tiny
from scone.tests.hardening.bad_files import (
    READERS,
    TABLE,
    VOCABULARY,
    Files,
    Reader,
    good_table,
    good_tokens,
    good_vocabulary,
    use_tokens,
)
from scone.tests.hardening.bad_inputs import MEMORY_LIMIT_BYTES, READ, REFUSED, judge_files, try_kind
from scone.tests.hardening.hostile import HOSTILE_VALUES, refused_or_read
from scone.tokenization import f_gram_file
from scone.tokenization.matcher import Matcher
from scone.utils.errors import SconeError
from scone.utils.files import fingerprint_of

KINDS = [(reader, kind) for reader in READERS for kind in READERS[reader].kinds]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_bad_inputs_are_refused_or_read(tmp_path: Path, name: str, kind: str) -> None:
    reader = READERS[name]
    (tmp_path / "good").mkdir()
    good = reader.good(tmp_path / "good")
    judge = judge_files(reader, kind, good, tmp_path / "input")

    examples = 120 if kind.startswith("forged") else 60

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(reader.kinds[kind](good))
    def law(files: Files) -> None:
        assert judge(files) in (READ, REFUSED)

    law()


def change(folder: Path) -> None:
    (folder / "a").write_bytes(b"changed")


def hoard(folder: Path) -> None:
    assert bytearray(MEMORY_LIMIT_BYTES + (64 << 20))


def refuse_without_a_reason(folder: Path) -> None:
    raise SconeError("no")


def fail(folder: Path) -> None:
    raise KeyError(folder)


@pytest.mark.parametrize(
    ("bad_reader", "outcome"),
    [
        (change, "the input was changed"),
        (hoard, "memory grew"),
        (refuse_without_a_reason, "refused with"),
        (fail, "KeyError"),
        (lambda folder: (folder / "a").read_bytes(), "damage was let pass"),
    ],
)
def test_whatever_is_neither_refused_nor_read_is_told(
    tmp_path: Path, bad_reader: Callable[[Path], Any], outcome: str
) -> None:
    """The judge of all this, judged."""

    def use(folder: Path) -> Any:
        content = (folder / "a").read_bytes()
        return content if content == b"good" else bad_reader(folder)

    good = {"a": b"good"}
    reader = Reader("bad reader", lambda _: good, {}, use, sealed=True)
    judge = judge_files(reader, "damaged", good, tmp_path / "input")
    counted = try_kind(st.sampled_from([good, {"a": b"bad"}]), good, judge, wanted=5, seed=0)
    assert counted["inputs"] == len(counted["failures"]) == 1
    assert outcome in counted["failures"][0]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return good_vocabulary(tmp_path_factory.mktemp("vocabulary"))[VOCABULARY]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return good_table(tmp_path_factory.mktemp("table"))[TABLE]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    good_tokens(folder)
    return folder


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
