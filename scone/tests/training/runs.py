"""Small training runs that several tests start: their corpus, options, command line, and how results are compared."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from scone.configs.loading import from_mapping
from scone.configs.schema import SconeOptions

WORDS = tuple("the cat sat on the mat and the dog ran to the old red house by the sea while it rained all day".split())  # noqa: SIM905

RARELY = {"training.save_steps": 1000, "training.eval_steps": 1000}
"""Changes for runs of many steps, of which only the end is looked at."""
STILL = {"model.hidden_dropout_prob": 0.0, "model.attention_probs_dropout_prob": 0.0}
"""Changes for runs that are compared across numbers of processes, which draw other dropout."""


def write_corpus(folder: Path) -> Path:
    """Sixty short documents of repeated phrases, so that f-grams exist and a tiny model can learn."""
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
        "model.f_gram.num_hidden_layers": None,
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


def log_of(run: Path) -> dict[str, Any]:
    """What a finished run says of itself."""
    return json.loads((run / "training_log.json").read_text())


def logged(run: Path, name: str) -> list[float]:
    """A figure of its log, from line to line that has it."""
    return [line[name] for line in log_of(run)["log"] if name in line]


def in_shards(folder: Path) -> None:
    """Cut the weights in ``folder`` into several files and an index, as those above 50 GB are saved."""
    whole = weights(folder)
    (folder / "model.safetensors").unlink()
    save_torch_state_dict(whole, folder, max_shard_size="4KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def assert_same_weights(left: Path, right: Path, **tolerance: float) -> None:
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def run_ranks(rank: Callable[..., None], num_ranks: int, *arguments: object) -> None:
    """Run ``rank(number, *arguments)`` in processes, forked from one that has imported what they need."""
    torch.multiprocessing.start_processes(rank, args=arguments, nprocs=num_ranks, start_method="forkserver")


def join(rank: int, port: int, num_nodes: int = 1) -> None:
    """Be one of two ranks, as a launcher says it, on one node or two."""
    local = (str(rank), "2") if num_nodes == 1 else ("0", "1")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": local[0], "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": local[1]}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def run_command(rank: int, port: int, flags: list[str], folder: Path) -> None:
    """`scone train` as one of two ranks; its exit status and what it says of errors are in ``folder``."""
    from scone.scripts.train import main
    from scone.training.distributed import destroy_process_group
    from scone.utils.command_line import run_main

    join(rank, port)
    with (folder / f"{rank}.err").open("w") as errors:
        os.dup2(errors.fileno(), 2)
        status = run_main(main, ["--quiet", *flags])
    (folder / f"{rank}.status").write_text(str(status))
    destroy_process_group()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def command_line(corpus: Path, output_dir: Path, *flags: str) -> list[str]:
    return [
        *("--dataset_name", str(corpus), "--max_length", "32", "--min_freq", "3", "--tokenizer", "train"),
        *("--vocab_size", "300", "--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2"),
        *("--f_gram_num_hidden_layers", "1"),  # as in `options`: an f-gram model and rows
        *("--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0", "--learning_rate", "0.01"),
        *("--output_dir", str(output_dir), "--cache_dir", str(corpus.parent / "cache"), "--num_workers", "0"),
        *("--report_to", "none", "--device", "cpu", *flags),
    ]
