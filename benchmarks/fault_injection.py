"""Kill −9, full disks, two runs at once …: hundreds of faults at random moments, and whether anything was lost.

    python benchmarks/fault_injection.py --kills 100 --json docs/results/fault_injection.json

Runs for minutes to hours and may be stopped at any time: started again with the same ``--json`` it goes on. A small
slice of it is a test (scone/tests/hardening). The faults and what they hit are in ``scone.tests.hardening``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import REPOSITORY, commit, machine

from scone.utils.files import write_json

JOBS = ("tokenise", "count", "train", "precompute", "convert")
KILLS_OF_A_BATCH = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="kills of each job (default: 100)")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS, help="which jobs (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where results are kept, and found again")
    parser.add_argument("--quick", action="store_true", help="ten kills of each job")
    chosen = parser.parse_args()
    results = json.loads(chosen.json.read_text()) if chosen.json and chosen.json.exists() else {"batches": []}
    with tempfile.TemporaryDirectory(prefix="scone-faults-") as scratch:
        for seed in range(1 if chosen.quick else -(-chosen.kills // KILLS_OF_A_BATCH)):
            for job in chosen.jobs:
                done = any(batch["job"] == job and batch["seed"] == seed for batch in results["batches"])
                if not done:
                    results["batches"].append(batch_of_kills(job, seed, Path(scratch)))
                    finish(results, chosen.json)
        if "scenarios" not in results:
            results["scenarios"] = json.loads(
                child("scone.tests.hardening.scenarios", "--folder", scratch + "/scenarios")
            )
    finish(results, chosen.json)
    print(json.dumps(results["summary"], indent=2))
    return 1 if results["summary"]["failures"] else 0


def batch_of_kills(job: str, seed: int, scratch: Path) -> dict[str, Any]:
    """Ten kills of one job, in processes of their own."""
    arguments = [job, "--kills", str(KILLS_OF_A_BATCH), "--seed", str(seed), "--folder", str(scratch / "kills")]
    batch: dict[str, Any] = json.loads(child("scone.tests.hardening.kills", *arguments)) | {"commit": commit()}
    print(f"{job} {seed}: {batch['kills']} {'; '.join(batch['failures']) or 'nothing lost'}", flush=True)
    return batch


def child(module: str, *arguments: str) -> str:
    """The last line of output of a module run as a process. Raises CalledProcessError when it fails."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def finish(results: dict[str, Any], path: Path | None) -> None:
    """Add the summary, machine and commit, and write the results where they are wanted."""
    results["summary"] = summary(results)
    results["machine"], results["commit"] = machine(), commit()
    if path:
        write_json(path, results)


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Kills by job and moment, trials, and everything that was lost."""
    by_job = {
        job: {
            "trials": sum(batch["trials"] for batch in results["batches"] if batch["job"] == job),
            **{
                moment: sum(batch["kills"][moment] for batch in results["batches"] if batch["job"] == job)
                for moment in ("before", "while", "after")
            },
        }
        for job in JOBS
    }
    scenarios = results.get("scenarios", {})
    failures = [f"{batch['job']}: {failure}" for batch in results["batches"] for failure in batch["failures"]]
    failures += [f"{name}: {outcome}" for name, outcome in scenarios.items() if outcome != "survived"]
    return {
        "kills": sum(jobs["before"] + jobs["while"] for jobs in by_job.values()),
        "kills_at_work": sum(jobs["while"] for jobs in by_job.values()),
        "came_too_late": sum(jobs["after"] for jobs in by_job.values()),
        "trials": sum(jobs["trials"] for jobs in by_job.values()),
        "by_job": by_job,
        "scenarios_survived": sum(outcome == "survived" for outcome in scenarios.values()),
        "failures": failures,
    }


if __name__ == "__main__":
    sys.exit(main())
