"""The command line: what each command reads, its help, and one line and a status for every mistake.

In this process, through the `scone` command's own ``main``, but for what only a process of its own can show.
"""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scone import __version__
from scone.cli import VERBS, main
from scone.configs.loading import get_option
from scone.configs.schema import entries
from scone.scripts import generate, hydra_train, train_configurations
from scone.utils.command_line import describe_error, run_main
from scone.utils.errors import SconeError
from scone.utils.progress import bars_are_visible, is_quiet

REPOSITORY = Path(__file__).parents[3]
HEAVY = ("torch", "transformers", "numba", "numpy", "datasets", "hydra")

# ------------------------------------------------------------------ mistakes

MISTAKES = {
    "trian": "found the unknown command trian; did you mean train? (see scone --help)",
    "Benchmark": "found the unknown command Benchmark; did you mean benchmark?",
    "zzz": "found the unknown command zzz; expected one of demo, train",
    # options of the schema: one parser for all commands
    "train --max_n 1": "--max_n: found 1; expected a whole number from 2 to 255; meaning: length of the longest f-gram",
    "train --min_freq 0": "--min_freq: found 0; expected a whole number of at least 1",
    "train --learning_rate fast": "--learning_rate: found fast; expected a number",
    "train --learning_rate nan": "--learning_rate: found nan",
    "train --batch_size 2.5": "--batch_size: found 2.5; expected a whole number",
    "train --batch_size": "--batch_size: expected one argument",
    "train --fp16=maybe": "--fp16: found maybe; expected true or false",
    "train --init warm": "--init: found warm; expected one of scratch, pretrained",
    "train --max_steps 0": "--max_steps: found 0; expected -1",
    "train --memory_budget '4 bananas'": "4GiB",
    "train --maxn 3": "unknown option --maxn; did you mean --max_n?",
    "train --use_memory_map": "unknown option --use_memory_map; it belongs to other commands",
    "train --zzzzz": "unknown option --zzzzz; leave it out",
    "train train": "found the argument 'train'; expected only options",
    "train --fp16 --bf16": "found both fp16 and bf16",
    "train --num_epochs 0": "found num_epochs 0, which trains nothing",
    "train --hidden_size 10 --num_attention_heads 3": "model.hidden_size: found 10 with 3 attention heads",
    "train --max_length 1025 --max_position_embeddings 1024": "data.max_length: found 1025",
    "train --config no/such/file.yaml": "found no file no/such/file.yaml",
    # each command's own
    "train-configurations": "found no --configs; expected one or more of small-100k",
    "train-configurations --configs smal-100k": "unknown configuration smal-100k; did you mean small-100k?",
    "train_configurations --configs small-100k --max_n 1": "--max_n: found 1",  # by the script's name
    "train-configurations --configs small-100k --distributed --num_gpus 0": "--num_gpus: found 0; expected at least 1",
    "hydra-train data.maxn=4": "unknown option data.maxn; did you mean data.max_n?",
    "hydra-train +data.maxn=4": "unknown option data.maxn; did you mean data.max_n?",
    "hydra-train max_n=4": "did you mean data.max_n?",
    "hydra-train data.max_n=1": "data.max_n: found 1; expected a whole number from 2",
    "hydra-train data.max_n=three": "data.max_n: found three; expected a whole number",
    "hydra-train data.max_n=[": "no viable alternative at input",
    "hydra-train data.max_n": "missing EQUAL",
    "precompute --model_path m": "--output_path",
    "precompute --model_path . --output_path x": "found no config.json",
    "precompute --model_path m --output_path x --row_type int2": "invalid choice",
    "table convrt": "found scone table convrt; expected scone table convert",
    "evaluate --model_path m --limit 3": "found --limit without --tasks",
    "evaluate --model_path m --tasks piqa --limit 0": "--limit: found 0",
    "generate --model_path m": "--prompt",
    "generate --model_path m --prompt x --quantization int3": "found quantization 'int3'",
    "benchmark --config none.json": "cannot read none.json as JSON: No such file or directory; check the path",
    "generate --model_path m --prompt x --placement mmap": "--placement mmap without --embedding_cache_path",
    "train --resume": "unknown option --resume; did you mean --resume_from_checkpoint?",
    "evaluate --model_path m --dataset_name text.txt --output /dev/null": "found a device or pipe at /dev/null",
    "precompute --model_path m --output_path /dev/null": "found a device or pipe at /dev/null",
    # said before the corpus is read, or the model, which is not there either
    "train-configurations --configs small-100k medium-100k --dataset_name none.txt --base_model_name ./m": "'./m'",
    "count --dataset_name none.txt --output text.txt/x": "/text.txt; check the path",
    "count --dataset_name none.txt --output text.txt/": "/text.txt; check the path",
    "precompute --model_path m --output_path folder": "Is a directory: folder; give a file",
    "precompute --model_path m --output_path text.txt/x/y": "/text.txt; check the path",
    "evaluate --model_path m --dataset_name text.txt --output text.txt/x": "/text.txt; check the path",
    "evaluate --model_path folder --dataset_name none.txt": "found no file 'none.txt'",
    "evaluate --model_path folder --dataset_name text.txt --split dev": "'text.txt' has no 'dev' split",
    "evaluate --model_path m --tasks piqa --task_data folder": "found no data of the task piqa in folder",
    "benchmark --config none.json --output_dir text.txt/x": "/text.txt; check the path",
    "inspect x": "--model_path",
    "inspect x --model_path no/such/model": "no/such/model",
    "verify missing": "found nothing at missing",
    "verify folder": "found a folder folder without anything of SCONE",
    "verify text.txt": "found text.txt, which states none of SCONE's formats",
    "verify short": "found short, which states none of SCONE's formats",
    # bytes that are no text, as Python passes them on
    "train --dataset_name caf\udce9.txt": "is no text in utf-8; expected UTF-8",
    "train --\udce9 1": "is no text in utf-8; expected UTF-8",
    "hydra-train data.dataset_name=\udce9": "is no text in utf-8; expected UTF-8",
    "g\udce9n\udce9rate": "is no text in utf-8; expected UTF-8",
}


