"""The scaling benchmark, rehearsed on the CPU with two processes over gloo; what it does about failures; its table."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import scone
from scone.tests.training import runs
from scone.training.run import prepare_run_corpus

BENCHMARKS = Path(scone.__file__).parents[1] / "benchmarks"
pytestmark = [
    pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="an installed package has no benchmarks"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    for folder in (BENCHMARKS, BENCHMARKS / "gpu"):
        monkeypatch.syspath_prepend(str(folder))
    yield {name: importlib.import_module(name) for name in ("bench_scaling_gpu", "side_by_side", "tables")}
    for name in ("bench_scaling_gpu", "timed_training", "side_by_side", "tables", "common"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and the token file of a few thousand tokens."""
    folder = tmp_path_factory.mktemp("data")
    corpus = prepare_run_corpus(runs.options(runs.write_corpus(folder), folder / "run"), quiet=True)
    corpus.tokenizer.save_pretrained(folder / "tokenizer")
    shutil.copytree(corpus.train.folder, folder / "train")
    return folder


def rehearse(bench: ModuleType, data: Path, folder: Path, *flags: str) -> dict[str, Any]:
    command = ["--data", str(data), "--tiny", "--gpus", "1", "2", "--output_dir", str(folder)]
    bench.main([*command, "--json", str(folder / "scaling.json"), *flags])
    return json.loads((folder / "scaling.json").read_text())


@pytest.mark.slow
def test_a_rehearsal_measures_everything(modules: dict[str, ModuleType], data: Path, tmp_path: Path) -> None:
    report = rehearse(modules["bench_scaling_gpu"], data, tmp_path, "--variants", "plain", "both")
    assert report["benchmark"] == "gpu_scaling"
    assert report["config"]["failed"] == {}
    found = {record["metric"]: record for record in report["records"]}
    alone = {"tokens_per_second_plain_1", "tokens_per_second_both_1", "f_grams_per_second_table_1"}
    memory = {"peak_memory_plain_1", "peak_memory_both_1"}
    memory |= {"ddp_peak_memory_plain_2", "ddp_peak_memory_both_2", "fsdp_peak_memory_plain_2"}
    peers = {
        "ddp_efficiency_plain_2": "tokens_per_second_plain_1",
        "ddp_efficiency_both_2": "tokens_per_second_both_1",
        "fsdp_efficiency_plain_2": "tokens_per_second_plain_1",
        "precompute_efficiency_2": "f_grams_per_second_table_1",
    }
    difference = found.pop("precompute_difference_2")
    assert (difference["ours"], difference["met"]) == (0.0, True), "ranks change nothing of a table"
    assert set(found) == {*alone, *memory, *peers}
    assert all(record["ours"] > 0 for record in found.values())
    for metric, one in peers.items():
        record = found[metric]
        assert record["peer"] == pytest.approx(2 * found[one]["ours"])
        assert record["ratio"] == pytest.approx(record["ours"] / record["peer"])
        assert (record["target"], record["met"]) == (0.9, record["ratio"] >= 0.9)
    (folder,) = tmp_path.glob("scaling-*")
    assert not {"cache", "model", "table_1", "table_2"} & {path.name for path in folder.iterdir()}
    table = modules["tables"].scaling_table(report)
    assert [line.split(" | ")[:2] for line in table.splitlines()[2:5]] == [
        ["| plain", "DDP"],
        ["| f-gram model + learned rows", "DDP"],
        ["| plain", "FSDP, full_shard"],
    ]
    assert "same rows)" in table


def test_runs_that_fail_are_named_and_the_others_go_on(
    modules: dict[str, ModuleType], data: Path, tmp_path: Path
) -> None:
    flags = ("--variants", "plain", "--strategies", "ddp", "--timeout", "0.1")
    report = rehearse(modules["bench_scaling_gpu"], data, tmp_path, *flags)
    late = "TimeoutError: not through after 0.1 s"
    assert report["config"]["failed"] == {"one_plain_1": late, "ddp_plain_2": late}
    assert report["records"] == []
    assert len(list(tmp_path.glob("scaling-*/*.log"))) == 2
    assert "Failed: `one_plain_1`, `ddp_plain_2`." in modules["tables"].scaling_table(report)


