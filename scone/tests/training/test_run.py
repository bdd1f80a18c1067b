"""Training runs: real corpora in files, real checkpoints, real processes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from scone.configs.schema import ModelOptions
from scone.data.dataset import Collator
from scone.inference.embedding_table import EmbeddingTable
from scone.inference.loading import load_model
from scone.inference.precompute import precompute_table
from scone.scripts.train import main, read_arguments
from scone.tests import tiny
from scone.tests.processes import forked
from scone.tests.training.runs import RARELY, STILL, assert_same_weights, command_line, log_of, logged, options, weights
from scone.training.optimizer import rows_learning_rate
from scone.training.options import number_of_rows, tokens_of_a_pass
from scone.training.run import build_model, build_trainer, prepare_run_corpus, train
from scone.training.run_folder import complete_checkpoints
from scone.training.trainer import SconeTrainer
from scone.utils.command_line import run_main


@pytest.fixture(scope="module")
def still(corpus, tmp_path_factory):
    """The final model of the plainest run without dropout."""
    return train(options(corpus, tmp_path_factory.mktemp("still") / "run", **STILL), quiet=True)


def test_a_run_leaves_a_complete_model_and_learns(corpus, tmp_path):
    final_model = train(options(corpus, tmp_path / "run", **RARELY, **{"training.max_steps": 30}), quiet=True)
    names = {path.name for path in final_model.iterdir()}
    assert {"config.json", "model.safetensors", "f_grams.safetensors", "options.yaml", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))], "code that loading would run"
    log, losses = log_of(tmp_path / "run"), logged(tmp_path / "run", "loss")
    assert losses[-1] < losses[0] - 0.5
    assert log["final"]["eval_perplexity"] > 1
    assert 0 < log["log"][0]["match_rate"] <= 1
    assert 0 < log["log"][0]["nodes_per_position"] <= 3


def test_the_plain_baseline_is_an_ordinary_model_on_the_same_batches(corpus, tmp_path):
    """At step 0 SCONE is its trunk, so the first loss of both runs is the same number."""
    losses, once = [], STILL | {"training.logging_steps": 1, "training.max_steps": 1}
    for with_f_grams in (False, True):
        folder = tmp_path / str(with_f_grams)
        train(options(corpus, folder, **once, **{"model.use_f_gram_embeddings": with_f_grams}), quiet=True)
        losses.append(logged(folder, "loss")[0])
    assert losses[0] == losses[1]
    assert json.loads((tmp_path / "False/final_model/config.json").read_text())["model_type"] == "gpt2"


def test_a_plain_run_warns_of_nothing_that_does_not_apply(corpus, tmp_path, caplog, monkeypatch):
    """Neither of padding that is not there, nor of a loss that GPT-2's name does not tell, nor of memory."""
    library = logging.getLogger("transformers")
    monkeypatch.setattr(library, "handlers", [*library.handlers, caplog.handler])
    logging.Logger.warning_once.cache_clear()  # transformers' own; other tests may have used the one time up
    plain = {"model.use_f_gram_embeddings": False, "training.max_steps": 70}
    train(options(corpus, tmp_path, **plain, **RARELY), quiet=True)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("transformers")] == []


def test_evaluation_reads_no_more_than_the_tokens_it_is_given(corpus, tmp_path):
    def evaluation(name, limit):
        run = options(corpus, tmp_path / name, **{"training.max_eval_tokens": limit, "training.max_steps": 1})
        trainer = build_trainer(run, build_model(run, files, quiet=True), files, quiet=True)
        return trainer.evaluate()["eval_loss"], trainer.eval_dataset.num_tokens

    files = prepare_run_corpus(options(corpus, tmp_path / "run"), quiet=True)
    assert files.validation is not None
    whole = files.validation.num_tokens
    losses = {limit: evaluation(str(limit), limit) for limit in (None, 10 * whole, 100, 20)}
    assert losses[None] == losses[10 * whole]
    assert losses[None][1] > losses[100][1] == 96
    assert losses[20][1] == 20
    assert len({loss for loss, _ in losses.values()}) == 3
    final_model = train(options(corpus, tmp_path / "run", **{"training.max_eval_tokens": 100}), quiet=True)
    assert "validation perplexity (first 100 tokens)" in (final_model / "README.md").read_text()


