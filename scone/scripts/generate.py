"""Continue a prompt: `scone generate`, `python -m scone.scripts.generate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from scone.configs.loading import parse_options, print_notices
from scone.configs.schema import SconeOptions
from scone.scripts.arguments import arguments, load_engine, number, switch
from scone.utils.command_line import run_main
from scone.utils.errors import SconeError

EXAMPLES = (
    'scone generate --model_path ./outputs/scone-model/final_model --prompt "Once upon a time" --max_length 100',
    "scone generate --model_path ./outputs/scone-model/final_model --embedding_cache_path embeddings.cache "
    '--prompt "Once upon a time" --do_sample --temperature 0.7 --top_p 0.9 --quantization int8',
)


SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
"""What says how to sample, and its defaults."""
ARGUMENTS = arguments(
    "model_path",
    "embedding_cache_path",
    "tokenizer_path",
    "quantization",
    "placement",
    prompt={"required": True, "action": "append", "metavar": "TEXT", "help": "text to continue; may be repeated"},
    max_length=number(1, "total length, prompt included, in tokens (default: 100, or the model's limit if lower)"),
    min_length=number(0, "minimum total length, prompt included", 0),
    num_beams=number(1, "number of beams; 1: no beam search", 1),
    temperature=number(1e-6, "sampling temperature", SAMPLING["temperature"], float),
    top_k=number(0, "sample from the k most likely tokens; 0: all", SAMPLING["top_k"]),
    top_p=number(0, "nucleus sampling probability", SAMPLING["top_p"], float),
    repetition_penalty=number(1e-6, "penalty for repeated tokens; 1: none", 1.0, float),
    num_return_sequences=number(1, "continuations per prompt", 1),
    do_sample=switch("sample tokens (default: greedy decoding)"),
    stream=switch("print the text while it is being generated"),
    stats=switch("print latency, speed, table reads and memory to stderr"),
)


def read_arguments(argv: Sequence[str] | None) -> tuple[SconeOptions, argparse.Namespace]:
    """The options on the command line, and the script's own arguments. Raises SconeError."""
    options, extra = parse_options(
        argv,
        ("training.device", "training.seed", "inference.use_memory_map"),
        "Continue a prompt with a model, SCONE (with or without its table) or plain.",
        examples=EXAMPLES,
        add_arguments=ARGUMENTS,
    )
    for name, limit in (("min_length", extra.max_length), ("top_p", 1)):
        if limit is not None and getattr(extra, name) > limit:
            raise SconeError(f"--{name}: found {getattr(extra, name)}; expected at most {limit}")
    if extra.stream and extra.stats:
        raise SconeError("found both --stream and --stats; expected one of them; leave --stream out")
    if not extra.do_sample and extra.num_return_sequences > extra.num_beams:
        raise SconeError(
            f"--num_return_sequences: found {extra.num_return_sequences} with {extra.num_beams} beam(s) and no "
            "sampling; expected at most as many as beams; add --do_sample or raise --num_beams"
        )
    given = [f"--{name}" for name, default in SAMPLING.items() if getattr(extra, name) != default]
    if given and not extra.do_sample:
        found = f"found {', '.join(given)} without --do_sample"
        print_notices([f"{found}: nothing is sampled, so it changes nothing; add --do_sample"])
    return options, extra


def main(argv: Sequence[str] | None = None) -> int:
    """Generate and print the texts, prompt included."""
    options, extra = read_arguments(argv)
    from scone.inference.engine import GenerationOptions

    engine = load_engine(options, extra)
    names = [name for name in GenerationOptions.__dataclass_fields__ if name in extra]
    wanted = GenerationOptions(**{name: getattr(extra, name) for name in names}, seed=options.training.seed)
    if extra.stream:
        for place, prompt in enumerate(extra.prompt):
            pieces = engine.stream(prompt, wanted)  # what cannot be continued is refused before anything is printed
            print("\n\n" if place else "", prompt, sep="", end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
        print()
        return 0
    generations, stats = engine.generate(extra.prompt, wanted)
    texts = [text for generation in generations for text in generation.texts]
    print("\n\n".join(f"[{place}] {text}" for place, text in enumerate(texts, 1)) if len(texts) > 1 else texts[0])
    if extra.stats:
        print(stats, file=sys.stderr)
        for part in (engine.loaded.quantization, engine.loaded.table and engine.loaded.table.describe()):
            if part is not None:
                print(part, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
