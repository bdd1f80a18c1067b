"""Bad inputs for every reader: how many were tried, read as what they say, refused in one line, or anything else.

    python benchmarks/bad_inputs.py --json docs/results/bad_inputs.json

Any bytes, damaged bytes, forged numbers with checksums that fit, bombs; each reader in a process of its own, with
limits of time and memory. Started again with the same ``--json`` it goes on; another ``--seed`` tries other inputs.
The inputs and the judge of what becomes of them are in ``scone.tests.hardening``; a small slice of them is a test.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import REPOSITORY, commit, machine

from scone.tests.hardening.bad_files import READERS
from scone.tests.hardening.bad_inputs import MEMORY_LIMIT_BYTES, SECONDS_LIMIT
from scone.utils.files import write_json


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--inputs", type=int, default=4000, metavar="N", help="inputs of a cheap reader (default: 4000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which inputs (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where results are kept, and found again")
    parser.add_argument("--quick", action="store_true", help="a tenth of the inputs")
    chosen = parser.parse_args()
    results = json.loads(chosen.json.read_text()) if chosen.json and chosen.json.exists() else {"bad_inputs": []}
    inputs = chosen.inputs // 10 if chosen.quick else chosen.inputs
    for name in READERS:
        if any(batch["reader"] == name and batch["seed"] == chosen.seed for batch in results["bad_inputs"]):
            continue
        results["bad_inputs"].append(batch_of(name, inputs, chosen.seed))
        finish(results, chosen.json)
    finish(results, chosen.json)
    print(json.dumps(results["summary"], indent=2))
    return 1 if results["summary"]["failures"] else 0


def batch_of(name: str, inputs: int, seed: int) -> dict[str, Any]:
    """All kinds of bad inputs for one reader, in a process of its own. What failed is kept in a temporary folder."""
    folder = tempfile.mkdtemp(prefix="scone-bad-inputs-")
    arguments = [name, "--inputs", str(inputs), "--seed", str(seed), "--folder", f"{folder}/work"]
    command = [sys.executable, "-m", "scone.tests.hardening.bad_inputs", *arguments]
    started = time.monotonic()
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    batch: dict[str, Any] = {"reader": name, "seed": seed, "commit": commit()}
    if done.returncode:
        how = (
            f"took longer than {SECONDS_LIMIT} s"
            if done.returncode == -signal.SIGALRM
            else f"ended with {done.returncode}"
        )
        batch |= {"kinds": {}, "failures": [f"{how}: {done.stderr.strip()[-300:]}"]}
    else:
        kinds = json.loads(done.stdout.strip().splitlines()[-1])
        batch |= {"kinds": kinds, "failures": [failure for kind in kinds.values() for failure in kind.pop("failures")]}
    batch["seconds"] = round(time.monotonic() - started, 1)
    tried = sum(kind["inputs"] for kind in batch["kinds"].values())
    seen = f"{'; '.join(batch['failures'])} (see {folder})" if batch["failures"] else "nothing but read or refused"
    print(f"{name}: {tried:,} inputs in {batch['seconds']:.0f} s: {seen}", flush=True)
    return batch


def finish(results: dict[str, Any], path: Path | None) -> None:
    """Add the summary, machine and commit, and write the results where they are wanted."""
    by_reader: dict[str, dict[str, int]] = {}
    for batch in results["bad_inputs"]:
        counted = by_reader.setdefault(batch["reader"], {"inputs": 0, "read": 0, "refused": 0, "else": 0})
        for kind in batch["kinds"].values():
            for name in ("inputs", "read", "refused"):
                counted[name] += kind[name]
        counted["else"] += len(batch["failures"])
    results["summary"] = {
        "inputs": sum(counted["inputs"] for counted in by_reader.values()),
        "by_reader": by_reader,
        "seconds_limit": SECONDS_LIMIT,
        "memory_limit_bytes": MEMORY_LIMIT_BYTES,
        "failures": [f"{batch['reader']}: {text}" for batch in results["bad_inputs"] for text in batch["failures"]],
    }
    results["machine"], results["commit"] = machine(), commit()
    if path:
        write_json(path, results)


if __name__ == "__main__":
    sys.exit(main())