def test_rates_of_rows_follow_from_the_tokens_of_one_pass(corpus, tmp_path):
    """The measured points of docs/experiments, and what a run takes for its own budget, steps or epochs."""
    assert [round(rows_learning_rate(tokens * 10**6), 4) for tokens in (4, 20, 82)] == [0.0091, 0.004, 0.002]
    assert (rows_learning_rate(0), rows_learning_rate(10**12)) == (1e-2, 5e-4)
    for changes, tokens in [
        ({"training.max_steps": 3, "training.gradient_accumulation_steps": 2}, lambda corpus_tokens: 3 * 2 * 4 * 32),
        ({"training.max_steps": 10**6}, lambda corpus_tokens: corpus_tokens),
        ({"training.max_steps": -1, "training.num_epochs": 50}, lambda corpus_tokens: corpus_tokens),
        ({"training.max_steps": -1, "training.num_epochs": 0.5}, lambda corpus_tokens: corpus_tokens // 2),
    ]:
        run = options(corpus, tmp_path, **changes)
        files = prepare_run_corpus(run, quiet=True)
        assert tokens_of_a_pass(run, files.train.num_tokens, 1) == tokens(files.train.num_tokens)
        given = options(corpus, tmp_path, **changes, **{"training.rows_learning_rate": 0.03})
        for each, rate in ((run, rows_learning_rate(tokens(files.train.num_tokens))), (given, 0.03)):
            trainer = build_trainer(each, build_model(each, files, quiet=True), files, quiet=True)
            assert trainer.create_optimizer().param_groups[-1]["lr"] == rate


def test_weight_decay_acts_on_matrices_alone_and_not_on_rows(corpus, tmp_path):
    run = options(corpus, tmp_path, **{"training.weight_decay": 0.1})
    files = prepare_run_corpus(run, quiet=True)
    trainer = build_trainer(run, build_model(run, files, quiet=True), files, quiet=True)
    *groups, rows = trainer.create_optimizer().param_groups
    assert rows["weight_decay"] == 0
    decays = {(parameter.ndim >= 2, group["weight_decay"]) for group in groups for parameter in group["params"]}
    assert decays == {(True, 0.1), (False, 0.0)}


MODERN = {"model.base_model_name": "scone-modern", "model.input_norm": True, "training.optimizer": "muon"}


RESUMED = {
    "plain": {},
    "accumulated": {"training.gradient_accumulation_steps": 2, "training.batch_size": 2},
    "modern": MODERN,
    "rows on the host": {"model.rows_device": "host"},
    "rows in bf16": {"model.rows_dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_training_equals_uninterrupted(corpus, whole, tmp_path, name):
    """Dropout, order, optimizer, learned rows, how they are rounded, and schedule all go on where they were."""
    changes = RESUMED[name]
    if name == "plain":
        shutil.copytree(whole.parent, tmp_path / "run")
    else:
        train(options(corpus, tmp_path / "run", **changes), quiet=True)
    uninterrupted = (tmp_path / "run" / "final_model").rename(tmp_path / "uninterrupted")
    last = complete_checkpoints(tmp_path / "run")[-1]
    assert last.name == "checkpoint-6"
    (last / "complete.json").unlink()  # as if killed while the last checkpoint was written
    resume = {"training.resume_from_checkpoint": "true"}
    resumed = train(options(corpus, tmp_path / "run", **changes, **resume), quiet=True)
    assert_same_weights(uninterrupted, resumed, atol=0.0, rtol=0.0)
    if name == "rows on the host":
        assert_same_weights(whole, resumed, atol=0.0, rtol=0.0)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluations_change_nothing_in_a_run(corpus, tmp_path, workers):
    """Not its dropout either, which comes of a generator that data loaders draw from, and not after a resume."""

    class Draws(TrainerCallback):
        def on_evaluate(self, *_, **__):
            torch.rand(3)

    never, always = ({"training.eval_steps": steps, "data.num_workers": workers} for steps in (1000, 1))
    unseen = train(options(corpus, tmp_path / "unseen", **never), quiet=True)
    seen = train(options(corpus, tmp_path / "seen", **always), quiet=True, callbacks=[Draws()])
    assert len(logged(tmp_path / "seen", "eval_loss")) == 6
    assert_same_weights(unseen, seen, atol=0.0, rtol=0.0)
    shutil.rmtree(seen)
    shutil.rmtree(tmp_path / "seen" / "checkpoint-6")
    resume = {"training.resume_from_checkpoint": "true"}
    assert_same_weights(
        unseen, train(options(corpus, tmp_path / "seen", **never, **resume), quiet=True), atol=0.0, rtol=0.0
    )


def test_tokens_a_second_are_those_of_training(corpus, tmp_path):
    class Slow(TrainerCallback):
        def on_evaluate(self, args, state, control, **_):
            time.sleep(3 if state.global_step == 3 else 0)

    run = options(corpus, tmp_path / "run", **{"training.eval_steps": 1, "training.max_steps": 4})
    train(run, quiet=True, callbacks=[Slow()])
    last = logged(tmp_path / "run", "tokens_per_second")[-1]
    assert last > 2 * 4 * 32 / 3, "the evaluation between its two steps counted"


@pytest.mark.parametrize("with_f_grams", [True, False])
def test_a_mixture_of_experts_resumes_and_is_counted(corpus, tmp_path, with_f_grams):
    """transformers writes other names for its weights than the model has, and computes experts in several ways."""
    sizes = {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    AutoConfig.for_model("mixtral", **(tiny.SIZES | sizes)).save_pretrained(tmp_path / "trunk")
    changes = {"model.base_model_name": str(tmp_path / "trunk"), "model.use_f_gram_embeddings": with_f_grams}
    uninterrupted = train(options(corpus, tmp_path / "run", **changes), quiet=True).rename(tmp_path / "uninterrupted")
    cost = log_of(tmp_path / "run")["cost"]
    assert cost["training_flops_per_token"] >= 3 * cost["inference_flops_per_token"] > 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    resume = {"training.resume_from_checkpoint": "true"}
    resumed = train(options(corpus, tmp_path / "run", **changes, **resume), quiet=True)
    assert_same_weights(uninterrupted, resumed, atol=0.0, rtol=0.0)
    assert any("experts.0.w1" in name for name in weights(resumed)), "a finished model has the names that others read"


def test_a_run_resumed_at_its_end_is_that_run(corpus, tmp_path, caplog):
    """As if killed between its last checkpoint and the final model: not a step more, and what all of it computed."""
    changes = {"training.lr_scheduler_type": "constant"}
    found = []
    for resumed in (False, True):
        resume = {"training.resume_from_checkpoint": "true"} if resumed else {}
        final_model = train(options(corpus, tmp_path / "run", **changes, **resume), quiet=True)
        found.append((weights(final_model), log_of(tmp_path / "run")))
        shutil.rmtree(final_model)
    (trained, whole), (loaded, again) = found
    torch.testing.assert_close(loaded, trained, atol=0, rtol=0)
    assert whole["steps"] == again["steps"] == 6
    assert whole["cost"] == again["cost"]
    assert "missing keys" not in caplog.text
    assert whole["final"] == again["final"]


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"training.batch_size": 2, "training.gradient_accumulation_steps": 2}, {"atol": 2e-4, "rtol": 2e-3}),
        ({"training.gradient_checkpointing": True}, {"atol": 1e-5, "rtol": 1e-4}),
    ],
)
def test_batches_in_parts_or_recomputed_train_the_same(corpus, still, tmp_path, changes, tolerance):
    same = train(options(corpus, tmp_path / "run", **STILL, **RARELY, **changes), quiet=True)
    assert_same_weights(still, same, **tolerance)


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_resumes(corpus, tmp_path):
    flags = command_line(
        corpus, tmp_path / "run", "--batch_size", "4", "--max_steps", "100000", "--save_steps", "50000"
    )
    said = tmp_path / "said"
    process = forked(run_main, main, [*flags, "--logging_steps", "1"], said=said)
    while process.is_alive() and not (said.exists() and "'loss'" in said.read_text()):
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join()
    output = said.read_text()
    assert process.exitcode == 130, output
    assert "interrupted" in output
    assert "Traceback" not in output
    (checkpoint,) = complete_checkpoints(tmp_path / "run")
    step = int(checkpoint.name.split("-")[1])
    train(read_arguments([*flags, "--resume_from_checkpoint", "--max_steps", str(step + 2)])[0], quiet=True)
    assert (tmp_path / "run" / "final_model" / "model.safetensors").exists()


