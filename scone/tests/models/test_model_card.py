"""The model card of a saved model, and the record of what a run was made with."""

from __future__ import annotations

from pathlib import Path

from scone.tests import tiny
from scone.tests.training.runs import options
from scone.training.artifacts import CARD_FILE, write_model_card
from scone.utils.environment import environment


def test_a_card_says_what_the_model_is_and_keeps_what_people_wrote(tmp_path):
    (tmp_path / "corpus.jsonl").touch()
    chosen, figures = options(tmp_path / "corpus.jsonl", tmp_path / "my-run"), {"eval_perplexity": 4.4817}
    for model in (tiny.scone(), tiny.trunk()):
        text = write_model_card(tmp_path, chosen, model, 1234, 6, figures | {"eval_loss": 1.5}).read_text("utf-8")
        for words in ("# my-run", "corpus.jsonl", "1,234", "4.4817", "scone generate", "licence"):
            assert words in text, words
        assert (", ranked by frequency |" in text) == hasattr(model.config, "num_f_grams")
        assert "most frequent" not in text  # by gain they are not
        assert str(tmp_path) not in text  # a folder of its author's machine says nothing to others
    (tmp_path / CARD_FILE).write_text("mine")
    write_model_card(tmp_path, chosen, tiny.trunk(), 1, 1, {})
    assert (tmp_path / CARD_FILE).read_text() == "mine"


def test_the_environment_names_versions_and_no_person():
    found = environment()
    assert found["libraries"]["torch"]
    assert found["commit"] is None or len(found["commit"].removesuffix("-dirty")) == 40
    assert str(Path.home()) not in str(found)
