"""Train several input embeddings under one budget and compare: ``python experiments/run.py experiments/NAME.yaml``.

A result repeats its experiment: ``python experiments/run.py docs/results/NAME.json …``. A YAML names the tokenizer and
the token files of train, validation and test texts, ``base`` options, and ``runs``: what each run changes of them, and
its ``seeds`` where it has several; ``{data}`` in it is the folder of ``--data``. ``train_tokens`` gives a run only the
beginning of the train file, f-grams too; ``lora_rank`` trains adapters in place of the trunk. ``test_tokens`` tests on
the beginning of each text alone; ``curve_tokens`` does so at every evaluation.
Runs of one train file see the same batches. f-grams are counted once, before the first run. Finished runs are kept and
skipped, so an interrupted experiment goes on where it was. ``--jobs`` runs several at once, those that compute most
first or those that ``--only`` names first, spread over ``--gpus`` GPUs; ``--processes`` splits each run's batches over
so many processes, a GPU each. With
``--deadline_s`` everything is over by then: ``--grace_s`` before it nothing more is started and what runs saves a
checkpoint, from which the same command goes on; its loss curve up to there is kept, marked as unfinished. The result
is one JSON with configuration, machine and commit, and a table, last.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from common import measured_on  # noqa: E402

from scone.configs.loading import from_mapping  # noqa: E402
from scone.configs.schema import DataOptions, SconeOptions  # noqa: E402
from scone.utils.command_line import run_main  # noqa: E402
from scone.utils.errors import SconeError  # noqa: E402
from scone.utils.files import read_json, write_json  # noqa: E402
from scone.utils.text import markdown_table  # noqa: E402

if TYPE_CHECKING:
    from scone.data.token_file import TokenFile

TRUNK = "model.base_model_name"
INTERRUPTED = 130
POLL_SECONDS = 0.5
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything an experiment reads lies on this machine


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not finished yet, merge and print. Raises SconeError."""
    arguments = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # workers are ended, not left behind
    plan = Plan.read(arguments)
    plan.check_folder()
    if arguments.gpus is not None and not arguments.worker:
        check_gpus(arguments.gpus, arguments.processes)
    if arguments.worker:
        plan.run(arguments.worker, arguments.keep_models)
        return 0
    names = [name for name in plan.options if chosen(name, arguments.only, arguments.skip)]
    if not names:
        raise SconeError(f"found no run of {arguments.experiment} to start; it has {', '.join(plan.options)}")
    started = time.monotonic()
    ordered = sorted(names, key=lambda name: place(name, arguments.only) if arguments.only else -plan.cost(name))
    if arguments.list:
        print("\n".join(ordered))
        return 0
    pending = [name for name in ordered if not is_finished(plan.output_dir / f"{name}.json")]
    print(f"{len(names)} runs, {len(names) - len(pending)} of them finished before", flush=True)
    if pending:
        plan.prepare(pending)
        print(f"counted and compiled in {time.monotonic() - started:.0f} s", flush=True)
    last_start = None if arguments.deadline_s is None else started + arguments.deadline_s - arguments.grace_s
    command = [sys.executable, *sys.argv]
    if (processes := arguments.processes) > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*torchrun, *sys.argv]
    failed, cut = run_all(
        *(pending, plan.output_dir, arguments.jobs, command, last_start, arguments.grace_s, arguments.gpus, processes)
    )
    result = plan.merge()
    write_json(arguments.json or plan.output_dir / "result.json", result)
    print(table(result))
    if cut:
        print(f"cut off or not started: {', '.join(cut)}", file=sys.stderr)
    if failed:
        print(f"failed: {', '.join(failed)} (see their .log files in {plan.output_dir})", file=sys.stderr)
    return 1 if failed else 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of the tokenizer and token files it names")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--gpus", type=int, help="give each run one of so many GPUs (default: all see all)")
    parser.add_argument("--processes", type=int, default=1, help="of each run, on a GPU each (default 1)")
    parser.add_argument("--only", nargs="*", help="these runs alone, in this order (all seeds, or one)")
    parser.add_argument("--skip", nargs="*", default=[], help="all but these runs")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="changes to the base options")
    parser.add_argument("--deadline_s", type=float, help="seconds after which nothing runs any more")
    parser.add_argument("--grace_s", type=float, default=45, help="seconds of these to save checkpoints in")
    parser.add_argument("--keep_models", action="store_true", help="keep the trained models too")
    parser.add_argument("--list", action="store_true", help="show the runs in the order of their start, and stop")
    parser.add_argument("--json", type=Path, help="write the merged result here (default OUTPUT_DIR/result.json)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Plan:
    """An experiment's YAML and where it reads and writes. ``runs``: full name → (run, changes); the rest by it.

    ``train_tokens``: how many the run reads of the train file, about; 0: all. ``lora_rank``: 0: no adapters.
    """

    name: str
    experiment: Mapping[str, Any]
    data: Path
    output_dir: Path
    runs: Mapping[str, tuple[str, Mapping[str, Any]]]
    options: Mapping[str, SconeOptions]
    train_tokens: Mapping[str, int]
    lora_rank: Mapping[str, int]
    processes: int

    @classmethod
    def read(cls, arguments: argparse.Namespace) -> Plan:
        """Every run's options, checked before anything starts. Raises SconeError."""
        if arguments.experiment.suffix == ".json":
            experiment = read_json(arguments.experiment)["experiment"]
            ranking = "frequency"  # results of before there were two do not name it
        else:
            experiment = yaml.safe_load(arguments.experiment.read_text(encoding="utf-8"))
            ranking = DataOptions().ranking
        experiment["base"] = {"data.ranking": ranking} | experiment["base"]
        overrides = dict(pair.split("=", 1) for pair in arguments.set)
        runs: dict[str, tuple[str, Mapping[str, Any]]] = {}
        for name, changes in experiment["runs"].items():
            seeds = changes.get("seeds")
            rest = {option: value for option, value in changes.items() if option != "seeds"}
            if seeds is None:
                runs[name] = (name, rest)
            for seed in seeds or ():
                runs[f"{name}-seed{seed}"] = (name, rest | {"training.seed": seed})
        options, train_tokens, lora_rank = {}, {}, {}
        for name, (_, changes) in runs.items():
            places = {
                "training.output_dir": str(arguments.output_dir / name),
                "data.cache_dir": str(arguments.output_dir / "cache"),
                "training.save_steps": 10**9,
                "training.report_to": "none",
            }
            values = {**experiment["base"], **places, **changes, **overrides}
            if TRUNK in values:  # a pretrained one lies beside the token files, as the tokenizer does
                values[TRUNK] = values[TRUNK].format(data=arguments.data)
            train_tokens[name] = int(values.pop("train_tokens", 0))
            lora_rank[name] = int(values.pop("lora_rank", 0))
            options[name] = split(from_mapping(nested(values), name), arguments.processes)
        name, data, output_dir = arguments.experiment.stem, arguments.data, arguments.output_dir
        return cls(name, experiment, data, output_dir, runs, options, train_tokens, lora_rank, arguments.processes)

    def check_folder(self) -> None:
        """Raises SconeError when a run's result is another experiment's: it would count as finished."""
        for path in (self.output_dir / f"{name}.json" for name in self.runs):
            owner = read_json(path).get("experiment", self.name) if path.exists() else self.name
            if owner != self.name:
                raise SconeError(
                    f"found {path}, a run of the experiment {owner}; expected those of {self.name}, which has that "
                    "name; give each experiment its own --output_dir"
                )

    def corpus(self, train_tokens: int = 0) -> Any:
        """Tokenizer, train and validation tokens; of the train file the documents up to ``train_tokens``."""
        from scone.data.token_file import TokenFile
        from scone.tokenization.tokenizers import load_tokenizer
        from scone.training.run import Corpus

        train = TokenFile.open(self.data / self.experiment["train"])
        if train_tokens:
            train = beginning(train, train_tokens, self.output_dir / "cache" / f"train-{train_tokens}")
        return Corpus(
            load_tokenizer(self.experiment["tokenizer"].format(data=self.data)),
            train,
            TokenFile.open(self.data / self.experiment["validation"]),
        )

    def same_text(self, train_tokens: int) -> list[SconeOptions]:
        """Options of all runs that read as much of the train file: their losses are grouped by the same f-grams."""
        return [options for name, options in self.options.items() if self.train_tokens[name] == train_tokens]

    def cost(self, name: str) -> float:
        """About what a run computes, up to a factor: those with most start first."""
        options = self.options[name]
        training, model = options.training, options.model
        tokens = training.max_steps * training.batch_size * training.gradient_accumulation_steps
        tokens *= options.data.max_length
        return float(tokens * (model.hidden_size or 768) ** 2 * (model.num_hidden_layers or 12))

    def prepare(self, names: Sequence[str] | None = None) -> None:
        """Count the vocabularies of ``names`` (None: all), and compile what each worker would compile for itself."""
        from scone.data.dataset import BlockDataset, Collator
        from scone.evaluation.sweep import count_once, shared_matcher

        for train_tokens in {self.train_tokens[name] for name in (names or self.runs)}:
            corpus, runs = self.corpus(train_tokens), self.same_text(train_tokens)
            count_once(runs, corpus, num_processes=self.processes, quiet=True)
            matcher = shared_matcher(runs, corpus, num_processes=self.processes)
            if matcher is not None:
                Collator(matcher.vocabulary, num_rows=1)([BlockDataset(corpus.train, 32)[0]])
        for test in {self.experiment["validation"], *self.experiment["tests"]}:
            if not (self.data / test).is_dir():
                raise SconeError(f"found no token file {test} in {self.data}; the experiment names it; make it first")

    def run(self, name: str, keep_model: bool) -> None:
        """Train and test one configuration; its JSON is marked as finished when it is done."""
        from measured_run import measured_run

        from scone.data.token_file import TokenFile
        from scone.evaluation.sweep import shared_matcher
        from scone.training.options import ranked

        run, changes = self.runs[name]
        path, corpus = self.output_dir / f"{name}.json", self.corpus(self.train_tokens[name])
        options = ranked(self.options[name], corpus.train.num_tokens, self.processes)
        result = measured_run(
            options,
            corpus,
            {test: TokenFile.open(self.data / test) for test in self.experiment["tests"]},
            path,
            matcher=shared_matcher(self.same_text(self.train_tokens[name]), corpus, num_processes=self.processes),
            stride=self.experiment.get("stride"),
            curve_tokens=self.experiment.get("curve_tokens", 0),
            test_tokens=self.experiment.get("test_tokens", 0),
            lora_rank=self.lora_rank[name],
            keep_model=keep_model,
        )
        if result:
            facts = {"experiment": self.name, "run": run, "changes": changes, "ranking": options.data.ranking}
            write_json(path, facts | result)

    def merge(self) -> dict[str, Any]:
        """All runs that left something, finished or not, in one mapping; of windows the means of some neighbours."""
        found = {name: read_json(path) for name in self.runs if (path := self.output_dir / f"{name}.json").exists()}
        for name, result in found.items():
            run, changes = self.runs[name]
            result |= {"run": run, "changes": dict(changes)}
            for test in result.get("tests", {}).values():
                if windows := test.pop("window_losses", None):
                    test["block_losses"] = block_means(windows)
        return {"experiment": self.experiment, **measured_on(), "runs": found}


def split(options: SconeOptions, processes: int) -> SconeOptions:
    """Each of so many processes takes its share of every batch: together they take the batches of one."""
    size = options.training.batch_size
    if processes < 1 or size % processes:
        expected = f"expected a multiple of --processes {processes}, at least one"
        raise SconeError(f"found batches of {size}; {expected}; give a number that divides it")
    return replace(options, training=replace(options.training, batch_size=size // processes))


def block_means(losses: Sequence[float], blocks: int = 48) -> list[float]:
    """Means of so many runs of neighbouring windows: neighbours are of one document, and are drawn together."""
    import numpy as np

    parts = np.array_split(np.asarray(losses), min(blocks, len(losses)))
    return [round(float(part.mean()), 5) for part in parts]


def beginning(file: TokenFile, tokens: int, folder: Path) -> TokenFile:
    """The first documents of ``file``, until there are as many ``tokens``; written to ``folder`` unless it is there."""
    import numpy as np

    from scone.data.token_file import TokenFile, TokenFileWriter

    if tokens > file.num_tokens:
        raise SconeError(f"found {file.num_tokens:,} tokens in {file.folder}; expected {tokens:,}; prepare more text")
    if not folder.exists():
        part = folder.with_suffix(".part")
        writer = TokenFileWriter(part, file.vocab_size, file.separator_id)
        start = 0
        for end in np.flatnonzero(np.asarray(file.tokens) == file.separator_id):
            writer.add_document(file.tokens[start:end])
            start = int(end) + 1
            if start >= tokens:
                break
        writer.finish({"tokenizer_fingerprint": file.metadata["tokenizer_fingerprint"]})
        part.rename(folder)
    return TokenFile.open(folder, check_content=False)


def table(experiment: Mapping[str, Any]) -> str:
    """Markdown: one line a run, its seeds taken together. FLOPs are those of the first run times; unfinished runs stand
    last. Bits a byte: the mean over tests, where all have them; it compares runs of different tokenizers too.
    """
    tests, groups = experiment["experiment"]["tests"], dict[str, list[Mapping[str, Any]]]()
    for name, run in experiment["runs"].items():
        if run.get("finished", True):
            groups.setdefault(run.get("run", name), []).append(run)
    rows: list[list[Any]] = []
    for name, runs in groups.items():
        cells = [perplexity_text([run["tests"][test]["loss"] for run in runs]) for test in tests]
        bits = [test.get("bits_per_byte") for run in runs for test in run["tests"].values()]
        cells.append(f"{statistics.fmean(bits):.4f}" if all(bits) else "–")
        base, costs = next(iter(groups.values()))[0]["cost"], ("inference_flops_per_token", "training_flops")
        pairs = [(runs[0]["cost"][cost], base[cost]) for cost in costs]
        cells += [f"{own / other:.2f}×" if own and other else "–" for own, other in pairs]
        rows.append([name, len(runs), *cells, f"{statistics.fmean(run['train_seconds'] for run in runs):.0f}"])
    head = ["run", "seeds", *tests, "bits a byte", "inference FLOPs", "training FLOPs", "training s"]
    lines = [markdown_table(head, rows)]
    for name, run in experiment["runs"].items():
        if not run.get("finished", True):
            last = [entry for entry in run["log"] if "eval_loss" in entry][-1:]
            loss = f"validation loss {last[0]['eval_loss']:.3f} at step {last[0]['step']}" if last else "no loss"
            lines.append(f"\nunfinished: {name}, {run['steps']} of {run['max_steps']} steps, {loss}")
    return "\n".join(lines)


def perplexity_text(losses: Sequence[float]) -> str:
    """exp of the mean loss over seeds, with ± half the range of perplexities where there are several."""
    text = f"{math.exp(statistics.fmean(losses)):.2f}"
    return text + (f" ± {(math.exp(max(losses)) - math.exp(min(losses))) / 2:.2f}" if len(losses) > 1 else "")


def chosen(name: str, only: Sequence[str] | None, skip: Sequence[str]) -> bool:
    """Whether the run, or the run that this is a seed of, is asked for."""
    return not names_of(name) & set(skip) and (not only or bool(names_of(name) & set(only)))


def place(name: str, only: Sequence[str]) -> int:
    """Where the run stands in ``only``."""
    return next(place for place, wanted in enumerate(only) if wanted in names_of(name))


def names_of(name: str) -> set[str]:
    """A run's own name, and that of the run that it is a seed of."""
    return {name, name.rsplit("-seed", 1)[0]}


def check_gpus(wanted: int, processes: int) -> None:
    """Raises SconeError where there are not so many: a run that sees none would train on the CPU."""
    import torch

    if not processes <= wanted <= torch.cuda.device_count():
        raise SconeError(
            f"found {torch.cuda.device_count()} GPUs; expected {wanted}, at least one a process of a run "
            f"({processes}); give --gpus what is there"
        )


def is_finished(path: Path) -> bool:
    """Whether the run's JSON is there and says that the run came to its end."""
    return path.exists() and bool(read_json(path).get("finished", True))


def run_all(
    names: Sequence[str],
    output_dir: Path,
    jobs: int,
    command: Sequence[str],
    last_start: float | None = None,
    grace_s: float = 0.0,
    gpus: int | None = None,
    processes: int = 1,
) -> tuple[list[str], list[str]]:
    """Run each configuration in its own process (group), so that one failure or leak stays its own; ``jobs`` at once.

    Args:
        command: this script's, to which each worker's name is added.
        last_start: the monotonic time from which nothing is started and what runs is asked to stop.
        grace_s: how long it may take for that, before it is killed.
        gpus: each sees, of the first so many GPUs that we were given, as many as it has ``processes``, those with the
            fewest others; None: all.

    Returns those that failed, and those that were cut off or never started.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    threads = max(1, len(os.sched_getaffinity(0)) // (jobs * processes))  # each run's share of the cores
    waiting, failed = list(names), list[str]()
    running: dict[str, tuple[subprocess.Popen[bytes], float, list[int]]] = {}  # its process, start and GPUs

    def start(name: str) -> None:
        environment, own = (
            os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
            list[int](),
        )
        if gpus is not None:
            taken = [gpu for *_, its in running.values() for gpu in its]
            own = sorted(range(gpus), key=taken.count)[:processes]
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(
                visible.split(",")[gpu] if visible else str(gpu) for gpu in own
            )
        with (output_dir / f"{name}.log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [*command, "--worker", name], stdout=log, stderr=log, env=environment, start_new_session=True
            )
        running[name] = process, time.monotonic(), own

    def collect() -> None:
        time.sleep(POLL_SECONDS)
        for name, (process, started, _) in [*running.items()]:
            if (status := process.poll()) is not None:
                del running[name]
                word = {0: "finished", INTERRUPTED: "interrupted"}.get(status, "failed")
                print(f"{name}: {word} after {time.monotonic() - started:.0f} s", flush=True)
                if word == "failed" and (last_start is None or time.monotonic() < last_start):
                    failed.append(name)

    try:
        while (waiting or running) and (last_start is None or time.monotonic() < last_start):
            while waiting and len(running) < jobs:
                start(waiting.pop(0))
            collect()
        cut = [*running, *waiting]
        for process, *_ in running.values():
            process.terminate()
        while running and time.monotonic() < last_start + grace_s:
            collect()
    finally:
        for process, *_ in running.values():  # with its data loaders, at once: its log is on disk
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return failed, [name for name in cut if not is_finished(output_dir / f"{name}.json")]


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` → ``{"a": {"b": 1}}``."""
    result: dict[str, Any] = {}
    for dotted, value in flat.items():
        place = result
        *sections, last = dotted.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return result


if __name__ == "__main__":
    sys.exit(run_main(main))