def test_fp16_on_a_cpu_warns_and_trains(corpus, tmp_path, caplog):
    train(options(corpus, tmp_path / "run", **{"training.fp16": True, "training.max_steps": 1}), quiet=True)
    assert "fp16 is not available" in caplog.text


@pytest.mark.parametrize("with_f_grams", [True, False])
def test_mixed_precision_leaves_logits_as_they_are(tmp_path, with_f_grams):
    """What accelerate would make of them for nobody changes neither losses nor weights."""

    def run(folder, own):
        model = tiny.scone() if with_f_grams else tiny.trunk()
        trainer = SconeTrainer(
            model=model,
            args=tiny.training_arguments(folder, bf16=True, max_steps=3, logging_steps=1, remove_unused_columns=False),
            train_dataset=[{"input_ids": tokens} for tokens in tiny.corpus(320).reshape(20, 16)],
            data_collator=Collator(model.vocabulary if with_f_grams else None, 40),
            f_gram_learning_rate=None,
            rows_learning_rate=0.01,
        )
        if not own:
            del trainer.accelerator.prepare_model  # accelerate's is behind it
        types = set()
        model.register_forward_hook(lambda module, inputs, output: types.add((output.loss.dtype, output.logits.dtype)))
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        return types, losses, model.state_dict()

    ours, theirs = run(tmp_path / "ours", True), run(tmp_path / "theirs", False)
    assert (ours[0], theirs[0]) == ({(torch.float32, torch.bfloat16)}, {(torch.float32, torch.float32)})
    assert ours[1] == theirs[1]
    for name, tensor in ours[2].items():
        assert torch.equal(tensor, theirs[2][name]), name


