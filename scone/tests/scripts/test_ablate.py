"""`scone ablate`: every ablation gives runs that can be trained, and the command keeps what is finished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scone.configs.ablations import ABLATIONS
from scone.scripts.ablate import main, planned_runs
from scone.tests.training.runs import command_line, options, write_corpus
from scone.training.run import build_model, prepare_run_corpus
from scone.utils.errors import SconeError

F_GRAM_MODEL = {
    "model.f_gram.hidden_size": 16,
    "model.f_gram.num_hidden_layers": 2,
    "model.f_gram.num_attention_heads": 2,
    "data.max_f_grams": 60,
    "model.learned_rows": 60,
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_every_ablation_changes_the_base_to_models_that_can_be_built(corpus, tmp_path):
    base = options(corpus, tmp_path, **F_GRAM_MODEL)
    read = prepare_run_corpus(base, quiet=True)
    runs = planned_runs(base, [], [])
    assert {run.ablation for run in runs} == {"", *ABLATIONS}
    for run in runs:
        assert run.group == "base" or run.options.model != base.model or run.changes, run.name
        if "min_freq" not in str(run.changes):  # nothing is that frequent here
            build_model(run.options, read, quiet=True)


def test_an_ablation_that_does_not_apply_is_refused_by_name_and_left_out_of_all(corpus, tmp_path):
    base = options(corpus, tmp_path, **(F_GRAM_MODEL | {"model.f_gram.num_hidden_layers": 0}))
    with pytest.raises(SconeError, match="found a base without an f-gram model"):
        planned_runs(base, ["start"], [])
    assert {run.ablation for run in planned_runs(base, [], [])} >= {"rows", "max_n"}
    assert not {run.ablation for run in planned_runs(base, [], [])} & {"start", "depth", "output"}


def test_the_command_compares_runs_and_keeps_what_is_finished(corpus, tmp_path, capsys):
    flags = [*command_line(corpus, tmp_path / "out", "--batch_size", "4", "--max_steps", "3"), "--max_f_grams", "60"]
    flags += ["--f_gram_num_hidden_layers", "1", "--ablations", "backoff", "controls"]
    assert main([*flags, "--list"]) == 0
    assert "no-backoff" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main(flags) == 0
    first = capsys.readouterr().out
    for name in ("base", "plain", "no-backoff", "control-shuffled", "control-single"):
        assert f"| {name} |" in first
        assert json.loads((tmp_path / "out" / f"{name}.json").read_text())["finished"]
        assert not (tmp_path / "out" / name).exists()
    assert (tmp_path / "out" / "ablations.md").read_text().strip() in first
    assert (tmp_path / "out" / "benchmark.html").exists()
    assert main(flags) == 0
    again = capsys.readouterr().out
    assert again.count("(finished before)") == 5
    assert again.split("\n\n")[1] == first.split("\n\n")[1]
    with pytest.raises(SconeError, match=r"made with training\.max_steps 3; expected 4"):
        main([*flags, "--max_steps", "4"])


def test_several_seeds_are_one_line(corpus, tmp_path, capsys):
    flags = [*command_line(corpus, tmp_path, "--batch_size", "4", "--max_steps", "1"), "--seeds", "1", "2"]
    assert main([*flags, "--f_gram_num_hidden_layers", "0", "--ablations", "backoff"]) == 0
    table = capsys.readouterr().out
    assert table.count("| plain |") == 1
    assert (tmp_path / "plain-seed2.json").exists()


def test_an_unknown_ablation_gets_a_suggestion():
    with pytest.raises(SconeError, match="did you mean combination"):
        main(["--ablations", "combinations"])
