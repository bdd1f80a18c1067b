"""Tables of docs/results/what_users_ask.json (experiments/what_users_ask.py), and of vocabularies.json."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ladder_table import NAMES
from recipe_table import nats, percent

from scone.utils.text import markdown_table

TESTS = {"needle": "right answers", "pair": "pair, nats", "passage": "passage, nats"}


def users_table(report: Mapping[str, Any], view: str) -> str:
    """Of pairs ``tasks``, ``silenced``, ``visits``, ``generations``; of long context ``context``, ``positions``."""
    if view in ("context", "positions"):
        if "long" not in report:
            return "*Not run yet.*\n"
        return (_context if view == "context" else _positions)(report["long"])
    pairs = report.get("pairs", [])
    if not pairs or (view == "tasks" and not any("tasks" in pair for pair in pairs)):
        return "*Not run yet.*\n"
    return {"tasks": _tasks, "silenced": _silenced, "visits": _visits, "generations": _generations}[view](pairs)


def vocabularies_table(report: Mapping[str, Any]) -> str:
    """Bits per byte of plain with larger vocabularies, beside plain and rows of the small one; seeds taken together."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in report["runs"].values():
        groups.setdefault(run["run"], []).append(run)
    first = next(iter(groups.values()))[0]
    texts, lines = list(first["tests"]), []
    for name, runs in groups.items():
        tests = {text: [run["tests"][text] for run in runs] for text in texts}
        bits = [statistics.fmean(test["bits_per_byte"] for test in tests[text]) for text in texts]
        run = runs[0]
        token_bytes = statistics.fmean(
            test["loss"] / (test["bits_per_byte"] * math.log(2)) for each in tests.values() for test in each
        )
        flops, per_token = (
            f"{run['cost'][cost] / first['cost'][cost]:.{digits}f}×"
            for cost, digits in (("training_flops", 2), ("inference_flops_per_token", 1))
        )
        read = [f"{run['tokens'] / 1e6:.1f} M", f"{run['tokens'] * token_bytes / 1e6:.0f} MB"]
        means = [f"{each:.3f}" for each in [*bits, statistics.fmean(bits)]]
        lines.append([f"`{name}`", len(runs), *read, flops, per_token, *means])
    costs = ["tokens", "text", "training FLOPs", "FLOPs a token"]
    head = ["", "seeds", *costs, *(NAMES.get(text, text) for text in texts), "mean"]
    return f"{markdown_table(head, lines)}\n\n*Bits per byte. FLOPs are those of the first line times.*\n"