def test_a_frozen_trunk_keeps_its_weights(corpus, tmp_path):
    run = options(corpus, tmp_path / "run", **RARELY, **{"training.freeze_trunk": True})
    final = weights(train(run, quiet=True))
    torch.manual_seed(0)
    start = build_model(run, prepare_run_corpus(run, quiet=True), quiet=True).state_dict()
    for name, tensor in final.items():
        moved = not torch.equal(tensor, start[name])
        assert moved == (not name.startswith("trunk.")) or name.endswith((".bias", "map_in.weight")), name
    cost = log_of(tmp_path / "run")["cost"]
    whole = 3 * (cost["inference_flops_per_token"] + cost["f_gram_flops_per_token"])
    assert whole - cost["inference_flops_per_token"] < cost["training_flops_per_token"] < 0.95 * whole


def test_rows_in_bf16_load_as_they_are(corpus, whole, tmp_path):
    """Nothing but the rows is rounded; a table made of them has the live rows."""
    final = train(options(corpus, tmp_path / "run", **RESUMED["rows in bf16"]), quiet=True)
    saved = weights(final)
    rows = saved.pop("f_gram_embedding.rows.weight")
    assert rows.dtype == torch.bfloat16
    assert rows.any()
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    exact = weights(whole)["f_gram_embedding.rows.weight"]
    assert 0 < (rows.float() - exact).abs().mean() < 0.01 * exact.abs().mean()
    model = load_model(final, device="cpu").model
    assert {parameter.dtype for parameter in model.trunk.parameters()} == {torch.float32}
    assert torch.equal(model.f_gram_embedding.rows.weight, rows)
    precompute_table(model, tmp_path / "table", quiet=True)
    ranks = torch.arange(model.vocabulary.num_f_grams)
    with EmbeddingTable.open(tmp_path / "table") as table:
        torch.testing.assert_close(table.rows(ranks), tiny.live_rows(model), rtol=1e-5, atol=1e-6)


