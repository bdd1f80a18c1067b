"""Names out of the hub's reach: a path that is not there and an unknown name are refused at once, a copy is used."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from scone.tests import tiny
from scone.utils.errors import SconeError
from scone.utils.hub import refuse_missing_path, within_reach

SECONDS = 20  # of each command once all is imported; the hub's client alone would wait 23 seconds for each file
# imports first, for they take longer than all else
RUN_ALL = """
import json, sys, time
import scone.inference.serve, scone.training.run, scone.tokenization.counting
from scone.cli import main
for words in json.loads(sys.argv[1]):
    started = time.monotonic()
    status = main(words)
    print(json.dumps([status, time.monotonic() - started]), flush=True)
"""
TRAINED = ["--dataset_name", "text.txt", "--tokenizer", "train", "--vocab_size", "300", "--output_dir", "run"]


def nowhere():
    """Commands with names that lead nowhere."""
    commands = [
        ["generate", "--model_path", name, "--prompt", "x"] for name in ("./missing", "~/missing", "a/b/missing")
    ]
    for name in ("outputs/missing", "missing", "here/missing"):
        commands += [
            ["generate", "--model_path", name, "--prompt", "x"],
            ["evaluate", "--model_path", name],
            ["serve", "--model_path", name],
            ["precompute", "--model_path", name, "--output_path", "table"],
            ["count", "--dataset_name", name],
            ["count", "--tokenizer", name, "--dataset_name", "text.txt"],
            ["train", "--base_model_name", name, *TRAINED],
            ["train", "--base_model_name", name, *TRAINED, "--init", "pretrained"],
        ]
    return commands


def with_a_copy():
    """Commands with a name of which the hub's cache has a copy."""
    trained = ["--init", "pretrained", "--base_model_name", "owner/name", "--tokenizer", "owner/name"]
    trained += ["--dataset_name", "text.txt", "--max_steps", "1", "--f_gram_num_hidden_layers", "0"]
    sizes = ["--max_length", "8", "--batch_size", "2", "--min_freq", "2", "--device", "cpu", "--output_dir", "run"]
    return [
        ["generate", "--model_path", "owner/name", "--prompt", "the dog", "--max_length", "5"],
        ["evaluate", "--model_path", "owner/name", "--tasks", "piqa"],
        ["train", *trained, *sizes],
    ]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """The folder, statuses and seconds, and what was said of errors, of a process whose hub refuses connections."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "here").mkdir()
    (folder / "text.txt").write_text("the dog the dog the dog\n" * 50)
    copies = folder / "hub" / "hub" / "models--owner--name"  # as the hub's client lays it
    (copies / "refs").mkdir(parents=True)
    (copies / "refs" / "main").write_text("abc")
    tiny.trunk("gpt2").save_pretrained(copies / "snapshots" / "abc")
    words = ["[UNK]", "[EOS]", "the", "dog"]
    tiny.word_tokenizer(words, "[UNK]", unk_token="[UNK]", eos_token="[EOS]").save_pretrained(
        copies / "snapshots" / "abc"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # a port that nobody listens at
        environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{free.getsockname()[1]}"}
        environment |= {"HF_HOME": str(folder / "hub"), "SCONE_CACHE": str(folder / "cache")}
        del environment["HF_HUB_OFFLINE"]
        command = [sys.executable, "-c", RUN_ALL, json.dumps(nowhere() + with_a_copy())]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=True)
    assert "Retrying" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return folder, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")], errors


@pytest.mark.slow
def test_every_command_refuses_a_name_that_leads_nowhere_at_once_and_in_one_line(said):
    _, ends, errors = said
    commands = nowhere()
    ends = ends[: len(commands)]
    assert [status for status, _ in ends] == [2] * len(commands)
    assert max(seconds for _, seconds in ends) < SECONDS, dict(zip(map(str, commands), ends, strict=True))
    for words, error in zip(commands, errors[: len(commands)], strict=True):
        asked = words[2] in ("outputs/missing", "missing", "here/missing")
        assert repr(words[2]) in error
        assert ("cannot be reached" if asked else "found no file or folder") in error


@pytest.mark.slow
def test_a_copy_in_the_cache_of_the_hub_is_loaded_at_once(said):
    """By those who run a plain model, and as a pretrained trunk."""
    folder, ends, errors = said
    generated, evaluated, trained = ends[len(nowhere()) :]
    assert [status for status, _ in (generated, evaluated, trained)] == [0, 2, 0]
    (error,) = errors[len(nowhere()) :]  # nothing says where the items of a task may be
    assert "found no --task_data, and the Hugging Face hub cannot be reached" in error
    assert max(generated[1], evaluated[1]) < SECONDS  # training also compiles
    assert (folder / "run" / "final_model" / "model.safetensors").is_file()


def test_what_exists_wins_and_what_the_hub_cannot_have_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert within_reach("owner/name", "it") == "owner/name"
    assert within_reach("~/owner", "it") == str(tmp_path / "owner")
    for name in ("gpt2", "other/name", "other/name.v2", "owner/other"):
        refuse_missing_path(name, "it")
    for name in ("a/b/c", "/a", "../a", "a b", "a/", "~/a", "C:\\a"):
        with pytest.raises(SconeError, match="expected it there; check the path"):
            refuse_missing_path(name, "it")