@pytest.mark.parametrize("command", MISTAKES, ids=ascii)
def test_a_mistake_is_one_line_and_status_2(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_text("hello, this is a text")
    (tmp_path / "short").write_bytes(b"\x01")
    assert main(shlex.split(command)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = [line for line in shown.err.splitlines() if not line.startswith("notice: ")]
    assert line.startswith("error: ")
    assert line.isascii()
    assert MISTAKES[command] in line


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--temperature 0.7", "--temperature"),
        ("--top_k 5 --num_beams 2 --top_p 0.9", "--top_k, --top_p"),
        ("--temperature 1 --top_k 50", None),
        ("--temperature 0.7 --do_sample", None),
    ],
)
def test_how_to_sample_is_not_ignored_without_a_word(words, named, capsys):
    generate.read_arguments(shlex.split(f"--model_path m --prompt x {words}"))
    said = f"notice: found {named} without --do_sample: nothing is sampled, so it changes nothing; add --do_sample\n"
    assert capsys.readouterr().err == (said if named else "")


def test_a_checkout_beside_a_script_is_not_taken_for_the_package(tmp_path):
    (tmp_path / "scone" / "scone").mkdir(parents=True)
    (tmp_path / "script.py").write_text("import scone\nprint(scone.__version__)\n")
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, __version__, "")


def test_libraries_say_nothing_at_the_start_of_a_command(tmp_path):
    """A process of its own, since each hears of kernels that a library lacks once."""
    command = [sys.executable, "-m", "scone.scripts.train", "--base_model_name", "./none", "--dataset_name", "none.txt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: found no file or folder './none'")
    assert done.stderr.count("\n") == 1


FAILURES = [
    (SconeError("found 1;\n expected 2"), 2, "error: found 1; expected 2"),
    (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "error: No space left on device: a/b; free some disk"),
    (PermissionError(errno.EACCES, "Permission denied", "a"), 2, "error: Permission denied: a; check the permissions"),
    (PermissionError(errno.EACCES, "Permission denied"), 2, "error: Permission denied; run again with --debug"),
    (OSError(errno.ENOENT, "No such file", "a\x1b[2J"), 2, "error: No such file: a\\x1b[2J; check the path"),
    (MemoryError(), 2, "error: out of memory"),
    (KeyboardInterrupt(), 130, "interrupted; what was finished is kept"),
    (RuntimeError("odd\nthing"), 1, "error: unexpected RuntimeError: odd thing; run again with --debug for the trace"),
]


