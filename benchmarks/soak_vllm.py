"""Many clients of one vLLM server for long, some of whom leave before their answer ends: no wrong answer, memory flat.

    .venv-vllm/bin/python benchmarks/soak_vllm.py [--requests 2000] [--clients 64] [--json FILE]

In the environment that `make test-vllm` makes. Every whole answer is compared, token by token, with what our own model
says of the same prompt alone; prompts share beginnings, so that most of them hit the prefix cache; blocks are few, so
that requests are preempted. Exits with 1 where an answer is wrong, or memory still grew in the second half, by more
than a twentieth.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from common import REPOSITORY, measured_on
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from vllm_servers import Server, ask, vllm_server

from scone.tests.vllm import models
from scone.utils.files import write_json

LEAVING = 0.15
"""Of the requests: they close their connection after a few tokens."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak_vllm.") as name:
        folder = models.make("modern", Path(name) / "model")
        words = Tokenizer(WordLevel({f"t{number}": number for number in range(models.VOCAB_SIZE)}, unk_token="t0"))
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
        model = models.load(folder)
        expected = [(prompt, alone(model, prompt)) for prompt in models.prompts(100, 100)]
        flags = ["--max-model-len", "256", "--num-gpu-blocks-override", "90", "--block-size", "32", "--enforce-eager"]
        flags += ["--max-num-batched-tokens", "256", "--max-num-seqs", str(options.clients)]
        with vllm_server(folder, *flags) as server:
            memory, found = [], Counter[str]()
            for quarter in range(4):
                found.update(asyncio.run(soak(server, expected, options.requests // 4, options.clients, quarter)))
                memory.append(server.resident_bytes())
            metrics = httpx.get(f"{server.address}/metrics").text.splitlines()
            counters = {name: counter(metrics, name) for name in ("num_preemptions", "prefix_cache_hits")}
    result = dict(found) | counters | {"resident_mib_by_quarter": [size >> 20 for size in memory]}
    report = {"benchmark": "vllm_soak", **measured_on(), "clients": options.clients} | result
    print("  ".join(f"{key}: {value}" for key, value in result.items()))
    if options.json:
        write_json(options.json, report)
    return int(found["wrong"] > 0 or found["right"] == 0 or memory[-1] > 1.05 * memory[1])


def alone(model: Any, prompt: list[int]) -> list[int]:
    """Our own model's greedy answer, 24 tokens."""
    with torch.no_grad():
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, min_new_tokens=24, do_sample=False, eos_token_id=None
        )
    return output[0, len(prompt) :].tolist()


async def soak(
    server: Server, expected: list[tuple[list[int], list[int]]], requests: int, clients: int, seed: int
) -> dict[str, int]:
    """Ask so often; how many answers were right, wrong, and left alone."""
    random = np.random.default_rng(seed)
    found = {"requests": requests, "right": 0, "wrong": 0, "left": 0}
    waiting = asyncio.Semaphore(clients)
    # a connection each: one that is kept may be closed by the server at the moment of the next request
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:

        async def one(number: int, leaves: bool, new: int) -> None:
            async with waiting:
                prompt, tokens = expected[number]
                answer = await ask(client, server, prompt, new, leave_after=new // 3 if leaves else None)
            is_right = answer.tokens == tokens[: len(answer.tokens)] and (leaves or len(answer.tokens) == new)
            found["wrong" if not is_right else "left" if leaves else "right"] += 1

        numbers = random.integers(0, len(expected), requests).tolist()
        leaves = (random.random(requests) < LEAVING).tolist()
        new = random.integers(3, 25, requests).tolist()
        await asyncio.gather(*map(one, numbers, leaves, new))
    return found


def counter(metrics: list[str], name: str) -> float:
    """A counter of vLLM's page of metrics."""
    return sum(float(line.split()[-1]) for line in metrics if line.startswith(f"vllm:{name}_total"))


if __name__ == "__main__":
    sys.path[:0] = [str(REPOSITORY)]
    sys.exit(main())
