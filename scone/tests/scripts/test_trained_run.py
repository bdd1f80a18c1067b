"""One small run of train-configurations: its folders, report and table, and what other commands say of them."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest

from scone.cli import main
from scone.inference.embedding_table import EmbeddingTable
from scone.tests import tiny
from scone.tests.training.runs import write_corpus
from scone.tokenization.f_gram_vocabulary import FGramVocabulary

TINY = shlex.split(
    "--tokenizer train --vocab_size 300 --hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 "
    "--intermediate_size 32 --f_gram_hidden_size 16 --f_gram_num_hidden_layers 1 --f_gram_num_attention_heads 2 "
    "--f_gram_intermediate_size 32 --max_length 32 --max_steps 4 --save_steps 2 --eval_steps 4 --num_workers 0 "
    "--report_to none --device cpu"
)


@dataclass(frozen=True)
class Run:
    """Where the corpus, the cache and the results of the module's run lie."""

    corpus: Path
    cache: Path
    output: Path

    def where(self, output: Path | None = None) -> list[str]:
        folders = {"--dataset_name": self.corpus, "--cache_dir": self.cache, "--output_dir": output or self.output}
        return [str(word) for pair in folders.items() for word in pair]

    def argv(self, *more: str, output: Path | None = None) -> list[str]:
        """The command line that made the run, and ``more``."""
        return ["train-configurations", *self.where(output), *TINY, "--configs", "small-100k", "medium-1m", *more]

    @property
    def final_model(self) -> Path:
        return self.output / "scone-small-100k" / "final_model"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    result = Run(write_corpus(folder), folder / "cache", folder / "outputs")
    assert main(result.argv()) == 0
    table = str(result.final_model.parent / "embeddings.cache")
    assert main(["precompute", "--model_path", str(result.final_model), "--output_path", table]) == 0
    return result


def test_each_configuration_lands_in_its_folder_with_one_count(run):
    sizes = []
    for name, floor in (("small-100k", 100), ("medium-1m", 20)):
        vocabulary = FGramVocabulary.load(run.output / f"scone-{name}" / "final_model")
        assert vocabulary.counts.min() >= floor
        sizes.append(vocabulary.num_f_grams)
    assert 0 < sizes[0] < sizes[1]
    vocabularies = sorted(path.parent.name for path in run.cache.glob("vocabularies/*/*/f_grams.safetensors"))
    assert vocabularies == ["100-100000", "20-1000000"]
    assert len(list(run.cache.glob("vocabularies/*/*/counting.json"))) == 1  # the second was cut from the first


def test_all_files_have_the_mode_of_new_files(run):
    """Models and checkpoints, plain and SCONE, tables, vocabularies, tokens: what others may read is for the umask."""
    plain = ["train", *run.where(run.output / "plain"), *TINY, "--use_f_gram_embeddings", "false", "--max_steps", "1"]
    assert main(plain) == 0
    mask = os.umask(0)
    os.umask(mask)
    files = [path for folder in (run.output, run.cache) for path in folder.rglob("*") if path.is_file()]
    modes = {str(path): stat.S_IMODE(path.stat().st_mode) for path in files}
    assert {path: oct(mode) for path, mode in modes.items() if mode != 0o666 & ~mask} == {}
    assert len([path for path in files if path.suffix == ".safetensors"]) >= 9


def test_finished_configurations_are_kept(run, capsys):
    before = (run.final_model / "model.safetensors").stat().st_mtime_ns
    assert main(run.argv()) == 0
    assert capsys.readouterr().out.count("(finished before)") == 2
    assert (run.final_model / "model.safetensors").stat().st_mtime_ns == before
    assert main(run.argv("--seed", "7")) == 2
    assert "begun with training.seed 42; expected 7; choose another --output_dir" in capsys.readouterr().err


def test_an_interrupted_configuration_is_resumed(run, tmp_path, capsys):
    interrupted = shutil.copytree(run.output, tmp_path / "outputs") / "scone-small-100k"
    before = (interrupted / "final_model" / "model.safetensors").read_bytes()
    shutil.rmtree(interrupted / "final_model")
    shutil.rmtree(interrupted / "checkpoint-4")
    assert main(run.argv(output=tmp_path / "outputs")) == 0
    assert capsys.readouterr().out.count("(finished before)") == 1
    assert (interrupted / "final_model" / "model.safetensors").read_bytes() == before


