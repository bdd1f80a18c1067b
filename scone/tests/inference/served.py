"""A tiny model in a folder, and real server processes over it, for the tests of serving."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from scone.inference.precompute import precompute_table
from scone.models.language_model import SconeForCausalLM
from scone.scripts.serve import main
from scone.tests.processes import forked
from scone.tokenization.counting import count_f_grams
from scone.tokenization.tokenizers import train_tokenizer
from scone.utils.command_line import run_main

TEXT = "the cat sat on the mat and the dog ran under the hill; then it slept. é \U0001f600 <b>bold</b> & more. " * 9
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def make_model(folder: Path, text: str = TEXT, max_n: int = 4, positions: int = 256, f_gram_model: Any = None) -> Path:
    """A random SCONE that knows the text, with a chat template and its table, and its trunk alone in ``plain``."""
    tokenizer = train_tokenizer(iter([text]), 300, folder)
    tokenizer.chat_template = TEMPLATE
    tokens = np.array(tokenizer(text).input_ids, np.int64)
    limits = {"vocab_size": 300, "max_n": max_n, "min_freq": 2, "separator_ids": [0], "quiet": True}
    vocabulary = count_f_grams([tokens], **limits).vocabulary
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=positions, bos_token_id=0, eos_token_id=0,
        initializer_range=0.4,
    )  # fmt: skip
    trunk = GPT2LMHeadModel(config)
    model = SconeForCausalLM.from_trunk(trunk, vocabulary, f_gram_model=f_gram_model, learned_rows=10**6)
    assert model.f_gram_embedding is not None
    torch.nn.init.normal_(model.f_gram_embedding.rows.weight, std=0.5)
    model.eval().save_pretrained(folder)
    model.trunk.save_pretrained(folder / "plain")
    for place in (folder, folder / "plain"):
        tokenizer.save_pretrained(place)
    precompute_table(model, folder / "embeddings.cache", quiet=True)
    return folder


def command_line(folder: Path, *options: str) -> list[str]:
    """Of a server over `make_model`'s folder, at a port that is free."""
    table = ["--embedding_cache_path", str(folder / "embeddings.cache")]
    return ["--model_path", str(folder), *table, "--port", "0", "--model_name", "tiny", *options]


def address_in(line: str) -> str:
    """Of a server, in the line that it begins with."""
    assert line.startswith("serving tiny at http://127.0.0.1:"), line
    assert "vllm serve MODEL" in line
    return line.split()[3]


def without_key(argv: list[str]) -> int:
    """What a process that serves does."""
    os.environ.pop("SCONE_API_KEY", None)
    return run_main(main, argv)


@contextmanager
def server(folder: Path, *options: str) -> Iterator[str]:
    """The address of a forked server, which is stopped at the end."""
    said = folder / "said"
    process = forked(without_key, command_line(folder, *options), said=said)
    try:
        while process.is_alive() and not (said.exists() and "serving" in said.read_text()):
            time.sleep(0.02)
        yield address_in(said.read_text())
    finally:
        process.terminate()
        process.join(60)
    assert process.exitcode == 0, said.read_text()


@contextmanager
def server_process(folder: Path, key: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a server that was started as users do, and its process, which is stopped at the end."""
    command = [sys.executable, "-m", "scone.scripts.serve", *command_line(folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"SCONE_API_KEY": key}
    ) as process:
        try:
            assert process.stdout is not None
            yield address_in(process.stdout.readline()), process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
