"""Checked options from flags, YAML files and mappings, and back. Precedence: defaults < file < flags."""

from __future__ import annotations

import argparse
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from scone.configs.presets import MODERN_RECIPE, MODERN_TRUNK
from scone.configs.schema import SECTIONS, TRUNK_SIZES, Entry, SconeOptions, convert, entries, shortened, shown
from scone.utils.command_line import did_you_mean, is_first_process
from scone.utils.errors import SconeError, library_refusal
from scone.utils.files import atomic_path
from scone.utils.progress import is_quiet

_OF_A_RUN = "# Resolved options of a SCONE run"  # how a file that `save_options` wrote begins
_METAVARS = {bool: "true|false", int: "N", float: "X", str: "TEXT"}


class OptionParser(argparse.ArgumentParser):
    """The options named by ``sections`` (a section, "training", or a single option, "training.seed") as flags.

    ``add_arguments`` adds the flags that are the script's own; ``defaults`` are this script's other defaults (for the
    help only). Raises SconeError for what cannot be read.
    """

    def __init__(
        self,
        sections: Sequence[str],
        description: str,
        examples: Sequence[str] = (),
        add_arguments: Callable[[argparse.ArgumentParser], object] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            prog=program_name(),
            description=description,
            usage="%(prog)s [options]",
            epilog="\n  ".join(["examples:", *examples]) if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        # both are taken out before (utils/command_line.py), and here for the help only
        own = {"debug": "show tracebacks", "quiet": "print results only: no progress, notices or logs"}
        for name, help_ in own.items():
            self.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=help_)
        if add_arguments is not None:
            add_arguments(self)
        if "--local_rank" not in self._option_string_actions:  # torch.distributed.launch passes it
            self.add_argument("--local_rank", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.reads_file = bool(sections) and "--config" not in self._option_string_actions
        if self.reads_file:
            help_of_config = "YAML file of options; flags override it (see configs/)"
            self.add_argument("--config", metavar="FILE", default=None, help=help_of_config)
        self.chosen = [
            entry
            for name, entry in entries().items()
            if any(name == chosen or name.startswith(f"{chosen}.") for chosen in sections)
        ]
        for section in dict.fromkeys(entry.section for entry in self.chosen):
            group = self.add_argument_group(f"{section} options")
            for entry in self.chosen:
                if entry.section == section:
                    _add_option(group, entry, (defaults or {}).get(entry.name, entry.default))

    def error(self, message: str) -> NoReturn:
        raise SconeError(f"{message}; see {self.prog} --help")

    def read(self, argv: Sequence[str]) -> tuple[dict[str, Any], argparse.Namespace]:
        """The options that were given (dotted name → converted value), and the script's own arguments.

        Raises SconeError for an unknown flag (with the nearest known one), a missing or a bad value.
        """
        namespace, unknown = self.parse_known_args([_underscored(self, word) for word in argv])
        if unknown:
            raise _unknown_argument(self, unknown[0])
        given: dict[str, Any] = {}
        for entry in self.chosen:
            if entry.name in vars(namespace):
                text = vars(namespace).pop(entry.name)
                given[entry.name] = convert(entry, text, f"--{entry.flag}", from_text=True)
        return given, namespace


def _add_option(group: argparse._ArgumentGroup, entry: Entry, default: Any) -> None:
    """Add the flag of one option. Values stay text here."""
    info, absent = entry.info, argparse.SUPPRESS
    text = f"{info.help}, in {info.unit}" if info.unit else info.help
    if default is not None or "(default: " not in info.help:  # else the help says what none stands for
        shown = "none" if default in (None, "") else f"{default:g}" if isinstance(default, float) else str(default)
        text += f" (default: {shown.lower() if entry.type is bool else shown})"
    metavar = "{" + ",".join(info.choices) + "}" if info.choices else _METAVARS[entry.type]
    bare = "true" if entry.type is bool else info.bare  # the value of a flag that is given without one
    shape: dict[str, Any] = {"metavar": metavar, "nargs": "?" if bare else None, "const": bare, "default": absent}
    group.add_argument(f"--{entry.flag}", dest=entry.name, help=text.replace("%", "%%"), **shape)
    if entry.type is bool:
        negative: dict[str, Any] = {"action": "store_const", "const": "false", "default": absent, "help": absent}
        group.add_argument(f"--no_{entry.flag}", dest=entry.name, **negative)


def program_name() -> str:
    """How this process was called: "scone train" or "python -m scone.scripts.train"."""
    stem = Path(sys.argv[0]).stem
    if stem in ("scone", "cli", "__main__"):
        return " ".join(["scone", *sys.argv[1:2]])
    return f"python -m scone.scripts.{stem}"


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


FLAG = "flag"

# What describes another option's value: a file's sizes are those of the file's own base model, and wikitext-103-v1 is
# a configuration of wikitext. They go when a later layer replaces that value, unless that layer gives them too.
_DESCRIBES = {"data.dataset_name": ("data.dataset_config_name",), "model.base_model_name": TRUNK_SIZES}


@dataclass(frozen=True)
class Layer:
    """Options from one source: ``source`` is FLAG, a file's name or a description; ``values`` by dotted name."""

    source: str
    values: Mapping[str, Any]


def parse_options(
    argv: Sequence[str] | None,
    sections: Sequence[str],
    description: str,
    *,
    defaults: Mapping[str, Any] | None = None,
    **settings: Any,
) -> tuple[SconeOptions, argparse.Namespace]:
    """Read the command line (``argv``; None: of this process): the options, and the script's own arguments.

    ``sections`` names what the script exposes: whole sections ("data") or single options ("training.seed"), because two
    sections have a ``batch_size``. ``defaults`` (dotted name → value) replaces schema defaults. ``settings`` as
    `OptionParser` has them: ``examples``, ``add_arguments`` …. Raises SconeError for bad input.
    """
    layers, extra = parse_layers(argv, sections, description, defaults=defaults, **settings)
    options, notices = merge(layers, defaults)
    print_notices(notices)
    return options, extra


def parse_layers(
    argv: Sequence[str] | None, sections: Sequence[str], description: str, **settings: Any
) -> tuple[list[Layer], argparse.Namespace]:
    """As :func:`parse_options`, but unmerged: the file's layer, then the flags', for scripts that put one between."""
    parser = OptionParser(sections, description, **settings)
    values, extra = parser.read(sys.argv[1:] if argv is None else argv)
    layers = [Layer(FLAG, values)]
    if parser.reads_file and extra.config is not None:
        layers.insert(0, Layer(str(extra.config), flatten(_with_ranking(extra.config), str(extra.config))))
    return layers, extra


def merge(layers: Sequence[Layer], defaults: Mapping[str, Any] | None = None) -> tuple[SconeOptions, list[str]]:
    """Lay ``layers`` over the schema's defaults, later ones winning; returns the options and notices for the user.

    Raises SconeError where options contradict each other.
    """
    sources = ["default", *(layer.source for layer in layers)]
    values = {name: entry.default for name, entry in entries().items()} | dict(defaults or {})
    setter = dict.fromkeys(values, 0)
    notices: list[str] = []
    for index, layer in enumerate(layers, start=1):
        for name, value in layer.values.items():
            stale = [
                described
                for described in _DESCRIBES.get(name, ())
                if value != values[name]
                and described not in layer.values
                and setter[described] == setter[name]
                and values[described] is not None
            ]
            if stale and setter[name] > 0:
                dropped = ", ".join(f"{item.rsplit('.', 1)[1]} {values[item]}" for item in stale[:3])
                dropped += ", …" if len(stale) > 3 else ""
                notices.append(
                    f"{name} is {value} by {layer.source}: what {sources[setter[name]]} says of {values[name]} "
                    f"is not used ({dropped}); give it again to use it"
                )
            values.update(dict.fromkeys(stale))
            setter.update(dict.fromkeys(stale, 0))
            values[name], setter[name] = value, index
    if values["model.base_model_name"] == MODERN_TRUNK and values["model.init"] == "scratch":
        values |= {name: value for name, value in MODERN_RECIPE.items() if setter[name] == 0}
    _check_together(values)
    options = SconeOptions(given={name: sources[index] for name, index in setter.items() if index > 0})
    for name, value in values.items():
        group, _, last = name.rpartition(".")
        setattr(get_option(options, group), last, value)
    return options, notices


def print_notices(notices: Sequence[str]) -> None:
    """One line each on stderr, printed by the first process of a run only."""
    if is_first_process() and not is_quiet():
        for notice in notices:
            print(f"notice: {notice}", file=sys.stderr)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, as it stands there. Raises SconeError (missing, damaged, not a mapping, a key twice).

    Plain values only: a tag that would become an object is an error.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML forbids a key twice, PyYAML takes the last: the first half of a section would be lost in silence."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            counts = Counter(key.value for key, _ in node.value if key.value != "<<")
            if counts and (twice := max(counts, key=counts.__getitem__)) and counts[twice] > 1:
                raise yaml.YAMLError(f"found duplicate key {twice} in the mapping of line {node.start_mark.line + 1}")
            return super().construct_mapping(node, deep)

    if not Path(path).is_file():
        raise SconeError(f"found no file {path}; expected a YAML file of options; check --config")
    with library_refusal(f"cannot read {path} as YAML", "mend the file"):
        loaded = Loader(Path(path).read_text(encoding="utf-8")).get_single_data()
    if not isinstance(loaded, dict | None):
        raise SconeError(f"{path}: found {type(loaded).__name__}; expected sections: {', '.join(SECTIONS)}")
    return loaded or {}


def load_options(path: str | Path) -> SconeOptions:
    """The options in a YAML file over the defaults. Raises SconeError."""
    return from_mapping(_with_ranking(path), str(path))


def _with_ranking(path: str | Path) -> dict[str, Any]:
    """As `load_yaml`. What a run resolved and names no ranking is of before there were two: by frequency."""
    mapping = load_yaml(path)
    data = mapping.get("data")
    if isinstance(data, dict) and "ranking" not in data and Path(path).read_text("utf-8").startswith(_OF_A_RUN):
        return mapping | {"data": data | {"ranking": "frequency"}}
    return mapping


def from_mapping(mapping: Mapping[str, Any], source: str = "") -> SconeOptions:
    """Options from a nested mapping (section → option → value) over the defaults; the inverse of :func:`to_mapping`.

    Values are converted by the option's type ("5e-5" → 5e-05). Raises SconeError for unknown names ("did you mean"),
    wrong types, values out of bounds.
    """
    options, _ = merge([Layer(source or "mapping", flatten(mapping, source))])
    return options


def to_mapping(options: SconeOptions) -> dict[str, Any]:
    """A nested plain mapping of all options: section → option → value."""
    return {section: asdict(getattr(options, section)) for section in SECTIONS}


def get_option(options: SconeOptions, name: str) -> Any:
    """The value of the option with a dotted name, such as "model.f_gram.hidden_size"."""
    return functools.reduce(getattr, name.split("."), options)


def save_options(options: SconeOptions, path: str | Path) -> None:
    """Write all options as YAML, atomically; ``--config`` reads it. Raises OSError."""
    import yaml

    mapping = to_mapping(options)
    text = yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True)
    if yaml.safe_load(text) != mapping:  # a lone U+0085 or its like, which PyYAML writes bare but reads as a line break
        text = yaml.safe_dump(mapping, sort_keys=False)
    with atomic_path(path) as temporary:
        temporary.write_text(f"{_OF_A_RUN}; give this file to --config to repeat it.\n{text}", "utf-8")


