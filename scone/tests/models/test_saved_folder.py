"""A saved folder in other hands: fresh processes, without our import, without our package, at a terminal."""

from __future__ import annotations

import os
import pty
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from scone.tests import tiny
from scone.tokenization.tokenizers import train_tokenizer

TEXT = "some text to train on, "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer."""
    path = tmp_path_factory.mktemp("saved") / "final_model"
    tiny.scone("llama").save_pretrained(path)
    train_tokenizer([TEXT * 20], 300, path)
    return path


def run(program: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process with a cache of its own for what transformers copies, and nobody at its terminal."""
    variables = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")} | environment
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=variables, check=False
    )


LOAD = (
    "from transformers import AutoModelForCausalLM as A; A.from_pretrained({!r}, trust_remote_code=True); print('ok')"
)


def test_without_the_package_one_line_says_what_to_install(folder: Path, tmp_path: Path) -> None:
    done = run("import sys; sys.modules['scone'] = None; " + LOAD.format(str(folder)), tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: this model needs SCONE, which cannot be imported here")
    assert "pip install scone-lm" in last
    assert "Run `pip" not in done.stderr  # what transformers would say of an import that it finds missing


@pytest.mark.parametrize(
    ("code", "fails_by"),
    [('__version__ = "0.2.0"', "No module named 'scone.models'"), ("print 'of Python 2'", "Missing parentheses")],
)
def test_a_strangers_package_of_our_name_is_told_apart(folder: Path, tmp_path: Path, code: str, fails_by: str) -> None:
    (tmp_path / "scone").mkdir()
    (tmp_path / "scone" / "__init__.py").write_text(code + "\n")
    # an editable installation answers for its submodules whoever has the name
    alone = "import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]; "
    done = run(alone + LOAD.format(str(folder)), tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: this model needs SCONE")
    assert fails_by in last
    assert "pip uninstall scone" in last


def test_a_folder_of_an_older_version_loads(folder: Path, tmp_path: Path) -> None:
    """Their file imports without a try."""
    (folder / "modeling_scone.py").write_text(
        '"""Where AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) finds SCONE."""\n\n'
        "from scone.models.configuration import SconeConfig\n"
        "from scone.models.language_model import SconeForCausalLM\n\n"
        '__all__ = ["SconeConfig", "SconeForCausalLM"]\n'
    )
    done = run(LOAD.format(str(folder)), tmp_path)
    assert done.stdout.strip() == "ok", done.stderr


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_of_new_files(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        tiny.scone().save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~mask)
    assert {"model.safetensors", "f_grams.safetensors", "modeling_scone.py", "config.json"} <= modes.keys()


TOKENIZER = "from transformers import AutoTokenizer as T; print(len(T.from_pretrained({!r}{}).encode('some text')))"


def at_a_terminal(program: str) -> str:
    """What a process says whose input and output are a terminal where nobody answers."""
    ours, its = pty.openpty()
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, close_fds=True) as process:
        os.close(its)
        said = b""
        try:
            while piece := os.read(ours, 4096):
                said += piece
                if b"[y/N]" in said:
                    break
        except OSError:  # its end was closed
            pass
        process.kill()
    os.close(ours)
    return said.decode(errors="replace")


@pytest.mark.parametrize(
    ("before", "arguments"),
    [("from scone import SconeForCausalLM; ", ""), ("", ", trust_remote_code=False")],
    ids=["with our class", "without"],
)
def test_a_tokenizer_asks_nothing_at_a_terminal(folder: Path, before: str, arguments: str) -> None:
    """Where nothing of ours was imported, transformers asks for the *configuration's* code unless told not to."""
    said = at_a_terminal(before + TOKENIZER.format(str(folder), arguments))
    assert "custom code" not in said
    assert said.split()[-1].isdigit(), said


def test_a_tokenizer_needs_nobody_to_answer(folder: Path, tmp_path: Path) -> None:
    done = run(TOKENIZER.format(str(folder), ""), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1].isdigit()
