"""Serve a model over HTTP: `scone serve`, `python -m scone.scripts.serve`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from scone.configs.loading import parse_options
from scone.configs.schema import SconeOptions
from scone.utils.command_line import run_main
from scone.utils.errors import SconeError

KEY_VARIABLE = "SCONE_API_KEY"
VLLM = "vllm serve MODEL"
EXAMPLES = (
    "scone serve --model_path ./outputs/scone-model/final_model --embedding_cache_path embeddings.cache",
    "SCONE_API_KEY=secret scone serve --model_path ./outputs/scone-model/final_model --host 0.0.0.0 --port 8000",
)


def read_arguments(argv: Sequence[str] | None) -> tuple[SconeOptions, argparse.Namespace]:
    """The options on the command line, and the script's own arguments. Raises SconeError."""
    return parse_options(
        argv,
        ("training.device", "inference.use_memory_map"),
        "Serve a model, SCONE (with or without its table) or plain, on a CPU or to try it out: an OpenAI-compatible "
        f"API, metrics, and a page. For many clients or a GPU use vLLM: {VLLM} (docs/how-to/vllm.md).",
        examples=EXAMPLES,
        add_arguments=_add_arguments,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stopped by SIGTERM or Ctrl-C."""
    options, extra = read_arguments(argv)
    placement = "mmap" if options.inference.use_memory_map else extra.placement
    return serve_model(extra, placement, options.training.device)


def serve_model(extra: argparse.Namespace, placement: str, device: str | None) -> int:
    """Load model and table and serve them. Raises SconeError; for a missing extra, before loading anything."""
    try:
        from scone.inference.serve import LOOPBACK, SconeInferenceEngine, ServeLimits, Service, serve
    except ModuleNotFoundError as error:
        raise SconeError(
            f'found no {error.name}, which serving needs; install with: pip install "scone-lm[serve]"'
        ) from error

    key = extra.api_key if extra.api_key is not None else os.environ.get(KEY_VARIABLE)
    if key is not None and not key.strip():
        raise SconeError("found an empty API key; expected some characters; leave --api_key out to serve without one")
    engine = SconeInferenceEngine.from_pretrained(
        *(extra.model_path, extra.embedding_cache_path, placement, extra.quantization, device, extra.tokenizer_path)
    )
    baseline = None if extra.baseline is None else SconeInferenceEngine.from_pretrained(extra.baseline, device=device)
    limits = ServeLimits(
        extra.max_prompt_tokens, extra.max_new_tokens, extra.max_batch, extra.max_waiting, extra.max_seconds
    )
    name = extra.model_name or Path(extra.model_path).resolve().name
    if extra.host not in LOOPBACK and key is None:
        print(f"warning: {extra.host} can be reached by others, and there is no --api_key", file=sys.stderr)

    def announce(address: str) -> None:
        page = f"API: {address}/v1, page: {address}/; for many clients or a GPU: {VLLM}"
        print(f"serving {name} at {address}  ({page})", flush=True)

    serve(Service(engine, name, limits, key, baseline), extra.host, extra.port, announce, extra.cors_origin)
    return 0


def _at_least(low: float, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"found {text}; expected at least {low}")
        return value

    return number


def _origin(text: str) -> str:
    """A web page's origin as a browser sends it, or ``*``."""
    if text != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", text):
        raise argparse.ArgumentTypeError(
            f"found {text}; expected a web page's origin, such as https://chat.example:8080 (no path), or *"
        )
    return text


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_path", required=True, metavar="FOLDER", help="the model: a final_model folder")
    add_serving_arguments(parser)


def add_serving_arguments(parser: argparse.ArgumentParser) -> None:
    """The serving arguments, model aside; `scone inspect --serve` takes them too."""
    add = parser.add_argument_group("serving").add_argument
    add("--embedding_cache_path", metavar="FILE", help="its embedding table (default: the f-gram model runs live)")
    add("--tokenizer_path", metavar="FOLDER", help="tokenizer (default: the model's own)")
    add("--placement", default="ram", help="where the table is kept: ram, mmap, direct, or tiers")
    add("--quantization", metavar="TYPE", help="quantise the trunk: fp16, int8 or int4")
    add("--baseline", metavar="FOLDER", help="a plain model whose predictions the page shows for comparison")
    add("--model_name", metavar="NAME", help="model name in the API (default: the folder's name)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=_at_least(0), default=8000, help="port to listen on, 0: a free one (default: 8000)")
    add("--api_key", metavar="KEY", help=f"ask clients for this key (better: the environment's {KEY_VARIABLE})")
    add(
        "--cors_origin",
        type=_origin,
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a web page elsewhere whose scripts may call the server, such as https://chat.example; * for all; may be "
        "given several times (default: none)",
    )
    count = _at_least(1)
    add("--max_prompt_tokens", type=count, metavar="N", help="longest prompt (default: the model's)")
    add("--max_new_tokens", type=count, default=1024, metavar="N", help="new tokens per request (default: 1024)")
    add("--max_batch", type=count, default=16, metavar="N", help="sequences per batch (default: 16)")
    add("--max_waiting", type=count, default=128, metavar="N", help="length of the request queue (default: 128)")
    seconds = _at_least(0.1, float)
    add("--max_seconds", type=seconds, default=120.0, metavar="S", help="time limit of a request (default: 120)")


if __name__ == "__main__":
    sys.exit(run_main(main))
