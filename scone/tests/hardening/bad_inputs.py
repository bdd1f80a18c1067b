"""Counted bad inputs for a reader: `python -m scone.tests.hardening.bad_inputs READER --inputs N --seed S --folder F`.

Prints JSON: how many of each kind were read, how many refused in one line, and whatever else happened (``failures``:
another exception, an input that was changed, memory beyond a limit, damage that passed a checksum). An input that takes
longer than a limit ends the process by SIGPROF or SIGALRM; its files are then what lies in the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from scone.tests.hardening.bad_files import READERS, Files, Reader, files_below, write_files
from scone.utils.command_line import describe_error
from scone.utils.errors import SconeError

SECONDS_LIMIT = 30
MEMORY_LIMIT_BYTES = 256 << 20
_ADDRESS_SPACE_BYTES = 8 << 30  # more than this at once fails, so that a mistake cannot take the machine along
_ROUNDS = 8  # of drawing, at most, until the wanted number of different inputs was seen
READ, REFUSED = "read", "refused"
Judge = Callable[[Any], str]
"""READ, REFUSED, or what went wrong."""


def try_kind(inputs: st.SearchStrategy[Any], good: Any, judge: Judge, wanted: int, seed: int) -> dict[str, Any]:
    """Judge ``wanted`` different inputs other than the ``good`` one; fewer where no more can be drawn."""
    counted: dict[str, Any] = {"inputs": 0, READ: 0, REFUSED: 0, "failures": []}
    seen = {repr(good)}

    def one(value: Any) -> None:
        if repr(value) in seen or counted["inputs"] == wanted:
            return
        seen.add(repr(value))
        counted["inputs"] += 1
        outcome = judge(value)
        if outcome in (READ, REFUSED):
            counted[outcome] += 1
        else:
            counted["failures"].append(outcome)

    rules = settings(
        max_examples=wanted,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for number in range(_ROUNDS):
        if counted["inputs"] < wanted:
            hypothesis.seed(f"{seed} {number}")(rules(given(inputs)(one)))()
    return counted


def judge_files(reader: Reader, kind: str, good: Files, folder: Path) -> Judge:
    """How a reader does with the files of an input, written into an empty folder."""
    outcome, undamaged = tried(reader, good, folder)
    assert outcome == READ, outcome

    def judge(files: Files) -> str:
        before = peak_bytes(reset=True)
        outcome, value = tried(reader, files, folder)
        grown = peak_bytes() - before
        if outcome == READ and reader.sealed and not kind.startswith("forged") and value != undamaged:
            outcome = "damage was let pass"
        if files_below(folder) != files:
            outcome = "the input was changed"
        if grown > MEMORY_LIMIT_BYTES:
            outcome = f"memory grew by {grown >> 20} MiB"
        if outcome not in (READ, REFUSED):
            kept = folder.with_name(f"failed-{hashlib.sha256(repr(files).encode()).hexdigest()[:12]}")
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            outcome = f"{kind}: {outcome} ({kept.name})"
        return outcome

    return judge


def tried(reader: Reader, files: Files, folder: Path) -> tuple[str, Any]:
    """What became of an input, and what was read."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_files(folder, files)
    signal.setitimer(signal.ITIMER_PROF, SECONDS_LIMIT)  # of processor time: the machine may be busy
    signal.alarm(20 * SECONDS_LIMIT)
    try:
        return READ, reader.use(folder)
    except SconeError as error:
        line, _ = describe_error(error)
        told = 10 < len(line) < 20_000 and line.isprintable()
        return (REFUSED if told else f"refused with {line[:200]!r}"), None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:200]!r}", None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


def try_reader(name: str, wanted: int, seed: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Every kind of bad input of one reader; ``wanted`` inputs altogether."""
    reader = READERS[name]
    makings = folder / "good"
    makings.mkdir(parents=True)
    good = reader.good(makings)
    share = -(-wanted // len(reader.kinds))
    return {
        kind: try_kind(inputs(good), good, judge_files(reader, kind, good, folder / "input"), share, seed)
        for kind, inputs in reader.kinds.items()
    }


def peak_bytes(process: int | str = "self", reset: bool = False) -> int:
    """The most memory that a process ever held (0 where the system is not Linux); ``reset``: what it holds now, from
    which the peak starts again.
    """
    if sys.platform != "linux":
        return 0
    if reset:
        Path(f"/proc/{process}/clear_refs").write_text("5", encoding="ascii")
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{process}/status has no VmHWM")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=[*READERS])
    parser.add_argument("--inputs", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ADDRESS_SPACE_BYTES,) * 2)
    kinds = try_reader(chosen.reader, chosen.inputs, chosen.seed, chosen.folder)
    print(json.dumps(kinds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
