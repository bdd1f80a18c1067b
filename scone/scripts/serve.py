"""Serve a model over HTTP: `scone serve`, `python -m scone.scripts.serve`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from scone.configs.loading import parse_options
from scone.configs.schema import SconeOptions
from scone.utils.command_line import run_main
from scone.utils.errors import SconeError

KEY_VARIABLE = "SCONE_API_KEY"
EXAMPLES = (
    "scone serve --model_path ./outputs/scone-model/final_model --embedding_cache_path embeddings.cache",
    "SCONE_API_KEY=secret scone serve --model_path ./outputs/scone-model/final_model --host 0.0.0.0 --port 8000",
)


def read_arguments(argv: Sequence[str] | None) -> tuple[SconeOptions, argparse.Namespace]:
    """The options on the command line, and the script's own arguments. Raises SconeError."""
    options, extra = parse_options(
        argv,
        ("training.device", "inference.use_memory_map"),
        "Serve a model, SCONE (with or without its table) or plain: an OpenAI-compatible API, metrics, and a page.",
        examples=EXAMPLES,
        add_arguments=_add_arguments,
    )
    for name, low in (
        *(("max_prompt_tokens", 1), ("max_new_tokens", 1), ("max_batch", 1), ("max_waiting", 1), ("max_seconds", 0.1)),
        *(("port", 0),),
    ):
        value = getattr(extra, name)
        if value is not None and value < low:
            raise SconeError(f"--{name}: found {value}; expected at least {low}")
    return options, extra


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stopped by SIGTERM or Ctrl-C."""
    options, extra = read_arguments(argv)
    placement = "mmap" if options.inference.use_memory_map else extra.placement
    return serve_model(extra, placement, options.training.device)


def serve_model(extra: argparse.Namespace, placement: str, device: str | None) -> int:
    """Load model and table and serve them. Raises SconeError; for a missing extra, before loading anything."""
    check_extra()
    check_origins(extra.cors_origin)
    from scone.inference.engine import SconeInferenceEngine
    from scone.inference.serve import LOOPBACK, ServeLimits, Service, serve

    key = extra.api_key if extra.api_key is not None else os.environ.get(KEY_VARIABLE)
    if key is not None and not key.strip():
        raise SconeError("found an empty API key; expected some characters; leave --api_key out to serve without one")
    engine = SconeInferenceEngine.from_pretrained(
        *(extra.model_path, extra.embedding_cache_path, placement, extra.quantization, device, extra.tokenizer_path)
    )
    baseline = None
    if extra.baseline is not None:
        baseline = SconeInferenceEngine.from_pretrained(extra.baseline, device=device)
    limits = ServeLimits(
        extra.max_prompt_tokens, extra.max_new_tokens, extra.max_batch, extra.max_waiting, extra.max_seconds
    )
    name = extra.model_name or Path(extra.model_path).resolve().name
    service = Service(engine, name, limits, key, baseline)
    if extra.host not in LOOPBACK and key is None:
        print(f"warning: {extra.host} can be reached by others, and there is no --api_key", file=sys.stderr)

    def announce(address: str) -> None:
        print(f"serving {name} at {address}  (API: {address}/v1, page: {address}/)", flush=True)

    serve(service, extra.host, extra.port, announce, extra.cors_origin)
    return 0


def check_origins(origins: Sequence[str]) -> None:
    """Raise SconeError for what no browser would send as an origin."""
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise SconeError(
                f"--cors_origin: found {origin}; expected a web page's origin, such as https://chat.example:8080 (no "
                "path), or *"
            )


def check_extra() -> None:
    """Raise SconeError where the libraries of the extra ``serve`` are missing."""
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise SconeError(
            f'found no {", ".join(missing)}, which serving needs; install with: pip install "scone-lm[serve]"'
        )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_path", required=True, metavar="FOLDER", help="the model: a final_model folder")
    add_serving_arguments(parser)


def add_serving_arguments(parser: argparse.ArgumentParser) -> None:
    """The serving arguments, model aside; `scone inspect --serve` takes them too."""
    group = parser.add_argument_group("serving")
    group.add_argument(
        "--embedding_cache_path", metavar="FILE", help="its embedding table (default: compute f-gram embeddings live)"
    )
    group.add_argument("--tokenizer_path", metavar="FOLDER", help="tokenizer (default: the model's own)")
    group.add_argument("--placement", default="ram", help="where the table is kept: ram, mmap, direct, or tiers")
    group.add_argument("--quantization", metavar="TYPE", help="quantise the trunk: fp16, int8 or int4")
    group.add_argument(
        "--baseline", metavar="FOLDER", help="a plain model whose predictions the page shows for comparison"
    )
    group.add_argument("--model_name", metavar="NAME", help="model name in the API (default: the folder's name)")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    group.add_argument("--port", type=int, default=8000, help="port to listen on, 0: a free one (default: 8000)")
    group.add_argument(
        "--api_key", metavar="KEY", help=f"ask clients for this key (better: the environment's {KEY_VARIABLE})"
    )
    group.add_argument(
        "--cors_origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a web page elsewhere whose scripts may call the server, such as https://chat.example; * for all; may be "
        "given several times (default: none)",
    )
    group.add_argument("--max_prompt_tokens", type=int, metavar="N", help="longest prompt (default: the model's)")
    group.add_argument(
        "--max_new_tokens", type=int, default=1024, metavar="N", help="limit on new tokens per request (default: 1024)"
    )
    group.add_argument("--max_batch", type=int, default=16, metavar="N", help="sequences per batch (default: 16)")
    group.add_argument(
        "--max_waiting", type=int, default=128, metavar="N", help="length of the request queue (default: 128)"
    )
    group.add_argument(
        "--max_seconds",
        type=float,
        default=120.0,
        metavar="S",
        help="time limit of a request, in seconds (default: 120)",
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
