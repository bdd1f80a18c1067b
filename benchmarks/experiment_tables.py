"""Tables of experiments (experiments/run.py): runs side by side, budgets, and where a gain comes from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from claim_plot import shown_results
from experiment_results import best_of, mean_loss, run_results, same_tokens
from gpu_tables import accelerators

from scone.evaluation.results import PLAIN, RunResult


def experiment_table(report: dict[str, Any]) -> str:
    """Validation loss of each run after so many steps, and its distance to the first run's."""
    runs = report["runs"]
    steps = [step for step, _ in next(iter(runs.values()))["validation_loss"]]
    lines = [
        f"| validation loss after steps | {' | '.join(f'{step:,}' for step in steps)} | to {next(iter(runs))} |",
        "|---|" + "---:|" * (len(steps) + 1),
    ]
    base = next(iter(runs.values()))["final_validation_loss"]
    for name, run in runs.items():
        losses = " | ".join(f"{loss:.3f}" for _, loss in run["validation_loss"])
        lines.append(f"| {name} | {losses} | {run['final_validation_loss'] - base:+.3f} |")
    where = accelerators(report["machine"])
    return "\n".join(lines) + f"\n\n*Measured on {where} at commit {report['commit'][:10]}.*\n"


def comparison_table(report: dict[str, Any], summary: bool = False) -> str:
    """Each run's perplexities (± half the range over seeds) beside its FLOPs and its change to the first's.

    Bold: the lowest of each text at plain's inference FLOPs and tokens. ``summary``: what the picture shows, and
    changes to its plain run, which has the best settings.
    """
    tests = report["experiment"]["tests"]
    results = run_results(report)
    base = shown_results(results)[0] if summary else reference(results)
    own = mean_loss(base, tests)

    def multiple(result: Any, field: str) -> float:
        return getattr(result, field) / getattr(base, field)

    equal = [
        result
        for result in results
        if multiple(result, "inference_flops_per_token") < 1.02 and same_tokens(result, base)
    ]
    best = {test: min(result.perplexity_of(test) or math.inf for result in equal) for test in tests}
    names = " | ".join(test.replace("_", " ") for test in tests)
    lines = [
        f"| run | input embedding | f-grams | inference FLOPs | training FLOPs | {names} | mean, to {base.name} |",
        "|---|---|---:|---:|---:|" + "---:|" * (len(tests) + 1),
    ]
    for result in shown_results(results) if summary else results:
        cells = [_perplexity(result, test, best if result in equal else {}) for test in tests]
        change = math.exp(mean_loss(result, tests) - own) - 1
        flops = [f"{multiple(result, field):.2f}×" for field in ("inference_flops_per_token", "training_flops")]
        f_grams = f"{result.num_f_grams:,}" if result.num_f_grams else "–"
        last = "–" if result is base else f"{100 * change:+.1f} %".replace("-", "−")
        lines.append(f"| {result.name} | {result.kind} | {f_grams} | {' | '.join([*flops, *cells])} | {last} |")
    unfinished = sum(not run.get("finished", True) for run in report["runs"].values())
    counts = sorted({len(result.facts["seeds"]) for result in results} - {1})
    seeds = " or ".join(map(str, counts))
    where = accelerators(report["machine"]) or report["machine"].get("processor", "")
    note = f"{base.training_tokens:,} training tokens; FLOPs as multiples of {base.name}'s" + (
        f"; {seeds} seeds where a ± stands" if seeds else "; one seed"
    )
    note += f"; {unfinished} runs unfinished" if unfinished else ""
    return "\n".join(lines) + f"\n\n*{note}. Measured on {where} at commit {report['commit'][:10]}.*\n"


def reference(results: Sequence[RunResult]) -> RunResult:
    """The first run; where it saw other tokens than most (a model as it was before), the best plain one of theirs."""
    usual, _ = Counter(result.training_tokens for result in results).most_common(1)[0]
    if results[0].training_tokens == usual:
        return results[0]
    return best_of([result for result in results if result.training_tokens == usual and result.kind == PLAIN])


