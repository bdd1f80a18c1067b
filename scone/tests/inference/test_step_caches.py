"""An engine whose decoding steps are replayed gives what it gives without, batch after batch."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, StaticCache

from scone.inference import step_caches
from scone.inference.embedding_table import EmbeddingTable
from scone.inference.engine import GenerationOptions, SconeInferenceEngine
from scone.inference.loading import LoadedModel
from scone.inference.statistics import counted_reads
from scone.inference.step_caches import SHORTEST, StepCaches
from scone.inference.streaming import Continuation
from scone.tests import tiny
from scone.tests.inference.replayed import pretend
from scone.tests.inference.tables import write_table

BATCHES = [
    (["1 2 3"], GenerationOptions(max_new_tokens=12)),
    (["4 1 1 2 5 1 3 2", "2 1", "1 7 1"], GenerationOptions(max_new_tokens=9)),
    (["1 3 1 2"], GenerationOptions(max_new_tokens=30, repetition_penalty=1.5)),
    (["5 1", "1 2"], GenerationOptions(max_new_tokens=8, do_sample=True, num_return_sequences=2, seed=3)),
    (["2 2 1"], GenerationOptions(max_new_tokens=8, num_beams=3)),
    (["1 1"], GenerationOptions(max_new_tokens=2)),
    (["3 2 1 6"], GenerationOptions(max_length=60)),
]
KINDS = ["plain", "live", "ram", "mmap", "gpu:50,disk"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Tokens are numbers; 0 ends a text."""
    numbers = {str(number): number for number in range(tiny.VOCAB_SIZE)}
    backend = Tokenizer(models.WordLevel(numbers, unk_token="1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="0")


def engines(
    kind: str, tokenizer: PreTrainedTokenizerFast, path: Path, device: str
) -> tuple[SconeInferenceEngine, SconeInferenceEngine]:
    """One that captures nothing, and one that would on a GPU, with the same model."""
    model: PreTrainedModel = tiny.trunk("gpt2") if kind == "plain" else tiny.scone("gpt2", min_freq=1)
    table = None
    if kind not in ("plain", "live"):
        size = model.config.vocab_size
        write_table(path, model.embed_nodes(torch.arange(size, size + model.config.num_f_grams)))
        table = EmbeddingTable.open(path, kind, device=device)
        model.attach_table(table)
    loaded = LoadedModel(model.to(device), table, None)  # type: ignore[arg-type]
    return SconeInferenceEngine(loaded, tokenizer, cuda_graphs=False), SconeInferenceEngine(loaded, tokenizer)


def on_a_gpu(engine: SconeInferenceEngine, patch: pytest.MonkeyPatch, waits: list[str] | None = None) -> list[Any]:
    """Let an engine on a CPU take it for a GPU of 8 GiB; what is captured, as `pretend`."""
    patch.setattr(step_caches, "_can_be_captured", lambda _: True)
    patch.setattr(step_caches, "_free_bytes", lambda _: 1 << 33)
    patch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 33, 1 << 33))
    patch.setattr(step_caches, "SHORTEST", 16)

    def captures(self: Any, inputs: dict[str, Any], config: Any) -> bool:
        return isinstance(inputs.get("past_key_values"), StaticCache)

    patch.setattr(type(engine.model), "_valid_auto_compile_criteria", captures, raising=False)
    engine._step_caches = StepCaches(engine.model)
    return pretend(patch, waits)


def texts_and_reads(engine: SconeInferenceEngine, prompts: list[str], options: GenerationOptions) -> tuple[Any, Any]:
    generations, stats = engine.generate(prompts, options)
    reads = stats.reads and (stats.reads.num_positions, stats.reads.num_rows)
    return [one.token_ids for one in generations], reads


