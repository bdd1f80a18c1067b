"""Model folders that are damaged or forged: verify and load say so in one line, and run nothing that is in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scone.inference.loading import load_model
from scone.scripts.verify import verify
from scone.tests import tiny
from scone.tests.hardening.hostile import damaged, forged, refused_or_read
from scone.tokenization.tokenizers import load_tokenizer, train_tokenizer
from scone.utils.errors import SconeError

FUZZ = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "final_model"
    tiny.scone().save_pretrained(folder)
    train_tokenizer(iter(["the cat sat on the mat and the dog ran"] * 5), 257, folder)
    return folder


def use(folder: Path) -> None:
    """What every command does with a model folder, each part of it whatever becomes of the others."""
    refused_or_read(lambda: verify(folder))
    refused_or_read(lambda: load_tokenizer(folder))
    loaded = refused_or_read(lambda: load_model(folder, device="cpu"))
    assert loaded is None or loaded.model is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", [*JSON_FILES, "model.safetensors", "f_grams.safetensors"])
@FUZZ
@given(data=st.data())
def test_model_folders_of_any_bytes(tmp_path: Path, model: Path, name: str, data: st.DataObject) -> None:
    folder = tmp_path / "m"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    (folder / name).write_bytes(data.draw(damaged((model / name).read_bytes())))
    use(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", JSON_FILES)
@FUZZ
@given(data=st.data())
def test_model_folders_with_forged_json(tmp_path: Path, model: Path, name: str, data: st.DataObject) -> None:
    folder = tmp_path / "m"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    (folder / name).write_text(json.dumps(data.draw(forged(json.loads((model / name).read_text())))), encoding="utf-8")
    use(folder)


@pytest.mark.parametrize("kind", ["scone", "gpt2", "unknown"])
def test_code_in_a_model_folder_is_not_run(
    tmp_path: Path, model: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    use(folder)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_run(tmp_path: Path, model: Path) -> None:
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
    use(folder)
    with pytest.raises(SconeError):
        load_model(folder, device="cpu")
    assert not (tmp_path / "ran").exists()
