"""Model folders that are damaged or forged: verify and load say so in one line, and run nothing that is in them."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from scone.inference.loading import load_model
from scone.scripts.verify import verify
from scone.tests import tiny
from scone.tests.hardening.hostile import refused_or_read
from scone.tokenization.tokenizers import load_tokenizer, train_tokenizer
from scone.utils.errors import SconeError

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
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


def use_model(folder):
    """Verify it, load the tokenizer, load the model: each whatever became of the others."""
    for use in (verify, load_tokenizer, lambda path: load_model(path, device="cpu")):
        refused_or_read(lambda use=use: use(folder))


@pytest.mark.parametrize("change", ["missing", "left over", "plain"])
def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path, model, change):
    """Libraries put random numbers where weights are missing, and drop those that the configuration does not name."""
    folder = tmp_path / "m"
    if change == "plain":
        tiny.trunk("gpt2").save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text()) | {"n_layer": 3, "layer_types": None}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(SconeError, match="no weights for"):
            load_model(folder, device="cpu")
        return
    shutil.copytree(model, folder)
    if change == "missing":
        weights = load_file(folder / "model.safetensors")
        del weights["trunk.transformer.h.1.mlp.c_fc.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"learned_rows": 0}))
    for use in (verify, lambda path: load_model(path, device="cpu")):
        with pytest.raises(SconeError, match="weights"):
            use(folder)


def test_a_tokenizer_with_an_absurd_id_is_refused(tmp_path, model):
    """The library that writes it out would ask for memory for every number below."""
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    token = next(iter(content["model"]["vocab"]))
    content["model"]["vocab"][token] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(content))
    for use in (verify, load_tokenizer):
        with pytest.raises(SconeError, match="the id 2,147,483,648; expected ids up to"):
            use(folder)


@pytest.mark.parametrize("kind", ["scone", "gpt2", "unknown"])
def test_code_in_a_model_folder_is_not_run(tmp_path, model, kind, monkeypatch):
    """Not even asked for on the terminal."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked whether to run code"))
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
        content["auto_map"] = dict.fromkeys(names, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        if name == "config.json" and kind != "scone":
            content["model_type"] = kind
        (folder / name).write_text(json.dumps(content))
    use_model(folder)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_run(tmp_path, model):
    """A folder with pytorch_model.bin instead of safetensors."""
    import os
    import pickle

    class Evil:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    use_model(folder)
    with pytest.raises(SconeError):
        load_model(folder, device="cpu")
    assert not (tmp_path / "ran").exists()
