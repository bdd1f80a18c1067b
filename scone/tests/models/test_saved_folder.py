"""A saved folder in other hands: of an earlier version, in fresh processes, without our package, at a terminal."""

from __future__ import annotations

import json
import os
import shutil
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
LOAD = "m = A.from_pretrained(folder, trust_remote_code=True)\n"
OLDER = '''"""Where AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) finds SCONE."""

from scone.models.configuration import SconeConfig
from scone.models.language_model import SconeForCausalLM

__all__ = ["SconeConfig", "SconeForCausalLM"]
'''
"""The file that names our classes, of a version that imports without a try."""
PROGRAMS = {
    "loads": LOAD + "assert torch.equal(m.eval()(torch.arange(12)[None]).logits, torch.load('logits.pt')); print('ok')",
    "older": f"folder = os.path.abspath('older')\n{LOAD}print('ok')",
    "no package": "sys.modules['scone'] = None\n" + LOAD,
    # an editable installation answers for its submodules whoever has the name
    "a stranger's": "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]\n"
    f"sys.path.insert(0, 'strangers')\n{LOAD}",
    # with nothing of ours imported transformers asks for the *configuration's* code unless told not to
    "tokenizer": "from scone.tokenization.tokenizers import load_tokenizer; ours = load_tokenizer(folder)\n"
    "from scone import SconeForCausalLM; from transformers import AutoTokenizer as T; its = T.from_pretrained(folder)\n"
    "print(*(len(each.encode('some text')) for each in (ours, its)))",
}
FRESH = """
import json, numba, os, sys, torch, traceback
from transformers import AutoModelForCausalLM as A, LlamaForCausalLM, PreTrainedTokenizerFast  # with what they import
assert not any(name.startswith('scone') for name in sys.modules)
folder, programs = json.load(sys.stdin)
for name, program in programs.items():
    nobody, terminal = os.openpty()
    if not os.fork():
        os.dup2(terminal, 0)
        for number, stream in enumerate(('out', 'err'), 1):
            os.dup2(os.open(f'{name}.{stream}', os.O_WRONLY | os.O_CREAT), number)
        try:
            exec(program)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(0)  # taking all of it down takes longer than loading
    os.wait()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its tokenizer."""
    path = tmp_path_factory.mktemp("saved") / "final_model"
    tiny.scone("llama").save_pretrained(path)
    train_tokenizer(["some text to train on, " * 20], 300, path)
    return path


@pytest.fixture(scope="module")
def said(folder, tmp_path_factory):
    """Where output and errors of each program lie. They are forked from one process that has imported transformers,
    which has a cache of its own for what that copies, and nobody at its terminal who would answer.
    """
    place = tmp_path_factory.mktemp("said")
    torch.save(tiny.scone("llama")(torch.arange(12)[None]).logits.detach(), place / "logits.pt")
    (Path(shutil.copytree(folder, place / "older")) / "modeling_scone.py").write_text(OLDER)
    (place / "strangers" / "scone").mkdir(parents=True)
    (place / "strangers" / "scone" / "__init__.py").write_text("print 'of Python 2'\n")
    variables = os.environ | {"HF_MODULES_CACHE": str(place / "modules")}
    given = json.dumps([str(folder), PROGRAMS])
    subprocess.run([sys.executable, "-c", FRESH], cwd=place, env=variables, input=given, text=True, check=True)
    return place


@pytest.mark.parametrize("name", ["loads", "older"])
def test_it_loads_by_auto_classes_without_our_import(said, name):
    assert (said / f"{name}.out").read_text().strip() == "ok", (said / f"{name}.err").read_text()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no package", ["which cannot be imported here", "pip install scone-lm"]),
        ("a stranger's", ["Missing parentheses", "pip uninstall scone"]),
    ],
)
def test_without_our_package_one_line_says_what_to_install(said, name, words):
    """Where there is none, and where a stranger's has our name."""
    errors = (said / f"{name}.err").read_text()
    last = errors.strip().splitlines()[-1]
    assert last.startswith("ImportError: this model needs SCONE")
    assert all(word in last for word in words), last
    assert "Run `pip" not in errors  # what transformers would say of an import that it finds missing


def test_a_tokenizer_asks_nothing_at_a_terminal(said):
    ours, its = (said / "tokenizer.out").read_text().split()
    assert ours == its


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
