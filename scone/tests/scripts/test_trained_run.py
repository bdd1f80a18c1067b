"""One small run of train-configurations, and what count, verify and inspect say of what it wrote."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest

from scone.cli import main
from scone.tokenization.f_gram_vocabulary import FGramVocabulary

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

TINY = shlex.split(
    "--tokenizer train --vocab_size 300 --hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 "
    "--intermediate_size 32 --f_gram_hidden_size 16 --f_gram_num_hidden_layers 1 --f_gram_num_attention_heads 2 "
    "--f_gram_intermediate_size 32 --max_length 32 --max_steps 4 --save_steps 2 --eval_steps 4 --num_workers 0 "
    "--report_to none --device cpu"
)
WORDS = shlex.split("the cat sat on the mat and the dog ran to the old red house by the sea while it rained all day")
CONFIGURATIONS = ["--configs", "small-100k", "medium-1m"]


@dataclass(frozen=True)
class Run:
    """Where the corpus, the cache and the results of the module's run lie."""

    corpus: Path
    cache: Path
    output: Path

    def argv(self, *more: str) -> list[str]:
        """The command line that made the run, and ``more``."""
        where = ["--dataset_name", str(self.corpus), "--cache_dir", str(self.cache), "--output_dir", str(self.output)]
        return ["train-configurations", *where, *TINY, *CONFIGURATIONS, *more]

    @property
    def final_model(self) -> Path:
        return self.output / "scone-small-100k" / "final_model"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    documents = [
        json.dumps({"text": " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(120))})
        for number in range(60)
    ]
    (folder / "corpus.jsonl").write_text("\n".join(documents), encoding="utf-8")
    result = Run(folder / "corpus.jsonl", folder / "cache", folder / "outputs")
    assert main(result.argv()) == 0
    return result


def test_each_configuration_lands_in_its_folder_with_one_count(run: Run) -> None:
    sizes = []
    for name, floor in (("small-100k", 100), ("medium-1m", 20)):
        vocabulary = FGramVocabulary.load(run.output / f"scone-{name}" / "final_model")
        assert vocabulary.counts[-1] >= floor
        sizes.append(vocabulary.num_f_grams)
    assert 0 < sizes[0] < sizes[1]
    vocabularies = sorted(path.parent.name for path in run.cache.glob("vocabularies/*/*/f_grams.safetensors"))
    assert vocabularies == ["100-100000", "20-1000000"]
    assert len(list(run.cache.glob("vocabularies/*/*/counting.json"))) == 1  # the second was cut from the first


def test_all_files_have_the_mode_of_new_files(run: Run) -> None:
    """Models and checkpoints, plain and SCONE, tables, vocabularies, tokens: what others may read is for the umask."""
    argv = ["precompute", "--model_path", str(run.final_model), "--output_path", str(run.output / "embeddings.cache")]
    assert main(argv) == 0
    plain = ["train", *run.argv()[1:7], *TINY, "--use_f_gram_embeddings", "false", "--max_steps", "1"]
    plain[plain.index("--output_dir") + 1] = str(run.output / "plain")
    assert main(plain) == 0
    expected = 0o666 & ~_umask()
    files = [path for folder in (run.output, run.cache) for path in folder.rglob("*") if path.is_file()]
    wrong = {str(path): oct(path.stat().st_mode) for path in files if stat.S_IMODE(path.stat().st_mode) != expected}
    assert wrong == {}
    assert len([path for path in files if path.suffix == ".safetensors"]) >= 10


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_finished_configurations_are_kept(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run.final_model / "model.safetensors").stat().st_mtime_ns
    assert main(run.argv()) == 0
    assert capsys.readouterr().out.count("(finished before)") == 2
    assert (run.final_model / "model.safetensors").stat().st_mtime_ns == before


def test_other_options_do_not_overwrite_a_finished_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run.argv("--seed", "7")) == 2
    assert "begun with training.seed 42; expected 7; choose another --output_dir" in capsys.readouterr().err


def test_an_interrupted_configuration_is_resumed(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "outputs"
    shutil.copytree(run.output, output)
    interrupted = output / "scone-small-100k"
    before = (interrupted / "final_model" / "model.safetensors").read_bytes()
    shutil.rmtree(interrupted / "final_model")
    shutil.rmtree(interrupted / "checkpoint-4")
    assert main(Run(run.corpus, run.cache, output).argv()) == 0
    shown = capsys.readouterr().out
    assert shown.count("(finished before)") == 1
    assert (interrupted / "final_model" / "model.safetensors").read_bytes() == before


def test_wrong_numbers_of_processes_get_one_line(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(run.argv("--distributed", "--num_gpus", "0")) == 2
    assert "--num_gpus: found 0; expected at least 1" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(run.argv("--distributed")) == 2
    assert "found --distributed inside a distributed launch" in capsys.readouterr().err


def test_a_whole_run_is_verified(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run.final_model.parent
    assert (
        main(["precompute", "--model_path", str(run.final_model), "--output_path", str(folder / "embeddings.cache")])
        == 0
    )
    capsys.readouterr()
    corpus = next(run.cache.glob("tokens/corpus*"))
    assert main(["verify", str(folder), str(corpus)]) == 0
    shown = capsys.readouterr().out
    for what in ("weights", "tokenizer", "f-grams of up to", "options", "of them are the rows of", "documents"):
        assert what in shown
    assert shown.count(": whole: ") == len(shown.splitlines())
    other = run.output / "scone-medium-1m" / "final_model"
    assert main(["verify", str(folder / "embeddings.cache"), "--model_path", str(other)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("name", ["f_grams.safetensors", "model.safetensors", "options.yaml", "config.json"])
def test_a_damaged_model_folder_is_refused(
    run: Run, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "final_model"
    shutil.copytree(run.final_model, folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2] + b"\xff")
    assert main(["verify", str(folder)]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert name in shown


def test_a_vocabulary_of_another_model_is_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "final_model"
    shutil.copytree(run.final_model, folder)
    shutil.copy(run.output / "scone-medium-1m" / "final_model" / "f_grams.safetensors", folder)
    assert main(["verify", str(folder)]) == 2
    assert "does not fit the model's configuration" in capsys.readouterr().err


def test_a_damaged_token_file_is_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "train"
    shutil.copytree(next(run.cache.glob("tokens/corpus*/train")), folder)
    with (folder / "tokens.npy").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\xff\x00")
    assert main(["verify", str(folder / "tokens.npy")]) == 2
    assert "checksum" in capsys.readouterr().err


def test_count_says_what_f_grams_cover(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["count", "--dataset_name", str(run.corpus), "--cache_dir", str(run.cache), "--tokenizer", "train"]
    argv += ["--vocab_size", "300", "--min_freq", "5", "--output", str(tmp_path / "v"), "--width", "16"]
    assert main([*argv, "--json", "--plot", str(tmp_path / "plot.svg")]) == 0
    report = json.loads(capsys.readouterr().out)
    vocabulary = FGramVocabulary.load(tmp_path / "v")
    assert report["fingerprint"] == vocabulary.fingerprint
    assert report["count"]["num_f_grams"] == vocabulary.num_f_grams
    assert report["count"]["count_at_cut"] == vocabulary.counts[-1]
    assert sum(level["num_f_grams"] for level in report["count"]["levels"]) == vocabulary.num_f_grams
    assert report["table_bytes"]["fp32"] == vocabulary.num_f_grams * 16 * 4
    rates = [found["match_rate"] for found in report["held_out"]]
    assert rates == sorted(rates, reverse=True)  # fewer f-grams match less
    assert 0 < rates[0] <= 1
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")
    assert main(argv) == 0
    shown = capsys.readouterr().out
    for what in ("tokens read", "count at cut", "candidates", "match rate", "table", "vocabulary"):
        assert what in shown


def test_inspect_shows_f_grams_ranks_and_counts(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["inspect", "--model_path", str(run.final_model)]
    text = json.loads(run.corpus.read_text(encoding="utf-8").splitlines()[0])["text"][:60] + "\n"
    assert main([*argv, text, "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    vocabulary = FGramVocabulary.load(run.final_model)
    assert "".join(record["text"] for record in records) == text
    assert any(record["rank"] is not None for record in records)
    for record in records:
        assert tuple(record["f_gram"]) == vocabulary.tokens(record["node"])
        if record["rank"] is not None:
            assert record["count"] == vocabulary.counts[record["rank"]]
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split()[-3:] == ["length", "rank", "count"]
    assert r'"\n"' in shown
