"""Training runs: real corpora in files, real checkpoints, real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scone.configs.loading import from_mapping
from scone.configs.schema import SconeOptions
from scone.training.run import train
from scone.training.trainer import complete_checkpoints
from scone.utils.errors import SconeError

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

WORDS = tuple("the cat sat on the mat and the dog ran to the old red house by the sea while it rained all day".split())  # noqa: SIM905


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Sixty short documents of repeated phrases, so that f-grams exist and a tiny model can learn."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = []
    for document in range(60):
        words = [WORDS[(document * 7 + i * i) % len(WORDS)] for i in range(120)]
        lines.append(json.dumps({"text": " ".join(words)}))
    (folder / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "corpus.jsonl"


def options(corpus: Path, output_dir: Path, **changes: object) -> SconeOptions:
    values: dict[str, object] = {
        "data.dataset_name": str(corpus),
        "data.dataset_config_name": None,
        "data.max_length": 32,
        "data.max_n": 3,
        "data.min_freq": 3,
        "data.cache_dir": str(corpus.parent / "cache"),
        "data.num_workers": 0,
        "model.tokenizer": "train",
        "model.vocab_size": 300,
        "model.hidden_size": 16,
        "model.num_hidden_layers": 1,
        "model.num_attention_heads": 2,
        "model.hidden_dropout_prob": 0.1,
        "training.output_dir": str(output_dir),
        "training.batch_size": 4,
        "training.max_steps": 6,
        "training.learning_rate": 0.01,
        "training.logging_steps": 2,
        "training.save_steps": 3,
        "training.eval_steps": 3,
        "training.report_to": "none",
        "training.device": "cpu",
    }
    nested: dict = {}
    for name, value in (values | changes).items():
        place = nested
        *sections, last = name.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return from_mapping(nested)


def weights(final_model: Path) -> dict[str, torch.Tensor]:
    return load_file(final_model / "model.safetensors")


def assert_same_weights(left: Path, right: Path, **tolerance: float) -> None:
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_a_run_leaves_a_complete_model_and_learns(corpus, tmp_path):
    final_model = train(options(corpus, tmp_path / "run", **{"training.max_steps": 30}), quiet=True)
    names = {path.name for path in final_model.iterdir()}
    assert {"config.json", "model.safetensors", "f_grams.safetensors", "options.yaml", "tokenizer.json"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))}, (
        "nothing that can execute code"
    )
    log = json.loads((tmp_path / "run" / "training_log.json").read_text())
    losses = [line["loss"] for line in log["log"] if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    assert log["final"]["eval_perplexity"] > 1
    assert 0 < log["log"][0]["match_rate"] <= 1
    assert 0 < log["log"][0]["nodes_per_position"] <= 3


def test_the_plain_baseline_is_an_ordinary_model_on_the_same_batches(corpus, tmp_path):
    """At step 0 SCONE is its trunk, so the first loss of both runs is the same number."""
    first_losses = []
    for name, with_f_grams in (("plain", False), ("scone", True)):
        changes = {
            "model.use_f_gram_embeddings": with_f_grams,
            "model.hidden_dropout_prob": 0.0,
            "model.attention_probs_dropout_prob": 0.0,
            "training.logging_steps": 1,
            "training.max_steps": 1,
        }
        train(options(corpus, tmp_path / name, **changes), quiet=True)
        first_losses.append(json.loads((tmp_path / name / "training_log.json").read_text())["log"][0]["loss"])
    assert first_losses[0] == first_losses[1]
    assert json.loads((tmp_path / "plain/final_model/config.json").read_text())["model_type"] == "gpt2"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_training_equals_uninterrupted(corpus, tmp_path, accumulation):
    """Dropout, order, optimizer, learned rows and schedule all go on where they were."""
    changes = {"training.gradient_accumulation_steps": accumulation, "training.batch_size": 4 // accumulation}
    whole = train(options(corpus, tmp_path / "whole", **changes), quiet=True)
    train(options(corpus, tmp_path / "cut", **changes), quiet=True)
    last = complete_checkpoints(tmp_path / "cut")[-1]
    assert last.name == "checkpoint-6"
    for path in (last / "complete.json", *(tmp_path / "cut" / "final_model").iterdir()):
        path.unlink()  # as if killed while the last checkpoint was written
    (tmp_path / "cut" / "final_model").rmdir()
    resumed = train(
        options(corpus, tmp_path / "cut", **changes, **{"training.resume_from_checkpoint": "true"}), quiet=True
    )
    assert_same_weights(whole, resumed, atol=0.0, rtol=0.0)


def test_accumulated_batches_equal_one_large_batch(corpus, tmp_path):
    still = {"model.hidden_dropout_prob": 0.0, "model.attention_probs_dropout_prob": 0.0}
    large = train(options(corpus, tmp_path / "large", **still), quiet=True)
    split = {"training.batch_size": 2, "training.gradient_accumulation_steps": 2}
    small = train(options(corpus, tmp_path / "small", **still, **split), quiet=True)
    assert_same_weights(large, small, atol=2e-4, rtol=2e-3)


def command_line(corpus: Path, output_dir: Path, *flags: str) -> list[str]:
    return [
        *("--dataset_name", str(corpus), "--max_length", "32", "--min_freq", "3", "--tokenizer", "train"),
        *("--vocab_size", "300", "--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2"),
        *("--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0", "--learning_rate", "0.01"),
        *("--output_dir", str(output_dir), "--cache_dir", str(corpus.parent / "cache"), "--num_workers", "0"),
        *("--report_to", "none", "--device", "cpu", *flags),
    ]


def test_two_ranks_equal_one_rank_with_twice_the_batch(corpus, tmp_path):
    """DDP over gloo; the learned rows, which DDP does not know, are averaged by our optimizer."""
    one = train(
        options(
            corpus,
            tmp_path / "one",
            **{"model.hidden_dropout_prob": 0.0, "model.attention_probs_dropout_prob": 0.0, "training.save_steps": 100},
        ),
        quiet=True,
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    flags = command_line(corpus, tmp_path / "two", "--batch_size", "2", "--max_steps", "6")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "-m", "scone.scripts.train", *flags], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_weights(one, tmp_path / "two" / "final_model", atol=2e-4, rtol=2e-3)


def test_ctrl_c_leaves_a_run_that_resumes(corpus, tmp_path):
    flags = command_line(
        corpus, tmp_path / "run", "--batch_size", "4", "--max_steps", "100000", "--save_steps", "50000"
    )
    command = [sys.executable, "-m", "scone.scripts.train", *flags, "--logging_steps", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "'loss'" in line:
                break
        process.send_signal(signal.SIGINT)
        output = process.stdout.read()
    assert process.returncode == 130, output
    assert "interrupted" in output
    assert "Traceback" not in output
    (checkpoint,) = complete_checkpoints(tmp_path / "run")
    step = int(checkpoint.name.split("-")[1])
    resume = ["--resume_from_checkpoint", "--max_steps", str(step + 2)]
    subprocess.run([sys.executable, "-m", "scone.scripts.train", *flags, *resume], check=True, timeout=120)
    assert (tmp_path / "run" / "final_model" / "model.safetensors").exists()


def test_kill_9_loses_at_most_the_steps_since_the_last_checkpoint(corpus, tmp_path):
    flags = command_line(corpus, tmp_path / "run", "--batch_size", "2", "--save_steps", "2", "--max_steps", "100000")
    process = subprocess.Popen([sys.executable, "-m", "scone.scripts.train", *flags], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(complete_checkpoints(tmp_path / "run")) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    last = complete_checkpoints(tmp_path / "run")[-1]
    step = int(last.name.split("-")[1])
    resume = ["--resume_from_checkpoint", "--max_steps", str(step + 2)]
    done = subprocess.run(
        [sys.executable, "-m", "scone.scripts.train", *flags, *resume], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "final_model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.min_freq": 10**6}, r"found no n-gram .* lower --min_freq"),
        ({"data.max_length": 4096}, r"found --max_length 4096; expected at most 1024"),
        ({"data.max_length": 9999, "model.max_position_embeddings": 9999}, r"expected at least one block of 9999"),
        ({"model.hidden_size": 15}, r"multiple of the heads"),
        ({"model.base_model_name": "no/such/model"}, r"cannot find the model"),
        ({"model.learned_rows": 0, "model.f_gram.num_hidden_layers": 0}, r"neither an f-gram model nor learned rows"),
        ({"training.resume_from_checkpoint": "nowhere"}, r"no complete checkpoint"),
        ({"training.freeze_trunk": True, "model.use_f_gram_embeddings": False}, r"nothing to train"),
        ({"model.init": "pretrained", "model.base_model_name": "gpt2"}, r"cannot load pretrained weights"),
    ],
)
def test_mistakes_get_one_line(corpus, tmp_path, changes, message):
    with pytest.raises(SconeError, match=message) as caught:
        train(options(corpus, tmp_path / "run", **changes), quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "final_model").exists()


def test_a_folder_with_other_things_or_a_finished_run_is_left_alone(corpus, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(SconeError, match="holds something else"):
        train(options(corpus, tmp_path / "photos"), quiet=True)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    run = options(corpus, tmp_path / "run", **{"training.max_steps": 1})
    train(run, quiet=True)
    with pytest.raises(SconeError, match="holds a finished run"):
        train(run, quiet=True)


def test_fp16_on_a_cpu_warns_and_trains(corpus, tmp_path, caplog):
    train(options(corpus, tmp_path / "run", **{"training.fp16": True, "training.max_steps": 1}), quiet=True)
    assert "fp16 is not available" in caplog.text


def test_gradient_checkpointing_changes_nothing(corpus, tmp_path):
    still = {"model.hidden_dropout_prob": 0.0, "model.attention_probs_dropout_prob": 0.0, "training.max_steps": 3}
    kept = train(options(corpus, tmp_path / "kept", **still), quiet=True)
    checkpointing = still | {"training.gradient_checkpointing": True}
    recomputed = train(options(corpus, tmp_path / "recomputed", **checkpointing), quiet=True)
    assert_same_weights(kept, recomputed, atol=1e-5, rtol=1e-4)


def test_a_frozen_trunk_keeps_its_weights(corpus, tmp_path):
    run = options(corpus, tmp_path / "run", **{"training.freeze_trunk": True})
    final = weights(train(run, quiet=True))
    torch.manual_seed(0)
    from scone.training.run import build_model, prepare_run_corpus

    start = build_model(run, prepare_run_corpus(run, quiet=True), quiet=True).state_dict()
    for name, tensor in final.items():
        moved = not torch.equal(tensor, start[name])
        assert moved == (not name.startswith("trunk.")) or name.endswith((".bias", "map_in.weight")), name
