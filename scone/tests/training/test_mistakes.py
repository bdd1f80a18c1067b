"""Mistakes get one line, most of them before the corpus is read."""

from __future__ import annotations

import json
import re

import pytest

from scone.tests import tiny
from scone.tests.training.runs import options
from scone.training.run import train


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.min_freq": 10**6}, r"found no n-gram .* lower --min_freq"),
        ({"data.max_length": 4096}, r"found --max_length 4096; expected at most 1024"),
        ({"data.max_length": 9999, "model.max_position_embeddings": 9999}, r"expected at least one block of 9999"),
        (
            {"model.base_model_name": "no/such/model"},
            r"found no file or folder 'no/such/model'; expected a model folder, or an architecture",
        ),
        # before counting, which would find nothing
        (
            {"model.learned_rows": 0, "model.f_gram.num_hidden_layers": 0, "data.min_freq": 10**6},
            r"neither an f-gram model",
        ),
        ({"training.resume_from_checkpoint": "nowhere"}, r"no complete checkpoint"),
        ({"training.report_to": "dvclive"}, r"not installed; install it"),
        ({"training.report_to": "tensorbord"}, r"did you mean tensorboard"),
        ({"training.freeze_trunk": True, "model.use_f_gram_embeddings": False}, r"nothing to train"),
        (
            {"model.init": "pretrained", "model.base_model_name": "gpt2"},
            r"neither as a folder here nor in the hub's cache.* --init scratch",
        ),
        # options that contradict each other
        ({"model.use_f_gram_embeddings": False, "model.over_encoding_rows": 5}, "at most one of these baselines"),
        ({"model.combination": "replace", "model.f_gram.num_hidden_layers": 0}, "without an f-gram model"),
        ({"model.f_gram.hidden_size": 9}, "expected a multiple of the heads"),
    ],
)
def test_mistakes_get_one_line(corpus, tmp_path, changes, message):
    said = tiny.refusal(lambda: train(options(corpus, tmp_path / "run", **changes), quiet=True))
    assert re.search(message, said), said
    assert not (tmp_path / "run" / "final_model").exists()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Model folders with a fault each, in the working folder."""
    (tmp_path / "empty").mkdir()
    encoder_decoder = {"model_type": "t5", "d_model": 16, "num_layers": 1, "num_heads": 2}
    no_weights = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}
    for name, config in {"t5": encoder_decoder, "new": {"model_type": "nosuch"}, "no_weights": no_weights}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)


BASE, ROWS = "model.base_model_name", {"model.f_gram.num_hidden_layers": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({BASE: "not_there"}, "neither as a folder here nor in the hub's cache"),
        ({BASE: "./not_there"}, "found no file or folder"),
        ({BASE: "./empty"}, "cannot read a model configuration in ./empty"),
        ({BASE: "./new"}, "does not recognize this architecture"),
        ({BASE: "./t5"}, "has no causal language model"),
        ({BASE: "./t5", "model.init": "pretrained"}, "has no causal language model"),
        ({BASE: "./not_there", "model.init": "pretrained"}, "found no file or folder"),
        ({BASE: "./no_weights", "model.init": "pretrained"}, "found a configuration and no weights"),
        ({BASE: "./no_weights", "model.init": "pretrained", "model.hidden_size": 32}, "expected 16, the size of"),
        ({"model.hidden_act": "gelo"}, "found --hidden_act gelo.*did you mean gelu"),
        ({"data.max_length": 4096}, "expected at most 1024"),
        ({"model.f_gram.hidden_size": 9}, "expected a multiple of the heads"),
        (ROWS | {"model.combination": "replace"}, "without an f-gram model"),
        (ROWS | {"model.learned_rows": 0}, "neither an f-gram model"),
        ({"training.device": "gpu"}, "found --device gpu, which torch does not know"),
        ({"training.device": "xla:3"}, "found --device xla:3 on a machine with"),
        ({"training.fsdp": "full_shard", "training.optimizer": "muon"}, "found --optimizer muon with --fsdp"),
        ({"training.fsdp": "full_shard", "training.fp16": True}, "found --fp16 with --fsdp"),
        ({"training.report_to": "dvclive"}, "not installed"),
        ({"training.output_dir": "no_weights/config.json"}, "found a file at"),
        ({"training.output_dir": "no_weights"}, "holds something else"),
        ({"training.resume_from_checkpoint": "empty"}, "no complete checkpoint"),
    ],
)
def test_mistakes_are_said_before_the_corpus_is_read(corpus, folders, tmp_path, changes, message):
    """To tokenise and count a real one takes minutes to hours."""
    before = sorted(tmp_path.rglob("*"))
    sizes = {"model.hidden_size": None, "model.num_attention_heads": None, "data.cache_dir": "cache"}
    said = tiny.refusal(lambda: train(options(corpus, tmp_path / "run", **(sizes | changes)), quiet=True))
    assert re.search(message, said), said
    assert sorted(tmp_path.rglob("*")) == before, "something was written"


def test_a_checkpoint_of_another_kind_is_refused_before_the_corpus_is_read(corpus, whole, tmp_path):
    checkpoint = str(whole.parent / "checkpoint-3")
    for changes, message in (
        ({"model.use_f_gram_embeddings": False}, "model_type gpt2; expected the checkpoint's scone"),
        ({BASE: "scone-modern", "model.init": "scratch"}, "model_type qwen3; expected the checkpoint's gpt2"),
        ({"model.num_hidden_layers": 2}, "n_layer 2; expected the checkpoint's 1"),
    ):
        run = {"data.cache_dir": str(tmp_path / "cache"), "training.resume_from_checkpoint": checkpoint} | changes
        assert message in tiny.refusal(train, options(corpus, tmp_path / "run", **run), quiet=True)
    assert not (tmp_path / "cache").exists()


def test_a_folder_with_other_things_or_a_finished_run_is_left_alone(corpus, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    assert "holds something else" in tiny.refusal(train, options(corpus, tmp_path / "photos"), quiet=True)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    run = options(corpus, tmp_path / "run", **{"training.max_steps": 1})
    train(run, quiet=True)
    assert "holds a finished run" in tiny.refusal(train, run, quiet=True)