def budget_table(report: dict[str, Any]) -> str:
    """Perplexity of each kind after so many tokens, and its distance to plain's of as many tokens."""
    tests = report["experiment"]["tests"]
    results = run_results(report)
    kinds = sorted({result.kind for result in results}, key=lambda kind: (kind != PLAIN, len(kind), kind))
    names = " | ".join(kinds)
    lines = [f"| training tokens | {names} |", "|---:|" + "---:|" * len(kinds)]
    for tokens in sorted({result.training_tokens for result in results}):
        of_kind = {result.kind: result for result in results if result.training_tokens == tokens}
        cells = []
        for kind in kinds:
            if kind not in of_kind:
                cells.append("–")
                continue
            loss = mean_loss(of_kind[kind], tests)
            change = math.exp(loss - mean_loss(of_kind[PLAIN], tests)) - 1
            to_plain = "" if kind == PLAIN else f" ({100 * change:+.1f} %)".replace("-", "−")
            cells.append(f"{math.exp(loss):,.1f}{to_plain}")
        lines.append(f"| {tokens:,} | {' | '.join(cells)} |")
    texts = " and ".join(test.replace("_", " ") for test in tests)
    where = accelerators(report["machine"]) or report["machine"].get("processor", "")
    note = f"Geometric mean of the perplexities of {texts}; one seed"
    return "\n".join(lines) + f"\n\n*{note}. Measured on {where} at commit {report['commit'][:10]}.*\n"


def groups_table(report: dict[str, Any], test: str, names: Mapping[str, str]) -> str:
    """Loss in nats by the length of the longest f-gram that ends at a position, and by its rank.

    ``names``: the run of each column and what the column is called; the first is what the others are compared with.
    Several seeds of a run are averaged.
    """
    found = {column: _groups_of(report, run, test) for run, column in names.items()}
    first, *others = found
    lines = [f"| the longest f-gram has | positions | {' | '.join(found)} |", "|---|---:|" + "---:|" * len(found)]
    for group, (count, base) in found[first].items():
        losses = [found[other][group][1] for other in others]
        cells = [f"{base:.3f}", *(f"{loss:.3f} ({loss - base:+.3f})" for loss in losses)]
        lines.append(f"| {group} | {count:,} | {' | '.join(cells).replace('-', '−')} |")
    return "\n".join(lines) + f"\n\n*Nats a token on {test.replace('_', ' ')}, and the distance to {first}'s.*\n"


def _groups_of(report: dict[str, Any], run: str, test: str) -> dict[str, tuple[int, float]]:
    """Positions and mean loss of every group, by what it is called."""
    tests = [result["tests"][test] for result in report["runs"].values() if result["run"] == run]
    groups: dict[str, tuple[int, float]] = {}
    for place in range(len(tests[0]["by_match_length"])):
        group = tests[0]["by_match_length"][place]
        name = "1 token: none ends here" if group["length"] == 1 else f"{group['length']} tokens"
        groups[name] = group["num_predicted"], _mean(found["by_match_length"][place]["loss"] for found in tests)
    for place, group in enumerate(tests[0]["by_rank"]):
        if group["first_rank"] is not None:
            name = f"rank {group['first_rank']:,} to {group['last_rank']:,}"
            groups[name] = group["num_predicted"], _mean(found["by_rank"][place]["loss"] for found in tests)
    return groups


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _perplexity(result: Any, test: str, best: dict[str, float]) -> str:
    value = result.perplexity_of(test)
    if value is None:
        return "–"
    spread = result.perplexity[test].get("perplexity_spread")
    text = f"{value:.2f}" + (f" ± {(spread[1] - spread[0]) / 2:.2f}" if spread else "")
    return f"**{text}**" if best.get(test) == value else text
