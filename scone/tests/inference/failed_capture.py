"""A step that waits although nothing told of it: its capture fails, and all goes on as if none had been tried."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import StaticCache

from scone.inference.embedding_table import EmbeddingTable
from scone.inference.statistics import counted_reads
from scone.models import cuda_graphs
from scone.models.captured_calls import CapturedCalls
from scone.tests import tiny
from scone.tests.inference.tables import write_table

PROMPT, LENGTH = 4, 16


@contextmanager
def notes_nothing() -> Iterator[list[str]]:
    """In place of what watches for waiting."""
    yield []


def wait(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """A hook that needs a number from the accelerator."""
    return output + 0 * output.sum().item()


@torch.inference_mode()
def main() -> None:
    """Decode, and check that nothing of the failure is left but the refusal to try again."""
    cuda_graphs.noted_waits = notes_nothing
    model = tiny.scone("gpt2", min_freq=1)
    size = model.config.vocab_size
    rows = model.embed_nodes(torch.arange(size, size + model.config.num_f_grams))
    text = torch.randint(0, 6, (2, LENGTH), generator=torch.Generator().manual_seed(0)).cuda()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "embeddings.cache"
        write_table(path, rows)
        with EmbeddingTable.open(path, "gpu", device="cuda") as table:
            model.cuda().attach_table(table)
            with counted_reads(model) as at_once:
                expected = model(text).logits
            model.trunk.get_output_embeddings().register_forward_hook(wait)
            stream = torch.cuda.current_stream()
            calls = CapturedCalls(model, compiles=False)
            for _ in range(2):
                cache = StaticCache(model.trunk.config, max_cache_len=LENGTH)
                with counted_reads(model) as reads:
                    model(input_ids=text[:, :PROMPT], past_key_values=cache, use_cache=True)
                    for at in range(PROMPT, LENGTH):
                        step = text[:, at : at + 1]
                        logits = calls(input_ids=step, past_key_values=cache, use_cache=True).logits
                        torch.testing.assert_close(logits[:, -1], expected[:, at], atol=1e-4, rtol=1e-4)
                assert reads is not None
                assert at_once is not None
                assert (reads.num_positions, reads.num_rows) == (at_once.num_positions, at_once.num_rows)
            assert torch.cuda.current_stream() == stream
            torch.manual_seed(3)
            expected = torch.randn(5, device="cuda")
            torch.manual_seed(3)
            assert torch.randn(5, device="cuda").equal(expected)
    assert cuda_graphs.Captures.gave_up
    assert not calls.num_graphs
    print("as without")


if __name__ == "__main__":
    main()
