"""The `scone` command: verbs, exit codes, one-line errors, and that its help needs no torch."""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import pytest

from scone import __version__
from scone.cli import VERBS, dispatch, main
from scone.utils.command_line import did_you_mean, run_main
from scone.utils.errors import SconeError

HEAVY = ("torch", "transformers", "numba", "numpy", "datasets", "hydra")


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=60, check=False)


def failing(error: BaseException) -> Callable[[Sequence[str]], int | None]:
    def fail(argv: Sequence[str]) -> int | None:
        raise error

    return fail


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb, (_, line) in VERBS.items():
        assert f"  {verb} " in text
        assert line in text


def test_no_arguments_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "commands:" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"scone {__version__}\n"


@pytest.mark.parametrize(("word", "meant"), [("trian", "train"), ("evalute", "evaluate"), ("Benchmark", "benchmark")])
def test_an_unknown_verb_gets_a_suggestion(word: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 2
    assert (
        capsys.readouterr().err
        == f"error: found the unknown command {word}; did you mean {meant}? (see scone --help)\n"
    )


def test_a_script_name_is_a_verb_too() -> None:
    with pytest.raises(SconeError, match="--max_n: found 1"):
        dispatch(["train_configurations", "--configs", "small-100k", "--max_n", "1"])


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "hydra-train"])
def test_the_help_of_every_verb_needs_nothing_heavy(verb: str) -> None:
    code = (
        "import sys; from scone.cli import dispatch\n"
        f"try: dispatch([{verb!r}, '--help'])\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ")
    assert "examples:" in result.stdout
    assert result.stdout.endswith("HEAVY []\n")


def test_help_is_there_at_once() -> None:
    fastest = min(_seconds("-m", "scone.cli", "--help") for _ in range(3))
    bare = min(_seconds("-c", "pass") for _ in range(3))
    assert fastest - bare < 0.3


def _seconds(*argv: str) -> float:
    start = time.perf_counter()
    assert run(*argv).returncode == 0
    return time.perf_counter() - start


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (SconeError("found 1;\n expected 2"), 2, "error: found 1; expected 2"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b"),
            2,
            "error: No space left on device: a/b; free some disk",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "a"),
            2,
            "error: Permission denied: a; check the permissions",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), 2, "error: Permission denied; run again with --debug"),
        (OSError(errno.ENOENT, "No such file", "a\x1b[2J"), 2, "error: No such file: a\\x1b[2J; check the path"),
        (MemoryError(), 2, "error: out of memory"),
        (KeyboardInterrupt(), 130, "interrupted; what was finished is kept"),
        (
            RuntimeError("odd\nthing"),
            1,
            "error: unexpected RuntimeError: odd thing; run again with --debug for the traceback, and please report it",
        ),
    ],
)
def test_every_failure_is_one_line_and_a_status(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(failing(error), []) == status
    shown = capsys.readouterr().err
    assert shown.startswith(line)
    assert shown.count("\n") == 1


def test_debug_shows_the_traceback_and_is_not_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []

    def script(argv: Sequence[str]) -> int | None:
        seen.extend(argv)
        raise SconeError("no")

    assert run_main(script, ["--seed", "1", "--debug", "--", "--debug"]) == 2
    assert seen == ["--seed", "1", "--", "--debug"]
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = (
        "from scone.utils.command_line import run_main; import sys; sys.exit(run_main(lambda argv: print(10**5 * 'x')))"
    )
    command = f'"{sys.executable}" -c "{code}" | head -c 1'
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (result.stdout, result.stderr) == ("x", "")


def test_suggestions_are_near_or_none() -> None:
    assert did_you_mean("trian", ["train", "count"]) == "did you mean train?"
    assert did_you_mean("zzz", ["train", "count"]) == ""


def test_quiet_is_taken_out_and_reaches_everything_that_talks(monkeypatch: pytest.MonkeyPatch) -> None:
    from scone.utils.progress import bars_are_visible, is_quiet

    monkeypatch.setenv("SCONE_PROGRESS", "1")
    monkeypatch.setattr("logging.disable", lambda level: None)
    seen: list[Sequence[str]] = []

    def script(argv: Sequence[str]) -> int | None:
        seen.append(argv)
        assert is_quiet()
        assert not bars_are_visible()
        return None

    assert bars_are_visible()
    assert run_main(script, ["--quiet", "--seed", "1"]) == 0
    assert seen == [["--seed", "1"]]