@pytest.mark.parametrize(("error", "status", "line"), FAILURES, ids=[repr(failure[0]) for failure in FAILURES])
def test_every_failure_is_one_line_and_a_status(error, status, line, capsys):
    def fail(argv):
        raise error

    assert run_main(fail, []) == status
    shown = capsys.readouterr().err
    assert shown.startswith(line)
    assert shown.count("\n") == 1


@given(st.text())
def test_messages_hold_nothing_that_a_terminal_obeys(text):
    """Names and values out of files are quoted in messages: no colours, titles or cleared screens come with them."""
    line, _ = describe_error(SconeError(f"found {text}\x1b]0;title\x07\x9b2J\u202e\ud800; expected none"))
    assert line.isprintable()
    assert "\\x1b]0;title\\x07\\x9b2J\\u202e\\ud800" in line


def test_debug_and_quiet_are_taken_out_and_act(monkeypatch, capsys):
    seen = []

    def script(argv):
        seen.append(argv)
        assert is_quiet() == (len(seen) > 1)
        assert bars_are_visible() == (len(seen) == 1)
        raise SconeError("no")

    monkeypatch.setenv("SCONE_PROGRESS", "1")
    monkeypatch.setattr("logging.disable", lambda level: None)
    assert run_main(script, ["--seed", "1", "--debug", "--", "--debug"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    assert run_main(script, ["--quiet", "--seed", "1"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert seen == [["--seed", "1", "--", "--debug"], ["--seed", "1"]]


# ------------------------------------------------------------------ help, version, and processes of their own


def test_help_lists_every_command_and_version_is_one_line(capsys):
    assert main(["--help"]) == main([]) == 0
    text = capsys.readouterr().out
    for verb, (_, line) in VERBS.items():
        assert text.count(f"  {verb} ") >= 2
        assert line in text
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"scone {__version__}\n"


def process(*words, **environment):
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, env=os.environ | environment, timeout=120, check=False)


def test_help_of_every_command_needs_nothing_heavy_and_prints_on_any_terminal():
    """In one process, whose output shows ASCII alone; Hydra, which helps with its own command, comes last."""
    program = (
        "import contextlib, sys; from scone.cli import main\n"
        "for verb in sorted(sys.argv[2:], key=lambda verb: verb == 'hydra-train'):\n"
        "    if verb == 'hydra-train':\n"
        "        print('HEAVY', [name for name in sys.argv[1].split(',') if name in sys.modules])\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        assert main([verb, '--help']) == 0, verb\n"
    )
    done = process("-c", program, ",".join(HEAVY), *VERBS, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    before, _, last = done.stdout.decode("ascii").partition("HEAVY ")
    assert last.startswith("[]\n")
    assert before.count("usage: ") >= len(VERBS) - 1
    assert before.count("examples:") == len(VERBS) - 1
    assert "data.max_n" in last


def test_a_reader_that_goes_away_is_no_error():
    code = "from scone.utils.command_line import run_main; run_main(lambda argv: print(10**5 * 'x'))"
    command = ["bash", "-c", f'"{sys.executable}" -c "{code}" | head -c 1']
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (b"x", b"")


@pytest.mark.parametrize(("encoding", "text"), [("ascii", "caf\xe9"), ("latin-1", "\u65e5"), ("utf-8", "\U0001f600")])
def test_output_that_cannot_show_a_character_is_one_line(encoding, text):
    """Nothing is put in its place: JSON, or a text that goes on to another program, would be another one."""
    program = (
        f"import sys; from scone.utils.command_line import run_main as r; sys.exit(r(lambda _: print({text!a}), []))"
    )
    done = process("-c", program, PYTHONIOENCODING=encoding)
    if encoding == "utf-8":
        assert done.stdout.decode().strip() == text
        return
    assert done.returncode == 2
    (line,) = done.stderr.decode("ascii").splitlines()
    assert f"found the text {text!a}, which" in line
    assert "set PYTHONIOENCODING=utf-8" in line


# ------------------------------------------------------------------ what is read: the documented flags

READ = {
    # the documented names and, of what a command does not say, defaults; flags of the schema: see configs/ too
    "train --config configs/base_config.yaml --dataset_name wikitext --dataset_config_name wikitext-103-v1 "
    "--text_column content --output_dir out --base_model_name gpt2 --max_length 256 --batch_size 8 --num_epochs 3 "
    "--learning_rate 5e-5 --max_n 4 --min_freq 50 --max_f_grams 5000000 --weight_decay 0.1 --warmup_steps 10 "
    "--max_grad_norm 0.5 --logging_steps 1 --save_steps 2 --eval_steps 3 --seed 7 --gradient_accumulation_steps 4 "
    "--fp16 --resume_from_checkpoint ./out/checkpoint-2 --max_steps 100 --init pretrained --device cpu": {
        "model.layer_norm_eps": 1e-12, "model.intermediate_size": 3072,
    },
    "train --config configs/large_config.yaml --tokenizer train --vocab_size 8192 --learned_rows 0 "
    "--f_gram_hidden_size 64 --f_gram_num_hidden_layers 2 --f_gram_num_attention_heads 4 "
    "--f_gram_intermediate_size 128": {"model.base_model_name": "gpt2-large", "training.fp16": True},
    "precompute_embeddings --model_path m --output_path t --batch_size 16 --use_memory_map --device cpu --seed 1 "
    "--tokenizer_path y": {},
    "precompute_embeddings --model_path m --output_path t": {"inference.batch_size": 32},
    "evaluate --model_path m --embedding_cache_path t --dataset_name c4 --dataset_config_name en --split test "
    "--batch_size 4 --text_column text --max_length 256 --device cpu --seed 1 --tokenizer_path y": {},
    "evaluate --model_path m": {"embedding_cache_path": None, "inference.batch_size": 8, "data.max_length": 512},
    "generate --model_path m --embedding_cache_path t --prompt Once --max_length 90 --do_sample --temperature 0.7 "
    "--top_p 0.9 --min_length 3 --num_beams 2 --top_k 5 --repetition_penalty 1.1 --num_return_sequences 2 --seed 1 "
    "--tokenizer_path y --quantization int8": {},
    "generate --model_path m --prompt x": {
        "embedding_cache_path": None, "do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50,
        "num_beams": 1, "num_return_sequences": 1, "training.seed": 42, "quantization": None,
    },
    "benchmark --config scone/configs/benchmark_config.json --output_dir ./benchmark_results": {},
}  # fmt: skip


@pytest.mark.parametrize("command", READ, ids=lambda command: command[:40])
def test_documented_flags_are_read_as_written(command, monkeypatch):
    if "configs/" in command and not (REPOSITORY / "configs").is_dir():
        pytest.skip("the ready YAML files are in the repository, not in an installed package")
    monkeypatch.chdir(REPOSITORY)
    script, *argv = shlex.split(command)
    result = import_module(f"scone.scripts.{script}").read_arguments(argv)
    options, extra = result if isinstance(result, tuple) else (result, None)
    by_flag = {entry.flag: name for name, entry in entries().items() if entry.section != "inference"}
    by_flag |= {"batch_size": "training.batch_size" if script == "train" else "inference.batch_size"}
    by_flag |= {"use_memory_map": "inference.use_memory_map"}

    def found(name):
        return get_option(options, name) if name in entries() else vars(extra)[name]

    for at, flag in enumerate(argv):
        if flag.startswith("--") and flag != "--config":
            is_own = extra is not None and flag[2:] in vars(extra)
            value = found(flag[2:] if is_own else by_flag[flag[2:]])
            said = [*argv, "--"][at + 1]
            assert value is True if said.startswith("--") else value in ([said], type(value)(said)), flag
    assert {name: found(name) for name in READ[command]} == READ[command]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("--output_dir ./results --batch_size 8 --configs small-100k small-500k", {"training.batch_size": 8}),
        ("--distributed --num_gpus 4 --fp16 --configs medium-100k medium-1m", {"model.f_gram.hidden_size": 768}),
        ("--gradient_checkpointing --configs large-100k", {"model.f_gram.num_hidden_layers": 24, "data.min_freq": 100}),
    ],
)
def test_configurations_land_in_folders_of_their_own(command, expected):
    options_of, extra = train_configurations.read_arguments(shlex.split(command))
    assert list(options_of) == command.partition("--configs ")[2].split()
    assert (extra.distributed, extra.num_gpus) == ((True, 4) if "--distributed" in command else (False, None))
    for name, options in options_of.items():
        root = "./results" if "--output_dir" in command else "./outputs"
        assert Path(options.training.output_dir) == Path(root) / f"scone-{name}"
        assert {option: get_option(options, option) for option in expected} == expected


def test_a_flag_wins_over_a_configuration_and_that_over_a_file(tmp_path, capsys):
    path = tmp_path / "options.yaml"
    path.write_text("data: {max_n: 5, max_f_grams: 7}\ntraining: {seed: 3}")
    argv = ["--config", str(path), "--configs", "small-500k", "--min_freq", "2"]
    options = train_configurations.read_arguments(argv)[0]["small-500k"]
    assert (options.data.max_n, options.data.max_f_grams, options.data.min_freq) == (3, 500_000, 2)
    assert options.training.seed == 3
    assert capsys.readouterr().err == "notice: --min_freq 2: used instead of what the configurations say\n"


# ------------------------------------------------------------------ Hydra


def jobs_of(command):
    """The options of the jobs that a command line of Hydra's means."""
    jobs = []
    hydra_train.run_jobs(shlex.split(command), jobs.append)
    return jobs


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            "data.max_n=4 model.base_model_name=gpt2-medium training.batch_size=4",
            {"data.max_n": 4, "model.base_model_name": "gpt2-medium", "model.hidden_size": None},
        ),
        ("training.gradient_checkpointing=true", {"training.gradient_checkpointing": True}),
        ("--local-rank=0 training.fp16=true", {"training.fp16": True, "training.output_dir": "./outputs/scone-model"}),
        ("--local_rank 0 training.learning_rate=5e-5", {"training.learning_rate": 5e-5}),
        ("model.f_gram.hidden_size=64 model.learned_rows=10", {"model.f_gram.hidden_size": 64}),
        ("data.dataset_name=my_texts --local-rank 0", {"data.dataset_config_name": None}),
    ],
)
def test_hydra_overrides_are_read_as_written(command, expected, tmp_path, monkeypatch):
    """The launcher's rank does not reach Hydra, which writes nothing of its own for a single run."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.chdir(tmp_path)
    (options,) = jobs_of(command)
    assert {name: get_option(options, name) for name in expected} == expected
    assert list(tmp_path.iterdir()) == []


def test_multirun_trains_every_combination_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "--multirun data.max_n=3,4 model.base_model_name=gpt2,gpt2-medium training.output_dir=out training.seed=3"
    every = [(n, name) for n in (3, 4) for name in ("gpt2", "gpt2-medium")]
    jobs = jobs_of(words)
    assert [(job.data.max_n, job.model.base_model_name) for job in jobs] == every
    folders = [Path("out", f"data.max_n={n},model.base_model_name={name}") for n, name in every]
    assert [Path(job.training.output_dir) for job in jobs] == folders


def test_only_the_first_process_writes_hydras_files_and_a_failed_job_does_not_stop_the_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    done = []

    def run(options):
        if options.data.max_n == 3:
            raise SconeError("no corpus")
        done.append(Path(options.training.output_dir))

    with pytest.raises(SconeError, match=r"1 of 2 jobs failed: \[data.max_n=3\] no corpus"):
        hydra_train.run_jobs(["--multirun", "data.max_n=3,4", "training.output_dir=outputs/scone-model"], run)
    assert done == [Path("outputs/scone-model/data.max_n=4")]
    assert list(tmp_path.iterdir()) == []


def test_job_folders_are_plain_names_and_stay_distinct():
    name = hydra_train.job_folder(["data.dataset_name=/a/b.txt", "training.seed=1"], {"data.dataset_name"})
    assert name == "data.dataset_name=_a_b.txt"
    assert hydra_train.job_folder(["training.output_dir=x"], {"data.max_n"}) == "job"
    long = {hydra_train.job_folder([f"data.dataset_name={'x' * 300}{i}"], {"data.dataset_name"}) for i in range(3)}
    assert len(long) == 3
    assert max(map(len, long)) <= 120
