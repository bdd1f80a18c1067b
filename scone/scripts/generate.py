"""Continue a prompt: `scone generate`, `python -m scone.scripts.generate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from scone.configs.loading import parse_options
from scone.configs.schema import SconeOptions
from scone.scripts.arguments import add_shared
from scone.utils.command_line import run_main
from scone.utils.errors import SconeError

if TYPE_CHECKING:
    from scone.inference.engine import GenerationOptions, SconeInferenceEngine

EXAMPLES = (
    'scone generate --model_path ./outputs/scone-model/final_model --prompt "Once upon a time" --max_length 100',
    "scone generate --model_path ./outputs/scone-model/final_model --embedding_cache_path embeddings.cache "
    '--prompt "Once upon a time" --do_sample --temperature 0.7 --top_p 0.9 --quantization int8',
)


def read_arguments(argv: Sequence[str] | None) -> tuple[SconeOptions, argparse.Namespace]:
    """The options on the command line, and the script's own arguments. Raises SconeError."""
    options, extra = parse_options(
        argv,
        ("training.device", "training.seed", "inference.use_memory_map"),
        "Continue a prompt with a model, SCONE (with or without its table) or plain.",
        examples=EXAMPLES,
        add_arguments=_add_arguments,
    )
    _check(extra)
    return options, extra


def main(argv: Sequence[str] | None = None) -> int:
    """Generate and print the texts, prompt included."""
    options, extra = read_arguments(argv)
    from scone.inference.engine import GenerationOptions, SconeInferenceEngine

    engine = SconeInferenceEngine.from_pretrained(
        extra.model_path,
        extra.embedding_cache_path,
        placement="mmap" if options.inference.use_memory_map else extra.placement,
        quantization=extra.quantization,
        device=options.training.device,
        tokenizer_path=extra.tokenizer_path,
    )
    numbers = {name: getattr(extra, name) for name in NUMBERS}
    wanted = GenerationOptions(**numbers, do_sample=extra.do_sample, seed=options.training.seed)
    if extra.stream:
        return _stream(engine, extra.prompt, wanted)
    generations, stats = engine.generate(extra.prompt, wanted)
    texts = [text for generation in generations for text in generation.texts]
    print("\n\n".join(f"[{number}] {text}" for number, text in enumerate(texts, 1)) if len(texts) > 1 else texts[0])
    if extra.stats:
        print(stats, file=sys.stderr)
        for part in (engine.loaded.quantization, engine.loaded.table and engine.loaded.table.describe()):
            if part is not None:
                print(part, file=sys.stderr)
    return 0


def _stream(engine: SconeInferenceEngine, prompts: list[str], options: GenerationOptions) -> int:
    """Print each prompt and its continuation as it comes."""
    for number, prompt in enumerate(prompts):
        pieces = engine.stream(prompt, options)  # what cannot be continued is refused here, before anything is printed
        print("\n\n" if number else "", prompt, sep="", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
    print()
    return 0


def _check(extra: argparse.Namespace) -> None:
    """Refuse values early that transformers would refuse with a traceback."""
    for name, (_, low, high, _) in NUMBERS.items():
        value, high = getattr(extra, name), extra.max_length if name == "min_length" else high
        positive = name in ("temperature", "repetition_penalty")
        if value is not None and (value < low or (positive and value == 0) or (high is not None and value > high)):
            expected = "more than 0" if positive else f"at least {low}" if high is None else f"{low} to {high}"
            raise SconeError(f"--{name}: found {value}; expected {expected}")
    if extra.stream and extra.stats:
        raise SconeError("found both --stream and --stats; expected one of them; leave --stream out")
    choices = extra.num_return_sequences
    if not extra.do_sample and choices > extra.num_beams:
        raise SconeError(
            f"--num_return_sequences: found {choices} with {extra.num_beams} beam(s) and no sampling, which can give "
            f"only {extra.num_beams}; add --do_sample or raise --num_beams"
        )


NUMBERS: dict[str, tuple[int | float | None, int | float, float | None, str]] = {
    "max_length": (
        None,
        1,
        None,
        "total length, prompt included, in tokens (default: 100, or the model's limit if lower)",
    ),
    "min_length": (0, 0, None, "minimum total length, prompt included, in tokens (default: 0)"),
    "num_beams": (1, 1, None, "number of beams (default: 1, no beam search)"),
    "temperature": (1.0, 0.0, None, "sampling temperature (default: 1.0)"),
    "top_k": (50, 0, None, "sample from the k most likely tokens, 0: all (default: 50)"),
    "top_p": (1.0, 0.0, 1.0, "nucleus sampling probability (default: 1.0)"),
    "repetition_penalty": (1.0, 0.0, None, "penalty for repeated tokens; 1: none (default: 1.0)"),
    "num_return_sequences": (1, 1, None, "continuations per prompt (default: 1)"),
}
"""Name → default, lowest and highest value, help."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, "model_path", "embedding_cache_path", "tokenizer_path")
    parser.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="text to continue; may be given several times"
    )
    for name, (default, low, _, text) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=type(low), default=default, help=text)
    parser.add_argument("--do_sample", action="store_true", help="sample tokens (default: greedy decoding)")
    add_shared(parser, "quantization", "placement")
    parser.add_argument("--stream", action="store_true", help="print the text while it is being generated")
    parser.add_argument("--stats", action="store_true", help="print latency, speed, table reads and memory to stderr")


if __name__ == "__main__":
    sys.exit(run_main(main))
