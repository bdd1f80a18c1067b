"""The demo end to end on a small text, twice; what it refuses; words that fit whoever won."""

from __future__ import annotations

import copy
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from scone.data.sources import stdlib_files
from scone.evaluation.demo import DemoOptions, run_demo
from scone.evaluation.demo_page import cost_table, render_demo, verdict
from scone.utils.errors import SconeError

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    texts = [path.read_text(encoding="utf-8")[:4000] for path in stdlib_files()[:60]]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts if text.strip())
    (folder / "corpus.jsonl").write_text(lines, encoding="utf-8")
    sizes = {"steps": 24, "batch_size": 4, "max_length": 64, "vocab_size": 400, "hidden_size": 32}
    sizes |= {"num_hidden_layers": 1, "max_f_grams": 2000, "max_test_tokens": 2000}
    return DemoOptions(data=str(folder / "corpus.jsonl"), output_dir=str(folder / "demo"), **sizes)


def run(options, listen=lambda line: None):
    """What it says, and its report."""
    said = []
    run_demo(options, lambda line: (said.append(line), listen(line)))
    return said, json.loads((Path(options.output_dir) / "report.json").read_text())


@pytest.fixture(scope="module")
def report(options):
    return run(options)[1]


def losses(report):
    return [report["models"][name]["evaluation"]["loss"] for name in ("plain", "scone")]


@pytest.mark.slow
def test_demo_measures_both_models_alike(options, report):
    plain, scone = report["models"]["plain"], report["models"]["scone"]
    for figure in ("inference_flops_per_token", "training_flops_per_token", "resident_parameters"):
        assert scone[figure] == plain[figure], "rows are read, not computed"
    assert scone["evaluation"]["num_predicted"] == plain["evaluation"]["num_predicted"]
    first_losses = [model["training_curve"][0][1] for model in (plain, scone)]
    assert first_losses[0] == pytest.approx(first_losses[1], abs=0.02), "the same start, the same batches"
    assert [model["steps"] for model in (plain, scone)] == [options.steps] * 2
    assert 1 <= len(report["samples"]) <= 3
    page = (Path(options.output_dir) / "report.html").read_text(encoding="utf-8")
    assert page == render_demo(report), "the page is made of report.json alone"
    assert page.count("<svg") == 2
    check_page(page)


@pytest.mark.slow
def test_what_no_page_may_hold_is_replaced(report):
    """A model of bytes wrote a form feed once, and the page was no page."""
    report = copy.deepcopy(report)
    for sample in report["samples"]:
        sample |= {name: "".join(map(chr, [*range(32), 0xFFFE, 0xFFFF])) for name in sample}
    page = render_demo(report)
    check_page(page)
    assert "\ufffd" in page


def test_training_time_is_that_of_the_median_step(options, report):
    """What the first step compiles and what evaluations take is in the log's seconds alone."""
    for name, model in report["models"].items():
        (folder,) = Path(options.output_dir).glob(f"{name}-*")
        step = json.loads((folder / "step_seconds.json").read_text(encoding="utf-8"))["step_seconds"]
        whole = json.loads((folder / "training_log.json").read_text(encoding="utf-8"))["train_seconds"]
        assert model["training_seconds"] == options.steps * step
        assert 0 < model["training_seconds"] < whole


def check_page(page: str) -> None:
    """One page by itself: nothing is fetched, every tag is closed, every name that is referred to is there."""
    assert not re.search(r"src\s*=|href\s*=(?!\"#)|url\((?!#)|@import|http", page)
    names = re.findall(r' id="([^"]*)"', page)
    assert set(re.findall(r'(?:href="#|url\(#)([\w-]+)', page)) <= set(names)
    text = re.sub(r"<(meta|br|hr)\b([^>]*?)/?>", r"<\1\2/>", page.partition(">")[2])  # behind the doctype
    ElementTree.fromstring(text.replace("xlink:", ""))


def stop_at(pattern):
    """What to listen with, to stop the demo at a line that begins so."""

    def stop(line):
        if re.match(pattern, line):
            raise KeyboardInterrupt

    return stop


def test_a_second_run_uses_what_was_finished_unless_options_or_text_are_others(options, report, tmp_path):
    again, other = (replace(options, output_dir=str(tmp_path / name)) for name in ("demo", "other"))
    for each in (again, other):
        shutil.copytree(options.output_dir, each.output_dir)
    said, found = run(again)
    assert sum("finished before, used again" in line for line in said) == 2
    assert losses(found) == losses(report)
    trains = r" *step +\d+/"
    with pytest.raises(KeyboardInterrupt):
        run(replace(again, steps=20), stop_at(trains))
    text = Path(options.data).read_text(encoding="utf-8")
    try:  # the path is the same, what is there is not
        Path(options.data).write_text("".join(reversed(text.splitlines(keepends=True))), encoding="utf-8")
        with pytest.raises(KeyboardInterrupt):
            run(other, stop_at(trains))
    finally:
        Path(options.data).write_text(text, encoding="utf-8")


def test_a_demo_that_is_stopped_goes_on_from_the_middle(options, report, tmp_path):
    stopped = replace(options, output_dir=str(tmp_path / "demo"))
    with pytest.raises(KeyboardInterrupt):
        run(stopped, stop_at(r" *step +18/24"))
    said, found = run(stopped)
    steps = [int(step[1]) for line in said if (step := re.match(r" *step +(\d+)/24", line))]
    assert steps[0] == 13
    assert losses(found) == pytest.approx(losses(report), rel=1e-5)


@pytest.mark.parametrize(
    ("interval", "factor", "kind", "word", "seconds", "steps"),
    [
        ((-0.2, -0.1), 0.8, "good", "SCONE wins", 6.0, 29),
        ((0.1, 0.2), 1.2, "bad", "The plain model wins", 5.0, 24),
        ((-0.1, 0.1), 1.0, "even", "No clear difference", 4.0, 19),
    ],
)
def test_verdict_fits_whoever_won(report, interval, factor, kind, word, seconds, steps):
    """And says what plain could do in SCONE's time: 5 s are 24 steps."""
    changed = copy.deepcopy(report)
    changed["comparison"]["loss_difference_interval"] = interval
    plain, scone = (changed["models"][name] for name in ("plain", "scone"))
    scone["evaluation"]["perplexity"] = plain["evaluation"]["perplexity"] * factor
    plain["training_seconds"], scone["training_seconds"] = 5.0, seconds
    said = verdict(changed)
    assert said["kind"] == kind
    assert said["headline"].startswith(word)
    assert word in render_demo(changed)
    assert f"plain would take {steps} steps in place of 24" in said["detail"]
    assert ["Steps in SCONE's training time", str(steps), "24"] in cost_table(changed)[1]


def test_other_folders_and_too_little_text_are_refused(options, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(SconeError, match=r"holds something else \(found thesis\.tex\)"):
        run(replace(options, output_dir=str(tmp_path)))
    lines = "".join(json.dumps({"text": f"a few words, number {number}"}) + "\n" for number in range(3))
    (tmp_path / "small.jsonl").write_text(lines)
    with pytest.raises(SconeError, match="give more text"):
        run(replace(options, data=str(tmp_path / "small.jsonl"), output_dir=str(tmp_path / "demo")))
