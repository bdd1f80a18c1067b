"""Train one model: `scone train`, `python -m scone.scripts.train`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from scone.configs.loading import parse_options
from scone.utils.command_line import is_first_process, run_main
from scone.utils.progress import is_quiet

EXAMPLES = (
    "scone train --dataset_name wikitext --dataset_config_name wikitext-103-v1 --output_dir ./outputs/scone-model",
    "scone train --config configs/base_config.yaml --learning_rate 1e-4",
    "scone train --dataset_name my_texts/ --tokenizer train --vocab_size 8192 --max_n 4 --min_freq 20",
    "scone train --config configs/base_config.yaml --resume_from_checkpoint",
)
DESCRIPTION = "Count f-grams on a corpus and train a language model whose input embeddings use them."
read_arguments = partial(
    parse_options, sections=("data", "model", "training"), description=DESCRIPTION, examples=EXAMPLES
)


def main(argv: Sequence[str] | None = None) -> int:
    """Train and print the path of the model."""
    options, _ = read_arguments(argv)
    from scone.training.distributed import destroy_process_group
    from scone.training.run import train

    final_model = train(options, quiet=is_quiet())
    destroy_process_group()
    if is_first_process():
        print(f"final model: {final_model}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
