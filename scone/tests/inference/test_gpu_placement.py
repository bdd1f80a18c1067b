"""Tables on a GPU return the rows that they return on the CPU, from every placement."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from scone.inference.embedding_table import EmbeddingTable
from scone.inference.streaming import table_reads
from scone.inference.table_format import ROW_TYPES
from scone.models.language_model import SconeForCausalLM
from scone.tests import tiny
from scone.tests.inference.tables import write_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("row_type", ROW_TYPES)
@pytest.mark.parametrize("placement", ["gpu", "ram", "mmap", "direct", "gpu:100,ram:200,disk"])
def test_rows_on_a_gpu_are_those_on_the_cpu(tmp_path: Path, row_type: str, placement: str) -> None:
    path = tmp_path / "embeddings.cache"
    write_table(path, torch.randn(700, 331), row_type)
    ranks = torch.randint(0, 700, (500,))
    with EmbeddingTable.open(path) as on_cpu, EmbeddingTable.open(path, placement, device="cuda") as on_gpu:
        for dtype in (torch.float32, torch.bfloat16):
            rows = on_gpu.rows(ranks.cuda(), dtype)
            assert rows.device.type == "cuda"
            assert torch.equal(rows.cpu(), on_cpu.rows(ranks, dtype))
        if placement.startswith("gpu"):
            assert on_gpu.memory.device > 0


PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize("placement", ["gpu", "ram", "gpu:100,ram"])
@pytest.mark.parametrize("is_padded", [False, True])
def test_the_accelerator_looks_up_what_the_host_does(tmp_path: Path, placement: str, is_padded: bool) -> None:
    """The same vectors, bit for bit, for a prompt and for the steps that continue it, wherever padding lies; and the
    same numbers of positions and rows.
    """
    model = tiny.scone()
    path = tmp_path / "embeddings.cache"
    write_table(path, tiny.live_rows(model), "bf16")
    text = torch.randint(0, 6, (3, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.cat([PADDED, torch.ones(3, 16, dtype=torch.int64)], dim=1) if is_padded else None
    model = model.cuda()
    with EmbeddingTable.open(path) as by_host, EmbeddingTable.open(path, placement, device="cuda") as by_itself:
        assert by_itself.gpu_rows(torch.device("cuda", 0))
        assert not by_host.gpu_rows(torch.device("cuda", 0))
        found, counts = [], []
        for table in (by_host, by_itself):
            model.attach_table(table)
            found.append(list(vectors_of(model, text, mask)))
            counts.append(table_reads(model).tolist())
        assert model.table_embedding.is_by_device
    assert counts[0] == counts[1]
    for expected, vectors in zip(*found, strict=True):
        assert torch.equal(expected, vectors)


@torch.inference_mode()
def vectors_of(model: SconeForCausalLM, text: torch.Tensor, mask: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """Input vectors of the first eight tokens, of three more, and of each after these."""
    cache = DynamicCache()
    for low, high in [(0, 8), (8, 11), *((at, at + 1) for at in range(11, text.shape[1]))]:
        tokens = text[:, low:high].cuda()
        seen = None if mask is None else mask[:, :high].cuda()
        yield model.input_vectors(tokens, None if seen is None else seen[:, low:], cache if low else None)
        model(input_ids=tokens, attention_mask=seen, cache=cache, use_cache=True)


def test_gradients_pass_by_the_rows(tmp_path: Path) -> None:
    """With a table, the token embedding of a position that reads a row has no part in it."""
    model = tiny.scone()
    size = model.config.num_f_grams
    path = tmp_path / "embeddings.cache"
    write_table(path, torch.randn(size, model.config.hidden_size))
    model = model.cuda()
    tokens = torch.randint(0, 6, (2, 20), generator=torch.Generator().manual_seed(0)).cuda()
    gradients = []
    for device in ("cpu", "cuda"):
        with EmbeddingTable.open(path, device=device) as table:
            model.attach_table(table)
            model.zero_grad()
            model.input_vectors(tokens).square().sum().backward()
            gradients.append(model.get_input_embeddings().weight.grad.clone())
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("is_served", [False, True])
def test_a_cache_that_waits_on_the_host_gives_what_others_do(tmp_path: Path, cache: str, is_served: bool) -> None:
    model, text = tiny.scone("llama"), torch.randint(0, 6, (2, 9), generator=torch.Generator().manual_seed(0))
    write_table(tmp_path / "embeddings.cache", tiny.live_rows(model), "fp32")
    model = model.cuda()
    with EmbeddingTable.open(tmp_path / "embeddings.cache", "gpu", device="cuda") as table:
        if is_served:
            model.attach_table(table)
        greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "disable_compile": True}
        greedy |= {"attention_mask": torch.ones_like(text).cuda()}
        expected = model.generate(text.cuda(), **greedy)
        assert torch.equal(model.generate(text.cuda(), cache_implementation=cache, **greedy), expected)
