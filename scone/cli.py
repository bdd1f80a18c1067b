"""The `scone` command: one verb per script, each loaded only when it is called."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from scone import __version__
from scone.utils.command_line import did_you_mean, run_main
from scone.utils.errors import SconeError

VERBS = {
    "demo": ("demo", "the whole method on real text: train plain and SCONE, compare, write a report"),
    "train": ("train", "count f-grams on a corpus and train one model"),
    "train-configurations": ("train_configurations", "train several f-gram configurations on one corpus"),
    "hydra-train": ("hydra_train", "train with Hydra overrides and sweeps"),
    "count": ("count", "count the f-grams of a corpus and show their coverage"),
    "precompute": ("precompute_embeddings", "write a model's embedding table"),
    "table": ("table", "change an embedding table's row type"),
    "evaluate": ("evaluate", "perplexity and zero-shot accuracy of a model"),
    "generate": ("generate", "continue a prompt"),
    "serve": ("serve", "serve a model over HTTP: an OpenAI-compatible API, metrics, and a page"),
    "benchmark": ("benchmark", "compare models: perplexity, speed, memory, FLOPs"),
    "inspect": ("inspect", "show a text's tokens with their f-grams, ranks and counts"),
    "verify": ("verify", "check a model folder, vocabulary, table or token file"),
}
"""Verb → (module in scone.scripts, one line of help)."""


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of `scone`; returns the exit status."""
    return run_main(dispatch, argv)


def dispatch(argv: Sequence[str]) -> int | None:
    """Call the verb's script with the arguments behind it. Raises SconeError for an unknown verb."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    verb, *arguments = argv
    if verb in ("-V", "--version"):
        print(f"scone {__version__}")
        return 0
    scripts = {name: script for name, (script, _) in VERBS.items()}
    script = scripts.get(verb.replace("_", "-")) or (verb if verb in scripts.values() else None)
    if script is None:
        advice = did_you_mean(verb, VERBS) or f"expected one of {', '.join(VERBS)}"
        raise SconeError(f"found the unknown command {verb}; {advice} (see scone --help)")
    return import_module(f"scone.scripts.{script}").main(arguments)


def help_text() -> str:
    """What `scone --help` prints."""
    width = max(map(len, VERBS)) + 2
    verbs = "\n".join(f"  {verb:<{width}}{line}" for verb, (_, line) in VERBS.items())
    return (
        "usage: scone COMMAND [options]\n\n"
        "Scale a language model's input embeddings with frequent n-grams, at fixed inference cost.\n\n"
        f"commands:\n{verbs}\n\n"
        "scone COMMAND --help explains a command. Every command also runs as python -m scone.scripts.NAME.\n"
        "--version shows the version, --debug the traceback of an error, --quiet nothing but results.\n"
        "count, evaluate, inspect and verify also take --json."
    )


if __name__ == "__main__":
    sys.exit(main())
