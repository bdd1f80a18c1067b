"""Every documented command, as written, on a small real corpus.

The working folder holds a folder ``wikitext`` with text and folders ``gpt2``, ``gpt2-medium``, ``gpt2-large`` with tiny
models: an existing path wins over a hub name, so the commands need no other words than those of the documentation. What
is added behind a command only makes it smaller.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import scone
from scone.data.sources import stdlib_files
from scone.inference.quantization import computes_in_fp16
from scone.tokenization.tokenizers import train_tokenizer

REPOSITORY = Path(scone.__file__).parents[1]
SMALL = "--max_steps 2 --num_workers 0 --report_to none --device cpu"
TINY_TRUNK = (
    "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 4 --intermediate_size 64 "
    "--max_position_embeddings 1024"
)
TINY_F_GRAM_MODEL = (
    "--f_gram_hidden_size 32 --f_gram_num_hidden_layers 1 --f_gram_num_attention_heads 2 --f_gram_intermediate_size 64"
)
SMALL_HYDRA = (
    "training.max_steps=2 data.num_workers=0 training.report_to=none training.device=cpu data.dataset_name=wikitext "
    "data.max_length=64"
)
FINAL_MODEL = "./outputs/scone-model/final_model"
TABLE = "--embedding_cache_path ./outputs/scone-model/embeddings.cache"
GENERATE = f'python -m scone.scripts.generate --model_path {FINAL_MODEL} {TABLE} --prompt "Once upon a time"'


def tiny_gpt2(folder: Path, texts: list[str]) -> None:
    """What `--base_model_name` and `model_name` take: weights, configuration, a BPE tokenizer of 512 tokens."""
    train_tokenizer(iter(texts), 512, folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_inner": 128, "n_positions": 1024}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """The working folder of all commands."""
    folder = tmp_path_factory.mktemp("documented")
    names = ("argparse.py", "ast.py", "calendar.py", "copy.py", "csv.py", "glob.py", "heapq.py", "json/decoder.py")
    files = [path for path in stdlib_files() if path.as_posix().endswith(names)]
    texts = [path.read_text(encoding="utf-8")[:9000] for path in files]
    (folder / "wikitext").mkdir()
    for split, part in {"train": texts[:-2], "validation": texts[-2:-1], "test": texts[-1:]}.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (folder / "wikitext" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    tiny_gpt2(folder / "gpt2", texts)
    for name in ("gpt2-medium", "gpt2-large"):
        shutil.copytree(folder / "gpt2", folder / name)
    if (REPOSITORY / "configs").is_dir():
        shutil.copytree(REPOSITORY / "configs", folder / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SCONE_CACHE", str(folder / "cache"))
        yield folder


def run(command: str, smaller: str = "") -> None:
    """Call the ``main`` that ``python -m scone.scripts.NAME …`` calls, in this process."""
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"], command
    assert not importlib.import_module(words[2]).main([*words[3:], *shlex.split(smaller)])


def launch(command: str, smaller: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in processes of its own."""
    words = [sys.executable, *shlex.split(command)[1:], *shlex.split(smaller)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)


