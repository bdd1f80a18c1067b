"""Every documented command and option is understood as it is written in the documentation."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from scone.configs.loading import get_option
from scone.configs.schema import SconeOptions
from scone.configs.values import entries
from scone.scripts import hydra_train, train_configurations
from scone.utils.errors import SconeError

REPOSITORY = Path(__file__).parents[3]
WIKITEXT = "--dataset_name wikitext --dataset_config_name wikitext-103-v1"
MODEL = "--model_path ./outputs/scone-model/final_model"
TABLE = "--embedding_cache_path ./outputs/scone-model/embeddings.cache"

DOCUMENTED: dict[str, dict[str, Any]] = {
    f"train {WIKITEXT} --output_dir ./outputs/scone-model --base_model_name gpt2 --max_length 512 --batch_size 8 "
    "--num_epochs 3 --learning_rate 5e-5": {
        "data.dataset_name": "wikitext",
        "data.dataset_config_name": "wikitext-103-v1",
        "training.output_dir": "./outputs/scone-model",
        "training.learning_rate": 5e-5,
    },
    "train --config configs/base_config.yaml": {"model.layer_norm_eps": 1e-12, "model.intermediate_size": 3072},
    "train --config configs/large_config.yaml": {"model.base_model_name": "gpt2-large", "training.fp16": True},
    "train --weight_decay 0.1 --warmup_steps 10 --max_grad_norm 0.5 --logging_steps 1 --save_steps 2 --eval_steps 3 "
    "--seed 7 --gradient_accumulation_steps 4 --fp16 --resume_from_checkpoint ./outputs/scone-model/checkpoint-2": {
        "training.weight_decay": 0.1,
        "training.warmup_steps": 10,
        "training.max_grad_norm": 0.5,
        "training.logging_steps": 1,
        "training.save_steps": 2,
        "training.eval_steps": 3,
        "training.seed": 7,
        "training.gradient_accumulation_steps": 4,
        "training.fp16": True,
        "training.resume_from_checkpoint": "./outputs/scone-model/checkpoint-2",
    },
    "train --max_n 4 --min_freq 50 --max_f_grams 5000000 --text_column content": {
        "data.max_n": 4,
        "data.min_freq": 50,
        "data.max_f_grams": 5_000_000,
        "data.text_column": "content",
    },
    "train --tokenizer train --vocab_size 8192 --max_steps 100 --init pretrained --device cpu --learned_rows 0 "
    "--f_gram_hidden_size 64 --f_gram_num_hidden_layers 2 --f_gram_num_attention_heads 4 "
    "--f_gram_intermediate_size 128": {
        "model.tokenizer": "train",
        "model.vocab_size": 8192,
        "training.max_steps": 100,
        "model.init": "pretrained",
        "training.device": "cpu",
        "model.learned_rows": 0,
        "model.f_gram.hidden_size": 64,
        "model.f_gram.num_hidden_layers": 2,
        "model.f_gram.num_attention_heads": 4,
        "model.f_gram.intermediate_size": 128,
    },
    f"precompute_embeddings {MODEL} --output_path ./outputs/scone-model/embeddings.cache --batch_size 32 "
    "--use_memory_map": {
        "output_path": "./outputs/scone-model/embeddings.cache",
        "inference.batch_size": 32,
        "inference.use_memory_map": True,
    },
    f"precompute_embeddings {MODEL} --output_path x --device cpu --seed 1 --tokenizer_path y": {"tokenizer_path": "y"},
    f"evaluate {MODEL} {TABLE} {WIKITEXT} --split test --batch_size 8": {
        "model_path": "./outputs/scone-model/final_model",
        "embedding_cache_path": "./outputs/scone-model/embeddings.cache",
        "split": "test",
        "inference.batch_size": 8,
    },
    f"evaluate {MODEL} --text_column text --max_length 512 --device cpu --seed 1 --tokenizer_path y": {
        "data.max_length": 512,
        "embedding_cache_path": None,
        "inference.batch_size": 8,
    },
    f'generate {MODEL} {TABLE} --prompt "Once upon a time" --max_length 100 --do_sample --temperature 0.7 '
    "--top_p 0.9": {
        "prompt": ["Once upon a time"],
        "max_length": 100,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 50,
    },
    f'generate {MODEL} --prompt "Once upon a time" --quantization int8': {"quantization": "int8"},
    f'generate {MODEL} --prompt "Once upon a time" --quantization int4': {"quantization": "int4"},
    f'generate {MODEL} --prompt "Once upon a time" --quantization fp16': {"quantization": "fp16"},
    f"generate {MODEL} --prompt x --min_length 3 --num_beams 2 --top_k 5 --repetition_penalty 1.1 "
    "--num_return_sequences 2 --seed 1 --tokenizer_path y": {
        "min_length": 3,
        "num_beams": 2,
        "top_k": 5,
        "top_p": 1.0,
        "temperature": 1.0,
        "repetition_penalty": 1.1,
        "num_return_sequences": 2,
    },
    "benchmark --config scone/configs/benchmark_config.json --output_dir ./benchmark_results": {
        "config": "scone/configs/benchmark_config.json",
        "output_dir": "./benchmark_results",
    },
}


@pytest.mark.parametrize("command", DOCUMENTED)
def test_a_documented_command_is_read_as_written(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "configs/" in command and not (REPOSITORY / "configs").is_dir():
        pytest.skip("the ready YAML files are in the repository, not in an installed package")
    monkeypatch.chdir(REPOSITORY)
    script, *argv = shlex.split(command)
    result = import_module(f"scone.scripts.{script}").read_arguments(argv)
    options, extra = result if isinstance(result, tuple) else (result, None)
    for name, expected in DOCUMENTED[command].items():
        found = get_option(options, name) if name in entries() else vars(extra)[name]
        assert found == expected, name


CONFIGURATIONS: Mapping[str, tuple[list[str], dict[str, Any]]] = {
    f"--base_model_name gpt2 {WIKITEXT} --output_dir ./results --num_epochs 3 --batch_size 8 "
    "--configs small-100k small-500k medium-100k": (
        ["small-100k", "small-500k", "medium-100k"],
        {"training.batch_size": 8},
    ),
    "--distributed --num_gpus 4 --fp16 --gradient_accumulation_steps 2 --configs medium-100k medium-500k": (
        ["medium-100k", "medium-500k"],
        {"training.fp16": True, "training.gradient_accumulation_steps": 2},
    ),
    "--gradient_checkpointing --batch_size 2 --gradient_accumulation_steps 8 --configs large-100k": (
        ["large-100k"],
        {"training.gradient_checkpointing": True, "model.f_gram.num_hidden_layers": 24, "data.min_freq": 100},
    ),
    "--distributed --num_gpus 4 --fp16 --gradient_checkpointing --configs medium-100k medium-500k medium-1m": (
        ["medium-100k", "medium-500k", "medium-1m"],
        {"model.f_gram.hidden_size": 768},
    ),
}


@pytest.mark.parametrize("command", CONFIGURATIONS)
def test_documented_train_configurations_are_read_as_written(command: str) -> None:
    names, expected = CONFIGURATIONS[command]
    options_of, extra = train_configurations.read_arguments(shlex.split(command))
    root = "./results" if "--output_dir" in command else "./outputs"
    assert list(options_of) == names
    assert extra.distributed is ("--distributed" in command)
    for name, options in options_of.items():
        assert Path(options.training.output_dir) == Path(root) / f"scone-{name}"
        for option, value in expected.items():
            assert get_option(options, option) == value


def test_a_flag_wins_over_a_configuration_and_that_over_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("data: {max_n: 5, max_f_grams: 7}\ntraining: {seed: 3}")
    argv = ["--config", str(path), "--configs", "small-500k", "--min_freq", "2"]
    options = train_configurations.read_arguments(argv)[0]["small-500k"]
    assert (options.data.max_n, options.data.max_f_grams, options.data.min_freq) == (3, 500_000, 2)
    assert options.training.seed == 3
    assert capsys.readouterr().err == "notice: --min_freq 2: used instead of what the configurations say\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "found no --configs; expected one or more of small-100k"),
        (["--configs", "smal-100k"], r"unknown configuration smal-100k; did you mean small-100k\?"),
    ],
)
def test_wrong_configurations_get_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(SconeError, match=message):
        train_configurations.read_arguments(argv)


def jobs_of(command: str) -> list[SconeOptions]:
    jobs: list[SconeOptions] = []
    hydra_train.run_jobs(shlex.split(command), jobs.append)
    return jobs


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            "data.max_n=4 model.base_model_name=gpt2-medium training.batch_size=4",
            {
                "data.max_n": 4,
                "model.base_model_name": "gpt2-medium",
                "model.hidden_size": None,
                "training.batch_size": 4,
            },
        ),
        (
            "training.gradient_checkpointing=true training.batch_size=2 training.gradient_accumulation_steps=8",
            {"training.gradient_checkpointing": True, "training.gradient_accumulation_steps": 8},
        ),
        (
            "--local-rank=0 training.batch_size=4 training.gradient_accumulation_steps=2 training.fp16=true",
            {"training.fp16": True, "training.output_dir": "./outputs/scone-model"},
        ),
        ("training.learning_rate=5e-5", {"training.learning_rate": 5e-5}),
        ("model.f_gram.hidden_size=64 model.learned_rows=10", {"model.f_gram.hidden_size": 64}),
        ("data.dataset_name=my_texts", {"data.dataset_config_name": None}),
    ],
)
def test_documented_hydra_overrides_are_read_as_written(
    command: str, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "0")
    (options,) = jobs_of(command)
    assert {name: get_option(options, name) for name in expected} == expected
    assert list(tmp_path.iterdir()) == []  # Hydra writes nothing of its own for a single run


def test_multirun_trains_every_combination_in_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    jobs = jobs_of(
        "--multirun data.max_n=3,4 model.base_model_name=gpt2,gpt2-medium training.output_dir=out training.seed=3"
    )
    assert [(job.data.max_n, job.model.base_model_name) for job in jobs] == [
        (3, "gpt2"),
        (3, "gpt2-medium"),
        (4, "gpt2"),
        (4, "gpt2-medium"),
    ]
    assert [Path(job.training.output_dir) for job in jobs] == [
        Path("out", f"data.max_n={n},model.base_model_name={name}") for n in (3, 4) for name in ("gpt2", "gpt2-medium")
    ]


def test_only_the_first_process_writes_hydras_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    first, second = jobs_of("--multirun data.max_n=3,4")
    assert Path(first.training.output_dir) == Path("outputs/scone-model/data.max_n=3")
    assert Path(second.training.output_dir) == Path("outputs/scone-model/data.max_n=4")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_job_does_not_stop_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done: list[int] = []

    def run(options: SconeOptions) -> None:
        if options.data.max_n == 3:
            raise SconeError("no corpus")
        done.append(options.data.max_n)

    with pytest.raises(SconeError, match=r"1 of 2 jobs failed: \[data.max_n=3\] no corpus"):
        hydra_train.run_jobs(["--multirun", "data.max_n=3,4"], run)
    assert done == [4]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.maxn=4", r"unknown option data.maxn; did you mean data.max_n\?"),
        ("+data.maxn=4", r"unknown option data.maxn; did you mean data.max_n\?"),
        ("max_n=4", r"unknown option max_n; .*did you mean data.max_n\?"),
        ("data.max_n=1", r"data.max_n: found 1; expected a whole number from 2"),
        ("data.max_n=three", r"data.max_n: found three; expected a whole number"),
        ("data.max_n=[", r"no viable alternative at input"),
        ("data.max_n", r"missing EQUAL"),
    ],
)
def test_a_wrong_override_gets_one_clear_line(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SconeError, match=message) as caught:
        jobs_of(override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "folder"),
    [
        (["data.max_n=3", "data.min_freq=2"], "data.max_n=3"),
        (["data.dataset_name=/a/b.txt", "training.output_dir=x"], "data.dataset_name=_a_b.txt"),
        (["training.output_dir=x"], "job"),
    ],
)
def test_job_folders_are_plain_names(overrides: list[str], folder: str) -> None:
    assert hydra_train.job_folder(overrides, {"data.max_n", "data.dataset_name"}) == folder


def test_long_job_folders_stay_distinct() -> None:
    names = {hydra_train.job_folder([f"data.dataset_name={'x' * 300}{i}"], {"data.dataset_name"}) for i in range(3)}
    assert len(names) == 3
    assert max(map(len, names)) <= 120


@pytest.mark.parametrize(
    ("argv", "kept"),
    [
        (["--local-rank=3", "a=1"], ["a=1"]),
        (["--local_rank", "3", "a=1"], ["a=1"]),
        (["a=1", "--local-rank", "3"], ["a=1"]),
        (["a=1"], ["a=1"]),
    ],
)
def test_the_launchers_rank_does_not_reach_hydra(
    argv: list[str], kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert hydra_train.without_local_rank(argv) == kept
