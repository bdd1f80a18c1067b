"""The tables of docs/experiments/pretrained.md say what a result's losses are."""

import math

import yaml

from scone.tests.evaluation import experiments

CHANGES = {"untouched": 0.0, "tuned-1e-4": math.log(0.9), "tuned-rows-1e-4": math.log(0.81)}
"""Nats a token, to the untouched model."""


def test_changes_are_those_of_the_losses():
    table = experiments.module("pretrained_table")
    tests = ["court_opinions", "c4"]

    def tested(change: float) -> dict[str, object]:
        blocks = [2 + change + place / 10 for place in range(5)]  # texts differ by more than models
        blocks[0] += change / 10
        loss = sum(blocks) / 5
        return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / 4, "block_losses": blocks}

    runs = {name: {"tokens": 8_192_000, "tests": dict.fromkeys(tests, tested(gap))} for name, gap in CHANGES.items()}
    runs["frozen-rows"] = {"finished": False}
    report = {"experiment": {"tests": tests}, "machine": {"accelerators": ["G", "G"]}, "runs": runs}
    texts, changes, rows = (table.pretrained_table(report, view) for view in ("texts", "changes", "rows"))
    assert "| `untouched` | 0.5500 (9.03) | 0.5500 (9.03) |" in texts
    assert "after 8.2 M tokens of court opinions; one seed; 2 × G." in texts
    # the first block has a tenth more: 1.02 times the change in all, and a standard error of a fiftieth of it
    gap, error = f"{100 * (0.9**1.02 - 1):.1f}".replace("-", "−"), f"{-4 * math.log(0.9):.1f}"
    assert f"| `tuned-1e-4` | {gap} % ± {error} | {gap} % ± {error} |" in changes
    assert f"| `tuned-rows-1e-4` | {gap} % ± {error} | {gap} % ± {error} |" in rows
    assert "untouched" not in changes
    assert "frozen" not in texts + changes + rows


def test_the_course_has_runs_that_were_cut_off_before_their_test():
    def run(**losses: float) -> dict[str, object]:
        return {"log": [{"loss": 9.0}, *({"step": int(step[1:]), "eval_loss": loss} for step, loss in losses.items())]}

    runs = {"untouched": run(_1=3.0), "tuned": run(_200=2.5, _400=2.25), "lora": run(_200=2.75) | {"finished": False}}
    course = experiments.module("pretrained_table").pretrained_table({"experiment": {}, "runs": runs}, "course")
    assert "| steps | 200 | 400 |" in course
    assert "| `tuned` | 2.500 | 2.250 |" in course
    assert "| `lora` | 2.750 |  |" in course
    assert "`untouched`: 3.000." in course


def test_each_run_with_rows_has_one_that_differs_in_them_alone():
    pairs = experiments.module("pretrained_table").PAIRS
    path = experiments.REPOSITORY / "experiments" / "pretrained.yaml"
    runs = yaml.safe_load(path.read_text(encoding="utf-8"))["runs"]
    plain = "model.use_f_gram_embeddings"
    assert pairs.keys() == {name for name, options in runs.items() if plain not in options}
    for name, base in pairs.items():
        if base != "untouched":
            assert runs[name] == {option: value for option, value in runs[base].items() if option != plain}
