"""What other libraries do with a model: take its body, add tokens to it, ask for tuples."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from scone.configs.schema import ModelOptions
from scone.inference.embedding_table import EmbeddingTable
from scone.inference.loading import load_model
from scone.inference.precompute import precompute_table
from scone.models.language_model import SconeForCausalLM
from scone.models.scaled_trunk import ScaledTrunkForCausalLM
from scone.models.token_history import CACHE
from scone.models.trunk import build_trunk
from scone.tests import tiny
from scone.tests.kernels import reference
from scone.tests.models.kinds import KINDS, model_of
from scone.tests.tiny import tokens
from scone.utils.errors import SconeError

# ------------------------------------------------------------------ the body


@pytest.mark.parametrize("trunk", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_head_of_the_body_equals_the_logits(name, kind, trunk, caplog):
    """What losses that never make whole logits compute: padded, and step by step with a cache, by either name of it."""
    model = model_of(kind, trunk)
    ids, mask = tokens(2, 16), torch.ones(2, 16, dtype=torch.int64)
    mask[1, :3] = 0
    head = model.get_output_embeddings()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        assert not torch.allclose(expected, model.trunk(input_ids=ids, attention_mask=mask).logits, atol=1e-3)
        for body in (model.base_model, getattr(model, model.base_model_prefix), model.get_decoder()):
            output = body(input_ids=ids, attention_mask=mask, use_cache=False)
            torch.testing.assert_close(head(output.last_hidden_state), expected, atol=1e-6, rtol=1e-6)
        cache, pieces, whole, wholes = None, [], None, []
        for start, stop in ((0, 5), (5, 6), (6, 16)):
            piece = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop], "use_cache": True}
            output = model.base_model(**piece, **{name: cache})
            cache = output[CACHE]
            pieces.append(head(output.last_hidden_state))
            output = model(**piece, **{name: whole})
            whole = output[CACHE]
            wholes.append(output.logits)
        positions = {"position_ids": torch.arange(16)[None]}
        unpadded = model(input_ids=ids, attention_mask=mask, **positions).logits
        for found in (pieces, wholes):
            torch.testing.assert_close(torch.cat(found, 1)[mask.bool()], unpadded[mask.bool()], atol=1e-5, rtol=1e-5)
    assert not caplog.records, "transformers says there what names it no longer has"


def test_the_body_is_no_part_of_the_model_and_a_copy_has_its_own():
    model = tiny.scone("llama")
    names = set(model.state_dict())
    assert model.base_model is model.base_model
    assert set(model.state_dict()) == names
    assert {id(part) for part in model.base_model.parameters()} == {id(part) for part in model.parameters()}
    assert model.base_model.config is model.trunk.base_model.config
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.f_gram_embedding.rows.weight.zero_()
        ids = tokens(1, 20)
        ours, its = (each.base_model(ids).last_hidden_state for each in (model, other))
    assert not torch.allclose(ours, its, atol=1e-3)


@pytest.mark.parametrize("kind", ["live", "over-encoding", "scaled"])
def test_a_model_of_ours_is_no_trunk(kind, tmp_path):
    """Around it, another layer would find the vectors of this one where it looks for token embeddings."""
    model_of(kind).save_pretrained(tmp_path)
    with pytest.raises(SconeError, match="input embeddings of ours already; expected a plain causal language model"):
        build_trunk(ModelOptions(base_model_name=str(tmp_path), init="pretrained"), None)
    model_of(kind).trunk.save_pretrained(tmp_path / "trunk")
    assert build_trunk(ModelOptions(base_model_name=str(tmp_path / "trunk"), init="pretrained"), None) is not None


# ------------------------------------------------------------------ tuples


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("configured", [False, True])
def test_a_tuple_holds_what_the_dictionary_does(kind, configured, tmp_path):
    model, ids = model_of(kind), tokens(2, 12)
    expected = model(input_ids=ids, labels=ids, output_hidden_states=True)
    bodys = model.base_model(input_ids=ids)
    assert expected[0] is expected.loss, "the loss comes first"
    if configured:
        model.config.return_dict = False
    asked = {} if configured else {"return_dict": False}
    found = model(input_ids=ids, labels=ids, output_hidden_states=True, **asked)
    assert isinstance(found, tuple)
    for ours, its in zip(found, expected.to_tuple(), strict=True):
        if isinstance(its, torch.Tensor):
            assert torch.equal(ours, its)
    assert torch.equal(model.base_model(input_ids=ids, **asked)[0], bodys.last_hidden_state)
    greedy = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert model.generate(ids, **greedy).shape == (2, 17)
    if configured and kind != "table":
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(again(input_ids=ids, labels=ids)[1], expected.logits)
        assert torch.equal(again(input_ids=ids, return_dict=True).logits, expected.logits)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_folder_that_asks_for_tuples_can_be_run(wrapped, tmp_path):
    model = tiny.scone() if wrapped else tiny.trunk()
    model.config.return_dict = False
    model.save_pretrained(tmp_path)
    model.config.return_dict = True
    with torch.no_grad():
        found = load_model(tmp_path, device="cpu").model(tokens(1, 9)).logits
        assert torch.equal(found, model(tokens(1, 9)).logits)


def test_a_trunk_that_gives_tuples_is_wrapped_in_a_model_that_does():
    trunk = tiny.trunk("gpt2", return_dict=False)
    model = ScaledTrunkForCausalLM.from_trunk(trunk, embedding_scale=2.0)
    assert isinstance(model(tokens(1, 9)), tuple)
    assert model(tokens(1, 9), return_dict=True).logits.shape == (1, 9, tiny.VOCAB_SIZE)


# ------------------------------------------------------------------ added tokens


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100), added=st.integers(1, 300))
def test_a_resized_vocabulary_is_the_one_counted_over_so_many_tokens(seed, added):
    old = tiny.vocabulary(tiny.corpus(600, seed))
    counts = {old.tokens(tiny.VOCAB_SIZE + rank): int(count) for rank, count in enumerate(old.counts)}
    size = tiny.VOCAB_SIZE + added
    expected = reference.vocabulary_of(counts, vocab_size=size, max_n=3, separator_ids=old.separator_ids)
    found = old.resized(size)
    found.verify()
    assert found.fingerprint == expected.fingerprint != old.fingerprint
    assert np.array_equal(found.suffixes, expected.suffixes)
    assert old.resized(tiny.VOCAB_SIZE) is old
    assert found.resized(tiny.VOCAB_SIZE).fingerprint == old.fingerprint


@pytest.mark.parametrize(("trunk", "mean_resizing"), [("gpt2", True), ("llama", False), ("qwen2", False)])
@pytest.mark.parametrize("kind", [*KINDS, "own tokens"])
def test_added_tokens_leave_everything_else_as_it_was(kind, trunk, mean_resizing, tmp_path):
    """Tied (gpt2, qwen2) and untied; old texts keep their logits, and a new token is no f-gram's node."""
    model, ids = model_of(kind, trunk), tokens(2, 20)
    with torch.no_grad():
        before = model(ids).logits
    added = torch.tensor([[5, 24, 7, 25, 8]])
    model.resize_token_embeddings(tiny.VOCAB_SIZE + 2, mean_resizing=mean_resizing)
    assert model.config.vocab_size == tiny.VOCAB_SIZE + 2 == len(model.get_output_embeddings().weight)
    if trunk != "llama":
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.no_grad():
        after = model(ids).logits
        torch.testing.assert_close(after[..., : tiny.VOCAB_SIZE], before, atol=1e-6, rtol=1e-6)
        vectors = model.input_vectors(added)[0]
        plain = model.get_input_embeddings()(added)[0] * model.config.embedding_scale
    if kind not in ("over-encoding", "scaled"):
        assert model.vocabulary.vocab_size == tiny.VOCAB_SIZE + 2
        assert model.match(added).tolist() == added.tolist(), "24 and 25 were f-grams' nodes; no f-gram crosses them"
        assert torch.equal(vectors, plain)
    labels = torch.tensor([[5, 24, 7, 25, 8]])
    model.train()(input_ids=added, labels=labels).loss.backward()
    assert model.get_input_embeddings().weight.grad[24:].abs().sum(1).gt(0).all()
    if kind == "table":
        return
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert torch.equal(again(added).logits, model(added).logits)


