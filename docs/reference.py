"""The reference pages, made from the option schema, the commands' own help and the docstrings: nothing by hand.

`python docs/reference.py` prints them; the site is built with them (docs/site_hooks.py).
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

API = {
    "scone.models.language_model": ("SconeForCausalLM",),
    "scone.models.configuration": ("SconeConfig",),
    "scone.inference.embedding_table": ("EmbeddingTable",),
    "scone.inference.engine": ("SconeInferenceEngine",),
    "scone.inference.precompute": ("precompute_table", "convert_table"),
    "scone.tokenization.f_gram_vocabulary": ("FGramVocabulary",),
    "scone.tokenization.matcher": ("Matcher",),
    "scone.tokenization.counting": ("count_f_grams",),
    "scone.data.prepare": ("prepare_corpus", "prepare_tokenizer"),
    "scone.data.token_file": ("TokenFile",),
    "scone.training.run": ("train",),
    "scone.training.optimizer": ("RowOptimizer",),
    "scone.evaluation.perplexity": ("perplexity",),
    "scone.utils.errors": ("SconeError",),
}
"""Module → names that the reference documents."""


def pages() -> dict[str, str]:
    """Path below docs/ → Markdown of every generated page."""
    return {
        "reference/options.md": options_page(),
        "reference/commands.md": commands_page(),
        "reference/python.md": python_page(),
    }


def options_page() -> str:
    """All options of the schema: flag, type, bounds, default, help, by section."""
    from scone.configs.schema import SECTIONS, entries, expectation

    lines = [
        "# Options",
        "",
        "Every option is a flag (`--max_n 4`), a line of a YAML file (`data:` and below it `max_n: 4`) and a Hydra",
        "override (`data.max_n=4`). Defaults give way to the file of `--config`, and that to flags. A command takes",
        "the options that its [help](commands.md) lists.",
    ]
    for section in SECTIONS:
        lines += ["", f"## `{section}`", "", "| option | flag | takes | default | meaning |", "|---|---|---|---|---|"]
        for entry in entries().values():
            if entry.section == section:
                unit = f" ({entry.info.unit})" if entry.info.unit else ""
                cells = (f"`{entry.name}`", f"`--{entry.flag}`", expectation(entry), f"`{shown(entry.default)}`")
                lines.append("| " + " | ".join((*cells, escaped(entry.info.help) + unit)) + " |")
    return "\n".join(lines) + "\n"


def shown(default: Any) -> str:
    """A default as a YAML file would have it."""
    return "none" if default is None else str(default).lower() if isinstance(default, bool) else f"{default}"


def escaped(text: str) -> str:
    """Text inside a table's cell."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def commands_page() -> str:
    """What `scone --help` and every command's --help print."""
    from scone.cli import VERBS, help_text

    lines = ["# Commands", "", "```text", help_text(), "```"]
    for verb in VERBS:
        lines += ["", f"## `scone {verb}`", "", "```text", help_of(verb), "```"]
    return "\n".join(lines) + "\n"


def help_of(verb: str) -> str:
    """The help of one command, 100 columns wide."""
    from scone.cli import dispatch

    if verb == "hydra-train":
        return (
            "usage: scone hydra-train [--multirun] [OPTION=VALUE ...]\n\nEvery option by its dotted name; see Options."
        )
    with _as_scone(verb), contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        dispatch([verb, "--help"])
    return output.getvalue().strip()


@contextlib.contextmanager
def _as_scone(verb: str) -> Iterator[None]:
    """The program's name and the terminal's width, as the help text takes them."""
    import os

    argv, columns = sys.argv, os.environ.get("COLUMNS")
    sys.argv, os.environ["COLUMNS"] = ["scone", verb], "100"
    try:
        yield
    finally:
        sys.argv = argv
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


def python_page() -> str:
    """Signatures and docstrings of the public names."""
    lines = ["# Python", "", "The names that programs use. `from scone import …` has the most common ones."]
    for module_name, names in API.items():
        module = importlib.import_module(module_name)
        for name in names:
            value = getattr(module, name)
            lines += ["", f"## `{name}`", "", f"`{module_name}`", "", *documented(name, value)]
            if inspect.isclass(value) and not issubclass(value, Exception):
                for method, member in methods(value):
                    lines += ["", f"### `{name}.{method}`", "", *documented(method, member)]
    return "\n".join(lines) + "\n"


def methods(value: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class itself defines and documents."""
    for name, raw in vars(value).items():
        member = raw.__func__ if isinstance(raw, (classmethod, staticmethod)) else raw
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)) and member.__doc__:
            yield name, member


def documented(name: str, value: Any) -> list[str]:
    """Signature and docstring, as a code block and as text."""
    lines = []
    if inspect.isfunction(value):
        signature = re.sub(r"'([^']*)'", r"\1", str(inspect.signature(value)))  # annotations are texts
        lines += ["```text", f"{name}{signature}", "```", ""]
    text = inspect.getdoc(value) or ""
    return lines + [escaped_line(line) for line in text.splitlines()]


def escaped_line(line: str) -> str:
    """A docstring's line as Markdown: double backticks are single ones, brackets of shapes are no links."""
    return re.sub(r"``([^`]*)``", r"`\1`", line).replace("<", "&lt;")


if __name__ == "__main__":
    for page in pages().values():
        print(page)
