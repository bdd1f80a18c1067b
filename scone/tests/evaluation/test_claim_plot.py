"""The picture and the table of the main claim, from a made-up experiment whose answers are known."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from scone.tests.evaluation import experiments

claim_plot, tables = experiments.module("claim_plot"), experiments.module("tables")
claim_svg, shown_results = claim_plot.claim_svg, claim_plot.shown_results
run_results = experiments.module("experiment_results").run_results


def test_picture_is_a_file_of_its_own() -> None:
    svg = claim_svg(experiments.experiment())
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in svg
    assert not re.search(r"@import|url\((?!#)", svg)
    labels = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert labels.count("learned rows") == 2, "once by inference, once by training FLOPs"
    assert labels.count("plain-4x-steps") == 1, "other budgets by training FLOPs alone"
    assert not any("shuffled" in str(label) for label in labels)


def test_picture_shows_the_most_f_grams() -> None:
    shown = [result.name for result in shown_results(run_results(experiments.experiment()))]
    assert shown == ["plain", "plain-2x-deep", "model-1k", "rows-1k", "both-1k", "over-encoding-1k"]


def test_picture_shows_the_better_settings() -> None:
    experiment = experiments.experiment()
    worse, better = (experiments.run(name, loss, experiments.ROWS) for name, loss in (("a", 3.87), ("b", 3.85)))
    experiment["runs"] = {"rows-worse": worse} | experiment["runs"] | {"rows-better": better}
    shown = [result.name for result in shown_results(run_results(experiment)) if result.kind == "learned rows"]
    assert shown == ["b"]


def test_without_plain_there_is_no_picture() -> None:
    experiment = experiments.experiment()
    experiment["runs"] = {"rows-1k": experiment["runs"]["rows-1k"]}
    with pytest.raises(ValueError, match="no finished plain run"):
        claim_svg(experiment)


def test_table_compares_with_plain() -> None:
    lines = tables.comparison_table(experiments.experiment()).splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    assert rows["plain"].endswith("| – |")
    assert "± 0.55" in rows["plain"]
    assert rows["both-1k"].endswith("| −15.6 % |")  # exp(−0.17) − 1
    assert rows["plain-2x-deep"].count("2.00×") == 2
    assert rows["rows-1k-shuffled"].count("**") == 6
    assert "1 runs unfinished" in lines[-1]
    assert len(tables.comparison_table(experiments.experiment(), summary=True).splitlines()) == 2 + 6 + 2
