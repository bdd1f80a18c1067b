"""A process that precomputes a table and can be killed: `python -m scone.tests.inference.precompute_worker`."""

from __future__ import annotations

import sys
import time

import torch

from scone.inference import precompute
from scone.tests.inference.tables import TokenSums


def main() -> None:
    """Arguments: path, row type, rank, ranks, seconds to dawdle over every chunk."""
    path, row_type, rank, world_size, seconds = sys.argv[1:]
    torch.set_num_threads(2)
    precompute.ROWS_PER_BATCH_UNIT = 33
    model = TokenSums()
    live = model.embed_nodes

    def slowly(nodes: torch.Tensor) -> torch.Tensor:
        time.sleep(float(seconds))
        return live(nodes)

    model.embed_nodes = slowly
    print("ready", flush=True)
    precompute.precompute_table(
        model, path, row_type=row_type, batch_size=1, rank=int(rank), world_size=int(world_size), use_memory_map=True
    )


if __name__ == "__main__":
    main()