def test_processes_are_not_started_by_processes(run, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(run.argv("--distributed")) == 2
    assert "found --distributed inside a distributed launch" in capsys.readouterr().err


def test_processes_share_the_table_of_a_model(tmp_path, monkeypatch, capsys):
    """The variables that torchrun sets are all that they need; each says what it did."""
    tiny.scone().save_pretrained(tmp_path / "model")
    words = ["precompute", "--model_path", str(tmp_path / "model"), "--output_path", str(tmp_path / "table")]
    words += ["--batch_size", "1", "--row_type", "int8", "--use_memory_map", "--device", "cpu"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        assert not (tmp_path / "table").exists()
        monkeypatch.setenv("RANK", str(rank))
        assert main([*words, f"--local-rank={rank}"]) == 0
    shown = capsys.readouterr()
    assert re.findall(r"^rank (\d): computed (\d+) rows in ", shown.err, re.MULTILINE) == [("1", "126"), ("0", "128")]
    assert "254 rows × 16 int8" in shown.out
    EmbeddingTable.open(tmp_path / "table").close()


# ------------------------------------------------------------------ verify


def test_a_whole_run_is_verified(run, capsys):
    folder, corpus = run.final_model.parent, next(run.cache.glob("tokens/corpus*"))
    assert main(["verify", str(folder), str(corpus)]) == 0
    shown = capsys.readouterr().out
    for what in ("weights", "tokenizer", "f-grams of up to", "options", "of them are the rows of", "documents"):
        assert what in shown
    assert shown.count(": whole: ") == len(shown.splitlines())
    other = run.output / "scone-medium-1m" / "final_model"
    assert main(["verify", str(folder / "embeddings.cache"), "--model_path", str(other)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("name", ["f_grams.safetensors", "model.safetensors", "options.yaml", "config.json", "other"])
def test_a_damaged_model_folder_is_refused(run, tmp_path, name, capsys):
    """Also one with the vocabulary of another model."""
    copy = shutil.copytree(run.final_model, tmp_path / "final_model")
    if name == "other":
        shutil.copy(run.output / "scone-medium-1m" / "final_model" / "f_grams.safetensors", copy)
    else:
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[: len(content) // 2] + b"\xff")
    assert main(["verify", str(copy)]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert ("does not fit the model's configuration" if name == "other" else name) in shown


# ------------------------------------------------------------------ count, inspect


def test_count_says_what_f_grams_cover(run, tmp_path, capsys):
    argv = ["count", "--dataset_name", str(run.corpus), "--cache_dir", str(run.cache), "--tokenizer", "train"]
    argv += ["--vocab_size", "300", "--min_freq", "5", "--output", str(tmp_path / "v"), "--width", "16"]
    assert main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    vocabulary = FGramVocabulary.load(tmp_path / "v")
    assert report["fingerprint"] == vocabulary.fingerprint
    assert report["count"]["num_f_grams"] == vocabulary.num_f_grams
    assert report["count"]["count_at_cut"] == vocabulary.counts.min()
    assert sum(level["num_f_grams"] for level in report["count"]["levels"]) == vocabulary.num_f_grams
    assert report["table_bytes"]["fp32"] == vocabulary.num_f_grams * 16 * 4
    lengths = report["held_out_positions_by_length"]
    assert 0 < lengths["1"] < sum(lengths.values())
    assert main(argv) == 0
    shown = capsys.readouterr().out
    for what in ("tokens read", "count at cut", "candidates", "match rate", "table", "vocabulary"):
        assert what in shown


def test_inspect_shows_f_grams_ranks_and_counts(run, capsys, monkeypatch):
    argv = ["inspect", "--model_path", str(run.final_model)]
    text = json.loads(run.corpus.read_text(encoding="utf-8").splitlines()[0])["text"][:60] + "\n"
    assert main([*argv, text, "--json"]) == 0
    records, vocabulary = json.loads(capsys.readouterr().out), FGramVocabulary.load(run.final_model)
    assert "".join(record["text"] for record in records) == text
    assert any(record["rank"] is not None for record in records)
    for record in records:
        assert tuple(record["f_gram"]) == vocabulary.tokens(record["node"])
        assert record["rank"] is None or record["count"] == vocabulary.counts[record["rank"]]
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split()[-3:] == ["length", "rank", "count"]
    assert r'"\n"' in shown
