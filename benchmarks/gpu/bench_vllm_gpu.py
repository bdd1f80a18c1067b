"""vLLM on one GPU: a plain trunk against SCONE by placement of 10 M rows, and the lookup alone.

    python benchmarks/gpu/bench_vllm_gpu.py [--json FILE] [--trunks 1b 8b] [--dir FOLDER] [--timeout SECONDS]

Trunks of Qwen3's form in bf16 with random weights, CUDA graphs on, in processes of their own, where vLLM is a library
(no HTTP). The f-grams are all pairs of tokens and answers are drawn at random, so every position reads a row that
nothing has read before: the worst case. Milliseconds a decoding step (the difference of a long and a short run), and of
a prefill of 2,048 tokens; medians of rounds in which placements take turns. ``none`` is SCONE's model without a lookup.
``--lookup_only`` needs no vLLM. ``--smoke`` says within a minute whether vLLM runs here, also on a CPU.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from common import Report
from transformers import AutoConfig
from workloads import pairs_as_f_grams, write_tiled_table

from scone.inference.embedding_table import EmbeddingTable
from scone.inference.table_format import RowFormat
from scone.models.configuration import SconeConfig
from scone.tokenization.f_gram_vocabulary import FGramVocabulary

TRUNKS = {  # width, layers, heads, heads of keys and values, inner width, row type
    "tiny": (256, 2, 4, 2, 512, "int8"),
    "1b": (2048, 20, 16, 8, 6144, "int8"),
    "8b": (4096, 36, 32, 8, 12288, "int4"),
}
TARGETS = {"gpu": 0.97, "ram": 0.97, "mmap": 0.95, "direct": 0.9}
ON_GPU = torch.cuda.is_available()
PROMPT, SHORT, LONG = 16, 2, 2048 if ON_GPU else 256


def main() -> None:
    """Measure, print the table of records, write the JSON; or be one of the processes that do."""
    report = Report.from_arguments("gpu_vllm", __doc__, add_options=_add_options)
    options = report.config
    if options["child"]:
        child(json.loads(options["child"]))
        return
    ends = time.monotonic() + options["timeout"]
    trunks = ["tiny"] if options["smoke"] else options["trunks"]
    options["f_grams"] = options["f_grams"] or (100_000 if trunks == ["tiny"] else 10_000_000)
    options["failed"], folder = [], options["dir"] / "bench_vllm_gpu"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    vocabulary = pairs_as_f_grams(options["f_grams"])
    vocabulary.save(folder)
    for trunk in trunks:
        if time.monotonic() > ends - 20:
            options["failed"].append(f"{trunk}: no time was left for it")
            continue
        measure_trunk(report, trunk, vocabulary, folder, ends)
        shutil.rmtree(folder / trunk)
    shutil.rmtree(folder)
    report.finish()
    sys.exit(bool(options["failed"]))


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trunks", nargs="+", choices=list(TRUNKS), default=["1b", "8b"], help="in this order")
    parser.add_argument("--dir", type=Path, default=Path(), help="where tables go: the disk that is measured")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds; what is not done by then is left out")
    parser.add_argument("--f_grams", type=int, help="rows of the table (10 M)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256], help="requests at a time")
    parser.add_argument("--placements", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="of the rows")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every placement")
    parser.add_argument("--lookup_only", action="store_true", help="without vLLM")
    parser.add_argument("--smoke", action="store_true", help="a tiny trunk alone, on any device")
    parser.add_argument("--child", help=argparse.SUPPRESS)


# ---------------------------------------------------------------------- models


def trunk_config(trunk: str, vocab_size: int) -> Any:
    width, layers, heads, few_heads, inner, _ = TRUNKS[trunk]
    return AutoConfig.for_model(
        "qwen3", vocab_size=vocab_size, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=few_heads, head_dim=64 if trunk == "tiny" else 128, intermediate_size=inner,
        max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        dtype="bfloat16", architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip


def make_model(trunk: str, vocabulary: FGramVocabulary, folder: Path) -> float:
    """SCONE around the trunk: its configuration, f-grams, and a table of random rows; the seconds that it took.

    Configurations are enough: vLLM makes random weights where it is told to.
    """
    started, target = time.perf_counter(), folder / trunk / "scone"
    config = SconeConfig(
        text_config=trunk_config(trunk, vocabulary.vocab_size).to_dict(), input_norm=True, max_n=2,
        num_f_grams=vocabulary.num_f_grams, vocabulary_fingerprint=vocabulary.fingerprint, requires_table=True,
        dtype="bfloat16", architectures=["SconeForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(target)
    (target / "f_grams.safetensors").hardlink_to(folder / "f_grams.safetensors")
    write_tiled_table(target / "embeddings.cache", RowFormat.of(TRUNKS[trunk][-1], config.hidden_size), vocabulary)
    return time.perf_counter() - started


# ---------------------------------------------------------------------- a process for each model


def measure_trunk(report: Report, trunk: str, vocabulary: FGramVocabulary, folder: Path, ends: float) -> None:
    """The plain trunk and SCONE in two processes, which start at the same time and take turns."""
    trunk_config(trunk, vocabulary.vocab_size).save_pretrained(folder / trunk / "plain")
    processes: dict[str, subprocess.Popen] = {}
    for kind in ["plain", "scone"]:
        if kind == "scone":  # the plain trunk starts while the table is written
            report.add(f"{trunk}_seconds_to_write_table", "s", make_model(trunk, vocabulary, folder), ratio=None)
        elif report.config["lookup_only"]:
            continue
        simple = {name: value for name, value in report.config.items() if isinstance(value, int | list | bool)}
        told = json.dumps(simple | {"kind": kind, "folder": str(folder / trunk)})
        command = [sys.executable, __file__, "--child", told]
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
        with _log(report, trunk, kind).open("w") as file:
            processes[kind] = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    while time.monotonic() < ends and any(process.poll() is None for process in processes.values()):
        time.sleep(0.2)
        waiting = {kind: (folder / trunk / f"ready-{kind}").exists() for kind in processes}
        if all(waiting[kind] or process.poll() is not None for kind, process in processes.items()):
            (folder / trunk / "go").touch()
    found: dict[str, float] = {}
    for kind, process in processes.items():
        late = process.poll() is None
        process.kill()
        lines = _log(report, trunk, kind).read_text().splitlines()
        if process.wait():
            report.config["failed"].append(f"{trunk} {kind}: {'time was over: ' if late else ''}{lines[-1:]}")
            print(report.config["failed"][-1], flush=True)
        found |= dict(json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT "))
    for name, value in found.items():
        what, _, placement = name.rpartition("_")
        peer = found.get(f"{what}_plain") if "_ms_" in name and placement != "plain" else None
        report.add(
            f"{trunk}_{name}", "ms" if "_ms_" in name else "", value, peer, "plain" if peer else None,
            ratio="peer/ours", target=TARGETS.get(placement) if peer else None,
        )  # fmt: skip


def _log(report: Report, trunk: str, kind: str) -> Path:
    return report.config["dir"] / f"bench_vllm_gpu_{trunk}_{kind}.log"


def child(given: dict[str, Any]) -> None:
    """One engine, and everything that is measured with it, told line by line."""
    folder, kind = Path(given["folder"]), given["kind"]
    started, llm, failed = time.perf_counter(), None, False
    try:
        llm = None if given["lookup_only"] else engine(folder / kind, given["batches"])
        _tell(f"seconds_to_start_{kind}", time.perf_counter() - started)
    except Exception:  # the lookup alone is worth something
        traceback.print_exc()
        failed = True

    def switch(lookup: Any) -> None:
        llm.apply_model(lambda model: setattr(model, "lookup", lookup))  # type: ignore[union-attr]

    subjects: dict[str, Callable[[], object]] = {"plain": lambda: None}
    if kind == "scone":
        subjects = {"none": lambda: switch(None)}
        for placement in given["placements"] if ON_GPU else [name for name in given["placements"] if name != "gpu"]:
            started = time.perf_counter()
            lookup = open_lookup(folder / kind, placement)
            _tell(f"seconds_to_open_{placement}", time.perf_counter() - started)
            for positions in [*given["batches"], LONG]:
                time_lookup(placement, lookup, positions, given["f_grams"])
            subjects[placement] = lambda lookup=lookup: switch(lookup)
    if llm is not None:
        (folder / f"ready-{kind}").touch()
        while not (folder / "go").exists():
            time.sleep(0.2)
        with (folder / "turn").open("w") as turn:
            measure(given, llm, subjects, turn)
    sys.exit(failed)


def engine(folder: Path, batches: list[int]) -> Any:
    """vLLM in this process, with room for tables and another engine beside it."""
    from vllm import LLM

    options: dict[str, Any] = {"enforce_eager": True, "num_gpu_blocks_override": 600}
    if ON_GPU:
        options = {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 6 << 30}
        options |= {"compilation_config": {"cudagraph_capture_sizes": sorted({1, 2, 4, 8, 16, *batches})}}
    return LLM(
        str(folder), load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True, max_model_len=LONG + 512,
        max_num_seqs=max(batches), max_num_batched_tokens=4096, enable_prefix_caching=False, seed=0,
        additional_config={"scone": {"placement": "mmap", "check_weights": False}}, **options,
    )  # fmt: skip


def measure(given: dict[str, Any], llm: Any, subjects: dict[str, Callable[[], object]], turn: IO[str]) -> None:
    """Decoding at each batch size and the prefill, of all subjects in turn, round by round."""
    from vllm import SamplingParams

    vocab_size, random = int(np.ceil(np.sqrt(given["f_grams"]))), np.random.default_rng(0)
    times: dict[str, list[float]] = defaultdict(list)

    def generate(batch: int, length: int, new: int) -> float:
        prompts = [{"prompt_token_ids": random.integers(0, vocab_size, length).tolist()} for _ in range(batch)]
        sampling = SamplingParams(temperature=1.0, max_tokens=new, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return 1000 * (time.perf_counter() - started)

    for number in range(given["rounds"] + 1):
        for name, switch in subjects.items():
            fcntl.flock(turn, fcntl.LOCK_EX)
            switch()
            for batch in given["batches"]:
                steps = 4 if number == 0 or not ON_GPU else 64 if batch > 100 else 128
                taken = generate(batch, PROMPT, steps + SHORT) - generate(batch, PROMPT, SHORT)
                times[f"decode_ms_b{batch}_{name}"].append(taken / steps)
            prefills = [generate(1, LONG, 1) for _ in range(3 if number else 1)]
            times[f"prefill_ms_{name}"].append(statistics.median(prefills))
            fcntl.flock(turn, fcntl.LOCK_UN)
        for name, values in times.items() if number else ():  # the first round warms up
            _tell(name, statistics.median(values[1:]))


# ---------------------------------------------------------------------- the lookup alone


def open_lookup(folder: Path, placement: str) -> Any:
    from scone.vllm.lookups import TableRows

    return TableRows(folder, EmbeddingTable.open(folder / "embeddings.cache", placement, _device()))


def time_lookup(name: str, lookup: Any, positions: int, num_f_grams: int) -> None:
    """Milliseconds of a step's lookup, from the call until rows are there; and of the kernel alone, in a CUDA graph.

    Of decoding, each position is a request of its own; a prefill is one request.
    """
    device, vocab_size = _device(), int(np.ceil(np.sqrt(num_f_grams)))
    requests, repeats = 1 if positions == LONG else positions, 20
    vectors = torch.zeros(positions, lookup._lookup.table.width, dtype=torch.bfloat16, device=device)
    output = torch.empty_like(vectors)
    ragged = torch.randint(0, vocab_size, (repeats, positions), dtype=torch.int32)
    histories = torch.randint(0, vocab_size, (requests, 64), dtype=torch.int32)
    starts = torch.linspace(0, positions, requests + 1).to(torch.int32)
    slots, computed = torch.arange(requests, dtype=torch.int32), torch.full((requests,), 32, dtype=torch.int32)
    on_device = [part.to(device) for part in (starts, slots, histories, computed)]
    tokens = ragged.to(device)

    def look_up(number: int) -> None:
        if lookup.on_device is not None:
            lookup.on_device.look_up_ragged(vectors, output, tokens[number], *on_device)
        else:
            lookup.put(vectors, ragged[number].numpy(), starts.numpy(), histories[:, 31:32].numpy())

    def timed(call: Callable[[], object]) -> float:
        _synchronize()
        started = time.perf_counter()
        call()
        _synchronize()
        return 1000 * (time.perf_counter() - started)

    taken = [timed(lambda number=number: look_up(number)) for number in range(repeats)]
    _tell(f"lookup_ms_{positions}_{name}", statistics.median(taken[3:]))
    if lookup.on_device is not None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for number in range(repeats):
                look_up(number)
        _tell(f"kernel_ms_{positions}_{name}", min(timed(graph.replay) for _ in range(5)) / repeats)


def _device() -> torch.device:
    return torch.device("cuda", 0) if ON_GPU else torch.device("cpu")


def _synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def _tell(name: str, value: float) -> None:
    print("RESULT", json.dumps([name, value]), flush=True)


if __name__ == "__main__":
    main()
