"""The code blocks of README.md and docs/: where they are, and how one is run."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scone
from scone.cli import VERBS

REPOSITORY = Path(scone.__file__).parents[1]
_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language and text, and why it is not run ("" where it is)."""

    page: str
    line: int
    language: str
    text: str
    reason: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """The shell commands of the block: continued lines joined, quoted line ends kept."""
        commands, waiting = [], ""
        for line in self.text.replace("\\\n", " ").splitlines():
            waiting = f"{waiting}\n{line}" if waiting else line
            if waiting.count('"') % 2 == 0:
                commands.append(waiting.strip())
                waiting = ""
        return [command for command in (*commands, waiting) if command and not command.startswith("#")]


def pages() -> list[Path]:
    """README.md and every page of docs/."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def blocks_of(page: Path) -> list[Block]:
    """The page's blocks of shell, Python, YAML and JSON."""
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(REPOSITORY))
    return [
        Block(name, text[: match.start()].count("\n") + 1, match["language"], match["text"], match["reason"] or "")
        for match in _BLOCK.finditer(text)
        if match["language"] in ("bash", "sh", "shell", "python", "yaml", "json")
    ]


def script_of(command: str) -> tuple[str, list[str]] | None:
    """(script, arguments) of a command that is ours, however it is launched; None for any other."""
    words = command.split("#", 1)[0] if '"' not in command else command
    try:
        found = shlex.split(words)
    except ValueError:
        return None
    while found and re.fullmatch(r"[A-Z_]+=\S*", found[0]):
        found = found[1:]
    if len(found) > 1 and found[0] == "scone":
        return (VERBS[found[1]][0], found[2:]) if found[1] in VERBS else None
    for index, word in enumerate(found):
        if word.startswith("scone.scripts.") and found[index - 1] == "-m":
            return word.rsplit(".", 1)[1], found[index + 1 :]
    return None


def run(block: Block, folder: Path, names: dict[str, Any]) -> None:
    """Run a block in ``folder``: our commands in this process, others by bash, Python with the page's ``names``."""
    if block.language == "python":
        exec(compile(block.text, str(block), "exec"), names)  # a test runs the documentation, not data
        return
    for command in block.commands():
        ours = script_of(command)
        if ours is not None:
            script, arguments = ours
            assert not importlib.import_module(f"scone.scripts.{script}").main(arguments), (str(block), command)
            continue
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        environment["SCONE_REPOSITORY"] = str(REPOSITORY)
        done = subprocess.run(
            ["bash", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (str(block), command, done.stderr[-500:])
