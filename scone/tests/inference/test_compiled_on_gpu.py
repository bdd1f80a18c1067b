"""Compiled steps of transformers on a GPU, CUDA graphs in them, equal full forward passes, from every placement."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

from scone.inference.embedding_table import EmbeddingTable
from scone.inference.streaming import table_reads
from scone.models.language_model import SconeForCausalLM
from scone.tests import tiny
from scone.tests.inference.tables import write_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # of the compiler
]
BY_ITSELF = ("gpu", "ram", "gpu:100,ram")
PLACEMENTS = (*BY_ITSELF, "mmap", "direct", "gpu:10,ram:20,disk", "live")


@pytest.fixture(params=PLACEMENTS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SconeForCausalLM]:
    torch._dynamo.reset()
    model = tiny.scone("llama", min_freq=1)
    if request.param == "live":
        yield model.cuda()
        return
    path = tmp_path / "embeddings.cache"
    write_table(path, tiny.live_rows(model))
    with EmbeddingTable.open(path, request.param, device="cuda") as table:
        model.attach_table(table)
        assert model.table_embedding is not None
        assert model.table_embedding.is_by_device == (request.param in BY_ITSELF)
        yield model.cuda()


def prompts() -> dict[str, torch.Tensor]:
    text = tiny.tokens(2, 8, 3)
    mask = torch.ones_like(text)
    mask[0, :3] = 0
    return {"input_ids": text.cuda(), "attention_mask": mask.cuda()}


def test_generate_over_a_static_cache_gives_what_it_gives_without(model: SconeForCausalLM) -> None:
    """Twice: the second text replays the graphs of the first."""
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "no_repeat_ngram_size": 2}
    expected = model.generate(**prompts(), use_cache=False, **options)
    for _ in range(2):
        before = table_reads(model)
        found = model.generate(**prompts(), cache_implementation="static", **options)
        assert found.tolist() == expected.tolist()
        if model.table_embedding is not None:  # replayed steps count too; the last token is not looked up
            positions, rows = (table_reads(model) - before).tolist()
            assert positions == 2 * (8 + 11)
            assert rows > 0
    assert (model.match(found)[:, 8:] >= tiny.VOCAB_SIZE).any(), "generated text must have f-grams"


@torch.inference_mode()
def test_a_compiled_model_equals_itself(model: SconeForCausalLM) -> None:
    """All of it with CUDA graphs, prompt and steps."""
    compiled: Any = torch.compile(model, mode="reduce-overhead")
    text = tiny.tokens(2, 16).cuda()
    full = model(text).logits
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=16)
    found = [model(text[:, :8], cache=cache, use_cache=True).logits]
    for at in range(8, 16):
        torch.compiler.cudagraph_mark_step_begin()
        step = compiled(text[:, at : at + 1], cache=cache, use_cache=True)
        found.append(step.logits.clone())  # the next step writes over it
    torch.testing.assert_close(torch.cat(found, dim=1), full, atol=1e-4, rtol=1e-4)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(text, use_cache=False).logits, full, atol=1e-4, rtol=1e-4)
