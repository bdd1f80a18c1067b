"""Decoding steps as CUDA graphs give what ordinary calls give, whatever happens to the cache between them."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, StaticCache
from transformers.cache_utils import StaticSlidingWindowLayer

import scone
from scone.inference.embedding_table import EmbeddingTable
from scone.inference.statistics import counted_reads
from scone.models import cuda_graphs
from scone.models.captured_calls import MOST_COMPILED, CapturedCalls, is_step, options_within_a_graph
from scone.models.cuda_graphs import Captures
from scone.models.language_model import SconeForCausalLM
from scone.models.over_encoding import OverEncodingForCausalLM
from scone.models.scaled_trunk import ScaledTrunkForCausalLM
from scone.models.step_look_up import WARM_UP_CALLS
from scone.tests import tiny
from scone.tests.inference.replayed import pretend
from scone.tests.inference.tables import small_model, write_table

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # the compiler's own
LENGTH, PROMPT = 24, 5
BY_HOST = [("gpt2", "mmap"), ("gpt2", "direct"), ("qwen2", "gpu:100,disk"), ("gpt2", None)]


def some_text(rows: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 6, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def test_on_a_cpu_every_call_is_an_ordinary_one():
    model = small_model()
    calls, text = CapturedCalls(model), some_text(2, 0)
    assert model.get_compiled_call(None) == model.__call__
    cache = StaticCache(model.trunk.config, max_cache_len=LENGTH)
    with torch.inference_mode():
        expected = model(text).logits
        for at in range(LENGTH):
            logits = calls(input_ids=text[:, at : at + 1], past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(logits[:, 0], expected[:, at])
    assert not calls.num_graphs


@torch.inference_mode()
def test_what_counts_on_the_host_or_is_kept_by_others_is_no_step():
    model = small_model()
    cache = StaticCache(model.trunk.config, max_cache_len=LENGTH)
    token = torch.tensor([[1], [2]])
    step = {"input_ids": token, "past_key_values": cache, "use_cache": True}
    assert not is_step(step), "before the prompt nothing has a place"
    model(input_ids=token, past_key_values=cache, use_cache=True)
    mask = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
    assert is_step(step)
    assert is_step(step | {"attention_mask": mask, "output_hidden_states": False})
    assert is_step(step | {"attention_mask": {"full_attention": mask, "other": None}})
    assert not is_step(step | {"attention_mask": mask[:, 0, 0]})
    assert not is_step(step | {"attention_mask": {"full_attention": mask, "other": mask[0]}})
    assert not is_step(step | {"attention_mask": object()})
    assert not is_step(step | {"input_ids": token.expand(2, 2)})
    assert not is_step(step | {"output_hidden_states": True})
    assert not is_step(step | {"past_key_values": DynamicCache()} | {"output_attentions": True})
    kept = cache.layers[0]
    cache.layers[0] = StaticSlidingWindowLayer(max_cache_len=LENGTH, sliding_window=4)
    cache.layers[0].lazy_initialization(kept.keys, kept.values)
    assert not is_step(step)
    cache.layers[0] = kept
    assert is_step(step)
    cache.offloading = True
    assert not is_step(step)


@torch.inference_mode()
def test_each_kind_of_step_is_compiled_once():
    """Whatever the cache, up to a number of kinds for each model: the compiler's own limit is one for all models."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    # torch 2.7 compiles anew for the memory of another cache, 2.11 does not
    again = [1, 2] if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11) else []
    for model in range(2):
        trunk = tiny.trunk("gpt2")
        calls, kinds = CapturedCalls(trunk, backend=backend), set()
        for rows in [*range(1, MOST_COMPILED + 3), *again]:
            text, cache = some_text(rows, 0), StaticCache(trunk.config, max_cache_len=LENGTH)
            trunk(input_ids=text[:, :PROMPT], past_key_values=cache, use_cache=True)
            step = {"input_ids": text[:, PROMPT : PROMPT + 1], "past_key_values": cache, "use_cache": True}
            assert is_step(step)
            logits = calls._call(step).logits
            torch.testing.assert_close(logits[:, -1], trunk(text[:, : PROMPT + 1]).logits[:, -1])
            kinds.add(rows)
            assert len(compiled) == model * MOST_COMPILED + min(len(kinds), MOST_COMPILED)


