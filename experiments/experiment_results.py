"""An experiment's JSON (``experiments/run.py``) as comparable results: means over seeds, and plain's loss by budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from scone.configs.loading import get_option
from scone.configs.schema import SconeOptions
from scone.evaluation.results import BOTH, MODEL, OVER_ENCODING, PLAIN, ROWS, RunResult, kind_of_parts
from scone.utils.text import markdown_table

OURS = (MODEL, ROWS, BOTH)
"""The input embeddings of this project, without or with a gate (`family`)."""


def run_results(experiment: Mapping[str, Any]) -> list[RunResult]:
    """One result per run that finished, its seeds taken together; in the experiment's order.

    Perplexities are exp of the mean loss over seeds, with the lowest and highest as ``perplexity_spread`` where there
    are several. Costs are those of the first seed.
    """
    base = experiment["experiment"]["base"]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, run in experiment["runs"].items():
        if run.get("finished", True):
            groups.setdefault(run.get("run", name), []).append(run)
    return [_result(name, base | dict(runs[0]["changes"]), runs) for name, runs in groups.items()]


def table(experiment: Mapping[str, Any]) -> str:
    """Markdown: one line a run. FLOPs are those of the first run (plain) times; unfinished runs stand last.

    Bits a byte: the mean over tests, where all have them; it compares runs of different tokenizers too.
    """
    tests = experiment["experiment"]["tests"]
    results = run_results(experiment)
    rows = []
    for result in results:
        cells = [perplexity_text(result, test) for test in tests]
        bits = [result.perplexity[test].get("bits_per_byte") for test in tests]
        cells.append(f"{sum(bits) / len(bits):.4f}" if all(bits) else "–")
        for field in ("inference_flops_per_token", "training_flops"):
            cells.append(f"{getattr(result, field) / getattr(results[0], field):.2f}×")
        seconds = result.facts["train_seconds"]
        rows.append([result.name, len(seconds), *cells, f"{sum(seconds) / len(seconds):.0f}"])
    head = ["run", "seeds", *tests, "bits a byte", "inference FLOPs", "training FLOPs", "training s"]
    lines = [markdown_table(head, rows)]
    for name, run in experiment["runs"].items():
        if not run.get("finished", True):
            last = [entry for entry in run["log"] if "eval_loss" in entry][-1:]
            loss = f"validation loss {last[0]['eval_loss']:.3f} at step {last[0]['step']}" if last else "no loss"
            lines.append(f"\nunfinished: {name}, {run['steps']} of {run['max_steps']} steps, {loss}")
    return "\n".join(lines)


def perplexity_text(result: RunResult, test: str) -> str:
    """Perplexity on a test, with ± half the range over seeds where there are several."""
    value, spread = result.perplexity_of(test), result.perplexity.get(test, {}).get("perplexity_spread")
    if value is None:
        return "–"
    return f"{value:.2f}" + (f" ± {(spread[1] - spread[0]) / 2:.2f}" if spread else "")


def _result(name: str, options: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> RunResult:
    cost, parameters = runs[0]["cost"], runs[0]["parameters"]
    kind = kind_of_options(options)
    has_model = kind != PLAIN and kind != OVER_ENCODING and _option(options, "model.f_gram.num_hidden_layers") != 0
    width, layers = (_option(options, f"model.f_gram.{size}") for size in ("hidden_size", "num_hidden_layers"))
    return RunResult(
        name,
        kind,
        {test: _mean_perplexity([run["tests"][test] for run in runs]) for test in runs[0]["tests"]},
        num_f_grams=number_of_f_grams(kind, options),
        f_gram_model_parameters=_model_parameters(parameters, options) if has_model else 0,
        f_gram_model_size=f"{width} × {layers}" if has_model and width and layers else None,
        parameters=dict(parameters),
        inference_flops_per_token=cost["inference_flops_per_token"],
        training_flops_per_token=cost["training_flops_per_token"],
        training_flops=cost["training_flops"],
        training_tokens=runs[0]["tokens"],
        facts={
            "seeds": [run["seed"] for run in runs],
            "train_seconds": [run["train_seconds"] for run in runs],
            "validation_loss": _validation_loss(runs),
        },
    )


def _validation_loss(runs: Sequence[Mapping[str, Any]]) -> float | None:
    """Loss at the last evaluation of training, the mean over seeds; None where none was logged."""
    last = [[entry["eval_loss"] for entry in run["log"] if "eval_loss" in entry][-1:] for run in runs]
    found = [losses[0] for losses in last if losses]
    return sum(found) / len(found) if len(found) == len(runs) else None


def _option(options: Mapping[str, Any], name: str) -> Any:
    """The value in flat ``options``, or the default."""
    return options[name] if name in options else get_option(SconeOptions(), name)


def number_of_f_grams(kind: str, options: Mapping[str, Any]) -> int | None:
    """S; of hashed tables their rows; None for a plain model."""
    if kind == PLAIN:
        return None
    return int(_option(options, "model.over_encoding_rows" if kind == OVER_ENCODING else "data.max_f_grams"))


def _model_parameters(parameters: Mapping[str, int], options: Mapping[str, Any]) -> int | None:
    """What is trained apart from the rows, which are as wide as the table's; None where that width is not known."""
    width = _option(options, "model.hidden_size")
    if not width:
        return None
    rows = min(int(_option(options, "model.learned_rows")), parameters["table"] // int(width))
    return parameters["training_only"] - rows * int(width)


def kind_of_options(options: Mapping[str, Any]) -> str:
    """The input embedding in words, from flat options (``model.learned_rows`` …); variants have words of their own."""
    if not _option(options, "model.use_f_gram_embeddings"):
        return PLAIN
    if _option(options, "model.over_encoding_rows"):
        return OVER_ENCODING
    has_model = _option(options, "model.f_gram.num_hidden_layers") != 0
    has_rows = bool(_option(options, "model.learned_rows"))
    kind = kind_of_parts(has_model, has_rows)
    variants = []
    if _option(options, "model.combination") != "add":
        variants.append(str(_option(options, "model.combination")))
    if not options.get("model.rows_backoff", True):  # these two are no options any more
        variants.append("no back-off")
    if options.get("model.control", "none") != "none":
        variants.append(f"{options['model.control']} table")
    return ", ".join([kind, *variants])


def family(kind: str) -> str:
    """A kind without its gate, which is a setting like a learning rate where kinds are compared."""
    return kind.removesuffix(", gate")


def best_of(candidates: Sequence[RunResult]) -> RunResult:
    """The one of lowest validation loss; of the lowest loss on all tests where an experiment logged none.

    Tests have no part in the choice where they need not. Raises ValueError where there is no candidate.
    """

    def loss(result: RunResult) -> float:
        logged = result.facts["validation_loss"]
        return float(logged) if logged is not None else mean_loss(result, result.perplexity)

    return min(candidates, key=loss)


def _mean_perplexity(tests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    losses = [float(test["loss"]) for test in tests]
    found = {name: tests[0][name] for name in ("num_predicted", "num_documents") if tests[0].get(name) is not None}
    if all(test.get("bits_per_byte") for test in tests):
        found["bits_per_byte"] = sum(test["bits_per_byte"] for test in tests) / len(tests)
    if len(tests) == 1:
        found |= {"perplexity_interval": tests[0].get("perplexity_interval")}
    else:
        found |= {"perplexity_spread": [math.exp(min(losses)), math.exp(max(losses))]}
    loss = sum(losses) / len(losses)
    return {"perplexity": math.exp(loss), "loss": loss} | found


def mean_loss(result: RunResult, tests: Iterable[str]) -> float:
    """Mean over ``tests`` of the log-perplexity, each text counting the same."""
    values = [math.log(result.perplexity[test]["perplexity"]) for test in tests]
    return sum(values) / len(values)


def same_tokens(first: RunResult, second: RunResult) -> bool:
    """Whether both saw as many training tokens, give or take a step: runs resumed at their end once took one more."""
    return math.isclose(first.training_tokens or 0, second.training_tokens or 0, rel_tol=2e-3)


def plain_of_equal_inference(results: Sequence[RunResult]) -> list[RunResult]:
    """The best plain run of each budget at the first one's inference FLOPs, by rising training FLOPs."""
    plain = [result for result in results if result.kind == PLAIN]
    if not plain:
        return []
    flops = plain[0].inference_flops_per_token
    same = [result for result in plain if math.isclose(result.inference_flops_per_token or 0, flops or 1, rel_tol=0.02)]
    by_budget: list[list[RunResult]] = []
    for result in sorted(same, key=lambda result: result.training_tokens or 0):
        if by_budget and same_tokens(by_budget[-1][0], result):
            by_budget[-1].append(result)
        else:
            by_budget.append([result])
    return [best_of(results) for results in by_budget]


def plain_loss_at(results: Sequence[RunResult], training_flops: float, tests: Sequence[str]) -> float | None:
    """What plain's mean loss would be after ``training_flops``: linear between its runs in log FLOPs.

    Never beyond its runs: None where fewer than two budgets were trained, or ``training_flops`` lies outside of them.
    """
    points = [
        (math.log(result.training_flops), mean_loss(result, tests))
        for result in plain_of_equal_inference(results)
        if result.training_flops
    ]
    x = math.log(training_flops)
    slack = 1e-3  # budgets that differ by a thousandth are the same
    if len(points) < 2 or x < points[0][0] - slack or x > points[-1][0] + slack:
        return None
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1 + slack:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (min(max(x, x0), x1) - x0) / (x1 - x0)
    return None
