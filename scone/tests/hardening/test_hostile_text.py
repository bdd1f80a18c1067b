"""JSON, YAML and texts that are bombs, absurd numbers or code: one line, or read; never more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scone.configs.loading import load_options, save_options
from scone.configs.schema import SconeOptions
from scone.tests.hardening import hostile
from scone.tests.hardening.bad_files import NUMBERS, use_text
from scone.tests.hardening.hostile import refused_or_read
from scone.utils.command_line import describe_error
from scone.utils.errors import SconeError
from scone.utils.files import read_json


@pytest.mark.parametrize("text", [hostile.deep_json(), '{"a":' * 50_000, "1" * 5000, "[" + "9" * 100_000 + "]"])
def test_json_that_nothing_should_hold_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(SconeError, match="as JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "option",
    ["training.seed", "training.learning_rate", "data.dataset_name", "data.memory_budget", "training.fp16"],
)
def test_options_of_absurd_numbers(tmp_path: Path, option: str, number: str) -> None:
    section, name = option.split(".")
    (tmp_path / "a.yaml").write_text(f"{section}:\n  {name}: {number}\n", encoding="utf-8")
    refused_or_read(lambda: load_options(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 20_000 + "]" * 20_000,
        "data: &a\n  max_n: *a",
        "data: &a {dataset_name: *a}",
        "data: !!python/object/apply:os.system [echo]",
        "data: {dataset_name: !!binary |\n  ////}",
        "data: {dataset_name: 2001-99-99}",
        "data: {dataset_name: !!timestamp x}",
        "data: {dataset_name: !!int x}",
        "? [a, b]\n: c",
        "? {a: b}\n: c",
        "a" * 3_000_000,
        "data: {<<: 3}",
    ],
    ids=lambda text: text[-40:],
)
def test_options_that_are_nonsense_or_code_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SconeError) as caught:
        load_options(tmp_path / "a.yaml")
    assert len(str(caught.value)) < 2000


def test_aliases_in_options_are_read(tmp_path: Path) -> None:
    """What people use them for: a value, or a section, said once."""
    text = "data: {max_n: &n 4, min_freq: *n}\ntraining: &t {seed: 7}\n"
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    assert load_options(tmp_path / "a.yaml").data.min_freq == 4


def test_saved_options_survive_any_text(tmp_path: Path) -> None:
    options = SconeOptions()
    for text in ("\0", "\ud800", "a\u2028b\x85", "*a", "&a", "!!int 3", "{{", "9" * 5000):
        options.data.text_column = text
        try:
            save_options(options, tmp_path / "o.yaml")
        except UnicodeEncodeError:
            continue  # half a character: nothing was written
        assert refused_or_read(lambda: load_options(tmp_path / "o.yaml")) in (None, options)


@given(st.text())
def test_messages_hold_nothing_that_a_terminal_obeys(text: str) -> None:
    """Names and values out of files are quoted in messages: no colours, titles or cleared screens come with them."""
    line, _ = describe_error(SconeError(f"found {text}\x1b]0;title\x07\x9b2J\u202e\ud800; expected none"))
    assert line.isprintable()
    assert "\\x1b]0;title\\x07\\x9b2J\\u202e\\ud800" in line


@pytest.mark.parametrize("column", [hostile.deep_json(), "1" * 5000, '"\\ud800"', "{}", "NaN", "[1]"])
def test_rows_with_hostile_values(tmp_path: Path, column: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": ' + column + "}\n", encoding="utf-8")
    refused_or_read(lambda: use_text(tmp_path))


def test_a_bomb_of_a_compressed_line_is_refused_before_it_fills_memory(tmp_path: Path) -> None:
    """256 MiB of one line in a few kilobytes; the limit is lowered here so that the test is quick."""
    import zstandard

    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    piece = bytes(1 << 24)
    content = b"".join(compressor.compress(piece) for _ in range(64)) + compressor.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    assert len(content) < 1 << 20
    program = f"""
from pathlib import Path
from scone.data import readers
from scone.utils.command_line import describe_error
from scone.utils.errors import SconeError
readers.LONGEST_LINE_BYTES = 1 << 24
try:
    list(readers.read_documents(Path({str(tmp_path / "a.jsonl.zst")!r}), "text"))
except SconeError as error:
    print(error)
print(next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    line, peak_mebibytes = done.stdout.strip().split("\n")
    assert "longer than" in line
    assert int(peak_mebibytes) < 300