class Waiting(TrainerCallback):
    """Has PyTorch warn wherever a step between the third and the last waits for the GPU."""

    def on_step_end(self, args, state, control, **_):
        torch.cuda.set_sync_debug_mode("warn" if 2 < state.global_step < state.max_steps - 1 else "default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["plain", "rows", "rows on the host", "f-gram model"])
def test_no_step_waits_for_the_gpu(corpus, tmp_path, kind):
    """Else the host begins each step late, and what the host does is time that the GPU has nothing to do."""
    run = options(
        *(corpus, tmp_path / "run"),
        **{
            "training.device": "cuda",
            "training.bf16": True,
            "training.max_steps": 9,
            "training.logging_steps": 100,
            "training.save_steps": 100,
            "training.eval_steps": 100,
            "model.use_f_gram_embeddings": kind != "plain",
            "model.f_gram.num_hidden_layers": 0 if "rows" in kind else 1,
            "model.rows_device": "host" if "host" in kind else "accelerator",
        },
    )
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try:
            train(run, quiet=True, callbacks=[Waiting()])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = {f"{each.filename}:{each.lineno}" for each in found if "called a synchronizing" in str(each.message)}
    assert not waits  # PyTorch's first warning, that the mode is a prototype, is none


VARIANTS = {
    "over-encoding": {"model.over_encoding_rows": 500},
    "gate, few rows": {"model.combination": "gate", "model.learned_rows": 20},
    "plain, scaled": {"model.use_f_gram_embeddings": False, "model.embedding_scale": 2.0},
    "one row, scaled": {"model.learned_rows": 1, "model.embedding_scale": 2.0},
    "the paper's": {"model.combination": "replace", "model.learned_rows": 0},
    "own tokens": {"model.f_gram.token_embeddings": "separate"},
}


@pytest.mark.parametrize(
    "kind", [{}, {"model.use_f_gram_embeddings": False}, {"model.over_encoding_rows": 500}], ids=str
)
def test_the_modern_trunk_starts_flat_learns_and_loads(corpus, tmp_path, kind):
    """Its layers add nothing at the start, so the first loss is that of its normalised token embeddings."""
    run = options(corpus, tmp_path, **MODERN, **RARELY, **kind, **{"training.logging_steps": 1})
    model = build_model(run, prepare_run_corpus(run, quiet=True), quiet=True).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        vectors = model.input_norm(model.get_input_embeddings()(ids))
        expected = model.trunk.lm_head(model.trunk.model.norm(vectors))
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    final_model = train(run, quiet=True)
    losses = logged(tmp_path, "loss")
    assert losses[-1] < losses[0]
    loaded = AutoModelForCausalLM.from_pretrained(final_model)
    assert loaded.input_norm.weight.ne(1).any()
    assert loaded.trunk.model.layers[0].mlp.down_proj.weight.any()


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_input_embedding_trains_and_loads(corpus, tmp_path, variant):
    final_model = train(options(corpus, tmp_path, **RARELY, **VARIANTS[variant]), quiet=True)
    cost = log_of(tmp_path)["cost"]
    assert cost["training_flops_per_token"] >= 3 * cost["inference_flops_per_token"] > 0
    assert ("match_rate" in cost) == (not variant.startswith(("over", "plain")))
    model = AutoModelForCausalLM.from_pretrained(final_model)
    rows = [weight for name, weight in model.named_parameters() if name.endswith("rows.weight")]
    assert all(weight.any() for weight in rows), "rows were trained"
    assert getattr(model.config, "embedding_scale", 1.0) == VARIANTS[variant].get("model.embedding_scale", 1.0)


def test_every_f_gram_gets_a_row_unless_told_otherwise(corpus, tmp_path, caplog):
    """Also beyond a million; f-grams that nothing gives a vector are said to be so."""
    for has_model, given, expected in ((False, None, 3_000_000), (True, None, 1_000_000), (True, 2, 2)):
        asked = ModelOptions(learned_rows=given)
        assert number_of_rows(asked, 3_000_000, has_model) == expected
    assert number_of_rows(ModelOptions(), 30, True) == 30
    assert not caplog.records
    rows_alone = {"model.learned_rows": 2, "model.f_gram.num_hidden_layers": 0}
    run = options(corpus, tmp_path / "run", **rows_alone)
    model = build_model(run, prepare_run_corpus(run, quiet=True), quiet=True)
    assert model.config.learned_rows == 2 < model.config.num_f_grams
    assert "leave --learned_rows out, or give --max_f_grams 2" in caplog.text