def flatten(mapping: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Dotted name → converted value of a nested mapping. Raises SconeError naming ``source``."""
    prefix = f"{source}: " if source else ""
    return {name: convert(entries()[name], value, f"{prefix}{name}") for name, value in _leaves(mapping, "", prefix)}


def _leaves(mapping: Mapping[str, Any], group: str, prefix: str) -> Iterator[tuple[str, Any]]:
    known = entries()
    groups = {name.rsplit(".", 1)[0] for name in known}
    for key, value in mapping.items():
        name = f"{group}.{key}" if group else str(key)
        if name in known:
            yield name, value
        elif name not in groups:
            kind = "option" if group else "section"
            raise SconeError(f"{prefix}found the unknown {kind} {shortened(name)}; {suggestion(name)}")
        elif value is None:
            continue  # a section whose options are all commented out
        elif not isinstance(value, Mapping):
            raise SconeError(
                f"{prefix}{name}: found {shown(value)}; expected a section of options; indent them below it"
            )
        else:
            yield from _leaves(value, name, prefix)


def suggestion(name: str) -> str:
    """What to do about an unknown dotted name: the nearest known one, in this section or another."""
    known, last = entries(), name.rsplit(".", 1)[-1]
    elsewhere = [option for option in known if option.rsplit(".", 1)[1] == last]
    near = f"did you mean {' or '.join(elsewhere)}?" if elsewhere else did_you_mean(name, [*SECTIONS, *known])
    if "." not in name:
        return "; ".join(["expected one of " + ", ".join(SECTIONS), near]).removesuffix("; ")
    return near or "see scone train --help for the options"


def _check_together(values: Mapping[str, Any]) -> None:
    """Refuse options that contradict each other, before any work is done."""
    if values["training.fp16"] and values["training.bf16"]:
        raise SconeError("found both fp16 and bf16; expected at most one of them; leave one out")
    if values["training.num_epochs"] == 0 and values["training.max_steps"] == -1:
        raise SconeError("found num_epochs 0, which trains nothing; expected more than 0, or max_steps; leave it out")
    for group in ("model", "model.f_gram"):
        width, heads = values[f"{group}.hidden_size"], values[f"{group}.num_attention_heads"]
        if width is not None and heads is not None and width % heads:
            raise SconeError(
                f"{group}.hidden_size: found {width} with {heads} attention heads; expected a multiple of the heads; "
                f"change {group}.hidden_size or {group}.num_attention_heads"
            )
    length, positions = values["data.max_length"], values["model.max_position_embeddings"]
    if positions is not None and length > positions:
        raise SconeError(
            f"data.max_length: found {length}, longer than model.max_position_embeddings {positions}; "
            "lower max_length or raise max_position_embeddings"
        )
