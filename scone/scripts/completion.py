"""Shell completion: `eval "$(scone completion bash)"`, also for zsh and fish."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from scone.configs.flags import Described
from scone.configs.loading import parse_options
from scone.scripts.verbs import VERBS
from scone.utils.command_line import run_main
from scone.utils.completion import SHELLS, Flag, completion_script

EXAMPLES = ('eval "$(scone completion bash)"', "scone completion fish | source")


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The shell. Raises SconeError."""
    _, extra = parse_options(
        argv,
        (),
        "Print a script that completes commands, options and their values in your shell.",
        examples=EXAMPLES,
        add_arguments=_add_arguments,
        config_flag=False,
    )
    return extra


def main(argv: Sequence[str] | None = None) -> int:
    """Print the script."""
    extra = read_arguments(argv)
    flags = {verb: flags_of(script) for verb, (script, _) in VERBS.items()}
    flags["completion"] = []
    print(completion_script(extra.shell, {verb: line for verb, (_, line) in VERBS.items()}, flags), end="")
    return 0


def flags_of(script: str) -> list[Flag]:
    """What a command's own parser knows; nothing for the one that Hydra parses and the one with commands of its own."""
    if script in ("hydra_train", "table", "completion"):
        return []
    try:
        import_module(f"scone.scripts.{script}").read_arguments(["--describe"])
        raise AssertionError(f"{script} did not build a parser")
    except Described as described:
        parser = described.parser
    found = []
    for action in parser._actions:
        names = [name for name in action.option_strings if name.startswith("--")]
        if names and action.help != argparse.SUPPRESS:
            entry = parser.entries_by_flag.get(names[0])
            choices = entry.info.choices if entry else tuple(map(str, action.choices or ()))
            found.append(Flag(names[0], " ".join((action.help or "").split()).partition(" (default")[0], choices or ()))
    return found


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=tuple(SHELLS), metavar="SHELL", help=f"one of {', '.join(SHELLS)}")


if __name__ == "__main__":
    sys.exit(run_main(main))
