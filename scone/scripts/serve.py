"""Serve a model over HTTP: `scone serve`, `python -m scone.scripts.serve`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from scone.configs.loading import parse_options
from scone.scripts.arguments import arguments, load_engine, number
from scone.utils.command_line import run_main
from scone.utils.errors import SconeError

KEY_VARIABLE = "SCONE_API_KEY"
VLLM = "vllm serve MODEL"
DESCRIPTION = f"""\
Serve a model, SCONE (with or without its table) or plain, on a CPU or to try it out: an OpenAI-compatible API, metrics,
and a page. For many clients or a GPU use vLLM: {VLLM} (docs/how-to/vllm.md)."""
EXAMPLES = (
    "scone serve --model_path ./outputs/scone-model/final_model --embedding_cache_path embeddings.cache",
    "SCONE_API_KEY=secret scone serve --model_path ./outputs/scone-model/final_model --host 0.0.0.0 --port 8000",
)


def _origin(text: str) -> str:
    """A web page's origin as a browser sends it, or ``*``."""
    if text != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", text):
        raise argparse.ArgumentTypeError(
            f"found {text}; expected a web page's origin, such as https://chat.example:8080 (no path), or *"
        )
    return text


ARGUMENTS = arguments(
    "model_path",
    "embedding_cache_path",
    "tokenizer_path",
    "placement",
    "quantization",
    model_name={"metavar": "NAME", "help": "model name in the API (default: the folder's name)"},
    host={"default": "127.0.0.1", "help": "address to listen on (default: 127.0.0.1, this machine only)"},
    port=number(0, "port to listen on; 0: a free one", 8000),
    api_key={"metavar": "KEY", "help": f"ask clients for this key (better: the environment's {KEY_VARIABLE})"},
    cors_origin={
        "type": _origin,
        "action": "append",
        "default": [],
        "metavar": "ORIGIN",
        "help": "a web page elsewhere whose scripts may call the server, such as https://chat.example; * for all; "
        "may be given several times (default: none)",
    },
    max_new_tokens=number(1, "new tokens per request", 1024),
    max_batch=number(1, "sequences per batch", 16),
    max_waiting=number(1, "length of the request queue", 128),
)
read_arguments = partial(
    parse_options,
    sections=("training.device", "inference.use_memory_map"),
    description=DESCRIPTION,
    examples=EXAMPLES,
    add_arguments=ARGUMENTS,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stopped by SIGTERM or Ctrl-C. Raises SconeError; for a missing extra, before loading anything."""
    options, extra = read_arguments(argv)
    try:
        from scone.inference.serve import LOOPBACK, Service, listen, serve
    except ModuleNotFoundError as error:
        raise SconeError(
            f'found no {error.name}, which serving needs; install with: pip install "scone-lm[serve]"'
        ) from error

    key = extra.api_key if extra.api_key is not None else os.environ.get(KEY_VARIABLE)
    if key is not None and not key.strip():
        raise SconeError("found an empty API key; expected some characters; leave --api_key out to serve without one")
    listen(extra.host, extra.port).close()  # before anything is loaded; until all is, clients are to be turned away
    engine = load_engine(options, extra)
    name = extra.model_name or Path(extra.model_path).resolve().name
    if extra.host not in LOOPBACK and key is None:
        print(f"warning: {extra.host} can be reached by others, and there is no --api_key", file=sys.stderr)

    def announce(address: str) -> None:
        page = f"API: {address}/v1, page: {address}/; for many clients or a GPU: {VLLM}"
        print(f"serving {name} at {address}  ({page})", flush=True)

    service = Service(engine, name, extra.max_new_tokens, extra.max_batch, extra.max_waiting, key)
    serve(service, extra.host, extra.port, announce, extra.cors_origin)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
