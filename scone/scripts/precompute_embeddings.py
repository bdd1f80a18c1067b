"""Precompute a model's embedding table: `scone precompute`, `python -m scone.scripts.precompute_embeddings`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial

from scone.configs.loading import parse_options
from scone.scripts.arguments import ROW_TYPES, arguments, check_tokenizer
from scone.utils.command_line import run_main
from scone.utils.errors import SconeError
from scone.utils.files import check_writable
from scone.utils.progress import is_quiet

EXAMPLES = (
    "scone precompute --model_path outputs/scone-model/final_model --output_path outputs/scone-model/embeddings.cache",
    "scone precompute --model_path outputs/scone-model/final_model --output_path table.int8 --row_type int8",
    "torchrun --nproc_per_node 4 -m scone.scripts.precompute_embeddings --model_path … --output_path …",
)
ARGUMENTS = arguments(
    "model_path",
    "group_size",
    output_path={"required": True, "help": "file to write, such as embeddings.cache"},
    row_type={"default": "fp32", "choices": ROW_TYPES, "help": "row type of the table"},
    compute_dtype={"default": "fp32", "choices": ("fp32", "bf16", "fp16"), "help": "precision of the f-gram model"},
    tokenizer_path={"help": "tokenizer to check against the one that the f-grams were counted with"},
    local_rank={"type": int, "default": 0, "help": argparse.SUPPRESS},  # torch.distributed.launch passes it
)
read_arguments = partial(
    parse_options,
    sections=("inference", "training.device", "training.seed"),
    description="Run the f-gram model over every f-gram and write one row for each into an embedding table.",
    examples=EXAMPLES,
    add_arguments=ARGUMENTS,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the table and print where it is. Under torchrun every process takes its share."""
    options, extra = read_arguments(argv)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", extra.local_rank))
    import torch

    from scone.inference.embedding_table import EmbeddingTable
    from scone.inference.loading import choose_device, load_model
    from scone.inference.precompute import precompute_table
    from scone.models.language_model import SconeForCausalLM

    check_writable(extra.output_path)
    torch.manual_seed(options.training.seed)
    device = choose_device(options.training.device)
    if device.type == "cuda" and device.index is None and world_size > 1:
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
    model = load_model(extra.model_path, device=device).model
    if not isinstance(model, SconeForCausalLM):  # over-encoding's hashed rows are a table already
        raise SconeError(
            f"found a model without f-grams in {extra.model_path}; expected one trained with f-grams; others need no "
            "embedding table: serve it as it is"
        )
    if extra.tokenizer_path:
        from scone.tokenization.tokenizers import load_tokenizer

        advice = "leave --tokenizer_path out, or give the tokenizer of the model"
        check_tokenizer(load_tokenizer(extra.tokenizer_path), model.vocabulary, advice)
    complete = precompute_table(
        model,
        extra.output_path,
        row_type=extra.row_type,
        group_size=extra.group_size,
        batch_size=options.inference.batch_size,
        use_memory_map=options.inference.use_memory_map,
        compute_dtype=extra.compute_dtype,
        rank=rank,
        world_size=world_size,
        quiet=is_quiet(),
    )
    if complete:
        with EmbeddingTable.open(extra.output_path, placement="mmap") as table:
            print(f"{extra.output_path}: {table.describe()}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
