"""The scaling benchmark, rehearsed on the CPU with two processes over gloo, and what it does about failures."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

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
def modules(monkeypatch):
    for folder in (BENCHMARKS, BENCHMARKS / "gpu"):
        monkeypatch.syspath_prepend(str(folder))
    yield {name: importlib.import_module(name) for name in ("bench_scaling_gpu", "side_by_side", "tables")}
    for name in ("bench_scaling_gpu", "timed_training", "side_by_side", "tables", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def rehearse(modules, tmp_path_factory, tmp_path):
    """The report on two GPUs that are none, on a few thousand tokens."""
    folder = tmp_path_factory.mktemp("data")
    corpus = prepare_run_corpus(runs.options(runs.write_corpus(folder), folder / "run"), quiet=True)
    corpus.tokenizer.save_pretrained(folder / "tokenizer")
    shutil.copytree(corpus.train.folder, folder / "train")

    def measure(*flags):
        command = ["--data", str(folder), "--tiny", "--gpus", "1", "2", "--output_dir", str(tmp_path), *flags]
        modules["bench_scaling_gpu"].main([*command, "--json", str(tmp_path / "scaling.json")])
        return json.loads((tmp_path / "scaling.json").read_text())

    return measure


@pytest.mark.slow
def test_a_rehearsal_measures_everything(modules, rehearse, tmp_path):
    report = rehearse("--variants", "both", "--strategies", "ddp", "precompute")
    assert report["benchmark"] == "gpu_scaling"
    assert report["config"]["failed"] == {}
    found = {record["metric"]: record for record in report["records"]}
    difference = found.pop("precompute_difference_2")
    assert (difference["ours"], difference["met"]) == (0.0, True), "ranks change nothing of a table"
    peers = {"ddp_efficiency_both_2": "tokens_per_second_both_1"}
    peers |= {"precompute_efficiency_2": "f_grams_per_second_table_1"}
    assert set(found) == {*peers, *peers.values(), "peak_memory_both_1", "ddp_peak_memory_both_2"}
    assert all(record["ours"] > 0 for record in found.values())
    for metric, one in peers.items():
        record = found[metric]
        assert record["peer"] == pytest.approx(2 * found[one]["ours"])
        assert record["ratio"] == pytest.approx(record["ours"] / record["peer"])
        assert (record["target"], record["met"]) == (0.9, record["ratio"] >= 0.9)
    (folder,) = tmp_path.glob("scaling-*")
    assert not {"cache", "model", "table_1", "table_2"} & {path.name for path in folder.iterdir()}
    head, _, both, *_ = modules["tables"].scaling_table(report).splitlines()
    assert head.startswith("| input embedding | strategy | tokens/s on 1 GPU | on 2 | efficiency | peak memory")
    assert both.startswith("| f-gram model + learned rows | DDP | ")


def test_runs_that_fail_are_named_and_the_others_go_on(modules, rehearse, tmp_path):
    report = rehearse("--variants", "plain", "--strategies", "ddp", "--timeout", "0.1")
    late = "TimeoutError: not through after 0.1 s"
    assert report["config"]["failed"] == {"one_plain_1": late, "ddp_plain_2": late}
    assert report["records"] == []
    assert len(list(tmp_path.glob("scaling-*/*.log"))) == 2
    assert "Failed: `one_plain_1`, `ddp_plain_2`." in modules["tables"].scaling_table(report)


def test_the_last_words_of_a_program(modules, tmp_path, monkeypatch):
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
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert side_by_side.gpu_for(1) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")  # each sees one of the GPUs that we were given
    assert side_by_side.gpu_for(1) == {"CUDA_VISIBLE_DEVICES": "7"}
