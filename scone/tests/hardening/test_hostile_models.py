"""Model folders that are damaged or forged: verify and load say so in one line, and run nothing that is in them."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
from safetensors.torch import load_file, save_file

from scone.inference.loading import load_model
from scone.scripts.verify import verify
from scone.tests import tiny
from scone.tests.hardening.hostile import refused_or_read
from scone.tokenization.tokenizers import load_tokenizer, train_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny SCONE with its tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "final_model"
    tiny.scone().save_pretrained(folder)
    train_tokenizer(iter(["the cat sat on the mat and the dog ran"] * 5), 257, folder)
    return folder


@pytest.fixture
def folder(model, tmp_path):
    """A copy of it."""
    return shutil.copytree(model, tmp_path / "m")


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def use_model(folder):
    """Verify it, load the tokenizer, load the model: each whatever became of the others."""
    for use in (verify, load_tokenizer, lambda path: load_model(path, device="cpu")):
        refused_or_read(lambda use=use: use(folder))


@pytest.mark.parametrize("damage", ["missing", "left over", "plain"])
def test_weights_that_do_not_fit_the_configuration_are_refused(folder, damage):
    """Libraries put random numbers where weights are missing, and drop those that the configuration does not name."""
    if damage == "missing":
        weights = load_file(folder / "model.safetensors")
        del weights["trunk.transformer.h.1.mlp.c_fc.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif damage == "left over":
        change(folder / "config.json", learned_rows=0)
    else:
        tiny.trunk("gpt2").save_pretrained(folder / "plain")
        change(folder / "plain" / "config.json", n_layer=3, layer_types=None)
        assert "no weights for" in tiny.refusal(load_model, folder / "plain", device="cpu")
        return
    for use in (verify, lambda path: load_model(path, device="cpu")):
        assert "weights" in tiny.refusal(use, folder)


def test_a_tokenizer_with_an_absurd_id_is_refused(folder):
    """The library that writes it out would ask for memory for every number below."""
    content = json.loads((folder / "tokenizer.json").read_text())
    token = next(iter(content["model"]["vocab"]))
    content["model"]["vocab"][token] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(content))
    for use in (verify, load_tokenizer):
        assert "the id 2,147,483,648; expected ids up to" in tiny.refusal(use, folder)


@pytest.mark.parametrize("kind", ["scone", "gpt2", "unknown"])
def test_code_in_a_model_folder_is_not_run(tmp_path, folder, kind, monkeypatch):
    """Not even asked for on the terminal."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked whether to run code"))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    code = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Evil") | {"AutoTokenizer": ["evil.Evil"] * 2}
    change(folder / "tokenizer_config.json", auto_map=code)
    change(folder / "config.json", auto_map=code, **({} if kind == "scone" else {"model_type": kind}))
    use_model(folder)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_run(tmp_path, folder):
    """A folder with pytorch_model.bin instead of safetensors."""

    class Evil:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    use_model(folder)
    tiny.refusal(load_model, folder, device="cpu")
    assert not (tmp_path / "ran").exists()
