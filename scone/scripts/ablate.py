"""What each choice is worth: `scone ablate --config base.yaml --ablations combination rows backoff`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scone.configs.ablations import ABLATIONS
from scone.configs.loading import from_mapping, merge, parse_layers, print_notices, to_mapping
from scone.configs.schema import SconeOptions
from scone.utils.command_line import did_you_mean, run_main
from scone.utils.errors import SconeError
from scone.utils.files import atomic_path, read_json, write_json

if TYPE_CHECKING:
    from scone.training.run import Corpus

DESCRIPTION = """\
Train a base configuration, the plain trunk, and runs that change one choice of the base each, all on the same batches
with the same budget, and compare them on the validation split. The corpus is tokenised and counted once. Finished runs
are kept: after an interruption run the same command again. OUTPUT_DIR gets ablations.md, benchmark.json, .csv, .md and
benchmark.html, a report with plots; the models are removed once they are measured."""
EXAMPLES = (
    "scone ablate --config configs/base_config.yaml --max_steps 2000 --ablations combination rows backoff",
    "scone ablate --list",
)
DEFAULTS = {"training.output_dir": "./ablations"}
TEXT = "validation"
_MAY_CHANGE = ("output_dir", "resume_from_checkpoint", "device", "cache_dir", "num_workers", "memory_budget")


@dataclass(frozen=True)
class Run:
    """One model to train: its ablation, what it changes of the base, its seed, and all its options."""

    name: str
    group: str  # the name without the seed
    ablation: str
    changes: Mapping[str, Any]
    options: SconeOptions


def read_arguments(argv: Sequence[str] | None) -> tuple[SconeOptions, argparse.Namespace]:
    """The base options, and the script's own arguments. Raises SconeError."""
    layers, extra = parse_layers(
        argv,
        ("data", "model", "training"),
        DESCRIPTION,
        examples=EXAMPLES,
        add_arguments=_add_arguments,
        defaults=DEFAULTS,
    )
    base, notices = merge(layers, DEFAULTS)
    print_notices(notices)
    for name in extra.ablations:
        if name not in ABLATIONS:
            advice = did_you_mean(name, ABLATIONS) or f"expected {', '.join(ABLATIONS)}"
            raise SconeError(f"--ablations: found the unknown ablation {name}; {advice}")
    return base, extra


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not finished yet, print the table and say where the report is."""
    base, extra = read_arguments(argv)
    runs = planned_runs(base, extra.ablations, extra.seeds)
    if extra.list:
        print("\n".join(f"{run.ablation:22}{run.name:24}{_described(run.changes)}" for run in runs))
        return 0
    from scone.evaluation.experiment import count_once
    from scone.training.run import prepare_run_corpus

    folder = Path(base.training.output_dir)
    waiting = [run for run in runs if not is_finished(folder, run)]
    corpus = prepare_run_corpus(base)
    if corpus.validation is None:
        raise SconeError(
            f"{base.data.dataset_name!r} has no validation split; expected one to compare on; give another corpus"
        )
    if waiting:
        count_once([run.options for run in runs], corpus)
    for position, run in enumerate(runs, start=1):
        print(f"[{position}/{len(runs)}] {run.name}" + ("" if run in waiting else " (finished before)"), flush=True)
        if run in waiting:
            train_one(folder, run, corpus, runs)
    print("\n" + write_tables(folder, runs))
    return 0


def planned_runs(base: SconeOptions, names: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The base, the plain trunk, and the runs of the named ablations (none named: of all that apply).

    Raises SconeError when a named ablation does not apply to the base.
    """
    if not base.model.use_f_gram_embeddings or base.model.over_encoding_rows:
        raise SconeError("found a base without f-grams; expected one with them, of which choices are varied")
    plans: dict[str, tuple[str, Mapping[str, Any]]] = {
        "base": ("", {}),
        "plain": ("", {"model.use_f_gram_embeddings": False}),
    }
    for name in names or ABLATIONS:
        lacking = ABLATIONS[name].missing(base)
        if lacking is None:
            plans |= {run: (name, changes) for run, changes in ABLATIONS[name].runs(base).items()}
        elif names:
            raise SconeError(f"--ablations {name}: found a base without {lacking}; expected one; leave it out")
    return [
        _run(base, group, ablation, changes, seed, several=len(seeds) > 1)
        for group, (ablation, changes) in plans.items()
        for seed in seeds or (base.training.seed,)
    ]


