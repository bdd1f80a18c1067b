"""Faults and bad inputs in numbers: kills at random moments, full disks, two runs at once; and hostile files.

    python benchmarks/hardening.py faults --kills 100 --json docs/results/fault_injection.json
    python benchmarks/hardening.py bad_inputs --json docs/results/bad_inputs.json

Faults: of every long job kills by signal 9, and what else may happen to it; was anything lost? Bad inputs: any bytes,
damaged ones, forged numbers with checksums that fit, bombs; did each reader read what they say, refuse in one line, or
do anything else? Each batch is a process of its own; what failed stays in a temporary folder. Runs for minutes to hours
and may be stopped: started again with the same ``--json`` it goes on. A small slice of both is a test
(scone/tests/hardening, which has the faults, the inputs and the judges).
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

from common import REPOSITORY, measured_on

from scone.tests.hardening.bad_files import READERS
from scone.tests.hardening.bad_inputs import MEMORY_LIMIT_BYTES, SECONDS_LIMIT
from scone.utils.files import write_json

JOBS = ("tokenise", "count", "train", "precompute", "convert")
KILLS_OF_A_BATCH = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["faults", "bad_inputs"])
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="kills of each job (default: 100)")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS, help="jobs to be killed (default: all)")
    parser.add_argument("--inputs", type=int, default=4000, metavar="N", help="inputs of each reader (default: 4000)")
    parser.add_argument("--seed", type=int, default=0, help="which inputs (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where results are kept, and found again")
    parser.add_argument("--quick", action="store_true", help="a tenth of the kills or inputs")
    chosen = parser.parse_args()
    results = json.loads(chosen.json.read_text()) if chosen.json and chosen.json.exists() else {}
    tell = faults if chosen.what == "faults" else bad_inputs
    for summary in tell(chosen, results, 10 if chosen.quick else 1):  # after each batch, so that none is lost
        results |= {"summary": summary} | measured_on()
        if chosen.json:
            write_json(chosen.json, results)
    print(json.dumps(results["summary"], indent=2))
    return 1 if results["summary"]["failures"] else 0


def faults(chosen: argparse.Namespace, results: dict[str, Any], fewer: int) -> Any:
    """Kills of the jobs in batches, in turn, then the other scenarios; yields the summary so far."""
    batches = results.setdefault("batches", [])
    with tempfile.TemporaryDirectory(prefix="scone-faults-") as scratch:
        for seed, job in product(range(-(-chosen.kills // fewer // KILLS_OF_A_BATCH)), chosen.jobs):
            if (job, seed) not in [(batch["job"], batch["seed"]) for batch in batches]:
                words = ["--only", "--kills", f"{job}={KILLS_OF_A_BATCH}", "--seed", seed]
                said = child("scenarios", *words, "--folder", f"{scratch}/kills", check=True).stdout
                batches.append(json.loads(said.splitlines()[0]))
                print(f"{job} {seed}: {'; '.join(batches[-1]['failures']) or 'nothing lost'}", flush=True)
                yield of_faults(results)
        if "scenarios" not in results:
            results["scenarios"] = last_line(child("scenarios", "--folder", f"{scratch}/scenarios", check=True))
    yield of_faults(results)


def of_faults(results: dict[str, Any]) -> dict[str, Any]:
    """Kills by job and moment, trials, and everything that was lost."""
    by_job = {job: Counter(dict.fromkeys(("trials", "before", "while", "after"), 0)) for job in JOBS}
    for batch in results["batches"]:
        by_job[batch["job"]].update({"trials": batch["trials"], **batch["kills"]})
    total = sum(by_job.values(), Counter())
    scenarios = results.get("scenarios", {})
    failures = [f"{batch['job']}: {failure}" for batch in results["batches"] for failure in batch["failures"]]
    failures += [f"{name}: {outcome}" for name, outcome in scenarios.items() if outcome != "survived"]
    return {
        "kills": total["while"] + total["before"],
        "kills_at_work": total["while"],
        "came_too_late": total["after"],
        "trials": total["trials"],
        "by_job": by_job,
        "scenarios_survived": sum(outcome == "survived" for outcome in scenarios.values()),
        "failures": failures,
    }


def bad_inputs(chosen: argparse.Namespace, results: dict[str, Any], fewer: int) -> Any:
    """All kinds of bad inputs, reader by reader; yields the summary so far."""
    batches = results.setdefault("bad_inputs", [])
    for name in READERS:
        if (name, chosen.seed) not in [(batch["reader"], batch["seed"]) for batch in batches]:
            batches.append(batch_of_inputs(name, chosen.inputs // fewer, chosen.seed))
            yield of_inputs(batches)
    yield of_inputs(batches)


def batch_of_inputs(name: str, inputs: int, seed: int) -> dict[str, Any]:
    folder, started = tempfile.mkdtemp(prefix="scone-bad-inputs-"), time.monotonic()
    done = child("bad_inputs", name, "--inputs", inputs, "--seed", seed, "--folder", f"{folder}/work")
    kinds = {} if done.returncode else last_line(done)
    failures = [failure for kind in kinds.values() for failure in kind.pop("failures")]
    if done.returncode:
        late = -done.returncode in (signal.SIGALRM, signal.SIGPROF)
        how = f"took longer than {SECONDS_LIMIT} s" if late else f"ended with {done.returncode}"
        failures = [f"{how}: {done.stderr.strip()[-300:]}"]
    seconds, tried = round(time.monotonic() - started, 1), sum(kind["inputs"] for kind in kinds.values())
    seen = f"{'; '.join(failures)} (see {folder})" if failures else "nothing but read or refused"
    print(f"{name}: {tried:,} inputs in {seconds:.0f} s: {seen}", flush=True)
    return {"reader": name, "seed": seed, "kinds": kinds, "failures": failures, "seconds": seconds}


def of_inputs(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """What became of the inputs of each reader."""
    by_reader: dict[str, Counter[str]] = {}
    for batch in batches:
        counted = by_reader.setdefault(batch["reader"], Counter(inputs=0, read=0, refused=0))
        for kind in batch["kinds"].values():
            counted.update({key: kind[key] for key in ("inputs", "read", "refused")})
        counted["else"] += len(batch["failures"])
    return {
        "inputs": sum(counted["inputs"] for counted in by_reader.values()),
        "by_reader": by_reader,
        "seconds_limit": SECONDS_LIMIT,
        "memory_limit_bytes": MEMORY_LIMIT_BYTES,
        "failures": [f"{batch['reader']}: {text}" for batch in batches for text in batch["failures"]],
    }


def child(module: str, *arguments: object, check: bool = False) -> subprocess.CompletedProcess[str]:
    """A module of scone.tests.hardening run as a process; what it says of errors goes on to ours where ``check``."""
    command = [sys.executable, "-m", f"scone.tests.hardening.{module}", *map(str, arguments)]
    errors = None if check else subprocess.PIPE
    return subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=errors, text=True, check=check)


def last_line(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
