"""The options as command-line flags: an argparse parser made from the schema."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from scone.configs.schema import SECTIONS
from scone.configs.values import Entry, convert, entries
from scone.utils.command_line import did_you_mean
from scone.utils.errors import SconeError

_METAVARS = {bool: "true|false", int: "N", float: "X", str: "TEXT"}


class OptionParser(argparse.ArgumentParser):
    """An argument parser that raises SconeError and returns only the flags that were given."""

    def __init__(self, description: str, examples: Sequence[str], program: str | None) -> None:
        epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples) if examples else None
        super().__init__(
            prog=program or program_name(),
            description=description,
            usage="%(prog)s [options]",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.entries_by_flag: dict[str, Entry] = {}
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
        self.add_argument(  # like --debug, it is taken out before (utils/command_line.py) and here for the help only
            "--quiet",
            action="store_true",
            default=argparse.SUPPRESS,
            help="print results only: no progress, notices or logs",
        )

    def error(self, message: str) -> NoReturn:
        raise SconeError(f"{message}; see {self.prog} --help")

    def add_option(self, group: argparse._ArgumentGroup, entry: Entry, default: Any) -> None:
        """Add the flag of one option. Values stay text here; :func:`flag_values` converts them."""
        info = entry.info
        shown = "none" if default is None else f"{default:g}" if isinstance(default, float) else str(default).lower()
        unit = f", in {info.unit}" if info.unit else ""
        text = f"{info.help}{unit}"
        if default is not None or "(default: " not in info.help:  # the help says what none stands for
            text += f" (default: {shown if entry.type is not str else default or 'none'})"
        metavar = "{" + ",".join(info.choices) + "}" if info.choices else _METAVARS[entry.type]
        bare = "true" if entry.type is bool else info.bare  # the value of a flag that is given without one
        group.add_argument(
            f"--{entry.flag}",
            dest=entry.name,
            metavar=metavar,
            nargs="?" if bare else None,
            const=bare,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS if info.hidden else text.replace("%", "%%"),
        )
        if entry.type is bool:
            negative: dict[str, Any] = {"action": "store_const", "const": "false", "default": argparse.SUPPRESS}
            group.add_argument(f"--no_{entry.flag}", dest=entry.name, help=argparse.SUPPRESS, **negative)
        self.entries_by_flag[f"--{entry.flag}"] = entry


def build_parser(
    sections: Sequence[str],
    description: str,
    examples: Sequence[str] = (),
    program: str | None = None,
    add_arguments: Callable[[argparse.ArgumentParser], object] | None = None,
    defaults: Mapping[str, Any] | None = None,
    config_flag: bool = True,
) -> OptionParser:
    """A parser for the options named by ``sections`` (a section, "training", or a single option, "training.seed").

    ``add_arguments`` adds the flags that are the script's own; ``defaults`` are this script's other defaults (for the
    help only). Two options with the same flag are a programming error (argparse.ArgumentError).
    """
    parser = OptionParser(description, examples, program)
    if add_arguments is not None:
        add_arguments(parser)
    if "--local_rank" not in parser._option_string_actions:  # torch.distributed.launch passes it
        parser.add_argument("--local_rank", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    if config_flag:
        parser.add_argument(
            "--config", metavar="FILE", default=None, help="YAML file of options; flags override it (see configs/)"
        )
    for section in SECTIONS:
        chosen = [entry for entry in entries().values() if entry.section == section and _is_chosen(entry, sections)]
        if chosen:
            group = parser.add_argument_group(f"{section} options")
            for entry in chosen:
                parser.add_option(group, entry, (defaults or {}).get(entry.name, entry.default))
    return parser


def flag_values(parser: OptionParser, argv: Sequence[str]) -> tuple[dict[str, Any], argparse.Namespace]:
    """Parse ``argv``: the options that were given (dotted name → converted value), and the script's own arguments.

    Raises SconeError for an unknown flag (with the nearest known one), a missing or a bad value.
    """
    namespace, unknown = parser.parse_known_args([_underscored(parser, word) for word in argv])
    if unknown:
        raise _unknown_argument(parser, unknown[0])
    given: dict[str, Any] = {}
    for entry in parser.entries_by_flag.values():
        if entry.name in vars(namespace):
            text = vars(namespace).pop(entry.name)
            given[entry.name] = convert(entry, text, f"--{entry.flag}", from_text=True)
    return given, namespace


def program_name() -> str:
    """How this process was called: "scone train" or "python -m scone.scripts.train"."""
    stem = Path(sys.argv[0]).stem
    if stem in ("scone", "cli", "__main__"):
        return " ".join(["scone", *sys.argv[1:2]])
    return f"python -m scone.scripts.{stem}"


def _is_chosen(entry: Entry, sections: Sequence[str]) -> bool:
    return any(entry.name == chosen or entry.name.startswith(f"{chosen}.") for chosen in sections)


def _underscored(parser: OptionParser, word: str) -> str:
    """``--max-n`` as ``--max_n``, where that is a flag."""
    name, equals, value = word.partition("=")
    known = "--" + name[2:].replace("-", "_")
    return known + equals + value if word.startswith("--") and known in parser._option_string_actions else word


def _unknown_argument(parser: OptionParser, word: str) -> SconeError:
    name = word.partition("=")[0]
    if not name.startswith("-"):
        return SconeError(f"found the argument {word!r}; expected only options; see {parser.prog} --help")
    flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    elsewhere = {f"--{entry.flag}": entry for entry in entries().values()}.get(
        name.replace("-", "_").replace("__", "--", 1)
    )
    near = did_you_mean(name, flags) or "leave it out"
    advice = near if elsewhere is None else f"it belongs to other commands ({elsewhere.name})"
    return SconeError(f"found the unknown option {name}; {advice} (see {parser.prog} --help)")
