"""A table holds the live model's rows, however often precomputing was killed and however it was split."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from scone.inference import precompute
from scone.inference.embedding_table import EmbeddingTable
from scone.inference.precompute import precompute_table
from scone.inference.row_types import ROW_TYPES, RowFormat
from scone.inference.table_check import verify_table
from scone.inference.table_format import TableLayout
from scone.inference.table_writer import TablePlan, TableWriter
from scone.tests.inference.tables import VOCAB_SIZE, small_model
from scone.utils.errors import SconeError


def _live(model: object) -> torch.Tensor:
    return model.embed_nodes(torch.arange(model.vocabulary.num_f_grams) + VOCAB_SIZE)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven chunks for the small vocabulary's 354 f-grams."""
    monkeypatch.setattr(precompute, "ROWS_PER_BATCH_UNIT", 33)


@pytest.mark.parametrize(("f_gram_model", "learned_rows"), [(True, 0), (False, 40), (True, 40)])
def test_table_row_equals_live_model(tmp_path: Path, f_gram_model: bool, learned_rows: int) -> None:
    """Every f-gram's row, for each kind of input embedding."""
    model = small_model(f_gram_model, learned_rows)
    path = tmp_path / "embeddings.cache"
    assert precompute_table(model, path, batch_size=1, quiet=True)
    with EmbeddingTable.open(path, expected_fingerprints=model.table_fingerprints()) as table:
        torch.testing.assert_close(table.rows(torch.arange(table.num_rows)), _live(model), rtol=1e-5, atol=1e-6)
    assert verify_table(path, model).sampled_rows == 354
    assert os.listdir(tmp_path) == ["embeddings.cache"]


