"""The ladder: a multiplier of curves of a known law is that multiplier, and intervals hold what was drawn."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.tests.evaluation import experiments
from scone.tests.evaluation.experiments import run

ladder = experiments.module("ladder_fit")
TEXTS = ("novels", "c4")


def law(a: float, b: float, exponent: float, flops: float) -> float:
    return a + b * (flops / 1e15) ** -exponent


@given(
    a=st.floats(0, 3),
    b=st.floats(0.5, 3),
    exponent=st.floats(0.05, 0.8),
    times=st.floats(0.6, 3),
    cost=st.floats(1, 2.5),
    rungs=st.integers(3, 5),
)
@settings(max_examples=12, deadline=None)
def test_a_multiplier_is_that_of_the_law(a, b, exponent, times, cost, rungs):
    """Whatever a step costs: the FLOPs count, not the tokens."""
    budgets = [1e15 * 2**rung for rung in range(rungs)]
    runs = {f"plain-{each}": run(f"7m-{place}-plain", each, law(a, b, exponent, each))
            for place, each in enumerate(budgets)}  # fmt: skip
    for place, each in enumerate(budgets):
        runs[f"rows-{each}"] = run(f"7m-{place}-rows", cost * each, law(a, b, exponent, times * cost * each))
    found = ladder.multipliers(ladder.rungs_of({"runs": runs}), draws=20)
    assert [each.rung.per_weight for each in found] == [str(place) for place in range(rungs)]
    for place, each in enumerate(found):
        assert each.value == pytest.approx(times, rel=0.1 if each.beyond else 0.03)
        assert each.beyond == (not 1 - 1e-9 <= times * cost * 2**place <= 2 ** (rungs - 1) + 1e-9) or times == 1
        # every run has the same windows and no seeds differ: nothing is left to chance
        assert (each.low, each.high) == pytest.approx((each.value, each.value), rel=1e-6)
    for each in ladder.savings(
        ladder.rungs_of({"runs": runs}), ladder.ROWS, draws=20
    ):  # the same, read on the other curve
        assert (each.rung.kind, each.value) == ("plain", pytest.approx(times, rel=0.1 if each.beyond else 0.03))
        assert each.low == pytest.approx(each.high, rel=1e-6)


def test_an_interval_has_windows_and_seeds_in_it():
    """What moves all runs alike moves no multiplier; what moves one, or what seeds differ by, does."""
    budgets = [1e15, 2e15, 4e15]
    noise = np.random.default_rng(0).normal(size=48) * 0.5
    shared = noise - noise.mean()
    own = np.random.default_rng(1).normal(size=48) * 0.05
    own -= own.mean()

    def spread(rows_noise: np.ndarray, seeds: tuple[float, ...] = (0.0,)) -> float:
        runs = {
            f"plain{each}": run(f"7m-{each / 1e15:.0f}-plain", each, law(3, 1, 0.3, each), shared) for each in budgets
        }
        for seed, shift in enumerate(seeds):
            runs[f"rows{seed}"] = run("7m-2-rows", 2e15, law(3, 1, 0.3, 3e15) + shift, rows_noise, seed)
        (found,) = ladder.multipliers(ladder.rungs_of({"runs": runs}))
        assert found.low <= found.value <= found.high
        assert found.value == pytest.approx(1.5, rel=0.02)
        return found.high - found.low

    alone = spread(shared)
    assert alone < 0.01
    assert spread(shared + own) > 5 * alone
    assert spread(shared, (-0.01, 0.0, 0.01)) > 5 * alone


def test_the_noise_of_seeds_is_a_rungs_own_where_it_has_several():
    shifts = {"1": (-0.02, 0.0, 0.02), "2": (-0.001, 0.0, 0.001), "4": (0.0,)}
    runs = {f"{place}{seed}": run(f"7m-{place}-plain", float(place), 4 + shift, seed=seed)
            for place, each in shifts.items() for seed, shift in enumerate(each)}  # fmt: skip
    rungs = ladder.rungs_of({"runs": runs})
    drawn = ladder.drawn_losses(rungs, ladder.seed_spread(rungs), 4000)[1:].std(0)
    pooled = ((0.02**2 + 0.001**2) / 2) ** 0.5
    assert drawn == pytest.approx([0.02 / 3**0.5, 0.001 / 3**0.5, pooled], rel=0.05)


def test_one_budget_of_plain_is_no_curve_two_are_a_line_and_a_loss_it_never_reaches_has_no_end():
    budgets = [1e15, 2e15, 4e15]
    runs = {str(each): run(f"7m-{place}-plain", each, law(3, 1, 0.5, each)) for place, each in enumerate(budgets)}
    runs["rows"] = run("7m-1-rows", 2e15, 2.9)
    (found,) = ladder.multipliers(ladder.rungs_of({"runs": runs}), draws=10)
    assert (found.value, found.beyond) == (np.inf, True)
    del runs["1000000000000000.0"]
    runs["rows"] = run("7m-1-rows", 2e15, (law(3, 1, 0.5, 2e15) + law(3, 1, 0.5, 4e15)) / 2)
    (found,) = ladder.multipliers(ladder.rungs_of({"runs": runs}), draws=10)
    assert (found.value, found.beyond) == (pytest.approx(2**0.5), False), "half way, in log C"
    runs["rows"] = run("7m-1-rows", 2e15, law(3, 1, 0.5, 8e15))
    (found,) = ladder.multipliers(ladder.rungs_of({"runs": runs}), draws=10)
    assert found.beyond
    assert 2 < found.value < 4, "a line asks for less than the curve does"
    del runs["2000000000000000.0"]
    assert ladder.multipliers(ladder.rungs_of({"runs": runs})) == []


def test_results_are_put_together(tmp_path, capsys):
    """A later file adds runs; a run that was cut off never replaces one that was finished."""
    log = [{"step": 1, "loss": 5.0}, {"step": 2, "eval_loss": 4.5, "text_losses": {"novels": 4.4}}]
    extra = {"changes": {}, "finished": True, "log": log, "parameters": {"resident": 1}}
    budgets = [1e15, 2e15, 4e15]
    first = {
        f"7m-{i}-plain": run(f"7m-{i}-plain", each, law(3, 1, 0.5, each)) | extra for i, each in enumerate(budgets)
    }
    cut = first["7m-0-plain"] | {"finished": False, "tests": {}}
    second = {"7m-1-rows": run("7m-1-rows", 2e15, law(3, 1, 0.5, 3e15)) | extra, "7m-0-plain": cut}
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, runs in zip(paths, (first, second), strict=True):
        for each in runs.values():
            each["tests"] = {text: {"perplexity": 1.0, "bits_per_byte": 1.0, "by_match_length": []} | test
                             for text, test in each["tests"].items()}  # fmt: skip
        path.write_text(json.dumps({"experiment": {"tests": TEXTS}, "machine": {}, "commit": "c", "runs": runs}))
    assert ladder.main([*map(str, paths), "--json", str(tmp_path / "ladder.json")]) == 0
    assert "7m 1 rows: 1.5" in capsys.readouterr().out
    report = json.loads((tmp_path / "ladder.json").read_text())
    assert list(report["runs"]) == [*first, "7m-1-rows"]
    assert report["runs"]["7m-0-plain"]["finished"]
    assert report["runs"]["7m-1-rows"]["curve"] == [{"step": 2, "validation": 4.5, "texts": {"novels": 4.4}}]
    assert ladder.main([str(tmp_path / "ladder.json"), "--json", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == report
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ladder.SconeError, match="found no runs in"):
        ladder.main([str(tmp_path / "other.json")])


def test_tables_and_picture_say_what_the_losses_are():
    tables, plot = experiments.module("quality_tables"), experiments.module("plots")
    runs = {}
    for place, flops in ((5, 1e15), (10, 2e15), (20, 4e15)):
        for kind, times in (("plain", 1.0), ("rows", 1.5)):
            name = f"7m-{place}-{kind}"
            runs[name] = run(name, flops, law(3, 1, 0.5, times * flops))
            texts = [dict.fromkeys(TEXTS, 5.0 - tenth / 10 - times / 10) for tenth in range(10)]
            runs[name]["curve"] = [{"step": step, "validation": 5.0, "texts": each} for step, each in enumerate(texts)]
    lines = {
        view: tables.quality_table({"runs": runs}, view).split("\n") for view in ("multipliers", "texts", "curves")
    }
    assert "| 7 M | 0 M | 10 | 3.707 | 1.50 (1.50 to 1.50) | 1.50 (1.50 to 1.50) |" in lines["multipliers"]
    assert any("1.50* (1.50 to 1.50)" in line for line in lines["multipliers"]), "rows end below plain's last loss"
    change = f"−{100 * (1 - np.exp(law(3, 1, 0.5, 3e15) - law(3, 1, 0.5, 2e15))):.1f} %"
    assert f"| 7 M | 0 M | 10 | `rows` | 1 | {change} | {change} | {change} |" in lines["texts"]
    assert "| 7 M | 20 | `rows` |" + " −0.05 |" * 10 in lines["curves"]
    assert len(plot.draw_ladder({"runs": runs}).axes[0].lines) == 2


def test_passes_are_shown_in_their_order_beside_the_plain_run_of_as_many():
    shifts = {"epochs4-plain": 0.0, "epochs4-rows": -0.1, "epochs1-plain": 0.5, "epochs1-rows": 0.3}
    runs = {name: run(name, 1.0, 3.0 + shift) | {"tokens": 40_000_000} for name, shift in shifts.items()}
    table = experiments.module("quality_tables").quality_table({"runs": runs}, "passes")
    lines = [line for line in table.splitlines() if "`" in line]
    assert lines == [
        "| 1 | 40 M | `plain` | 30.0 | 36.6 | – |",
        "| 1 | 40 M | `rows` | −18.1 % | −18.1 % | −18.1 % |",
        "| 4 | 40 M | `plain` | 18.2 | 22.2 | – |",
        "| 4 | 40 M | `rows` | −9.5 % | −9.5 % | −9.5 % |",
    ]
