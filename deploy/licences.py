"""The licences of everything that an installation of SCONE brings along, as a table: `python deploy/licences.py`.

Follows the requirements of the installed package (with --extras those of extras too). Exits with 1 where a package
states no licence, or one of the GPL family: those need a look before a product is built on them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys

_TEXTS = {
    "BSD-3-Clause": ("Redistribution and use in source and binary forms", "endorse or promote products"),
    "BSD-2-Clause": ("Redistribution and use in source and binary forms",),
    "MIT": ("Permission is hereby granted, free of charge",),
    "Apache-2.0": ("Apache License", "Version 2.0"),
}
_NEEDS_A_LOOK = re.compile(r"(?<!L)GPL|AGPL|unknown", re.IGNORECASE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", nargs="*", default=[], help="extras whose requirements are listed too")
    parser.add_argument("--markdown", action="store_true", help="as the page docs/licences.md")
    chosen = parser.parse_args()
    found = requirements("scone-lm", set(chosen.extras))
    rows = [(name, importlib.metadata.version(name), licence(name)) for name in sorted(found)]
    if chosen.markdown:
        print(page(rows))
        return 0
    width = max(len(name) for name, _, _ in rows)
    for name, version, text in rows:
        print(f"{name:<{width}}  {version:<14} {text}")
    doubtful = [name for name, _, text in rows if _NEEDS_A_LOOK.search(text)]
    print(f"\n{len(rows)} packages; to look at: {', '.join(doubtful) or 'none'}")
    return 1 if doubtful else 0


_PAGE = """\
# Licences of what comes along

SCONE is under the MIT licence. These packages are installed with it and the extras `serve`, `quantization`, `spark`,
`offline` and `gguf`: what each states of itself, in the versions of `constraints.txt` on Linux. PyTorch is its CPU
build here; the CUDA build brings NVIDIA's libraries under NVIDIA's own terms. Made by `deploy/licences.py --markdown`;
`make licences` lists what is installed with you.

| package | version | licence |
|---|---|---|
"""


def page(rows: list[tuple[str, str, str]]) -> str:
    """The list as a page of the documentation."""
    return _PAGE + "\n".join(f"| {name} | {version.partition('+')[0]} | {text} |" for name, version, text in rows)


def requirements(name: str, extras: set[str]) -> set[str]:
    """All installed packages that ``name`` needs, itself left out."""
    found: set[str] = set()
    waiting = [(name, extras)]
    while waiting:
        package, wanted = waiting.pop()
        for line in importlib.metadata.requires(package) or ():
            needed = re.match(r"[\w.-]+", line)
            extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
            if needed is None or (extra and extra[1] not in wanted):
                continue
            other = re.sub(r"[-_.]+", "-", needed[0]).lower()
            if other not in found and installed(other):
                found.add(other)
                waiting.append((other, set(re.findall(r"\w+", (re.search(r"\[(.*?)\]", line) or [""])[0]))))
    return found


def installed(name: str) -> bool:
    """Whether a package is there (others are for another system or Python)."""
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def licence(name: str) -> str:
    """What a package states: its SPDX expression, else its classifiers, else the first line of its licence field."""
    facts = importlib.metadata.metadata(name)
    if facts.get("License-Expression"):
        return str(facts["License-Expression"])
    classified = [
        line.rsplit(" :: ", 1)[1] for line in facts.get_all("Classifier") or () if line.startswith("License ::")
    ]
    if classified and classified != ["OSI Approved"]:
        return ", ".join(classified)
    stated = (facts.get("License") or "").strip().splitlines()
    return stated[0][:60] if stated else _by_its_text(name)


def _by_its_text(name: str) -> str:
    """The licence of a package that states none but ships its text."""
    for file in importlib.metadata.distribution(name).files or ():
        if file.name.upper().startswith(("LICENSE", "LICENCE")) and ".dist-info" in str(file):
            text = " ".join(file.read_text().split())
            for licence_name, words in _TEXTS.items():
                if all(each in text for each in words):
                    return licence_name
    return "unknown"


if __name__ == "__main__":
    sys.exit(main())
