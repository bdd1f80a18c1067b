"""Laws of the language model: it starts as its trunk, sees no future, and is the same from a table and from a cache."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from scone.models.language_model import SconeForCausalLM
from scone.models.token_history import CACHE
from scone.tests import tiny
from scone.tests.processes import forked
from scone.tests.tiny import tokens
from scone.utils.errors import SconeError


def test_replacing_starts_at_the_scale_of_token_embeddings():
    model = tiny.scone(combination="replace", learned_rows=0, trained=False)
    with torch.no_grad():
        vectors = model.input_vectors(tokens(2, 40))
        plain = model.get_input_embeddings()(tokens(2, 40))
    matched = torch.from_numpy(model.match(tokens(2, 40)) >= tiny.VOCAB_SIZE)
    assert torch.equal(vectors[~matched], plain[~matched])
    assert not torch.isclose(vectors[matched], plain[matched]).all(-1).any()
    assert 0.5 < vectors[matched].std() / plain.std() < 2


@pytest.mark.parametrize("parts", [(True, 40), (True, 0), (False, 40), (False, 10**6)])
def test_exported_rows_equal_the_live_sum(parts):
    """A table's row is T(last token) + gain · h + the learned rows of the suffix chain, computed here by hand."""
    model = tiny.scone(f_gram_model=parts[0], learned_rows=parts[1])
    vocabulary, embedding = model.vocabulary, model.f_gram_embedding
    rows = tiny.live_rows(model)
    with torch.no_grad():
        for rank in range(0, vocabulary.num_f_grams, 7):
            path = vocabulary.tokens(tiny.VOCAB_SIZE + rank)
            expected = model.get_input_embeddings().weight[path[-1]].clone()
            if embedding.f_gram_model is not None:
                alone = model.trie_of(torch.tensor([[tiny.VOCAB_SIZE + rank]]).numpy())
                vectors = model.get_input_embeddings()(alone["tokens"])
                expected += embedding.gain * embedding.f_gram_model(vectors, alone)[0]
            for start in range(len(path) - 1):
                suffix = int(model.matcher.match(list(path[start:]))[-1]) - tiny.VOCAB_SIZE
                if suffix < model.config.learned_rows:
                    expected += embedding.rows.weight[suffix]
            torch.testing.assert_close(rows[rank], expected, atol=1e-5, rtol=1e-5)


def test_exporting_rows_leaves_each_part_in_its_mode():
    """As a trunk that is tuned without its dropout, in evaluation mode within a model that trains."""
    model = tiny.scone().train()
    model.trunk.eval()
    before = {name: part.training for name, part in model.named_modules()}
    tiny.live_rows(model)
    assert {name: part.training for name, part in model.named_modules()} == before


def test_a_cache_by_a_name_that_generate_does_not_know_is_never_read_as_none():
    """It would make one of its own beside it."""
    (other,) = {"cache", "past_key_values"} - {CACHE}
    found = MODEL.generate(tokens(1, 5), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    with pytest.raises((ValueError, FutureWarning), match=other):
        MODEL.generate(found.sequences, max_new_tokens=2, do_sample=False, **{other: found[CACHE]})
    with pytest.raises(ValueError, match=f"expected one of them; give {CACHE} alone"):
        MODEL(tokens(1, 2), cache=found[CACHE], past_key_values=found[CACHE])


@torch.no_grad()
def test_a_cache_of_another_model_or_that_went_on_without_its_history_is_refused():
    cache = getattr(MODEL.trunk(tokens(1, 5), use_cache=True), CACHE)
    with pytest.raises(ValueError, match="5 positions but the tokens of 0"):
        MODEL(tokens(1, 2), cache=cache)
    cache = StaticCache(config=MODEL.trunk.config, max_cache_len=16)
    MODEL(tokens(1, 5), cache=cache, use_cache=True)
    MODEL.trunk(tokens(1, 3), **{CACHE: cache}, use_cache=True)
    with pytest.raises(ValueError, match="8 positions but the tokens of 5"):
        MODEL(tokens(1, 2), cache=cache)


def test_a_served_model_saved_again_asks_for_its_table(tmp_path):
    model = tiny.scone()
    model.save_pretrained(tmp_path / "live")
    table = tiny.RowsInMemory(model)
    SconeForCausalLM.from_pretrained(tmp_path / "live", table=table).save_pretrained(tmp_path / "served")
    again = SconeForCausalLM.from_pretrained(tmp_path / "served")
    with pytest.raises(SconeError, match="expected its embedding table"):
        again(tokens(1, 4))
    again.attach_table(table)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(tokens(1, 9)).logits, model(tokens(1, 9)).logits)


def test_what_does_not_fit_is_refused_in_one_line(tmp_path):
    model = tiny.scone()
    with pytest.raises(SconeError, match="does not fit the model"):
        model.set_vocabulary(tiny.vocabulary(min_freq=9))
    table = tiny.RowsInMemory(model)
    table.num_rows -= 1
    with pytest.raises(SconeError, match=r"found \d+ rows"):
        model.attach_table(table)
    model.save_pretrained(tmp_path)
    (tmp_path / "f_grams.safetensors").unlink()
    with pytest.raises(SconeError, match=r"found no f_grams\.safetensors"):
        SconeForCausalLM.from_pretrained(tmp_path)


MODEL = tiny.scone()


def runs_in_another_process(model: SconeForCausalLM, ids: torch.Tensor, expected: torch.Tensor) -> int:
    """Beside one of that process's own, which looks up by the number that the other did where it comes from."""
    own = tiny.scone(seed=3)
    own.attach_table(tiny.RowsInMemory(own))
    assert own.table_embedding is not None
    assert model.table_embedding is not None
    while own.table_embedding.handle < model.table_embedding.handle:
        own.attach_table(tiny.RowsInMemory(own))
    with torch.no_grad():
        assert not torch.equal(own(ids).logits, expected)
        return int(not torch.equal(model(ids).logits, expected))


def test_a_served_model_reads_its_own_table_in_any_process():
    """It is handed over as it is, by pickling."""
    model, ids = tiny.scone(), tokens(2, 30)
    model.attach_table(tiny.RowsInMemory(model))
    with torch.no_grad():
        process = forked(runs_in_another_process, model, ids, model(ids).logits)
    process.join()
    assert process.exitcode == 0