def check_models(*folders: str) -> None:
    expected = {"config.json", "model.safetensors", "f_grams.safetensors", "options.yaml", "tokenizer.json"}
    for folder in folders:
        assert expected <= {path.name for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def model(workspace):
    """Training and precomputing as documented: nothing is added but a device, and a floor for so little text."""
    run(
        "python -m scone.scripts.train --dataset_name wikitext --dataset_config_name wikitext-103-v1 "
        "--output_dir ./outputs/scone-model --base_model_name gpt2 --max_length 512 --batch_size 8 --num_epochs 3 "
        "--learning_rate 5e-5",
        "--device cpu --min_freq 20",
    )
    run(
        f"python -m scone.scripts.precompute_embeddings --model_path {FINAL_MODEL} "
        "--output_path ./outputs/scone-model/embeddings.cache --batch_size 32 --use_memory_map"
    )
    check_models(FINAL_MODEL)
    assert json.loads(Path("outputs/scone-model/training_log.json").read_text())["steps"] >= 3
    return FINAL_MODEL


SHORT = f"{SMALL} {TINY_F_GRAM_MODEL} --max_length 64"
TRAININGS = {
    # as documented: (what makes it smaller, the folders that it fills)
    **{f"train --config configs/{name}.yaml": (f"{SHORT} {TINY_TRUNK} --output_dir o/{name}", [f"o/{name}"])
       for name in ("base_config", "large_config")},
    "hydra_train data.max_n=4 model.base_model_name=gpt2-medium training.batch_size=4":
        (f"{SMALL_HYDRA} training.output_dir=h/1", ["h/1"]),
    "hydra_train training.gradient_checkpointing=true training.batch_size=2 training.gradient_accumulation_steps=8":
        (f"{SMALL_HYDRA} training.output_dir=h/2", ["h/2"]),
    "hydra_train --multirun data.max_n=3,4 model.base_model_name=gpt2,gpt2-medium": (
        f"{SMALL_HYDRA} training.output_dir=h data.min_freq=10",
        [f"h/data.max_n={n},model.base_model_name={name}" for n in (3, 4) for name in ("gpt2", "gpt2-medium")],
    ),
    "train_configurations --base_model_name gpt2 --dataset_name wikitext --dataset_config_name wikitext-103-v1 "
    "--output_dir ./outputs --num_epochs 3 --batch_size 8 --configs small-100k small-500k medium-100k":
        (f"{SHORT} --min_freq 10", [f"outputs/scone-{name}" for name in ("small-100k", "small-500k", "medium-100k")]),
    "train_configurations --distributed --num_gpus 4 --fp16 --gradient_accumulation_steps 2 "
    "--configs medium-100k medium-500k":
        (f"{SHORT} --min_freq 10 --num_gpus 2 --configs medium-500k --dataset_name wikitext --output_dir d",
         ["d/scone-medium-500k"]),
}  # fmt: skip


@pytest.mark.parametrize("command", TRAININGS, ids=lambda command: command[:45])
def test_trainings_fill_their_folders(workspace, command):
    if "configs/" in command and not Path("configs").is_dir():
        pytest.skip("the ready configurations are in the repository, and this is an installed package")
    smaller, folders = TRAININGS[command]
    run(f"python -m scone.scripts.{command}", smaller)
    check_models(*(f"{folder}/final_model" for folder in folders))


@pytest.mark.slow
def test_distributed_launch(workspace):
    """As documented, but with two processes (four share two cores badly); under torchrun training/ has the laws."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    done = launch(
        f"python -m torch.distributed.launch --nproc_per_node=2 --master_port={port} -m scone.scripts.hydra_train "
        "training.batch_size=4 training.gradient_accumulation_steps=2 training.fp16=true",
        f"{SMALL_HYDRA} training.output_dir=./outputs/launched",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check_models("outputs/launched/final_model")


def test_evaluate(model, capsys):
    command = (
        f"python -m scone.scripts.evaluate --model_path {model} {TABLE} --dataset_name wikitext "
        "--dataset_config_name wikitext-103-v1 --split test --batch_size 8"
    )
    run(command)
    with_table = capsys.readouterr().out
    run(command.replace(TABLE, ""))
    assert with_table.splitlines()[0] == capsys.readouterr().out.splitlines()[0], "table and live model must agree"
    assert "perplexity" in with_table
    assert "embedding table" in with_table
    run(command, "--text_column text --max_length 128 --device cpu --seed 7 --tokenizer_path gpt2 --use_memory_map")


@pytest.mark.parametrize(
    "more",
    [
        "--max_length 100 --do_sample --temperature 0.7 --top_p 0.9",
        "--quantization int8",
        "--quantization int4",
        "--min_length 30 --max_length 40 --num_beams 2 --num_return_sequences 2 --repetition_penalty 1.2 --seed 3",
        "--do_sample --top_k 5 --top_p 1.0 --temperature 1.0 --max_length 20 --device cpu --tokenizer_path gpt2",
    ],
)
def test_generate(model, more, capsys):
    if "int" in more.split()[-1]:
        pytest.importorskip("bitsandbytes")
    run(f"{GENERATE} {more}")
    assert "Once upon a time" in capsys.readouterr().out


@pytest.mark.slow
def test_generate_without_a_table_and_as_a_process(model, capsys):
    """The text is the same from the live f-gram model, and alone on standard output."""
    run(f"{GENERATE} --max_length 20".replace(TABLE, ""))
    live = capsys.readouterr().out
    done = launch(f"{GENERATE} --max_length 20")
    assert done.returncode == 0, done.stderr
    assert done.stdout == live


def test_benchmark(model, capsys):
    """The shipped configuration with shorter grids, and this workspace's model where its first model should be."""
    shipped = json.loads((REPOSITORY / "scone" / "configs" / "benchmark_config.json").read_text())
    table = "./outputs/scone-model/embeddings.cache"
    shipped["model_configs"][0] |= {"model_path": model, "embedding_cache_path": table}
    shipped |= {"batch_sizes": [1, 2], "sequence_lengths": [32, 2048], "num_runs": 1, "warmup_runs": 0}
    Path("scone/configs").mkdir(parents=True)
    Path("scone/configs/benchmark_config.json").write_text(json.dumps(shipped))
    run(
        "python -m scone.scripts.benchmark --config scone/configs/benchmark_config.json "
        "--output_dir ./benchmark_results",
        "--device cpu --max_tokens 2000 --quantization fp16",
    )
    assert "SCONE-Small-500K" in capsys.readouterr().out
    result = json.loads(Path("benchmark_results/benchmark.json").read_text())
    records = {record["name"]: record for record in result["records"]}  # others may be there: what other tests trained
    assert {"SCONE-Small-100K", "GPT2-Small", "GPT2-Medium"} <= set(records)
    ours, plain, half = (records[name] for name in ("SCONE-Small-100K", "GPT2-Small", "SCONE-Small-100K fp16"))
    for record in (ours, plain):
        assert set(record["perplexity"]) == {"WikiText-103"}
        assert [(speed["batch_size"], speed["sequence_length"]) for speed in record["speed"]] == [(1, 32), (2, 32)]
        assert all(value > 0 for speed in record["speed"] for value in speed.values())
    assert ours["table_bytes"] > 0
    # a processor without fp16 arithmetic keeps the token embeddings in fp32
    share = 0.7 if computes_in_fp16(torch.device("cpu")) else 0.9
    assert half["resident_bytes"] < share * ours["resident_bytes"]
    assert half["perplexity"]["WikiText-103"]["perplexity"] > 1
    assert ours["inference_flops_per_token"] == plain["inference_flops_per_token"]
    missing = {item["what"] for item in result["missing"]}
    assert {"SCONE-Small-1M", "C4 for GPT2-Small", "GPT2-Small at 2048 tokens"} <= missing
    assert "## Missing" in Path("benchmark_results/benchmark.md").read_text()
    written = {path.name for path in Path("benchmark_results").iterdir()}
    assert written == {f"benchmark{end}" for end in (".json", ".md", ".html")}
