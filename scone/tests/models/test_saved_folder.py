"""A saved folder in other hands: of an earlier version, in fresh processes, without our package, at a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import scone.models.language_model
import scone.models.over_encoding
import scone.models.scaled_trunk  # noqa: F401 (each registers its Auto class)
from scone.tests import tiny
from scone.tokenization.tokenizers import train_tokenizer

FOLDERS = sorted((Path(__file__).parents[1] / "fixtures").glob("saved_by_*/*"))
LOAD = "from transformers import AutoModelForCausalLM as A; m = A.from_pretrained({!r}, trust_remote_code=True); "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its tokenizer."""
    path = tmp_path_factory.mktemp("saved") / "final_model"
    tiny.scone("llama").save_pretrained(path)
    train_tokenizer(["some text to train on, " * 20], 300, path)
    return path


def run(program, tmp_path, **environment):
    """A fresh process with a cache of its own for what transformers copies, and nobody at its terminal."""
    variables = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")} | environment
    quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "check": False}
    return subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=variables, **quiet)


def test_it_loads_by_auto_classes_without_our_import(folder, tmp_path):
    """With the file that names our classes, and with that of an older version, which imports without a try."""
    logits = tiny.scone("llama")(torch.arange(12)[None]).logits
    torch.save(logits.detach(), tmp_path / "logits.pt")
    older = (
        '"""Where AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) finds SCONE."""\n\n'
        "from scone.models.configuration import SconeConfig\n"
        "from scone.models.language_model import SconeForCausalLM\n\n"
        '__all__ = ["SconeConfig", "SconeForCausalLM"]\n'
    )
    program = (
        f"import sys, torch; {LOAD.format(str(folder))} found = m.eval()(torch.arange(12)[None]).logits\n"
        "assert torch.equal(found, torch.load('logits.pt')), 'logits differ'\n"
        f"open({str(folder / 'modeling_scone.py')!r}, 'w').write({older!r})\n"
        f"import os, subprocess; os.environ['HF_MODULES_CACHE'] += '2'\n"
        f"{LOAD.format(str(folder))} print('ok')"
    )
    written = (folder / "modeling_scone.py").read_text()
    try:
        done = run("import sys; assert not any(name.startswith('scone') for name in sys.modules); " + program, tmp_path)
    finally:
        (folder / "modeling_scone.py").write_text(written)
    assert done.stdout.strip() == "ok", done.stderr


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (None, ["which cannot be imported here", "pip install scone-lm"]),
        ("print 'of Python 2'", ["Missing parentheses", "pip uninstall scone"]),
    ],
    ids=["no package", "a stranger's"],
)
def test_without_our_package_one_line_says_what_to_install(folder, tmp_path, code, words):
    """Where there is none, and where a stranger's has our name."""
    # an editable installation answers for its submodules whoever has the name
    before = "import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]; "
    if code is None:
        before = "import sys; sys.modules['scone'] = None; "
    else:
        (tmp_path / "scone").mkdir()
        (tmp_path / "scone" / "__init__.py").write_text(code + "\n")
    done = run(before + LOAD.format(str(folder)), tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: this model needs SCONE")
    assert all(word in last for word in words), last
    assert "Run `pip" not in done.stderr  # what transformers would say of an import that it finds missing


AUTO = "from transformers import AutoTokenizer as T; print(len(T.from_pretrained({!r}).encode('some text')))"
OURS = "from scone.tokenization.tokenizers import load_tokenizer as t; print(len(t({!r}).encode('some text')))"


def at_a_terminal(program):
    """What a process says whose input and output are a terminal where nobody answers."""
    ours, its = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", program], stdin=its, stdout=its, stderr=its) as process:
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


def test_a_tokenizer_asks_nothing_at_a_terminal(folder):
    """Where nothing of ours was imported, transformers asks for the *configuration's* code unless told not to."""
    program = f"{OURS.format(str(folder))}; from scone import SconeForCausalLM; {AUTO.format(str(folder))}"
    first, *said = at_a_terminal(program).split()
    assert first.isdigit(), (first, said)
    assert "custom code" not in " ".join(said)
    assert said[-1] == first


def test_there_are_folders_of_every_kind():
    assert {folder.name for folder in FOLDERS} >= {"scone-gpt2", "scone-llama", "over-encoding-qwen2", "scaled-llama"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_a_folder_of_an_earlier_version_gives_the_same_logits(folder, tmp_path):
    expected = load_file(folder / "expected.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    model.eval().save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        for each in (model, again):
            torch.testing.assert_close(each(expected["input_ids"]).logits, expected["logits"], atol=1e-5, rtol=1e-5)
