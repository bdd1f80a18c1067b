"""What every benchmark shares: options, machine and commit, medians of interleaved runs, the table and the JSON.

A benchmark is a script ``bench_NAME.py`` that makes one ``Report``, adds records to it and calls ``finish``:

    report = Report.from_arguments("counting", __doc__)
    times = interleaved({"ours": run_ours, "polars": run_polars}, repeats=3)
    report.add("speed_vs_polars", "tokens/s", ours, theirs, "polars", target=3.0)
    report.finish()
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "experiments")]

from scone.utils.environment import PeakMemory, environment  # noqa: E402, F401 (for the benchmarks)
from scone.utils.files import write_json  # noqa: E402
from scone.utils.text import markdown_table  # noqa: E402


@dataclass
class Report:
    """All records of one run of one benchmark, with what they were measured on."""

    benchmark: str
    quick: bool = False
    json_path: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_arguments(
        cls,
        benchmark: str,
        description: str | None,
        argv: Sequence[str] | None = None,
        add_options: Callable[[argparse.ArgumentParser], None] | None = None,
    ) -> Report:
        """Parse ``--quick`` and ``--json FILE``, and whatever ``add_options`` adds (its values land in ``config``)."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--quick", action="store_true", help="the same ratios at a smaller size, within 2 minutes")
        parser.add_argument("--json", type=Path, metavar="FILE", help="also write the records as JSON to FILE")
        if add_options:
            add_options(parser)
        options = vars(parser.parse_args(argv))
        return cls(benchmark, options["quick"], options.pop("json"), options)

    def add(
        self,
        metric: str,
        unit: str,
        ours: float | None,
        peer: float | None = None,
        peer_name: str | None = None,
        *,
        bound: float | None = None,
        ratio: float | Literal["ours/peer", "peer/ours", "ours"] | None = "ours/peer",
        target: float | None = None,
        most: float | None = None,
        interval: tuple[float, float] | None = None,
    ) -> None:
        """Add a record and print it. ``ratio`` is a number or says how it comes from ``ours`` and ``peer``.

        ``bound`` is what the hardware allows, in the unit of ``ours``; the target of the ratio is ``target`` or more,
        or it is ``most`` or less. ``interval``: where the ratio lies with 95 % confidence, for a benchmark that
        scatters by as much as it asks for.
        """
        if isinstance(ratio, str):
            above, below = {"ours/peer": (ours, peer), "peer/ours": (peer, ours), "ours": (ours, 1)}[ratio]
            ratio = above / below if above is not None and below else None
        met = None
        if ratio is not None and (target is not None or most is not None):
            met = ratio >= target if target is not None else ratio <= most
        record = {"metric": metric, "unit": unit, "ours": ours, "peer": peer, "peer_name": peer_name, "bound": bound}
        record |= {"ratio": ratio, "target": target if most is None else most, "met": met, "interval": interval}
        self.records.append(record)
        print("  ".join(_cells(record)), flush=True)
        self.write()  # what is measured is kept, should the rest not come to its end

    def finish(self) -> None:
        """Print the table; write the JSON where one was asked for."""
        print(f"\n{benchmark_table(self.to_json())}")
        self.write()

    def write(self) -> None:
        if self.json_path:
            write_json(self.json_path, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The form that ``BENCHMARKS`` fixes: benchmark, machine, commit, config, records."""
        config = json.loads(json.dumps(self.config, default=_shown))
        return {"benchmark": self.benchmark, **measured_on(), "config": config, "records": self.records}


def _shown(value: object) -> str:
    """A path by its name alone: folders of the measuring machine say nothing to a reader."""
    return value.name if isinstance(value, Path) else str(value)


def benchmark_table(report: Mapping[str, Any]) -> str:
    """Metric, ours, peer, ratio, target of a report's JSON, in Markdown; a missed target says so."""
    machine = report["machine"]
    cores = f"{machine['cores']} cores" if machine.get("cores") else None
    accelerators = ", ".join(
        f"{count} × {card}" if count > 1 else card for card, count in Counter(machine.get("accelerators") or []).items()
    )
    where = ", ".join(str(part) for part in (machine.get("processor"), cores, accelerators) if part)
    size = "Quick size, m" if report["config"].get("quick") else "M"
    table = markdown_table(("metric", "ours", "peer", "ratio", "target", ""), map(_cells, report["records"]))
    table = table.replace("|---:|\n", "|---|\n", 1)  # whether it was met is a word
    return f"{table}\n\n*{size}easured on {where} at commit {report['commit'][:10]}.*\n"


def _cells(record: Mapping[str, Any]) -> list[str]:
    name = f" ({record['peer_name']})" if record["peer_name"] else ""
    interval = record.get("interval")  # reports of before have none
    return [
        f"`{record['metric']}`",
        f"{_number(record['ours'])} {record['unit']}".strip() if record["ours"] is not None else "",
        f"{_number(record['peer'])}{name}" if record["peer"] is not None else name[2:-1],
        _number(record["ratio"]) + (f" ({_number(interval[0])} to {_number(interval[1])})" if interval else ""),
        _number(record["target"]),
        {None: "", True: "met", False: "**missed**"}[record["met"]],
    ]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value and abs(value) < 0.01:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def measured_on() -> dict[str, Any]:
    """``machine``, and the ``commit`` of the working tree: with ``-dirty`` when tracked files differ from it, "unknown"
    outside git.
    """
    found = environment()
    commit = found.pop("commit") or "unknown"
    return {"machine": found, "commit": commit}


def interleaved(runs: dict[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Median wall seconds of each run, taken in turn (a, b, a, b, …) so that a drifting machine drifts for all.

    The first ``warmup`` rounds are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def in_child(script: Path, arguments: Sequence[str], timeout_seconds: float | None = None) -> dict[str, Any]:
    """Run ``python script arguments`` in a process of its own and return the JSON object on its last output line.

    For measurements that need a clean process: peak memory, start-up, libraries that do not give threads back.
    Raises RuntimeError with the end of its error output when it fails.
    """
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=timeout_seconds, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{script.name} {' '.join(arguments)} exited with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().split("\n")[-1])


def stop(process: subprocess.Popen, grace_s: float = 30.0) -> None:
    """End a process that leads a group, and what it started; what does not answer ``grace_s`` long is killed."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=grace_s)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def has_peer(package: str) -> bool:
    """Whether a library that ours is compared with is there; says so where it is not, and the rest goes on."""
    if found := find_spec(package) is not None:
        return found
    print(f"{package}: not installed (pip install --requirement benchmarks/requirements.txt); left out", flush=True)
    return False


def shared_data(*parts: str) -> Path | None:
    """The path of shared benchmark data (folder ``SCONE_SHARED`` or ``../shared``, then ``data/…``); None if absent."""
    root = Path(os.environ.get("SCONE_SHARED", REPOSITORY.parent / "shared"))
    path = root.joinpath("data", *parts)
    return path if path.exists() else None
