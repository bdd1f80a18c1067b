"""Precompute a model's embedding table: `scone precompute`, `python -m scone.scripts.precompute_embeddings`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scone.configs.loading import parse_options
from scone.configs.schema import SconeOptions
from scone.scripts.arguments import ROW_TYPES, add_shared, check_tokenizer
from scone.utils.command_line import run_main
from scone.utils.errors import SconeError
from scone.utils.progress import is_quiet

if TYPE_CHECKING:
    import torch

    from scone.models.language_model import SconeForCausalLM

EXAMPLES = (
    "scone precompute --model_path outputs/scone-model/final_model --output_path outputs/scone-model/embeddings.cache",
    "scone precompute --model_path outputs/scone-model/final_model --output_path table.int8 --row_type int8",
    "torchrun --nproc_per_node 4 -m scone.scripts.precompute_embeddings --model_path … --output_path …",
)


def read_arguments(argv: Sequence[str] | None) -> tuple[SconeOptions, argparse.Namespace]:
    """The options on the command line. Raises SconeError."""
    return parse_options(
        argv,
        ("inference", "training.device", "training.seed"),
        "Run the f-gram model over every f-gram and write one row for each into an embedding table.",
        examples=EXAMPLES,
        add_arguments=_add_arguments,
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, "model_path")
    parser.add_argument("--output_path", required=True, help="file to write, such as embeddings.cache")
    parser.add_argument("--row_type", default="fp32", choices=ROW_TYPES, help="row type of the table")
    add_shared(parser, "group_size")
    parser.add_argument(
        "--compute_dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="precision of the f-gram model"
    )
    parser.add_argument(
        "--tokenizer_path", help="tokenizer to check against the one that the f-grams were counted with"
    )
    local_rank: dict[str, Any] = {"type": int, "default": 0, "dest": "local_rank", "help": argparse.SUPPRESS}
    parser.add_argument("--local-rank", "--local_rank", **local_rank)  # torch.distributed.launch passes it


def main(argv: Sequence[str] | None = None) -> int:
    """Write the table and print where it is. Under torchrun every process takes its share."""
    options, arguments = read_arguments(argv)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", arguments.local_rank))
    import torch

    from scone.inference.embedding_table import EmbeddingTable
    from scone.inference.loading import choose_device
    from scone.inference.precompute import precompute_table

    torch.manual_seed(options.training.seed)
    device = choose_device(options.training.device)
    if device.type == "cuda" and device.index is None and world_size > 1:
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
    model = _load_scone(arguments.model_path, device)
    if arguments.tokenizer_path:
        from scone.tokenization.tokenizers import load_tokenizer

        advice = "leave --tokenizer_path out, or give the tokenizer of the model"
        check_tokenizer(load_tokenizer(arguments.tokenizer_path), model.vocabulary, advice)
    complete = precompute_table(
        model,
        arguments.output_path,
        row_type=arguments.row_type,
        group_size=arguments.group_size,
        batch_size=options.inference.batch_size,
        use_memory_map=options.inference.use_memory_map,
        compute_dtype=arguments.compute_dtype,
        rank=rank,
        world_size=world_size,
        quiet=is_quiet(),
    )
    if complete:
        with EmbeddingTable.open(arguments.output_path, placement="mmap") as table:
            print(f"{arguments.output_path}: {table.describe()}")
    return 0


def _load_scone(model_path: str, device: torch.device) -> SconeForCausalLM:
    from scone.inference.loading import load_model
    from scone.models.language_model import SconeForCausalLM

    model = load_model(model_path, device=device).model
    if model.config.model_type == "scone_over_encoding":
        raise SconeError(
            f"found an over-encoding model in {model_path}; expected one trained with f-grams; its hashed rows are a "
            "table already and nothing can be precomputed: serve it as it is"
        )
    if not isinstance(model, SconeForCausalLM):
        raise SconeError(
            f"found a plain model in {model_path}; expected one trained with f-grams; "
            "a model without f-grams needs no embedding table"
        )
    return model


if __name__ == "__main__":
    sys.exit(run_main(main))
