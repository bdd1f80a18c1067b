"""What the command line says of bytes that are no text, and of outputs that cannot show one: real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scone.scripts.verbs import VERBS


def run(*arguments: bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable.encode(), b"-m", b"scone.cli", *arguments]
    return subprocess.run(command, capture_output=True, env=os.environ | environment, timeout=120, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        (b"train", b"--dataset_name", b"caf\xe9.txt"),
        (b"train", b"--text_column", b"\xe9"),
        (b"train", b"--config", b"\xff.yaml"),
        (b"train", b"--\xe9", b"1"),
        (b"generate", b"--model_path", b"m", b"--prompt", b"\xff"),
        (b"hydra-train", b"data.dataset_name=\xe9"),
        (b"g\xe9n\xe9rate",),
    ],
)
def test_arguments_that_are_not_utf_8_get_one_line(arguments: tuple[bytes, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == b""
    (line,) = done.stderr.decode("ascii").splitlines()
    assert line.startswith("error: found the argument ")
    assert "is no text in utf-8; expected UTF-8" in line


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_help_prints_whatever_the_output_can_show(encoding: str) -> None:
    for arguments in ([b"--help"], [b"train", b"--help"], [b"evaluate", b"--help"]):
        done = run(*arguments, PYTHONIOENCODING=encoding)
        assert done.returncode == 0, done.stderr
        assert b"--" in done.stdout


def test_every_command_helps_in_ascii() -> None:
    """In one process: the libraries are slow to load."""
    program = (
        "import contextlib, sys; from scone.cli import main\n"
        "for verb in sys.argv[1:]:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        assert main([verb, '--help']) == 0, verb\n"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", program, *VERBS]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("encoding", "text"), [("ascii", "caf\xe9"), ("latin-1", "\u65e5"), ("utf-8", "\U0001f600")])
def test_output_that_cannot_show_a_character_is_one_line(encoding: str, text: str) -> None:
    """Nothing is put in its place: JSON, or a text that goes on to another program, would be another one."""
    program = (
        f"import sys; from scone.utils.command_line import run_main; sys.exit(run_main(lambda _: print({text!a}), []))"
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=False)
    if encoding == "utf-8":
        assert done.stdout.decode().strip() == text
        return
    assert done.returncode == 2
    (line,) = done.stderr.decode("ascii").splitlines()
    assert f"the output holds {text[-1]!a}, which" in line
    assert "set PYTHONIOENCODING=utf-8" in line


def test_a_file_name_that_is_not_utf_8_is_one_line_or_read(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    content = "\n".join(json.dumps({"text": "the cat sat on the mat"}) for _ in range(30)).encode()
    Path(os.fsdecode(bytes(tmp_path / "texts") + b"/caf\xe9.jsonl")).write_bytes(content)
    arguments = [
        b"count",
        b"--dataset_name",
        bytes(tmp_path / "texts"),
        b"--tokenizer",
        b"train",
        b"--vocab_size",
        b"300",
    ]
    done = run(*arguments, b"--min_freq", b"2", b"--cache_dir", bytes(tmp_path / "cache"))
    assert done.returncode in (0, 2)
    if done.returncode:
        assert done.stderr.decode("ascii").splitlines()[-1].startswith("error: found a name or text that is not UTF-8")
