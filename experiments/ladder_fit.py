"""The ladder's runs as compute multipliers: how much more training compute plain needs for the same loss.

    python experiments/ladder_fit.py RESULT.json … --json docs/results/ladder.json

puts the results of experiments/run.py together (later files add runs), with what a reader may want of each; everything
else is computed from that file. Of each size plain's loss is fitted by a + b·C^−β over training FLOPs C; a run's
multiplier is the C at which plain has its loss, divided by the run's own. Intervals draw the texts' blocks of windows
again, the same ones for all runs, and move each run by the spread of its seeds (of one seed: by that of all that have
several). Between two runs of plain alone the curve is a straight line in log C, which asks beyond them for less compute
than a curve would.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY)]

from scone.utils.command_line import run_main  # noqa: E402
from scone.utils.errors import SconeError  # noqa: E402
from scone.utils.files import read_json, write_json  # noqa: E402

PLAIN, DOUBLED, OVER_ENCODING = "plain", "plain-doubled", "over-encoding"
ROWS, GAIN = "rows", "rows-gain"  # of the most frequent f-grams; of those ranked by gain, which are the default
DRAWS = 1000
EXPONENTS = np.geomspace(0.02, 1.5, 600)


@dataclass(frozen=True)
class Rung:
    """Runs that differ in the seed alone.

    ``losses``: text → its loss, the mean over seeds; ``blocks``: text → losses of its blocks of windows [n], likewise.
    """

    size: str
    per_weight: str
    kind: str
    flops: float
    tokens: int
    seeds: int
    losses: Mapping[str, float]
    blocks: Mapping[str, np.ndarray]
    spread: float | None  # standard deviation of the mean loss over seeds

    @property
    def loss(self) -> float:
        """The mean over texts, each counting the same."""
        return statistics.fmean(self.losses.values())


@dataclass(frozen=True)
class Multiplier:
    """``low`` to ``high``: 95 %. ``beyond``: plain's curve had to be read outside its runs."""

    rung: Rung
    value: float
    low: float
    high: float
    beyond: bool


def rungs_of(report: Mapping[str, Any]) -> list[Rung]:
    """All finished runs whose names are SIZE-TOKENS PER WEIGHT-KIND, seeds taken together."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for run in report["runs"].values():
        size, per_weight, kind = ([*run["run"].split("-", 2), "", ""])[:3]
        if per_weight.isdigit() and run.get("finished", True):
            groups.setdefault((size, per_weight, kind), []).append(run)
    return [_rung(*key, runs) for key, runs in groups.items()]


def _rung(size: str, per_weight: str, kind: str, runs: Sequence[Mapping[str, Any]]) -> Rung:
    texts = list(runs[0]["tests"])
    losses = {text: statistics.fmean(run["tests"][text]["loss"] for run in runs) for text in texts}
    blocks = {text: np.mean([run["tests"][text]["block_losses"] for run in runs], axis=0) for text in texts}
    means = [statistics.fmean(run["tests"][text]["loss"] for text in texts) for run in runs]
    spread = statistics.stdev(means) if len(means) > 1 else None
    return Rung(
        *(size, per_weight, kind, runs[0]["cost"]["training_flops"], runs[0]["tokens"]),
        *(len(runs), losses, blocks, spread),
    )


def multipliers(rungs: Sequence[Rung], draws: int = DRAWS, curve: str = PLAIN) -> list[Multiplier]:
    """Of every rung that is not plain, where its size has two plain rungs or more (else there is no curve).

    With another ``curve`` than plain's: of the rungs of all other kinds, plain's too, on that kind's curve.
    """
    return [each for size in dict.fromkeys(rung.size for rung in rungs) for each in _of_size(rungs, size, draws, curve)]


def savings(rungs: Sequence[Rung], kind: str, draws: int = DRAWS) -> list[Multiplier]:
    """Of every plain rung: its training FLOPs, divided by those at which ``kind`` has its loss.

    As `multipliers`, but read on that kind's curve, which may reach a loss that plain's does not.
    """
    found = [each for each in multipliers(rungs, draws, kind) if each.rung.kind == PLAIN]
    return [Multiplier(each.rung, 1 / each.value, 1 / each.high, 1 / each.low, each.beyond) for each in found]


def _of_size(rungs: Sequence[Rung], size: str, draws: int, curve: str) -> list[Multiplier]:
    plain = sorted((rung for rung in rungs if (rung.size, rung.kind) == (size, curve)), key=lambda rung: rung.flops)
    others = [rung for rung in rungs if rung.size == size and rung.kind != curve]
    others.sort(key=lambda rung: (int(rung.per_weight), rung.kind))  # draws do not depend on the file
    if len(plain) < 2 or not others:
        return []
    flops = np.array([rung.flops for rung in plain])
    drawn = drawn_losses([*plain, *others], seed_spread(rungs), draws)  # [1 + draws, rungs], the first as measured
    found = []
    for place, rung in enumerate(others, start=len(plain)):
        reached = flops_of_loss(flops, drawn[:, : len(plain)], drawn[:, place]) / rung.flops
        low, high = np.quantile(reached[1:], (0.025, 0.975), method="nearest")
        beyond = not plain[-1].loss <= rung.loss <= plain[0].loss
        found.append(Multiplier(rung, float(reached[0]), float(low), float(high), beyond))
    return found


def seed_spread(rungs: Iterable[Rung]) -> float:
    """Standard deviation of the mean loss over seeds, of all rungs with several together; 0 where none has."""
    several = [(rung.seeds - 1, rung.spread) for rung in rungs if rung.spread is not None]
    total = sum(degrees for degrees, _ in several)
    return (sum(degrees * spread**2 for degrees, spread in several) / total) ** 0.5 if total else 0.0


def drawn_losses(rungs: Sequence[Rung], spread: float, draws: int) -> np.ndarray:
    """Mean losses [1 + draws, rungs]: first the measured ones, then with blocks drawn again and seeds' noise."""
    generator = np.random.default_rng(1)
    result = np.tile([rung.loss for rung in rungs], (1 + draws, 1))
    texts = list(rungs[0].losses)
    for text in texts:
        blocks = np.stack([rung.blocks[text] for rung in rungs])  # [rungs, n]
        again = generator.integers(blocks.shape[1], size=(draws, blocks.shape[1]))
        result[1:] += (blocks[:, again].mean(-1).T - blocks.mean(-1)) / len(texts)
    noise = np.array([spread if rung.spread is None else rung.spread for rung in rungs])
    result[1:] += generator.normal(size=(draws, len(rungs))) * noise / np.sqrt([rung.seeds for rung in rungs])
    return result


