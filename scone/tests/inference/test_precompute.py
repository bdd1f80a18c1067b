"""A table holds the live model's rows, however precomputing was split, and wherever it was cut off.

Real processes are killed at random moments, with all long jobs, in hardening/.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from scone.inference import precompute
from scone.inference.embedding_table import EmbeddingTable
from scone.inference.precompute import precompute_table, verify_table
from scone.inference.table_format import ROW_TYPES, RowFormat, TableLayout
from scone.inference.table_writer import TablePlan, TableWriter
from scone.tests import tiny
from scone.utils.errors import SconeError

NUM_ROWS = tiny.vocabulary().num_f_grams
QUICK = {"batch_size": 1, "quiet": True}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Eight chunks for the small vocabulary's f-grams."""
    monkeypatch.setattr(precompute, "ROWS_PER_BATCH_UNIT", 33)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "embeddings.cache"


@pytest.mark.parametrize(("f_gram_model", "learned_rows"), [(True, 0), (False, 40), (True, 40)])
def test_table_row_equals_live_model(path, f_gram_model, learned_rows):
    """Every f-gram's row, for each kind of input embedding; and whose rows they are."""
    model = tiny.scone(f_gram_model=f_gram_model, learned_rows=learned_rows)
    assert precompute_table(model, path, **QUICK)
    with EmbeddingTable.open(path, expected_fingerprints=model.table_fingerprints()) as table:
        assert {name: table.fingerprints[name] for name in ("weights", "vocabulary")} == model.table_fingerprints()
        torch.testing.assert_close(table.rows(torch.arange(NUM_ROWS)), tiny.live_rows(model), rtol=1e-5, atol=1e-6)
    assert verify_table(path, model).sampled_rows == NUM_ROWS
    assert os.listdir(path.parent) == ["embeddings.cache"]


