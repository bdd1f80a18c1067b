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
    """Bits per byte of plain with larger vocabularies, beside plain and rows of the small one."""
    runs = list(report["runs"].values())
    texts = list(runs[0]["tests"])
    first = runs[0]
    lines = []
    for run in runs:
        bits = [run["tests"][text]["bits_per_byte"] for text in texts]
        flops = run["cost"]["training_flops"] / first["cost"]["training_flops"]
        per_token = run["cost"]["inference_flops_per_token"] / first["cost"]["inference_flops_per_token"]
        costs = [f"{run['tokens'] / 1e6:.1f} M", f"{flops:.2f}×", f"{per_token:.1f}×"]
        lines.append([f"`{run['run']}`", *costs, *(f"{each:.3f}" for each in [*bits, statistics.fmean(bits)])])
    head = ["", "tokens", "training FLOPs", "FLOPs a token", *(NAMES.get(text, text) for text in texts), "mean"]
    return f"{markdown_table(head, lines)}\n\n*Bits per byte; a seed each. FLOPs are those of the first line times.*\n"


def _tasks(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Of all pairs the mean, with the spread over seeds (of the difference) and over items (of each)."""
    found = [{kind: _by_task(pair["tasks"][kind]) for kind in ("plain", "rows")} for pair in pairs if "tasks" in pair]
    lines, differences = [], []
    for task, first in found[0]["plain"].items():
        means = {kind: statistics.fmean(each[kind][task]["accuracy"] for each in found) for kind in ("plain", "rows")}
        differences.append([each["rows"][task]["accuracy"] - each["plain"][task]["accuracy"] for each in found])
        cells = [f"{mean:.3f} ± {_over_items(mean, first['num_items']):.3f}" for mean in means.values()]
        lines.append([task, f"{first['num_items']:,}", f"{first['chance']:.3f}", *cells, _spread(differences[-1], 3)])
    by_seed = [statistics.fmean(each) for each in zip(*differences, strict=True)]
    means = [statistics.fmean(task["accuracy"] for each in found for task in each[kind].values()) for kind in found[0]]
    lines.append(["mean", "", "", *(f"{mean:.3f}" for mean in means), _spread(by_seed, 3)])
    for task, first in found[0]["plain"].items():
        if first["perplexity"] is not None:
            logs = {kind: [math.log(each[kind][task]["perplexity"]) for each in found] for kind in ("plain", "rows")}
            changes = [rows - plain for plain, rows in zip(logs["plain"], logs["rows"], strict=True)]
            cells = [f"{math.exp(statistics.fmean(each)):,.0f}" for each in logs.values()]
            change = percent(math.expm1(statistics.fmean(changes)))
            lines.append([f"{task}, perplexity", f"{first['num_items']:,}", "", *cells, change])
    head = ["task", "items", "chance", "plain", "rows", "difference"]
    note = f"{_seeds(found)} ±: 95 % over items. In brackets: least and most of the seeds."
    return f"{markdown_table(head, lines)}\n\n*{note}*\n"


def _silenced(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Perplexity of plain, and what rows and silenced rows change."""
    texts, lines = list(pairs[0]["by_text"]), []
    changes: dict[str, list[list[float]]] = {"rows": [], "silenced": []}
    for text in texts:
        of_text = [pair["by_text"][text] for pair in pairs]
        cells = [f"{math.exp(statistics.fmean(each['plain'] for each in of_text)):.1f}"]
        for kind, collected in changes.items():
            collected.append([each[kind] - each["plain"] for each in of_text])
            low, high = (
                statistics.fmean(each[f"{kind}_minus_plain"]["interval"][end] for each in of_text) for end in (0, 1)
            )
            cells.append(f"{percent(math.expm1(statistics.fmean(collected[-1])))} ({_change(low)} to {_change(high)})")
        lines.append([NAMES.get(text, text), *cells])
    means = [percent(math.expm1(statistics.fmean(map(statistics.fmean, each)))) for each in changes.values()]
    lines.append(["mean", "", *means])
    head = ["text", "plain", "rows", "rows silenced"]
    note = f"Perplexity of plain, and the change from it (95 % over windows). {_seeds(pairs)}"
    return f"{markdown_table(head, lines)}\n\n*{note}*\n"


def _visits(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Loss by how often the f-gram was seen."""
    by_first = {each["first"]: [] for pair in pairs for each in pair["by_visits"]}
    for pair in pairs:
        for each in pair["by_visits"]:
            by_first[each["first"]].append(each)
    firsts, lines = sorted(by_first), []
    for place, first in enumerate(firsts):
        mean = {
            key: statistics.fmean(each[key] for each in by_first[first])
            for key in ("share", "plain", "rows", "silenced")
        }
        last = firsts[place + 1] - 1 if place + 1 < len(firsts) else None
        name = "no f-gram" if first == 0 else f"{first:,} and more" if last is None else f"{first:,} to {last:,}"
        changes = [nats(mean[kind] - mean["plain"]) for kind in ("rows", "silenced")]
        lines.append([name, f"{100 * mean['share']:.1f} %", f"{mean['plain']:.2f}", *changes])
    head = ["visits", "share of predictions", "plain", "rows", "rows silenced"]
    note = (
        "Loss of plain in nats a token, and the change from it, by how often the training text has the longest f-gram "
        f"that a token is predicted from. Six texts together. {_seeds(pairs)}"
    )
    return f"{markdown_table(head, lines)}\n\n*{note}*\n"


def _generations(pairs: Sequence[Mapping[str, Any]]) -> str:
    """All prompts of the first pair, as they came."""
    parts = []
    for number, each in enumerate(pairs[0]["generations"], 1):
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


def _spread(values: Sequence[float], digits: int) -> str:
    """The mean, and the least and most where there are several."""
    mean, *ends = (
        f"{each:+.{digits}f}".replace("-", "−") for each in (statistics.fmean(values), min(values), max(values))
    )
    return mean if len(values) == 1 else f"{mean} ({ends[0]} to {ends[1]})"


def _change(loss: float) -> str:
    return percent(math.expm1(loss)).removesuffix(" %")


def _seeds(pairs: Sequence[object]) -> str:
    return "One seed." if len(pairs) == 1 else f"Means of {len(pairs)} seeds."


def _escaped(text: str) -> str:
    """On one line, with what Markdown would take for its own marked."""
    return re.sub(r"([\\`*_\[\]<>#|~$])", r"\\\1", " ".join(text.split()))