def test_waiting_is_noted_for_the_thread_that_asks(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def wait() -> None:
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)

    with cuda_graphs.noted_waits() as waits:
        wait()
        wait()
        other = threading.Thread(target=wait)
        other.start()
        other.join()
        warnings.warn("something else", UserWarning, stacklevel=1)
    assert len(waits) == 2
    assert waits[0].startswith(f"{__file__}:")
    assert modes == ["warn", 0]
    assert [str(warning.message) for warning in recwarn] == ["something else"]


@torch.inference_mode()
@pytest.mark.parametrize("waits", [[], ["some_model.py:7"]])
def test_the_third_step_is_captured_unless_the_second_waited(
    waits: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    captured = pretend(monkeypatch, waits)
    trunk, text = tiny.trunk("gpt2"), some_text(2, 0)
    calls, cache = CapturedCalls(trunk, backend="eager"), StaticCache(trunk.config, max_cache_len=LENGTH)
    expected = trunk(text).logits
    trunk(input_ids=text[:, :PROMPT], past_key_values=cache, use_cache=True)
    for at in range(PROMPT, PROMPT + WARM_UP_CALLS + 1):
        assert not captured
        step = {"input_ids": text[:, at : at + 1], "past_key_values": cache, "use_cache": True}
        torch.testing.assert_close(calls(**step).logits[:, -1], expected[:, at])
    assert len(captured) == calls.num_graphs == (0 if waits else 1)
    assert calls.num_ordinary == (2 if waits else 0)
    assert ("it waits for the accelerator at some_model.py:7" in caplog.text) == bool(waits)


@pytest.mark.parametrize("kind", ["table", "live", "over-encoding", "plain", "scaled"])
def test_what_the_host_looks_up_is_given_to_the_captured_rest(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Through two texts in one cache and a third in another, with padding in front."""
    captured = pretend(monkeypatch)
    model: Any = tiny.trunk("gpt2") if kind in ("plain", "scaled", "over-encoding") else tiny.scone("gpt2", min_freq=1)
    if kind == "over-encoding":
        model = OverEncodingForCausalLM.from_trunk(model, num_rows=997, start="random", separator_ids=[0]).eval()
    if kind == "scaled":
        model = ScaledTrunkForCausalLM.from_trunk(model, 4.0).eval()
    if kind == "table":
        size = model.config.vocab_size
        rows = model.embed_nodes(torch.arange(size, size + model.config.num_f_grams))
        write_table(tmp_path / "table", rows)
        model.attach_table(EmbeddingTable.open(tmp_path / "table", "mmap"))
    calls = CapturedCalls(model, compiles=False, most_caches=2)
    caches = [StaticCache(getattr(model, "trunk", model).config, max_cache_len=LENGTH) for _ in range(2)]
    padding = torch.ones(2, LENGTH, dtype=torch.long)
    padding[0, :3] = 0
    places = (padding.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        for seed, cache in enumerate((caches[0], caches[0], caches[1])):
            text = some_text(2, seed)
            cache.reset()
            with counted_reads(model) as at_once:
                expected = model(input_ids=text, attention_mask=padding, position_ids=places).logits
            with counted_reads(model) as reads:
                prompt = {"input_ids": text, "attention_mask": padding, "position_ids": places}
                model(**{name: tensor[:, :PROMPT] for name, tensor in prompt.items()}, past_key_values=cache)
                for at in range(PROMPT, LENGTH):
                    seen = padding.bool() & (torch.arange(LENGTH) <= at)
                    step = {"input_ids": text[:, at : at + 1], "past_key_values": cache, "use_cache": True}
                    step |= {"attention_mask": seen[:, None, None]}
                    if kind != "plain":
                        step |= {"token_mask": padding[:, at : at + 1]}
                    found = calls(**step, position_ids=places[:, at : at + 1])
                    torch.testing.assert_close(found.logits[:, -1], expected[:, at], atol=1e-5, rtol=1e-5)
            if reads is not None and at_once is not None:
                assert (reads.num_positions, reads.num_rows) == (at_once.num_positions, at_once.num_rows)
    assert calls.caches == caches
    assert calls.num_graphs == len(captured) == 2
    assert not calls.num_ordinary
    steps = [step for kept in calls._kept.values() for step in kept.steps.values()]
    assert {step.look_up is None for step in steps} == {kind in ("plain", "scaled")}
    calls.forget(caches[0])
    assert calls.caches == caches[1:]


def test_generate_over_a_cache_of_ones_own_sees_a_changed_model(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = pretend(monkeypatch)
    model = tiny.scone("llama", min_freq=1)
    model._captured = CapturedCalls(model, compiles=False)
    monkeypatch.setattr(type(model), "get_compiled_call", lambda self, config: self._captured)
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda *_: True)
    cache = StaticCache(model.trunk.config, max_cache_len=LENGTH)
    text = some_text(1, 0)[:, :PROMPT]
    for turn in range(1, 3):
        how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        expected = model.generate(text, use_cache=False, disable_compile=True, **how)
        cache.reset()
        assert model.generate(text, past_key_values=cache, **how).tolist() == expected.tolist()
        assert len(captured) == turn
        assert model._captured.caches == [cache], "its caller may use it again"
        torch.manual_seed(turn)
        layer = model.trunk.model.layers[0].mlp.down_proj
        layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight))


def test_copies_other_tables_and_moved_weights_leave_graphs_behind(tmp_path: Path) -> None:
    model = small_model()
    model._captured = CapturedCalls(model)
    assert copy.deepcopy(model)._captured is None
    assert pickle.loads(pickle.dumps(model))._captured is None
    assert model._captured is not None
    size = model.config.vocab_size
    write_table(tmp_path / "table", model.embed_nodes(torch.arange(size, size + model.config.num_f_grams)))
    with EmbeddingTable.open(tmp_path / "table", "ram") as table:
        model.attach_table(table)
        assert model._captured is None
        copied = copy.deepcopy(model)
        assert copied.table_embedding is not model.table_embedding
        assert copied.table_embedding.table is table, "a copy reads the same rows"
        text = some_text(2, 0)
        torch.testing.assert_close(copied(text).logits, model(text).logits)
    model._captured = CapturedCalls(model)
    model.to(torch.float64)
    assert model._captured is None


@pytest.fixture(params=[("gpt2", "gpu"), ("gpt2", "ram"), ("gpt2", "gpu:100,ram"), ("qwen2", "ram"), *BY_HOST])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SconeForCausalLM]:
    """On the GPU, with its table in a placement that the GPU reads by itself, or the host, or without one."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    kind, placement = request.param
    model = tiny.scone(kind, min_freq=1)
    path = tmp_path / "embeddings.cache"
    if placement is None:
        yield model.cuda()
        return
    size = model.config.vocab_size
    write_table(path, model.embed_nodes(torch.arange(size, size + model.config.num_f_grams)))
    with EmbeddingTable.open(path, placement, device="cuda") as table:
        model.cuda().attach_table(table)
        by_host = model.table_embedding.look_up_on(model.device, model.vocabulary) is None
        assert by_host == ((kind, placement) in BY_HOST)
        yield model


def steps(model: Any, calls: Any, cache: StaticCache, text: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits [B, V] after the prompt and after each token that follows."""
    text = text.cuda()
    yield model(input_ids=text[:, :PROMPT], past_key_values=cache, use_cache=True).logits[:, -1]
    for at in range(PROMPT, LENGTH):
        yield calls(input_ids=text[:, at : at + 1], past_key_values=cache, use_cache=True).logits[:, -1]


@pytest.mark.gpu
@torch.inference_mode()
def test_captured_steps_equal_the_full_forward(model: SconeForCausalLM) -> None:
    """Through a text, another one in the same memory, reordered rows, and another number of rows."""
    calls = model.get_compiled_call(None)
    assert isinstance(calls, CapturedCalls)
    for rows, seeds in ((2, (0, 1)), (3, (2,))):
        cache = StaticCache(model.trunk.config, max_cache_len=LENGTH)
        for seed in seeds:
            text = some_text(rows, seed)
            with counted_reads(model) as reads:
                found = [logits.clone() for logits in steps(model, calls, cache, text)]
            assert calls.num_graphs == 1
            with counted_reads(model) as at_once:
                expected = model(text.cuda()).logits[:, PROMPT - 1 :]
            torch.testing.assert_close(torch.stack(found, 1), expected, atol=1e-4, rtol=1e-4)
            if model.table_embedding is not None:
                assert reads is not None
                assert at_once is not None
                assert (reads.num_positions, reads.num_rows) == (at_once.num_positions, at_once.num_rows)
            cache.reset()
    assert calls is model.get_compiled_call(None)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(text.cuda()).logits, model(text.cuda()).logits)


@pytest.mark.gpu
@torch.inference_mode()
def test_a_reordered_cache_is_captured_anew(model: SconeForCausalLM) -> None:
    text, order = some_text(2, 0), torch.tensor([1, 0])
    calls, cache = model.get_compiled_call(None), StaticCache(model.trunk.config, max_cache_len=LENGTH)
    model(input_ids=text[:, :PROMPT].cuda(), past_key_values=cache, use_cache=True)
    for at in range(PROMPT, LENGTH):
        if at in (PROMPT + 4, PROMPT + 6):
            cache.reorder_cache(order.cuda())
            text = text[order]
        logits = calls(input_ids=text[:, at : at + 1].cuda(), past_key_values=cache, use_cache=True).logits
        expected = model(text[:, : at + 1].cuda()).logits
        torch.testing.assert_close(logits[:, -1], expected[:, -1], atol=1e-4, rtol=1e-4)
    assert calls.num_graphs == 1


@pytest.mark.gpu
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_over_a_static_cache_gives_what_it_gives_without(model: SconeForCausalLM, beams: int) -> None:
    prompts = some_text(3, 4)[:, :8].cuda()
    mask = torch.ones_like(prompts)
    mask[0, :3] = 0
    how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    expected = model.generate(prompts, attention_mask=mask, use_cache=False, **how)
    graphs = []

    def count(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        graphs.append(model._captured.num_graphs if model._captured is not None else 0)
        return scores

    how["logits_processor"] = LogitsProcessorList([count])
    for _ in range(2):
        found = model.generate(prompts, attention_mask=mask, cache_implementation="static", **how)
        assert found.tolist() == expected.tolist()
        assert graphs[-1] == (1 if beams == 1 else 0), "transformers' beam search makes ordinary calls"
    assert model._captured is None or not model._captured.caches, "memory is kept for a cache that is gone"


@pytest.mark.gpu
@torch.inference_mode()
def test_a_plain_trunk_is_captured_too(model: SconeForCausalLM) -> None:
    plain = model.trunk
    text = some_text(2, 0)
    calls = CapturedCalls(plain, **options_within_a_graph(None))
    found = [one.clone() for one in steps(plain, calls, StaticCache(plain.config, max_cache_len=LENGTH), text)]
    torch.testing.assert_close(torch.stack(found, 1), plain(text.cuda()).logits[:, PROMPT - 1 :], atol=1e-4, rtol=1e-4)
    assert calls.num_graphs == 1
    assert LENGTH - PROMPT > WARM_UP_CALLS + 1


@pytest.mark.gpu
@torch.inference_mode()
def test_a_step_that_waits_is_not_captured(model: SconeForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    def wait(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0 * output.sum().item()

    model.trunk.get_output_embeddings().register_forward_hook(wait)
    calls, text = CapturedCalls(model), some_text(2, 0)
    cache = StaticCache(model.trunk.config, max_cache_len=LENGTH)
    found = [one.clone() for one in steps(model, calls, cache, text)]
    torch.testing.assert_close(torch.stack(found, 1), model(text.cuda()).logits[:, PROMPT - 1 :], atol=1e-4, rtol=1e-4)
    assert not calls.num_graphs
    assert not Captures.gave_up
    assert "it waits for the accelerator at" in caplog.text


@pytest.mark.gpu
def test_decoding_goes_on_after_a_capture_that_failed() -> None:
    """In a process of its own, which can capture nothing any more."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    program = Path(__file__).with_name("failed_capture.py")
    paths = [str(Path(scone.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "as without"