@pytest.mark.parametrize("placement", ["ram", "mmap", "direct", "ram:100,disk"])
@torch.no_grad()
def test_table_model_equals_live_model(path, placement):
    """Logits, with padding, from the table as from the live layer."""
    model = tiny.scone()
    precompute_table(model, path, quiet=True)
    tokens = torch.from_numpy(tiny.corpus(90).reshape(3, 30))
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    live = model(tokens, attention_mask=mask).logits
    with EmbeddingTable.open(path, placement) as table:
        model.attach_table(table)
        served = model(tokens, attention_mask=mask).logits
    assert (model.match(tokens) >= tiny.VOCAB_SIZE).mean() > 0.3
    torch.testing.assert_close(served, live, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_precompute_split_or_resumed_equals_precompute_in_one_go(tmp_path, row_type):
    """Any number of ranks, in any order of finishing, even where the number changes in between; any threads."""
    model, whole, split = tiny.scone(), tmp_path / "whole", tmp_path / "split"
    assert precompute_table(model, whole, row_type=row_type, **QUICK)
    assert not precompute_table(model, split, row_type=row_type, rank=2, world_size=3, **QUICK)
    assert not precompute_table(model, split, row_type=row_type, rank=0, world_size=2, **QUICK)
    assert not split.exists()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert precompute_table(model, split, row_type=row_type, rank=1, world_size=2, **QUICK)
    finally:
        torch.set_num_threads(threads)
    assert split.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("state", ["empty folder", "no plan", "torn line", "folder left behind"])
def test_cut_off_between_any_two_steps_it_goes_on(tmp_path, path, state):
    model, whole, folder = tiny.scone(), tmp_path / "whole", path.with_name(path.name + ".part")
    precompute_table(model, whole, **QUICK)
    ranks = {"rank": 0, "world_size": 1}
    if state == "torn line":
        ranks["world_size"] = 2  # so that nobody else does what this rank's list does not say
        journal = folder / "done-1.txt"
        assert not precompute_table(model, path, rank=1, world_size=2, **QUICK)
        journal.write_bytes(journal.read_bytes()[:-1])  # the last line without its end
        assert not precompute_table(model, path, rank=1, world_size=2, **QUICK)
    else:
        folder.mkdir()
        if state == "no plan":
            (folder / "table").write_bytes(b"x")
        elif state == "folder left behind":
            path.write_bytes(whole.read_bytes())
    assert precompute_table(model, path, **ranks, **QUICK)
    assert path.read_bytes() == whole.read_bytes()
    assert not folder.exists()


def test_an_unfinished_table_of_another_model_is_started_over(path, capsys):
    other = tiny.scone(seed=1)
    assert not precompute_table(tiny.scone(), path, batch_size=1, world_size=2)
    assert precompute_table(other, path, batch_size=1)
    assert "starting over" in (notices := capsys.readouterr().err)
    assert "fingerprints {" in notices
    verify_table(path, other)
    with pytest.raises(SconeError, match="made from other weights"):
        verify_table(path, tiny.scone())


def test_a_finished_table_is_kept_or_replaced_but_nothing_else_is(path, capsys):
    model = tiny.scone()
    precompute_table(model, path)
    before = path.stat().st_ino
    assert precompute_table(model, path)
    assert path.stat().st_ino == before
    assert "is complete already" in capsys.readouterr().err
    assert precompute_table(model, path, row_type="bf16")
    assert "is replaced once the new one is complete" in capsys.readouterr().err
    assert verify_table(path, model).layout.row_format.row_type == "bf16"
    path.write_text("my thesis")
    with pytest.raises(SconeError, match=r"found .*embeddings.cache in the way: .* delete it, or choose another"):
        precompute_table(model, path)
    assert path.read_text() == "my thesis"


def plan_of(model, tmp_path) -> TablePlan:
    """What a run with one chunk writes."""
    precompute_table(model, tmp_path / "plan", quiet=True)
    return TablePlan(verify_table(tmp_path / "plan").layout, 1, {})


def test_two_runs_with_other_settings_do_not_mix(tmp_path, path):
    model = tiny.scone()
    refusal = pytest.raises(SconeError, match=r"another process .* \(.*row_type fp32 instead of int8")
    with TableWriter(path, plan_of(model, tmp_path)), refusal:
        precompute_table(model, path, row_type="int8", **QUICK)
    assert precompute_table(model, path, **QUICK)


def test_a_disk_too_small_is_said_before_any_work(path):
    layout = TableLayout(1 << 45, RowFormat.of("fp32", 1024))
    with pytest.raises(SconeError, match=r"of free disk space .*; expected 131073.0 TiB; free some space"):
        TableWriter(path, TablePlan(layout, 1, {}))
    assert not os.listdir(path.parent)


def test_a_model_that_diverged_is_refused(path):
    model = tiny.scone()
    with torch.no_grad():
        model.f_gram_embedding.gain[3] = float("nan")
    with pytest.raises(SconeError, match="not finite"):
        precompute_table(model, path, quiet=True)


def test_half_precision_rows_are_near_and_say_so(path):
    model = tiny.scone()
    precompute_table(model, path, compute_dtype="bf16", quiet=True)
    assert verify_table(path, model).layout.compute_dtype == "bf16"
    with EmbeddingTable.open(path) as table:
        assert not torch.equal(table.rows(torch.arange(NUM_ROWS)), tiny.live_rows(model))


def test_a_row_that_is_not_the_models_is_found(tmp_path, path):
    """Checksums fit, fingerprints fit, and yet a row is wrong: only the live model can tell."""
    model = tiny.scone()
    rows = tiny.live_rows(model)
    rows[17] *= 1.01
    with TableWriter(path, plan_of(model, tmp_path)) as writer:
        writer.write(np.arange(NUM_ROWS), RowFormat.of("fp32", tiny.WIDTH).encode(rows))
        writer.mark_finished(0)
        writer.finish()
    with pytest.raises(SconeError, match=r"row 17 of .* differs from the model's"):
        verify_table(path, model)
