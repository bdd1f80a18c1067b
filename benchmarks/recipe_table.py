"""Tables of docs/results/recipe.json and paper_regime.json that docs show as they are measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scone.utils.text import markdown_table

TEXTS = {"wikipedia_test": "Wikipedia", "novels": "novels", "wikitext103_test": "WikiText-103", "c4": "C4"}
SUMMARY = {
    "plain": "plain",
    "rows-100k": "learned rows, 100 k f-grams",
    "over-encoding-1M": "over-encoding (hashed n-grams), 1 M rows",
    "rows-1M": "**learned rows, 1 M f-grams** (default)",
    "rows-3M": "learned rows, 3 M f-grams",
    "plain-2x-flops": "plain with twice the FLOPs",
}
"""The six runs of the README, of screen 4, and what they are called there."""
MATCH_TEXTS = ("wikipedia_test", "c4", "wikitext103_test")
MATCHES = {
    "1": ("rows-x1", "rows-x0.1", "model-x1-stopped", "model-x1-own-tokens", "rows-x1-bare-gradient"),
    "4": ("rows-1M", "rows-3M", "over-encoding-1M", "both-own-tokens-1M"),
    "6": ("rows-1M", "rows-1M-tail-1M", "rows-1M-graft", "rows-1M-classes", "counts-1M", "rows-1M-counts"),
}
"""Screen → the runs whose losses are shown by the longest f-gram that ends before the predicted token."""


def recipe_table(report: Mapping[str, Any], view: str) -> str:
    """``summary``: the README's runs. Of screen N ``runs_N``: perplexities of its runs; ``changes_N``: changes from the
    plain run of as many tokens; ``matches_N``: changes of the loss by length of match; ``validation_N``: losses on the
    validation text in the course of the runs, the first of which is plain.
    """
    kind, _, screen = view.partition("_")
    if kind == "summary":
        runs = runs_of(report, "4")
        return _perplexities({name: runs[run] for run, name in SUMMARY.items()}, "plain", "; 4 × H100")
    if kind == "validation":
        return _validation(report["screens"][screen]["runs"])
    runs = runs_of(report, screen)
    if kind == "changes":
        return _changes(runs)
    if kind == "matches":
        return _matches({name: runs[name] for name in ("plain", *MATCHES[screen])})
    plain = "plain" if "plain" in runs else next(iter(_plains(runs)))
    return _perplexities({f"`{name}`": runs[name] for name in dict.fromkeys((plain, *runs))}, f"`{plain}`")


def mean_perplexity(run: Mapping[str, Any]) -> float:
    """The geometric mean over the four texts."""
    return math.exp(sum(run["tests"][text]["loss"] for text in TEXTS) / len(TEXTS))


def runs_of(report: Mapping[str, Any], screen: str) -> dict[str, Any]:
    """The tested runs of a screen by name, after those of other screens that its ``beside`` names; several seeds of one
    are one, with the mean of each loss.
    """
    chosen = report["screens"][screen]
    found: dict[str, Any] = {}
    for other, names in chosen.get("beside", {}).items():
        theirs = runs_of(report, other)
        found |= {name: theirs[name] for name in names}
    seeds: dict[str, list[Mapping[str, Any]]] = {}
    for name, run in chosen["runs"].items():
        if run.get("tests"):
            trunk = {
                key: (chosen["base"] | run["changes"])[f"model.{key}"] for key in ("num_hidden_layers", "hidden_size")
            }
            seeds.setdefault(name.partition("-seed")[0], []).append({**run, "trunk": trunk})
    return found | {name: _mean(runs) for name, runs in seeds.items()}


def _mean(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tests = {}
    for text in runs[0]["tests"]:
        loss = statistics.fmean(run["tests"][text]["loss"] for run in runs)
        lengths = zip(*(run["tests"][text]["by_match_length"] for run in runs), strict=True)
        matches = [{**each[0], "loss": statistics.fmean(one["loss"] for one in each)} for each in lengths]
        tests[text] = {"loss": loss, "perplexity": math.exp(loss), "by_match_length": matches}
    return {**runs[0], "tests": tests, "seeds": len(runs), "means": [mean_perplexity(run) for run in runs]}


def _plains(runs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: run for name, run in runs.items() if run["changes"].get("model.use_f_gram_embeddings") is False}


def _perplexities(runs: Mapping[str, Any], plain_name: str, machine: str = "; H100") -> str:
    plain, lines = runs[plain_name], []
    for name, run in runs.items():
        costs = ("inference_flops_per_token", "training_flops_per_token")
        cells = [f"{run['cost'][cost] / plain['cost'][cost]:.2f}×" for cost in costs]
        cells += [f"{run['tests'][text]['perplexity']:.1f}" for text in TEXTS]
        change = "–" if run is plain else percent(mean_perplexity(run) / mean_perplexity(plain) - 1)
        if run is not plain and run["seeds"] > 1:
            change += f" ± {100 * statistics.stdev(run['means']) / mean_perplexity(plain):.1f}"
        lines.append([name, *cells, change])
    head = ["", "inference FLOPs", "training FLOPs", *TEXTS.values(), f"mean of four, to {plain_name}"]
    seeds = "one seed"
    if plain["seeds"] > 1:
        seeds += f", or the mean of several where ± is their standard deviation (plain: {plain['seeds']})"
    trunk = "{num_hidden_layers} layers × {hidden_size}".format(**plain["trunk"])
    note = f"Perplexity after {plain['tokens'] / 1e6:.0f} M training tokens; {trunk}; {seeds}{machine}."
    return f"{markdown_table(head, lines)}\n\n*{note}*\n"


def _changes(runs: Mapping[str, Any]) -> str:
    lines = []
    for plain_name, plain in sorted(_plains(runs).items(), key=lambda each: each[1]["tokens"]):
        tokens = f"{plain['tokens'] / 1e6:.0f}"
        same = {name: run for name, run in runs.items() if run["tokens"] == plain["tokens"] and name != plain_name}
        for name, run in {plain_name: plain, **same}.items():
            ours, theirs = ([each["tests"][text]["loss"] for text in TEXTS] for each in (run, plain))
            changes = [loss - other for loss, other in zip(ours, theirs, strict=True)]
            cells = [percent(math.expm1(change)) for change in [*changes, statistics.fmean(changes)]]
            if run is plain:
                cells = [*(f"{math.exp(loss):.1f}" for loss in theirs), "–"]
            lines.append([f"{tokens} M", f"`{name.removeprefix(f'{tokens}M-')}`", *cells])
    note = "Perplexity of plain, and the change from it; one seed, H100."
    return f"{markdown_table(['tokens', '', *TEXTS.values(), 'mean of four'], lines, words=2)}\n\n*{note}*\n"


def _matches(runs: Mapping[str, Any]) -> str:
    plain, lines = next(iter(runs.values())), []
    for text in MATCH_TEXTS:
        numbers = [entry["num_predicted"] for entry in plain["tests"][text]["by_match_length"]]
        cells = [f"{100 * number / sum(numbers):.0f} %" for number in numbers]
        lines.append(["*share of positions*", TEXTS[text], *cells])
    for name, run in runs.items():
        for text in () if run is plain else MATCH_TEXTS:
            ours, theirs = (each["tests"][text]["by_match_length"] for each in (run, plain))
            assert [entry["num_predicted"] for entry in ours] == [entry["num_predicted"] for entry in theirs], name
            cells = [nats(entry["loss"] - other["loss"]) for entry, other in zip(ours, theirs, strict=True)]
            lines.append([f"`{name}`", TEXTS[text], *cells])
    head = ["", "text", "none ends", *(f"{length} tokens" for length in range(2, len(lines[0]) - 1))]
    return f"{markdown_table(head, lines, words=2)}\n\n*Change of the loss to `plain`, in nats a token.*\n"


def _validation(runs: Mapping[str, Any]) -> str:
    plain = next(iter(runs.values()))
    tokens, lines = plain["tokens"] / plain["steps"], []
    for name, run in runs.items():
        cost = run["cost"]["training_flops_per_token"] / plain["cost"]["training_flops_per_token"]
        losses = dict(run["validation_losses"])
        cells = [f"{losses[step]:.3f}" for step, _ in plain["validation_losses"]]
        last, loss = plain["validation_losses"][-1]
        end = "–" if run is plain else percent(math.exp(losses[last] - loss) - 1)
        lines.append([f"`{name}`", f"{cost:.2f}×", *cells, end])
    steps = [f"{step * tokens / 1e6:.0f} M" for step, _ in plain["validation_losses"]]
    note = "Loss on the validation text (Wikipedia) after so many training tokens; one seed, H100."
    table = markdown_table(["", "training FLOPs", *steps, "perplexity, to plain"], lines)
    return f"{table}\n\n*{note}*\n"


def percent(change: float) -> str:
    """A share as signed per cent, with a minus sign that is one."""
    return f"{100 * change:+.1f} %".replace("-", "−")


def nats(change: float) -> str:
    """A change of a loss; one that rounds to nothing has no sign."""
    text = f"{change:+.2f}".replace("-", "−")
    return "0.00" if text[1:] == "0.00" else text
