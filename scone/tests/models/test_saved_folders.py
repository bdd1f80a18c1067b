"""Folders that an earlier version wrote load, and give the logits that were written beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import scone.models.language_model
import scone.models.over_encoding
import scone.models.scaled_trunk  # noqa: F401 (each registers its Auto class)

FOLDERS = sorted((Path(__file__).parents[1] / "fixtures").glob("saved_by_*/*"))


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