def test_a_table_is_precomputed_again_after_tokens_were_added(tmp_path):
    model, ids = tiny.scone("llama"), tokens(2, 30)
    precompute_table(model, tmp_path / "old.cache", quiet=True)
    old = EmbeddingTable.open(tmp_path / "old.cache", "ram")
    model.attach_table(old)
    model.resize_token_embeddings(tiny.VOCAB_SIZE + 5)
    assert model.table_embedding is None
    with pytest.raises(SconeError, match="made from other"):
        EmbeddingTable.open(tmp_path / "old.cache", "ram", expected_fingerprints=model.table_fingerprints())
    precompute_table(model, tmp_path / "new.cache", quiet=True)
    table = EmbeddingTable.open(tmp_path / "new.cache", "ram", expected_fingerprints=model.table_fingerprints())
    ranks = torch.arange(old.num_rows)
    torch.testing.assert_close(table.rows(ranks), old.rows(ranks), atol=1e-6, rtol=1e-6)
    model.save_pretrained(tmp_path / "model")
    served = SconeForCausalLM.from_pretrained(tmp_path / "model", table=table).eval()
    ids[:, ::7] = 27
    with torch.no_grad():
        torch.testing.assert_close(served(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(SconeError, match="resize that one, and precompute its table"):
        served.resize_token_embeddings(40)


def test_shrinking_takes_no_token_from_an_f_gram():
    model, ids = tiny.scone("llama"), tokens(2, 20)
    model.resize_token_embeddings(40)
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(tiny.VOCAB_SIZE)
        torch.testing.assert_close(model(ids).logits, before[..., : tiny.VOCAB_SIZE])
        largest = int(model.vocabulary.token_matrix(np.arange(model.vocabulary.num_f_grams)).max())
        with pytest.raises(SconeError, match=f"keep at least {largest + 1} tokens"):
            model.resize_token_embeddings(largest)
        torch.testing.assert_close(model(ids).logits, before[..., : tiny.VOCAB_SIZE])


def test_an_encoder_is_trained_and_measured_as_a_language_model(tmp_path):
    """BERT's own configuration has every position see those behind it: text would be foretold from itself."""
    config = AutoConfig.for_model("bert", **tiny.SIZES, vocab_size=tiny.VOCAB_SIZE)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    trunk = build_trunk(ModelOptions(base_model_name=str(tmp_path), init="pretrained"), None).eval()
    text = tokens(2, 8)
    changed = text.clone()
    changed[:, -1] = (text[:, -1] + 1) % tiny.VOCAB_SIZE
    for model in (trunk, load_model(tmp_path, device="cpu").model):
        before, after = (model(each).logits.detach() for each in (text, changed))
        assert torch.equal(before[:, :-1], after[:, :-1])
        assert not torch.equal(before[:, -1], after[:, -1])
