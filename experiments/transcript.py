"""Run the commands of a YAML list and keep what they printed: ``python experiments/transcript.py NAME.yaml``.

``docs/results/NAME.json`` gets each command, its output and its seconds; ``benchmarks/fill_tables.py`` puts them into
the docs. ``{data}`` and ``{out}`` in a command stand for ``--data`` and ``--output_dir``; the docs show the YAML's
``shown_data`` and ``shown_out`` in their place.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from common import commit, machine  # noqa: E402

from scone.utils.files import write_json  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("transcript", type=Path)
    parser.add_argument("--data", required=True, help="folder of the texts and tokenizers")
    parser.add_argument("--output_dir", required=True, help="where the commands write")
    arguments = parser.parse_args()
    plan = yaml.safe_load(arguments.transcript.read_text(encoding="utf-8"))
    places = {"data": arguments.data, "out": arguments.output_dir}
    done = []
    for template in plan["commands"]:
        command = shlex.split(template.format(**places))
        print(f"$ {shlex.join(command)}", flush=True)
        started = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-m", "scone.cli", *command[1:]] if command[0] == "scone" else command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        print(run.stdout, flush=True)
        if run.returncode:
            return run.returncode
        output = run.stdout
        for name, place in places.items():
            output = output.replace(place, plan[f"shown_{name}"])
        shown = template.format(data=plan["shown_data"], out=plan["shown_out"])
        done.append({"command": shown, "output": output, "seconds": round(time.perf_counter() - started, 1)})
    result = REPOSITORY / "docs" / "results" / f"{arguments.transcript.stem}.json"
    write_json(result, {"machine": machine(), "commit": commit(), "commands": done})
    return 0


if __name__ == "__main__":
    sys.exit(main())
