"""Model folders, damaged and forged, and what every command does with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scone.inference.loading import load_model
from scone.scripts.verify import verify
from scone.tests import tiny
from scone.tests.hardening.bad_files import Files, Reader, damages, files_below, forged_json
from scone.tokenization.tokenizers import load_tokenizer, train_tokenizer
from scone.utils.errors import SconeError

JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
MODEL_FILES = (*JSON_FILES, "model.safetensors", "f_grams.safetensors")


def good_model(folder: Path) -> Files:
    """A tiny SCONE with its tokenizer."""
    tiny.scone().save_pretrained(folder)
    train_tokenizer(iter(["the cat sat on the mat and the dog ran"] * 5), 257, folder)
    return files_below(folder)


def use_model(folder: Path) -> Any:
    """Verify it, load the tokenizer, load the model: each whatever became of the others. Raises the first refusal."""
    refusals: list[SconeError] = []
    loaded = None
    for use in (verify, load_tokenizer, lambda path: load_model(path, device="cpu")):
        try:
            loaded = use(folder)
        except SconeError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]
    assert loaded is not None
    assert loaded.model is not None
    return loaded


MODEL = Reader(
    "model folder",
    good_model,
    {
        "damaged": damages(*MODEL_FILES),
        "forged": forged_json(*JSON_FILES[1:]),
    },  # sizes in config.json are built as they say
    use_model,
    cost=10,
)