def _tasks(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Accuracies by run, and their difference; ±: 95 % over items, of the difference as if the items were others."""
    groups = _groups([pair for pair in pairs if "tasks" in pair])
    found = {
        name: [{kind: _by_task(pair["tasks"][kind]) for kind in ("plain", "rows")} for pair in group]
        for name, group in groups.items()
    }
    accuracies, perplexities = [], []
    for task, first in next(iter(found.values()))[0]["plain"].items():
        number = first["num_items"]
        line, perplexity = [task, f"{number:,}", f"{first['chance']:.3f}"], [f"{task}, perplexity", f"{number:,}", ""]
        for seeds in found.values():
            plain, rows = (
                statistics.fmean(each[kind][task]["accuracy"] for each in seeds) for kind in ("plain", "rows")
            )
            errors = [_over_items(accuracy, number) for accuracy in (plain, rows)]
            difference = f"{rows - plain:+.3f}".replace("-", "−")
            line += [f"{plain:.3f} ± {errors[0]:.3f}", f"{rows:.3f}", f"{difference} ± {math.hypot(*errors):.3f}"]
            if first["perplexity"] is not None:
                logs = [
                    statistics.fmean(math.log(each[kind][task]["perplexity"]) for each in seeds)
                    for kind in ("plain", "rows")
                ]
                perplexity += [*(f"{math.exp(each):,.0f}" for each in logs), percent(math.expm1(logs[1] - logs[0]))]
        accuracies.append(line)
        if first["perplexity"] is not None:
            perplexities.append(perplexity)
    head = ["task", "items", "chance"]
    for name in found:
        head += [f"{name}: plain", "rows", "difference"]
    note = f"{_told(groups)} ±: 95 % over items; a difference's is that of two draws of items, wider than its own."
    return f"{markdown_table(head, accuracies + perplexities)}\n\n*{note}*\n"


def _silenced(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Perplexity of plain, and what rows and silenced rows change, by run."""
    groups = _groups(pairs)
    texts, widest = list(pairs[0]["by_text"]), 0.0
    lines = [[NAMES.get(text, text)] for text in texts]
    means = ["mean"]
    for group in groups.values():
        changes: dict[str, list[float]] = {"rows": [], "silenced": []}
        for line, text in zip(lines, texts, strict=True):
            of_text = [pair["by_text"][text] for pair in group]
            line.append(f"{math.exp(statistics.fmean(each['plain'] for each in of_text)):.1f}")
            for kind, collected in changes.items():
                collected.append(statistics.fmean(each[kind] - each["plain"] for each in of_text))
                line.append(percent(math.expm1(collected[-1])))
                for each in of_text:
                    low, high = each[f"{kind}_minus_plain"]["interval"]
                    widest = max(widest, (math.exp(high) - math.exp(low)) / 2)
        means += ["", *(percent(math.expm1(statistics.fmean(each))) for each in changes.values())]
    head = ["text"]
    for name in groups:
        head += [f"{name}: plain", "rows", "silenced"]
    note = (
        f"Perplexity of plain, and the change from it: 95 % over windows are within ± {100 * widest:.1f} points. "
        f"{_told(groups)}"
    )
    return f"{markdown_table(head, [*lines, means])}\n\n*{note}*\n"


def _visits(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Change of the loss by how often the f-gram was seen, by run."""
    groups = _groups(pairs)
    firsts = sorted({each["first"] for pair in pairs for each in pair["by_visits"]})
    lines = []
    for first, following in zip(firsts, [*firsts[1:], None], strict=True):
        last = f" to {following - 1:,}" if following else " and more"
        line = ["no f-gram" if first == 0 else f"{first:,}{last}"]
        for group in groups.values():
            found = [each for pair in group for each in pair["by_visits"] if each["first"] == first]
            if not found:
                line += ["", "", ""]
                continue
            share = statistics.fmean(each["share"] for each in found)
            changes = (statistics.fmean(each[kind] - each["plain"] for each in found) for kind in ("rows", "silenced"))
            line += [f"{100 * share:.0f} %", *map(nats, changes)]
        lines.append(line)
    head = ["visits"]
    for name in groups:
        head += [f"{name}: share", "rows", "silenced"]
    note = (
        "Share of predictions, and the change from plain's loss in nats a token, by how often the training text has "
        f"the longest f-gram that a token is predicted from. Six texts together. {_told(groups)}"
    )
    return f"{markdown_table(head, lines)}\n\n*{note}*\n"


def _generations(pairs: Sequence[Mapping[str, Any]]) -> str:
    """All prompts of the last pair, as they came."""
    parts = []
    for number, each in enumerate(pairs[-1]["generations"], 1):
        parts.append(f"{number}. **{_escaped(each['prompt'])}**")
        parts += [f"    * *{kind}*: {_escaped(each[kind])}" for kind in ("plain", "rows")]
    return "\n".join(parts) + "\n"


def _context(report: Mapping[str, Any]) -> str:
    """Needle, pair and passage by distance, and each model's difference from the first."""
    names, lines = list(report["models"]), []
    for test, title in TESTS.items():
        for place, first in enumerate(report["models"][names[0]][test]):
            cells = [f"{_plain(first['mean'])} ± {_half(first['interval']):.2f}"]
            for name in names[1:]:
                each = report["models"][name][test][place]
                difference, (low, high) = each["difference"]["mean"], each["difference"]["interval"]
                shown = nats(difference) if low <= 0 <= high else f"**{nats(difference)}**"
                cells.append(f"{_plain(each['mean'])} ({shown} ± {(high - low) / 2:.2f})")
            lines.append([title, f"{first['distance']:,}", *cells])
    head = ["", "distance", *(f"`{name}`" for name in names)]
    note = "In brackets: the difference from the first; 95 % over sequences. Bold: zero is not in it."
    return f"{markdown_table(head, lines)}\n\n*{note}*\n"


def _positions(report: Mapping[str, Any]) -> str:
    """Loss by position in the window."""
    models = report["models"]
    firsts = [each["first"] for each in next(iter(models.values()))["by_position"]]
    head = ["", *(f"from {first:,}" for first in firsts), "all"]
    lines = [
        [f"`{name}`", *(f"{each['loss']:.3f}" for each in model["by_position"]), f"{model['loss']:.3f}"]
        for name, model in models.items()
    ]
    note = "Loss in nats a token by its position in a window of 4,096, six texts together."
    return f"{markdown_table(head, lines)}\n\n*{note}*\n"


def _by_task(results: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {result["task"]: result for result in results}


def _over_items(accuracy: float, num_items: int) -> float:
    return 1.96 * math.sqrt(accuracy * (1 - accuracy) / num_items)


def _plain(value: float) -> str:
    """Without a sign where it is positive, or rounds to nothing."""
    return nats(value).removeprefix("+")


def _half(interval: Sequence[float]) -> float:
    return (interval[1] - interval[0]) / 2


def _groups(pairs: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Pairs by run: the ladder's ``27m-5-plain`` is "27 M × 5", of 27 M weights and 5 tokens for each."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for pair in pairs:
        run = pair["plain"].partition("-plain")[0]
        groups.setdefault(re.sub(r"^(\d+)m-(\d+)$", r"\1 M × \2", run), []).append(pair)
    return groups


def _told(groups: Mapping[str, Sequence[object]]) -> str:
    """How many seeds each run has."""
    seeds = (f"{name}: {len(group)} seed{'s' * (len(group) > 1)}" for name, group in groups.items())
    return f"{'; '.join(seeds)}."


def _escaped(text: str) -> str:
    """On one line, with what Markdown would take for its own marked."""
    return re.sub(r"([\\`*_\[\]<>#|~$])", r"\\\1", " ".join(text.split()))
