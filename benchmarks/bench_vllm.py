"""Serving: the plain trunk in vLLM, SCONE in vLLM, and `scone serve`, by the number of clients at a time.

    .venv-vllm/bin/python benchmarks/bench_vllm.py [--quick] [--json FILE] [--eager] [--width D] [--layers L] [--steps]

In the environment that `make test-vllm` makes. A random trunk of the modern form (Qwen3's) with an input norm and a
table reads Python's standard library; every request has a prompt of its own of 32 to 96 tokens and gets 32 new ones.
All three servers are up at the same time and answer the same prompts in turn, round by round, so that a machine that
drifts does for all. Rates are of new tokens over all clients, times those until the first token of a client that is
alone; both are medians. A ratio is the median over rounds of the ratio within one, with the 95 % interval of its
bootstrap, which knows nothing of how one start of a server differs from the next.

Machines that are shared change their own speed within seconds by more than the targets ask: one plain server against
another was at 0.8 to 1.35 of it in a round. ``--steps`` measures what does not depend on that: how much of the forward
pass of a step is not its trunk's, in the worker while it serves.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Report
from transformers import AutoConfig, AutoModelForCausalLM
from vllm_servers import Server, gather, scone_server, vllm_server

from scone.data.sources import stdlib_files
from scone.inference.precompute import precompute_table
from scone.models.language_model import SconeForCausalLM
from scone.tokenization.counting import count_f_grams
from scone.tokenization.tokenizers import train_tokenizer

CLIENTS = (1, 8, 32, 64)
VOCAB_SIZE, NEW = 4096, 32
LEAST_PROMPTS, FEW_CLIENTS = 4, 8
"""Of a round. With few clients a round is short, and neighbours on the same machine come and go: there are twice as
many of them.
"""
IDLE_SECONDS = 1.5
"""Between two servers: processes of vLLM spin for a second after their last step, on the cores of the next server."""
TARGETS = {"decode": 0.97, "ttft": 1.05, "steps": 0.03}


def main() -> None:
    """Measure, print the table of records, write the JSON."""
    report = Report.from_arguments("vllm", __doc__, add_options=_add_options)
    if find_spec("vllm") is None:
        print("found no vLLM here; expected the environment of `make test-vllm`: .venv-vllm/bin/python")
        return
    options = report.config
    options["width"] = options["width"] or (256 if report.quick else 768)
    options["layers"] = options["layers"] or (4 if report.quick else 12)
    options["rounds"] = options["rounds"] or (3 if report.quick else 9)
    options |= {"vllm": version("vllm"), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory(prefix="bench_vllm.") as name, ExitStack() as servers:
        folder = Path(name)
        tokens = make_models(folder, options)
        flags = ["--max-model-len", "512", "--max-num-seqs", "64", "--no-enable-prefix-caching", "--block-size", "32"]
        flags += ["--enforce-eager"] if options["eager"] else []
        if options["steps"]:
            report.benchmark = "vllm_steps"
            time_steps(report, servers.enter_context(vllm_server(folder / "scone", *flags, timed=True)), tokens)
            report.finish()
            return
        subjects = {
            "plain": servers.enter_context(vllm_server(folder / "plain", *flags)),
            "vllm": servers.enter_context(vllm_server(folder / "scone", *flags)),
            "serve": servers.enter_context(scone_server(folder / "scone")),
        }
        measure(report, subjects, tokens)
    report.finish()


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--eager", action="store_true", help="vLLM compiles nothing")
    parser.add_argument("--steps", action="store_true", help="only what of a step is ours, in the worker that serves")
    parser.add_argument("--width", type=int, help="of the trunk (768; quick: 256)")
    parser.add_argument("--layers", type=int, help="of the trunk (12; quick: 4)")
    parser.add_argument("--rounds", type=int, help="turns, twice as many with few clients (9; quick: 3)")
    parser.add_argument("--clients", type=int, nargs="*", default=list(CLIENTS), help="at a time")


def make_models(folder: Path, options: dict[str, Any]) -> np.ndarray:
    """The trunk in ``plain`` and SCONE around it in ``scone``, with tokenizers and table; the tokens of the texts."""
    torch.manual_seed(0)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in stdlib_files()[:150]]
    tokenizer = train_tokenizer(iter(texts), VOCAB_SIZE, folder / "scone")
    tokens = np.concatenate([[*tokenizer(text).input_ids, 0] for text in texts]).astype(np.int64)
    vocabulary = count_f_grams(
        [tokens], vocab_size=VOCAB_SIZE, max_n=5, min_freq=2, max_f_grams=100_000, separator_ids=[0], quiet=True
    ).vocabulary
    width = options["width"]
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "head_dim": 64}
    config = AutoConfig.for_model(
        "qwen3", vocab_size=VOCAB_SIZE, hidden_size=width, num_hidden_layers=options["layers"], **heads,
        intermediate_size=width * 8 // 3 // 64 * 64, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    trunk = AutoModelForCausalLM.from_config(config).eval()
    model = SconeForCausalLM.from_trunk(
        trunk, vocabulary, f_gram_model=None, learned_rows=vocabulary.num_f_grams, input_norm=True
    ).eval()
    torch.nn.init.normal_(model.f_gram_embedding.rows.weight, std=0.02)
    model.save_pretrained(folder / "scone")
    precompute_table(model, folder / "scone" / "embeddings.cache", quiet=True)
    trunk.save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    options |= {"f_grams": vocabulary.num_f_grams, "trunk": sum(part.numel() for part in trunk.parameters())}
    return tokens


def measure(report: Report, subjects: dict[str, Server], tokens: np.ndarray) -> None:
    """All servers in turn, round by round, at each number of clients."""
    random = np.random.default_rng(0)
    firsts: dict[str, list[float]] = defaultdict(list)
    for clients in report.config["clients"]:
        rates: dict[str, list[float]] = defaultdict(list)
        for number in range(report.config["rounds"] * (2 if clients <= FEW_CLIENTS else 1) + 1):
            prompts = draw_prompts(tokens, max(LEAST_PROMPTS, clients), random)
            for name in random.permutation(list(subjects)):
                time.sleep(IDLE_SECONDS)
                answers, seconds = asyncio.run(gather(subjects[name], prompts, NEW, clients))
                if number:  # the first round warms up
                    rates[name].append(sum(answer.num_tokens for answer in answers) / seconds)
                    if clients == min(report.config["clients"]):
                        firsts[name].append(1000 * statistics.median(answer.first or answer.last for answer in answers))
        _add(report, f"decode_vs_{{}}_{clients}", "tokens/s", rates, target=TARGETS["decode"])
    _add(report, "ttft_vs_{}", "ms", firsts, most=TARGETS["ttft"])


def draw_prompts(tokens: np.ndarray, count: int, random: np.random.Generator) -> list[list[int]]:
    """Pieces of the texts, of 32 to 96 tokens."""
    starts = random.integers(0, len(tokens) - 100, count).tolist()
    return [tokens[start : start + int(random.integers(32, 97))].tolist() for start in starts]


def time_steps(report: Report, server: Server, tokens: np.ndarray) -> None:
    """How much of the forward pass is not the trunk's, in steps that decode for all clients at once."""
    random = np.random.default_rng(0)
    for clients in report.config["clients"]:
        for number in range(report.config["rounds"] + 1):
            asyncio.run(gather(server, draw_prompts(tokens, max(LEAST_PROMPTS, clients), random), NEW, clients))
            if not number:
                server.call("step_times")  # the first round warms up
        steps = [step[1:] for step in server.call("step_times") if step[0] == clients]
        ours, whole = 1000 * np.median(steps, axis=0)
        report.add(
            f"vllm_ours_of_step_{clients}", "ms", float(ours), peer=float(whole), peer_name="forward pass",
            most=TARGETS["steps"],
        )  # fmt: skip


def _add(report: Report, name: str, unit: str, found: dict[str, list[float]], **target: float) -> None:
    """Records of vLLM against the others, of numbers that were measured together."""
    for peer, peer_name in (("plain", "plain trunk in vLLM"), ("serve", "scone serve")):
        ratios = np.array(found["vllm"]) / np.array(found[peer])
        drawn = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
        low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
        report.add(
            "vllm_" + name.format("plain" if peer == "plain" else "scone_serve"), unit,
            statistics.median(found["vllm"]), peer=statistics.median(found[peer]), peer_name=peer_name,
            ratio=float(np.median(ratios)), interval=(float(low), float(high)), **(target if peer == "plain" else {}),
        )  # fmt: skip


if __name__ == "__main__":
    main()