def _run(base: SconeOptions, group: str, ablation: str, changes: Mapping[str, Any], seed: int, several: bool) -> Run:
    name = f"{group}-seed{seed}" if several else group
    mapping = to_mapping(base)
    own = {"training.seed": seed, "training.output_dir": str(Path(base.training.output_dir) / name)}
    for dotted, value in {**changes, **own}.items():
        *sections, last = dotted.split(".")
        place = mapping
        for section in sections:
            place = place[section]
        place[last] = value
    return Run(name, group, ablation, changes, from_mapping(mapping, name))


def is_finished(folder: Path, run: Run) -> bool:
    """Whether the run's result is there. Raises SconeError when it was made with other options."""
    path = folder / f"{run.name}.json"
    if not path.exists() or not (result := read_json(path)).get("finished"):
        return False
    now = to_mapping(run.options)
    for section, values in result["options"].items():
        for name, value in values.items():
            if name not in _MAY_CHANGE and now[section].get(name) != value:
                raise SconeError(
                    f"found {path}, made with {section}.{name} {value}; expected {now[section].get(name)}; "
                    "choose another --output_dir, or remove the file to train it again"
                )
    return True


def train_one(folder: Path, run: Run, corpus: Corpus, runs: Sequence[Run]) -> None:
    """Train and measure one run, from its checkpoint where it was interrupted; its JSON says when it is done."""
    from scone.evaluation.experiment import Tests, can_resume, measured_run, shared_matcher

    assert corpus.validation is not None
    options = run.options
    if can_resume(folder / run.name):
        options = replace(options, training=replace(options.training, resume_from_checkpoint="true"))
    path = folder / f"{run.name}.json"
    tests = Tests({TEXT: corpus.validation}, shared_matcher([each.options for each in runs], corpus))
    result = measured_run(options, corpus, tests, progress_path=path)
    write_json(
        path, {"ablation": run.ablation, "changes": dict(run.changes)} | result | {"options": to_mapping(options)}
    )


def write_tables(folder: Path, runs: Sequence[Run]) -> str:
    """Write ablations.md and the report; returns the table."""
    from scone.evaluation.experiment import paired_difference, run_result
    from scone.evaluation.measure import describe_machine
    from scone.evaluation.results import PLAIN, write_report

    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    found = {run.name: read_json(folder / f"{run.name}.json") for run in runs}
    lines = [
        "| run | changes | perplexity | to base, nats | training FLOPs | seconds |",
        "|---|---|---:|---:|---:|---:|",
    ]
    results = []
    base = [found[run.name] for run in groups["base"]]
    for group, members in groups.items():
        measured = [found[run.name] for run in members]
        result = run_result(group, PLAIN if group == "plain" else group, members[0].options, measured)
        results.append(result)
        windows = [[loss for run in each for loss in run["tests"][TEXT]["window_losses"]] for each in (base, measured)]
        difference, half = paired_difference(*windows)
        shown = "–" if group == "base" else f"{difference:+.4f} ± {half:.4f}"
        cost = measured[0]["cost"]["training_flops"] / base[0]["cost"]["training_flops"]
        seconds = sum(run["train_seconds"] for run in measured) / len(measured)
        lines.append(
            f"| {group} | {_described(members[0].changes)} | {result.perplexity_of(TEXT):.3f} | {shown} | {cost:.2f}× "
            f"| {seconds:.0f} |"
        )
    table = "\n".join(lines)
    with atomic_path(folder / "ablations.md") as temporary:
        temporary.write_text(f"{table}\n", encoding="utf-8")
    notes = [
        "All runs saw the same batches of a seed. Differences are per window of the validation split, with 95 % "
        "intervals over windows: another text, not another seed."
    ]
    write_report(results, folder, title="Ablations", facts={"machine": describe_machine(), "notes": notes})
    return f"{table}\n\nreport: {folder / 'benchmark.html'}"


def _described(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.split('.', 1)[1]} {value}" for name, value in changes.items()) or "–"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    listed = "; ".join(f"{name}: {ablation.help}" for name, ablation in ABLATIONS.items())
    parser.add_argument(
        "--ablations", nargs="+", default=[], metavar="NAME", help=f"what to vary (default: all that apply). {listed}"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[], metavar="SEED", help="seeds of every run (default: the base's)"
    )
    parser.add_argument("--list", action="store_true", help="show the runs and stop")


if __name__ == "__main__":
    sys.exit(run_main(main))
