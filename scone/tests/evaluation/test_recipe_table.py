"""The recipe's tables: seeds as their geometric mean, runs of another screen first, changes from the plain of as many
tokens.
"""

from __future__ import annotations

import math

import pytest

from scone.tests.evaluation import experiments

PLAIN = {"model.use_f_gram_embeddings": False}


def run(perplexity: float, changes: dict | None = None, tokens: int = 4_000_000, seed: int = 1) -> dict:
    """A finished run of one perplexity on all texts; where an f-gram ends it is a nat better."""
    loss = math.log(perplexity)
    matches = [{"length": n, "num_predicted": 3 - n, "loss": loss - (n - 1)} for n in (1, 2)]
    texts = experiments.module("recipe_table").TEXTS
    tests = {text: {"loss": loss, "perplexity": perplexity, "by_match_length": matches} for text in texts}
    cost = {"inference_flops_per_token": 10.0, "training_flops_per_token": 30.0}
    return {"changes": changes or {}, "tokens": tokens, "seed": seed, "cost": cost, "tests": tests}


@pytest.fixture
def report() -> dict:
    """Two screens, of which the second shows runs of the first."""
    base = {"model.num_hidden_layers": 4, "model.hidden_size": 256}
    first = {f"plain-seed{seed}": run(number, PLAIN, seed=seed) for seed, number in ((1, 80.0), (2, 125.0))}
    first |= {"rows-1M-seed1": run(81.0), "rows-1M-seed2": run(100.0, seed=2), "unseen": {**run(1.0), "tests": {}}}
    second = {"20M-plain": run(50.0, PLAIN, tokens=20_000_000), "20M-slow": run(45.0, tokens=20_000_000)}
    screens = {"6": {"base": base, "runs": first}}
    screens["7"] = {"base": base, "beside": {"6": ["plain", "rows-1M"]}, "runs": {"more": run(70.0)} | second}
    return {"screens": screens}


def test_seeds_are_their_geometric_mean_and_untested_runs_are_left_out(report):
    table = experiments.module("recipe_table").recipe_table(report, "runs_6")
    assert "| `plain` | 1.00× | 1.00× | 100.0 | 100.0 | 100.0 | 100.0 | – |" in table
    spread = (100 - 81) / 2**0.5  # of two numbers, in hundredths of plain
    assert f"| `rows-1M` | 1.00× | 1.00× | 90.0 | 90.0 | 90.0 | 90.0 | −10.0 % ± {spread:.1f} |" in table
    assert "unseen" not in table
    assert "4 M training tokens; 4 layers × 256" in table


def test_runs_of_another_screen_come_first_and_changes_are_from_the_plain_of_as_many_tokens(report):
    module = experiments.module("recipe_table")
    assert list(module.runs_of(report, "7")) == ["plain", "rows-1M", "more", "20M-plain", "20M-slow"]
    lines = [line for line in module.recipe_table(report, "changes_7").splitlines() if " M | `" in line]
    assert [line.split(" | ")[1] for line in lines] == ["`plain`", "`rows-1M`", "`more`", "`plain`", "`slow`"]
    assert lines[2] == "| 4 M | `more` | −30.0 % | −30.0 % | −30.0 % | −30.0 % | −30.0 % |"
    assert lines[4] == "| 20 M | `slow` | −10.0 % | −10.0 % | −10.0 % | −10.0 % | −10.0 % |"


def test_changes_by_length_of_match_are_of_the_same_positions(report, monkeypatch):
    module = experiments.module("recipe_table")
    monkeypatch.setitem(module.MATCHES, "6", ("rows-1M",))
    table = module.recipe_table(report, "matches_6")
    assert "| *share of positions* | C4 | 67 % | 33 % |" in table
    assert "| `rows-1M` | C4 | −0.11 | −0.11 |" in table
    for seed in (1, 2):  # other f-grams: other positions
        for test in report["screens"]["6"]["runs"][f"rows-1M-seed{seed}"]["tests"].values():
            test["by_match_length"] = [{**entry, "num_predicted": 5} for entry in test["by_match_length"]]
    with pytest.raises(AssertionError, match="rows-1M"):
        module.recipe_table(report, "matches_6")
