"""How long the command line takes to say anything: `scone --help` and a command's help, against Python alone."""

from __future__ import annotations

import subprocess
import sys

from common import Report, interleaved


def main() -> None:
    report = Report.from_arguments("startup", __doc__)

    def run(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)

    seconds = interleaved(
        {
            "python": lambda: run("-c", "pass"),
            "help": lambda: run("-m", "scone.cli", "--help"),
            "help_of_train": lambda: run("-m", "scone.cli", "train", "--help"),
        },
        repeats=5 if report.quick else 20,
    )
    for name in ("help", "help_of_train"):
        report.add(
            f"{name}_seconds",
            "s",
            seconds[name],
            seconds["python"],
            "Python alone",
            ratio="ours",
            target=0.3,
            better="lower",
        )
    report.finish()


if __name__ == "__main__":
    main()
