"""JSON, YAML, benchmark configurations and corpora that are damaged or hostile: one line, or read; never more."""

from __future__ import annotations

import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import scone
from scone.configs.loading import load_options, save_options
from scone.configs.schema import SconeOptions
from scone.data.readers import read_documents
from scone.evaluation.benchmark_config import BenchmarkConfig, read_benchmark_config
from scone.tests.hardening import hostile
from scone.tests.hardening.hostile import damaged, forged, refused_or_read
from scone.utils.errors import SconeError
from scone.utils.files import read_json

FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
OPTIONS = """\
data:
  dataset_name: texts
  max_n: 4
model: {base_model_name: gpt2, f_gram: {hidden_size: 8}}
training:
  learning_rate: 5e-5
  fp16: yes
"""
SHIPPED = Path(scone.__file__).parent / "configs" / "benchmark_config.json"
ROWS = "".join(json.dumps({"text": f"line {n} ä", "id": n}) + "\n" for n in range(20)).encode()
NUMBERS = ("1" * 5000, "0x" + "f" * 6000, "-" + "9" * 5000, "1e999999", "1" + "_1" * 3000, "190:20:30:15" * 400)


@FUZZ
@given(content=st.binary(max_size=300) | damaged(json.dumps({"a": [1, {"b": None}], "c": "ä"}).encode()))
def test_json_of_any_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    refused_or_read(lambda: read_json(tmp_path / "a.json"))


@pytest.mark.parametrize("text", [hostile.deep_json(), '{"a":' * 50_000, "1" * 5000, "[" + "9" * 100_000 + "]"])
def test_json_that_nothing_should_hold_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(SconeError, match="as JSON"):
        read_json(tmp_path / "a.json")


@FUZZ
@given(content=st.binary(max_size=300) | damaged(OPTIONS.encode()))
def test_options_of_any_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    options = refused_or_read(lambda: load_options(tmp_path / "a.yaml"))
    assert options is None or isinstance(options, SconeOptions)


@FUZZ
@given(text=st.text(alphabet="&*!<:{}[],-'\"|>%@?#\n ~abc0.123tf_datmoel", max_size=200))
def test_options_of_any_yaml(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    refused_or_read(lambda: load_options(tmp_path / "a.yaml"))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("option", ["training.seed", "training.learning_rate", "data.dataset_name", "training.fp16"])
def test_options_of_absurd_numbers(tmp_path: Path, option: str, number: str) -> None:
    section, name = option.split(".")
    (tmp_path / "a.yaml").write_text(f"{section}:\n  {name}: {number}\n", encoding="utf-8")
    refused_or_read(lambda: load_options(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    "text",
    [
        hostile.yaml_bomb() + "\ndata: *a11",
        hostile.yaml_bomb() + "\ndata: {dataset_name: *a11}",
        hostile.yaml_merge_bomb() + "\ndata: *a11",
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
def test_options_that_are_bombs_or_code_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SconeError) as caught:
        load_options(tmp_path / "a.yaml")
    assert len(str(caught.value)) < 2000


def test_aliases_in_options_are_read(tmp_path: Path) -> None:
    """What people use them for: a value, or a section, said once."""
    text = "data: {max_n: &n 4, min_freq: *n}\ntraining: &t {seed: 7}\n"
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    assert load_options(tmp_path / "a.yaml").data.min_freq == 4


@FUZZ
@given(content=forged(json.loads(SHIPPED.read_text())))
def test_forged_benchmark_configurations(tmp_path: Path, content: object) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content), encoding="utf-8")
    config = refused_or_read(lambda: read_benchmark_config(tmp_path / "a.json"))
    assert config is None or isinstance(config, BenchmarkConfig)


def test_saved_options_survive_any_text(tmp_path: Path) -> None:
    options = SconeOptions()
    for text in ("\0", "\ud800", "a\u2028b\x85", "*a", "&a", "!!int 3", "{{", "9" * 5000):
        options.data.text_column = text
        try:
            save_options(options, tmp_path / "o.yaml")
        except UnicodeEncodeError:
            continue  # half a character: nothing was written
        assert refused_or_read(lambda: load_options(tmp_path / "o.yaml")) in (None, options)


def documents(path: Path) -> list[str]:
    return list(read_documents(path, "text"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.tokens", "a.py", "a.jsonl.gz", "a.jsonl.xz", "a.txt.zst"])
@FUZZ
@given(data=st.data())
def test_corpora_of_damaged_files(tmp_path: Path, name: str, data: st.DataObject) -> None:
    content = data.draw(damaged(compressed(ROWS, name)) | st.binary(max_size=200))
    (tmp_path / name).write_bytes(content)
    found = refused_or_read(lambda: documents(tmp_path / name))
    assert found is None or all(isinstance(text, str) and text.encode("utf-8") is not None for text in found)


def compressed(content: bytes, name: str) -> bytes:
    import zstandard

    ways = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
    return ways.get(Path(name).suffix, bytes)(content)


@FUZZ
@given(data=st.data())
def test_corpora_of_damaged_parquet(tmp_path: Path, parquet: bytes, data: st.DataObject) -> None:
    (tmp_path / "a.parquet").write_bytes(data.draw(damaged(parquet)))
    found = refused_or_read(lambda: documents(tmp_path / "a.parquet"))
    assert found is None or all(isinstance(text, str) for text in found)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    rows = {"text": [f"text {n}" for n in range(30)], "n": list(range(30))}
    pyarrow.parquet.write_table(pyarrow.table(rows), path, compression="none")
    return path.read_bytes()


@pytest.mark.parametrize("column", [hostile.deep_json(), "1" * 5000, '"\\ud800"', "{}", "NaN", "[1]"])
def test_rows_with_hostile_values(tmp_path: Path, column: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": ' + column + "}\n", encoding="utf-8")
    refused_or_read(lambda: documents(tmp_path / "a.jsonl"))


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