def flops_of_loss(flops: np.ndarray, losses: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Training FLOPs [k] at which the curve through ``losses`` [k, n] at ``flops`` [n] comes down to ``wanted`` [k].

    The curve is a + b·C^−β of least squares, β from a grid, a never below zero; infinity where it never comes there.
    Of two runs it is the straight line in log C, which falls for longer than a curve would: it asks for less compute.
    """
    if len(flops) == 2:
        slope = np.log(flops[1] / flops[0]) / (losses[:, 1] - losses[:, 0])
        return np.where(slope < 0, flops[0] * np.exp((wanted - losses[:, 0]) * slope), np.inf)
    a, b, exponents = fit(flops, losses)
    with np.errstate(divide="ignore", invalid="ignore"):
        reached = flops[0] * ((wanted - a) / b) ** (-1 / exponents)
    return np.where(wanted > a, reached, np.inf)


def fit(flops: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``a``, ``b``, ``β`` [k] of a + b·(C / C₀)^−β for each line of ``losses`` [k, n]; C₀: the first of ``flops``."""
    found = []
    for exponent in EXPONENTS:
        x = (flops / flops[0]) ** -exponent
        centred = x - x.mean()
        b = np.maximum(losses @ centred / (centred @ centred), 1e-9)
        a = losses.mean(1) - b * x.mean()
        below = a < 0
        a, b = np.where(below, 0.0, a), np.where(below, losses @ x / (x @ x), b)
        error = ((losses - a[:, None] - b[:, None] * x) ** 2).sum(1)
        found.append((error, a, b, np.full(len(losses), exponent)))
    errors, *rest = (np.stack(parts) for parts in zip(*found, strict=True))
    best = errors.argmin(0)
    a, b, exponents = (part[best, np.arange(losses.shape[0])] for part in rest)
    return a, b, exponents


def beside(rungs: Sequence[Rung], kind: str) -> list[tuple[Rung, Rung]]:
    """Each rung of learned rows with that of ``kind`` at the same size and tokens; by gain where that was run."""
    own, by_gain, peers = (
        {(rung.size, rung.per_weight): rung for rung in rungs if rung.kind == each} for each in (ROWS, GAIN, kind)
    )
    return [(rung, peers[place]) for place, rung in (own | by_gain).items() if place in peers]


def compact(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of each run what `rungs_of`, the tables and the plot need, its curve, and what it cost."""
    kept = (
        "run",
        "changes",
        "finished",
        "seed",
        "steps",
        "tokens",
        "train_tokens",
        "train_seconds",
        "cost",
        "parameters",
        "ranking",
    )
    fields = ("loss", "perplexity", "bits_per_byte", "by_match_length", "by_rank", "block_losses")
    found = {}
    for name, run in runs.items():
        tests = {
            text: {field: test[field] for field in fields if field in test}
            for text, test in run.get("tests", {}).items()
        }
        curve = [
            {"step": entry["step"], "validation": entry["eval_loss"], "texts": entry.get("text_losses", {})}
            for entry in run["log"]
            if "eval_loss" in entry
        ]
        found[name] = {field: run[field] for field in kept if field in run} | {"tests": tests, "curve": curve}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Put the results together and print the multipliers. Raises SconeError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSONs of experiments/run.py, or one that this made")
    parser.add_argument("--json", type=Path, help="write what they say together here")
    arguments = parser.parse_args(argv)
    report: dict[str, Any] = {"runs": {}}
    for path in arguments.results:
        part = read_json(path)
        if "runs" not in part:
            raise SconeError(f"found no runs in {path}; expected a result of experiments/run.py; give another file")
        runs = part["runs"] if part.get("ladder") else compact(part["runs"])
        finished = {name for name, run in report["runs"].items() if run.get("finished", True)}
        report["runs"] |= {name: run for name, run in runs.items() if run.get("finished", True) or name not in finished}
        report |= {key: value for key, value in part.items() if key != "runs"}
    if arguments.json:
        write_json(arguments.json, {"ladder": True} | report)
    for each in multipliers(rungs_of(report)):
        rung = each.rung
        print(f"{rung.size} {rung.per_weight} {rung.kind}: {shown(each)}, loss {rung.loss:.4f}, {rung.seeds} seed(s)")
    return 0


def shown(multiplier: Multiplier) -> str:
    """``1.52 (1.41 to 1.66)``, with a star where plain's curve was read outside its runs."""
    star = "*" if multiplier.beyond else ""
    return f"{multiplier.value:.2f}{star} ({multiplier.low:.2f} to {multiplier.high:.2f})"


if __name__ == "__main__":
    sys.exit(run_main(main))