@pytest.mark.parametrize("placement", ["ram", "mmap", "direct", "ram:100,disk"])
def test_table_model_equals_live_model(tmp_path: Path, placement: str) -> None:
    """Logits, with padding, from the table as from the live layer."""
    model = small_model()
    path = tmp_path / "embeddings.cache"
    precompute_table(model, path, quiet=True)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB_SIZE, (3, 30), generator=random) // 3  # the frequent tokens, so that much matches
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    with torch.no_grad():
        live = model(tokens, attention_mask=mask).logits
        with EmbeddingTable.open(path, placement) as table:
            model.attach_table(table)
            served = model(tokens, attention_mask=mask).logits
    assert (model.match(tokens) >= VOCAB_SIZE).mean() > 0.3
    torch.testing.assert_close(served, live, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_precompute_split_or_resumed_equals_precompute_in_one_go(tmp_path: Path, row_type: str) -> None:
    """Any number of ranks, in any order of finishing, even where the number changes in between; any threads."""
    model = small_model()
    whole, split = tmp_path / "whole", tmp_path / "split"
    assert precompute_table(model, whole, row_type=row_type, batch_size=1, quiet=True)
    assert not precompute_table(model, split, row_type=row_type, batch_size=1, rank=2, world_size=3, quiet=True)
    assert not precompute_table(model, split, row_type=row_type, batch_size=1, rank=0, world_size=2, quiet=True)
    assert not split.exists()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert precompute_table(model, split, row_type=row_type, batch_size=1, rank=1, world_size=2, quiet=True)
    finally:
        torch.set_num_threads(threads)
    assert split.read_bytes() == whole.read_bytes()


def test_killed_between_any_two_steps_it_goes_on(tmp_path: Path) -> None:
    """States that a kill can leave (hardening/ kills real processes): no plan yet, a torn list."""
    model = small_model()
    whole = tmp_path / "whole"
    precompute_table(model, whole, batch_size=1, quiet=True)
    for number, state in enumerate(("empty folder", "no plan", "torn line", "folder left behind")):
        path = tmp_path / f"{number}"
        folder = tmp_path / f"{number}.part"
        if state in ("empty folder", "no plan"):
            folder.mkdir()
            if state == "no plan":
                (folder / "table").write_bytes(b"x")
        elif state == "torn line":
            assert not precompute_table(model, path, batch_size=1, rank=1, world_size=2, quiet=True)
            with (folder / "done-1.txt").open("a") as journal:
                journal.write("1")  # the beginning of "10\n"
        else:
            path.write_bytes(whole.read_bytes())
            folder.mkdir()
        assert precompute_table(model, path, batch_size=1, quiet=True), state
        assert path.read_bytes() == whole.read_bytes(), state
        assert not folder.exists(), state


def test_an_unfinished_table_of_another_model_is_started_over(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "embeddings.cache"
    assert not precompute_table(small_model(), path, batch_size=1, world_size=2)
    other = small_model(seed=1)
    assert precompute_table(other, path, batch_size=1)
    assert "starting over" in (notices := capsys.readouterr().err)
    assert "fingerprints.weights" in notices
    verify_table(path, other)
    with pytest.raises(SconeError, match="made from other weights"):
        verify_table(path, small_model())


def test_a_finished_table_is_kept_or_replaced_but_nothing_else_is(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, path = small_model(), tmp_path / "embeddings.cache"
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


def test_two_runs_with_other_settings_do_not_mix(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "embeddings.cache"
    plan = precompute._plan(model, "fp32", None, 33, "fp32")
    with (
        TableWriter(path, plan),
        pytest.raises(SconeError, match=r"another process .* \(row_type fp32 instead of int8"),
    ):
        precompute_table(model, path, row_type="int8", batch_size=1, quiet=True)
    assert precompute_table(model, path, batch_size=1, quiet=True)


def test_a_disk_too_small_is_said_before_any_work(tmp_path: Path) -> None:
    layout = TableLayout(1 << 45, RowFormat.of("fp32", 1024))
    with pytest.raises(SconeError, match=r"of free disk space .*; expected 131073.0 TiB; free some space"):
        TableWriter(tmp_path / "embeddings.cache", TablePlan(layout, 1, {}))
    assert not os.listdir(tmp_path)


def test_a_model_that_diverged_is_refused(tmp_path: Path) -> None:
    model = small_model()
    with torch.no_grad():
        model.f_gram_embedding.gain[3] = float("nan")
    with pytest.raises(SconeError, match="not finite"):
        precompute_table(model, tmp_path / "embeddings.cache", quiet=True)


def test_half_precision_rows_are_near_and_say_so(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "embeddings.cache"
    precompute_table(model, path, compute_dtype="bf16", quiet=True)
    assert verify_table(path, model).layout.compute_dtype == "bf16"
    with EmbeddingTable.open(path) as table:
        assert not torch.equal(table.rows(torch.arange(354)), _live(model))


def test_a_row_that_is_not_the_models_is_found(tmp_path: Path) -> None:
    """Checksums fit, fingerprints fit, and yet a row is wrong: only the live model can tell."""
    model, path = small_model(), tmp_path / "embeddings.cache"
    rows = _live(model)
    rows[17] *= 1.01
    row_format = RowFormat.of("fp32", 32)
    layout = precompute._plan(model, "fp32", None, 33, "fp32").layout
    with TableWriter(path, TablePlan(layout, 1, {})) as writer:
        writer.write(np.arange(354), row_format.encode(rows))
        writer.mark_finished(0)
        writer.finish()
    with pytest.raises(SconeError, match=r"row 17 of .* differs from the model's"):
        verify_table(path, model)


def test_fingerprints_are_those_of_the_model(tmp_path: Path) -> None:
    for number, model in enumerate(itertools.islice((small_model(seed=seed) for seed in itertools.count()), 2)):
        path = tmp_path / str(number)
        precompute_table(model, path, quiet=True)
        with EmbeddingTable.open(path) as table:
            assert {name: table.fingerprints[name] for name in ("weights", "vocabulary")} == model.table_fingerprints()