@pytest.mark.parametrize("kind", KINDS[:4])
def test_texts_and_reads_are_those_of_an_engine_that_captures_nothing(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, engine = engines(kind, tokenizer, tmp_path / "table", "cpu")
    expected = [texts_and_reads(usual, *batch) for batch in BATCHES]
    captured = on_a_gpu(engine, monkeypatch)
    for _ in range(2):
        assert [texts_and_reads(engine, *batch) for batch in BATCHES] == expected
        # (rows, positions): (1, 16), (3, 32), (1, 64) twice, (4, 16); beams and two tokens get none
        assert [shape[0] for shape in captured] == [1, 3, 1, 4], "a cache's graphs are used again"
    assert "get_compiled_call" not in engine.model.__dict__
    assert list(engine._step_caches._caches) == [(1, 16), (3, 32), (4, 16), (1, 64)], "the last used is last"


@pytest.mark.parametrize("kind", ["plain", "mmap"])
def test_a_step_that_waits_ends_the_caches_and_changes_no_text(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, engine = engines(kind, tokenizer, tmp_path / "table", "cpu")
    expected = [texts_and_reads(usual, *batch) for batch in BATCHES]
    captured = on_a_gpu(engine, monkeypatch, waits=["a_model.py:1"])
    assert [texts_and_reads(engine, *batch) for batch in BATCHES] == expected
    assert not captured
    assert not engine._step_caches.may_capture
    assert not engine._step_caches._caches
    with engine._step_caches.for_batch(1, 20, 10) as cache:
        assert cache is None


def test_memory_is_taken_for_what_was_used_last(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = engines("plain", tokenizer, tmp_path, "cpu")
    on_a_gpu(engine, monkeypatch)
    caches = engine._step_caches
    caches._place_bytes *= 3  # a guess that a cache corrects
    with caches.for_batch(2, 20, 10) as cache:
        engine.model(input_ids=torch.ones(2, 3, dtype=torch.long), past_key_values=cache)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert caches._bytes((2, 32)) == real
    caches._largest = 4 * real
    for rows, length, held in (
        (2, 32, [(2, 32)]),
        (2, 64, [(2, 32), (2, 64)]),
        (1, 64, [(2, 32), (2, 64), (1, 64)]),
        (2, 32, [(2, 64), (1, 64), (2, 32)]),
        (1, 32, [(1, 64), (2, 32), (1, 32)]),
        (8, 32, [(8, 32)]),
        (9, 32, [(8, 32)]),
    ):
        with caches.for_batch(rows, length, 10) as found:
            assert (found is None) == (rows == 9)
        assert list(caches._caches) == held
    with caches.for_batch(1, 10, 10) as found:
        assert found is not None
    held = [(1, 16)]
    assert list(caches._caches) == held, "four times what is wanted was held, and an eighth more was not there"
    monkeypatch.setattr(step_caches, "_free_bytes", lambda _: real)
    with caches.for_batch(1, 10, 10) as again:
        assert again is found, "it is there already"
    with caches.for_batch(2, 32, 10) as refused:
        assert refused is None, "twice its size must be free"
    with caches.for_batch(8, 32, 10) as refused:
        assert refused is None, "also with what is dropped for it"
    assert list(caches._caches) == held, "a cache that is refused costs no other its place"
    engine.forget_graphs()
    assert not caches._caches


def test_batches_of_several_threads_take_turns(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, engine = engines("ram", tokenizer, tmp_path / "table", "cpu")
    expected = usual.generate("1 2 3", GenerationOptions(max_new_tokens=12))[0]
    on_a_gpu(engine, monkeypatch)
    found: list[Any] = []

    def work() -> None:
        for _ in range(5):
            found.append("".join(engine.stream("1 2 3", GenerationOptions(max_new_tokens=12))))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [tokenizer.decode([1, 2, 3]) + text for text in found] == [expected[0].texts[0]] * 15


def test_a_model_with_settings_of_its_own_generates_as_they_say(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings that transformers refuses or mistakes beside a cache."""
    usual, engine = engines("mmap", tokenizer, tmp_path / "table", "cpu")
    captured = on_a_gpu(engine, monkeypatch)
    options = GenerationOptions(max_new_tokens=12)
    own = engine.model.generation_config
    expected = texts_and_reads(usual, ["1 2 3", "2 1"], options)
    for name, value, captures in (
        ("use_cache", False, True),
        ("cache_implementation", "static", False),
        ("cache_implementation", "dynamic", False),
        ("disable_compile", True, False),
        (None, None, True),
    ):
        captured.clear()
        engine.forget_graphs()
        with monkeypatch.context() as patch:
            if name is not None:
                patch.setattr(own, name, value)
            assert texts_and_reads(engine, ["1 2 3", "2 1"], options) == expected
        assert bool(captured) == captures, name
    monkeypatch.setattr(own, "prompt_lookup_num_tokens", 2)
    assert engine.generate("1 2 3", options)[0][0].token_ids == usual.generate("1 2 3", options)[0][0].token_ids


def test_a_model_that_no_static_cache_is_made_for_generates_as_ever(tokenizer: PreTrainedTokenizerFast) -> None:
    config = AutoConfig.for_model(
        "mamba", vocab_size=tiny.VOCAB_SIZE, hidden_size=16, num_hidden_layers=1, state_size=4, eos_token_id=0
    )
    loaded = LoadedModel(AutoModelForCausalLM.from_config(config).eval(), None, None)
    usual, engine = SconeInferenceEngine(loaded, tokenizer), SconeInferenceEngine(loaded, tokenizer)
    engine._step_caches = StepCaches(engine.model)
    assert not engine._step_caches.may_capture
    batch = ["1 2 3"], GenerationOptions(max_new_tokens=8)
    assert texts_and_reads(engine, *batch) == texts_and_reads(usual, *batch)


def new_head(model: Any) -> None:
    model.lm_head = torch.nn.Linear(16, tiny.VOCAB_SIZE, bias=False)


def new_weight(model: Any) -> None:
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight))


def new_data(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.weight.data = torch.randn(16, 32)


def hooked(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: -output)


def other_type(model: Any) -> None:
    model.to(torch.float64)


@pytest.mark.parametrize("change", [new_head, new_weight, new_data, hooked, other_type])
def test_a_model_that_was_changed_is_captured_anew(
    change: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.trunk("llama", initializer_range=0.6)
    loaded = LoadedModel(model, None, None)
    usual, engine = (SconeInferenceEngine(loaded, tokenizer, cuda_graphs=on) for on in (False, True))
    captured = on_a_gpu(engine, monkeypatch)
    batch = ["1 2 3"], GenerationOptions(max_new_tokens=12)
    before = texts_and_reads(engine, *batch)
    assert texts_and_reads(usual, *batch) == before
    torch.manual_seed(9)
    change(model)
    after = texts_and_reads(usual, *batch)
    assert texts_and_reads(engine, *batch) == after
    assert (after != before) == (change is not other_type), "else this test shows nothing"
    assert len(captured) == 2


def test_a_batch_within_a_batch_and_another_thread_s_generate_keep_out(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, engine = engines("ram", tokenizer, tmp_path / "table", "cpu")
    options = GenerationOptions(max_new_tokens=12)
    expected = texts_and_reads(usual, ["1 2 3"], options)[0]
    on_a_gpu(engine, monkeypatch)
    inner: list[Any] = []

    def work() -> None:
        tokens = engine.model.generate(
            torch.tensor([[1, 2, 3]]), max_new_tokens=12, do_sample=False, cache_implementation="static"
        )
        inner.append(tokens.tolist())

    def on_text(_: str) -> None:
        if not inner:
            inner.append(engine.generate("1 2 3", options)[0][0].token_ids)
            other = threading.Thread(target=work)
            other.start()
            other.join()

    row = Continuation([1, 2, 3], 12, on_text=on_text)
    engine.run([row], options)
    assert [[row.prompt_ids + row.token_ids]] == expected
    assert inner == [expected[0], expected[0]]
    assert engine._step_caches._calls.caches == list(engine._step_caches._caches.values())
    assert texts_and_reads(engine, ["1 2 3"], options)[0] == expected


def test_batches_in_inference_mode_and_out_of_it_alternate(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, engine = engines("mmap", tokenizer, tmp_path / "table", "cpu")
    batch = ["1 2 3"], GenerationOptions(max_new_tokens=12)
    expected = texts_and_reads(usual, *batch)
    on_a_gpu(engine, monkeypatch)
    for mode in (True, False, True, False):
        with torch.inference_mode(mode):
            assert texts_and_reads(engine, *batch) == expected


def test_every_number_of_rows_is_captured_once(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = engines("plain", tokenizer, tmp_path, "cpu")
    captured = on_a_gpu(engine, monkeypatch)
    for new_tokens in (8, 24, 8, 24):
        for rows in range(1, 17):
            engine.run([Continuation([1, 2], new_tokens) for _ in range(rows)], GenerationOptions())
    assert len(captured) == 32


@pytest.fixture(params=KINDS)
def pair(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> tuple[SconeInferenceEngine, SconeInferenceEngine]:
    """Engines as `engines`, on a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return engines(request.param, tokenizer, tmp_path / "table", "cuda")


@pytest.mark.gpu
def test_on_a_gpu_texts_and_reads_are_the_same_too(pair: tuple[SconeInferenceEngine, SconeInferenceEngine]) -> None:
    usual, engine = pair
    expected = [texts_and_reads(usual, *batch) for batch in BATCHES]
    for _ in range(2):
        assert [texts_and_reads(engine, *batch) for batch in BATCHES] == expected
    assert list(engine._step_caches._caches) == [(3, SHORTEST), (4, SHORTEST), (1, SHORTEST)]
    assert engine._step_caches._calls.num_graphs == 3


@pytest.mark.gpu
def test_while_others_stream_steps_are_captured(pair: tuple[SconeInferenceEngine, SconeInferenceEngine]) -> None:
    """Both engines at once, one of them capturing again and again, the other drawing random numbers."""
    options = GenerationOptions(max_new_tokens=12, do_sample=True)
    expected = {one: "".join(one.stream("1 2 3", options)) for one in pair}
    found: dict[SconeInferenceEngine, list[str]] = {one: [] for one in pair}

    def work(one: SconeInferenceEngine) -> None:
        for _ in range(4):
            one.forget_graphs()
            found[one].append("".join(one.stream("1 2 3", options)))

    threads = [threading.Thread(target=work, args=[one]) for one in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {one: [text] * 4 for one, text in expected.items()}
    assert not torch.cuda.is_current_stream_capturing()


@pytest.mark.gpu
def test_a_row_that_is_called_off_leaves_the_next_batch_alone(
    pair: tuple[SconeInferenceEngine, SconeInferenceEngine],
) -> None:
    usual, engine = pair
    options = GenerationOptions(max_new_tokens=12)
    expected = usual.generate("1 2 3", options)[0][0].token_ids
    row = Continuation([1, 5, 1], 12)
    row.on_text = lambda _: row.cancel()
    engine.run([row], options)
    assert len(row.token_ids) < 12
    assert engine.generate("1 2 3", options)[0][0].token_ids == expected
    with counted_reads(engine.model) as reads:
        engine.generate("1 2 3", options)
    assert reads is None or reads.num_positions == 3 + 11
