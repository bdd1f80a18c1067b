"""Shell completion: every command and flag is in the scripts, and the shells that are here understand them."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from scone.cli import main
from scone.configs.values import entries
from scone.scripts.completion import flags_of
from scone.scripts.verbs import VERBS
from scone.utils.completion import SHELLS


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_names_every_command_and_is_read_by_its_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(shell, capsys)
    for verb in VERBS:
        assert verb in text
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=text, capture_output=True, text=True, timeout=30, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_the_flags_are_those_of_the_schema() -> None:
    known = {flag.name: flag for flag in flags_of("train")}
    assert {f"--{entry.flag}" for entry in entries().values() if entry.section == "training"} <= set(known)
    assert known["--init"].choices == ("scratch", "pretrained")
    assert "--describe" not in known
    assert "(default" not in known["--max_n"].help


@pytest.mark.parametrize(
    ("words", "expected"),
    [("scone ev", "evaluate"), ("scone train --min", "--min_freq"), ("scone train --init ''", "scratch pretrained")],
)
def test_bash_completes(words: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    last = len(words.split()) - 1
    ask = f'COMP_WORDS=({words}); COMP_CWORD={last}; _scone; echo "${{COMPREPLY[*]}}"'
    command = ["bash", "-c", f"{script('bash', capsys)}\n{ask}"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip() == expected


def test_an_unknown_shell_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bsh"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