def test_the_last_words_of_a_program(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    """An error wins over what follows it, torchrun's summary too; then comes a signal, then the last line."""
    programs = {
        "import sys; print('[rank1]: ValueError: no'); print('bye'); sys.exit(1)": "[rank1]: ValueError: no",
        "raise SystemExit('error: found a fly in the soup')": "error: found a fly in the soup",
        "print('torch.distributed.elastic.ChildFailedError: x'); import os; os.kill(os.getpid(), 9)": (
            "Signal 9 ended it"
        ),
        "print('hello')": "hello",
        "": "no output",
        "import time; time.sleep(60)": "TimeoutError: not through after 4 s",
    }
    side_by_side = modules["side_by_side"]
    started = [
        side_by_side.Program([sys.executable, "-c", program], tmp_path / f"{place}.log", {})
        for place, program in enumerate(programs)
    ]
    side_by_side.run_side_by_side(started, timeout_seconds=4)
    assert [side_by_side.last_words(program.log.read_text()) for program in started] == list(programs.values())


def test_each_program_sees_one_of_the_gpus_that_we_were_given(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert modules["side_by_side"].gpu_for(1) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert modules["side_by_side"].gpu_for(1) == {"CUDA_VISIBLE_DEVICES": "7"}


def test_the_table_has_a_column_for_every_number_of_gpus(modules: dict[str, ModuleType]) -> None:
    def record(metric: str, ours: float, ratio: float | None = None, target: float | None = None) -> dict[str, Any]:
        met = None if target is None or ratio is None else ratio >= target
        return {"metric": metric, "ours": ours, "ratio": ratio, "target": target, "met": met}

    report = {
        "config": {"gpus": [1, 2, 4], "positions": 16_384, "compile": False, "failed": {"fsdp_model_4": "no"}},
        "machine": {"accelerators": ["GPU", "GPU"], "cores": 32, "libraries": {"torch": "1", "transformers": "2"}},
        "commit": "0123456789abc",
        "records": [
            record("tokens_per_second_model_1", 1000.0),
            record("peak_memory_model_1", 20.0),
            record("fsdp_efficiency_model_2", 1900.0, 0.95, 0.9),
            record("fsdp_peak_memory_model_2", 15.04),
            record("ddp_efficiency_model_2", 1700.0, 0.85, 0.9),
            record("ddp_efficiency_model_4", 3700.0, None, 0.9),  # whose peer failed
            record("f_grams_per_second_table_1", 50_000.0),
            record("precompute_efficiency_2", 90_000.0, 0.9, 0.9),
            record("precompute_difference_2", 1.25e-7),
        ],
    }
    lines = modules["tables"].scaling_table(report).splitlines()
    assert lines[0] == (
        "| input embedding | strategy | tokens/s on 1 GPU | on 2 | efficiency | on 4 | efficiency "
        "| peak memory of a GPU, on 1 | on 2 | on 4 |"
    )
    assert lines[2:4] == [
        "| f-gram model | DDP | 1,000 | 1,700 | **0.85** | 3,700 | – | 20.0 GiB | – | – |",
        "| f-gram model | FSDP, full_shard | 1,000 | 1,900 | 0.95 | – | – | 20.0 GiB | 15.0 GiB | – |",
    ]
    assert "50,000 f-grams/s on 1 GPU, 90,000 on 2 (efficiency 0.90, rows differ by up to 1.2e-07)." in lines[5]
    assert lines[7] == "Failed: `fsdp_model_4`."
    assert "not compiled. Measured on 2 × GPU, 32 cores, torch 1, transformers 2, at commit 0123456789." in lines[-1]
