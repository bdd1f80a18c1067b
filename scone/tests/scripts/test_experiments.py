"""The experiments of the repository: every run can be built, results repeat theirs, interruptions are survived."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from scone.data.sources import open_documents
from scone.data.token_file import TokenFileWriter
from scone.tests.evaluation import experiments
from scone.tests.training import runs
from scone.tokenization.tokenizers import load_tokenizer, tokenizer_fingerprint, train_tokenizer, vocabulary_size
from scone.training.run import build_model, build_trainer
from scone.training.run_folder import complete_checkpoints
from scone.utils.errors import SconeError

REPOSITORY = Path(__file__).parents[3]
RUNNER = REPOSITORY / "experiments" / "run.py"
PATHS = {path.stem: path for path in RUNNER.parent.glob("*.yaml")}
GONE = ("model.combination", "model.control", "model.rows_backoff", "model.f_gram.start", "model.f_gram.output_norm")


def of_today(name: str, folder: Path) -> Path:
    """What a result of before was run with, as far as today's options go."""
    experiment = json.loads((REPOSITORY / "docs" / "results" / f"{name}.json").read_text())["experiment"]
    for changes in (experiment["base"], *experiment["runs"].values()):
        for option in GONE:
            changes.pop(option, None)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"experiment": experiment}))
    return path


TODAY = tempfile.TemporaryDirectory()
PATHS["main_claim"] = of_today("main_claim", Path(TODAY.name))
EXPERIMENTS = {
    name: yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else json.loads(path.read_text())["experiment"]
    for name, path in PATHS.items()
    if path.exists()
}
SMALL = {
    "training.max_steps": 2,
    "training.batch_size": 2,
    "training.eval_steps": 1,
    "training.logging_steps": 1,
    "training.warmup_steps": 0,
    "training.device": "cpu",
    "training.bf16": False,
    "training.torch_compile": False,
    "data.max_length": 32,
    "data.num_workers": 0,
    "data.min_freq": 2,
    "model.hidden_size": 8,
    "model.intermediate_size": 16,
    "model.num_attention_heads": 2,
    "model.f_gram.num_attention_heads": 2,
    "model.f_gram.hidden_size": 8,
    "train_tokens": 0,
}
SMALL_TRUNK = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and the token files that the experiments name, of a few thousand tokens."""
    folder = tmp_path_factory.mktemp("data")
    corpus = runs.write_corpus(folder)
    texts = [json.loads(line)["text"] for line in corpus.read_text().split("\n")]
    train_tokenizer(iter(texts), 300, folder / "made")
    tokenizer = load_tokenizer(str(folder / "made"))
    written = folder / "texts"
    for name, part in {"train": texts, "test": texts[:2]}.items():
        writer = TokenFileWriter(written / name, vocabulary_size(tokenizer), tokenizer.eos_token_id)
        for text in part:
            writer.add_document(tokenizer(text, add_special_tokens=False).input_ids)
        writer.finish({"tokenizer_fingerprint": tokenizer_fingerprint(tokenizer)})
    for experiment in EXPERIMENTS.values():
        for name in {experiment["train"], experiment["validation"], *experiment["tests"]}:
            part = written / ("train" if name == experiment["train"] else "test")
            shutil.copytree(part, folder / "data" / name, dirs_exist_ok=True)
        shutil.copytree(folder / "made", experiment["tokenizer"].format(data=folder / "data"), dirs_exist_ok=True)
        if experiment["base"].get("model.init") == "pretrained":
            trunk = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary_size(tokenizer), **SMALL_TRUNK))
            trunk.save_pretrained(experiment["base"]["model.base_model_name"].format(data=folder / "data"))
    return folder / "data"


@pytest.fixture(scope="module")
def runner():
    sys.path.insert(0, str(RUNNER.parent))
    import run

    yield run
    sys.path.remove(str(RUNNER.parent))


def plan_of(runner, experiment: str, data: Path, output_dir: Path, **changes: object):
    flags = [str(PATHS[experiment]), "--data", str(data), "--output_dir", str(output_dir)]
    pairs = [f"{name}={value}" for name, value in (SMALL | changes).items()]
    return runner.Plan.read(runner.parse([*flags, "--set", *pairs]))


@pytest.mark.parametrize("experiment", list(EXPERIMENTS))
def test_every_run_can_be_built_and_computes_a_loss(runner, experiment, data, tmp_path):
    plan = plan_of(runner, experiment, data, tmp_path)
    corpus = plan.corpus()
    plan.prepare()
    # one of those that differ in numbers alone; 0 is not merely a number
    shapes = {name: repr(options).replace(options.training.output_dir, "") for name, options in plan.options.items()}
    distinct = {re.sub(r"[1-9][\d_]*(\.\d+)?(e[+-]?\d+)?", "n", shape): name for name, shape in shapes.items()}
    for name in distinct.values():
        options = plan.options[name]
        model = build_model(options, corpus, quiet=True)
        trainer = build_trainer(options, model, corpus, quiet=True)
        batch = next(iter(trainer.get_train_dataloader()))
        with torch.no_grad():
            assert model(**batch).loss.isfinite(), name


def test_runs_of_several_seeds_are_merged_into_one_line(runner, data, tmp_path):
    plan = plan_of(runner, "main_claim", data, tmp_path)
    plan.prepare()
    for name in ("plain-seed1", "plain-seed2", "both-10k"):
        plan.run(name, keep_model=False)
        assert not (tmp_path / name).exists()
    result = plan.merge()
    plain, both = result["runs"]["plain-seed1"], result["runs"]["both-10k"]
    assert plain["cost"]["inference_flops_per_token"] == both["cost"]["inference_flops_per_token"]
    assert plain["cost"]["training_flops"] < both["cost"]["training_flops"]
    assert 0 < both["cost"]["match_rate"] <= 1
    assert both["tokens"] == 2 * 2 * 32
    for test in result["experiment"]["tests"]:
        for measure in ("perplexity", "bits_per_byte", "num_words"):
            assert both["tests"][test][measure] > 0
    text = runner.table(result)
    bits = [test["bits_per_byte"] for seed in (1, 2) for test in result["runs"][f"plain-seed{seed}"]["tests"].values()]
    (line,) = [line for line in text.split("\n") if line.startswith("| plain | 2 |")]
    assert f"| {np.mean(bits):.4f} | 1.00× |" in line
    assert "| both-10k | 1 |" in text


@pytest.mark.parametrize("name", ["untouched", "frozen-both", "tuned-rows-1e-4"])
def test_only_a_trunk_that_is_fine_tuned_changes(runner, data, tmp_path, name):
    changes = {"training.weight_decay": 0.1, "model.learned_rows": 100}
    plan = plan_of(runner, "pretrained", data, tmp_path, **changes)
    assert plan.options[name].model.base_model_name == str(data / "trunk")
    plan.prepare()
    plan.run(name, keep_model=True)
    before = load_file(data / "trunk" / "model.safetensors")
    after = load_file(tmp_path / name / "final_model" / "model.safetensors")
    after = {key.removeprefix("trunk."): weight for key, weight in after.items()}
    assert before.keys() <= after.keys()
    same = {key for key, weight in before.items() if torch.equal(weight, after[key])}
    assert same == (set() if name == "tuned-rows-1e-4" else before.keys())


@pytest.mark.parametrize("name", ["lora-1e-3", "lora-rows-1e-3"])
def test_adapters_are_merged_into_what_is_saved(runner, data, tmp_path, name):
    """Matrices have changed by no more than the adapters' rank, the rest of the trunk not at all; rows train too."""
    pytest.importorskip("peft", reason="the extra tuning brings PEFT")
    changes = {"lora_rank": 2, "training.weight_decay": 0.1, "training.learning_rate": 0.1, "model.learned_rows": 100}
    plan = plan_of(runner, "pretrained", data, tmp_path, **changes)
    plan.prepare()
    plan.run(name, keep_model=True)
    before = load_file(data / "trunk" / "model.safetensors")
    after = load_file(tmp_path / name / "final_model" / "model.safetensors")
    after = {key.removeprefix("trunk."): weight for key, weight in after.items()}
    for key, weight in before.items():
        rank = torch.linalg.matrix_rank(after[key] - weight, atol=1e-5).item() if weight.ndim == 2 else None
        assert rank in (1, 2) if "_proj" in key else torch.equal(weight, after[key]), key
    rows = after.keys() - before.keys()
    assert [bool(after[key].any()) for key in rows] == [True] * ("rows" in name)
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["tests"].keys() == set(EXPERIMENTS["pretrained"]["tests"])


def test_results_of_another_experiment_are_not_taken_for_its_own(runner, data, tmp_path):
    (tmp_path / "rows-10k.json").write_text(json.dumps({"experiment": "ablations", "finished": True}))
    with pytest.raises(SconeError, match="a run of the experiment ablations; expected those of main_claim"):
        runner.main([*_flags(data, tmp_path), "--list"])


def test_after_the_deadline_nothing_runs_and_the_curves_so_far_are_kept(runner, data, tmp_path, capsys):
    partial = {"finished": False, "seed": 1, "steps": 1, "max_steps": 2, "log": [{"step": 1, "eval_loss": 5.0}]}
    (tmp_path / "rows-10k.json").write_text(json.dumps(partial))
    pairs = [f"{name}={value}" for name, value in SMALL.items()]
    assert runner.main([*_flags(data, tmp_path), "--only", "rows-10k", "--deadline_s", "0", "--set", *pairs]) == 0
    printed = capsys.readouterr()
    assert "0 of them finished before" in printed.out
    assert "cut off or not started: rows-10k" in printed.err
    assert "unfinished: rows-10k, 1 of 2 steps, validation loss 5.000 at step 1" in printed.out
    assert json.loads((tmp_path / "result.json").read_text())["runs"]["rows-10k"]["finished"] is False


def test_a_worker_that_fails_is_named_and_the_others_go_on(runner, tmp_path, capsys):
    """Workers are real processes; here their command line is one that fails at once."""
    failed, cut = runner.run_all(["first", "second"], tmp_path, 2, [sys.executable, "-c", "raise SystemExit(3)"])
    assert sorted(failed) == ["first", "second"]
    assert cut == []
    assert capsys.readouterr().out.count("failed after") == 2


def test_runs_are_spread_over_gpus(runner, tmp_path, monkeypatch):
    """Each worker sees one; of those that we were given, where we were given some."""
    program = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(1)"
    names = ["first", "second", "third", "fourth"]
    for visible, expected in ((None, ["0", "0", "1", "1"]), ("5,7", ["5", "5", "7", "7"])):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert runner.run_all(names, tmp_path, 4, [sys.executable, "-c", program], gpus=2) == ([], [])
        assert sorted((tmp_path / f"{name}.log").read_text().strip() for name in names) == expected


@pytest.mark.parametrize("gpus", ["0", "1000"])
def test_gpus_that_are_not_there_are_refused(runner, data, tmp_path, gpus):
    with pytest.raises(SconeError, match=f"GPUs; expected {gpus}, at least one"):
        runner.main([*_flags(data, tmp_path), "--gpus", gpus])


def test_a_worker_does_not_look_for_the_gpus_of_the_others(runner, data, tmp_path):
    """It sees the one that it was given (here none: it trains on the CPU)."""
    pairs = [f"{name}={value}" for name, value in SMALL.items()]
    flags = [*_flags(data, tmp_path), "--gpus", "1000", "--set", *pairs, "--worker", "plain-seed1"]
    assert runner.main(flags) == 0
    assert runner.is_finished(tmp_path / "plain-seed1.json")


def test_an_interrupted_run_goes_on_from_its_checkpoint(runner, data, tmp_path):
    changes = {"training.max_steps": 100_000, "training.eval_steps": 100_000}
    plan = plan_of(runner, "main_claim", data, tmp_path, **changes)
    path = tmp_path / "rows-10k.json"

    def interrupt() -> None:
        while not path.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        plan.run("rows-10k", keep_model=False)
    assert not runner.is_finished(path)
    steps = json.loads(path.read_text())["steps"]
    (checkpoint,) = complete_checkpoints(tmp_path / "rows-10k")
    changes = {"training.max_steps": int(checkpoint.name.split("-")[1]) + 2}
    plan_of(runner, "main_claim", data, tmp_path, **changes).run("rows-10k", keep_model=False)
    result = json.loads(path.read_text())
    assert runner.is_finished(path)
    assert result["steps"] == changes["training.max_steps"] > steps
    assert result["log"][0]["step"] == 1, "the curve from the start"


def test_a_run_that_does_not_exist_is_refused(runner, data, tmp_path):
    with pytest.raises(SconeError, match="found no run"):
        runner.main([*_flags(data, tmp_path), "--only", "nothing"])


def _flags(data: Path, output_dir: Path) -> list[str]:
    return [str(PATHS["main_claim"]), "--data", str(data), "--output_dir", str(output_dir)]


def test_a_run_of_fewer_tokens_trains_and_counts_on_whole_documents_of_the_beginning(runner, data, tmp_path):
    plan = plan_of(runner, "ladder", data, tmp_path, train_tokens=2000)
    plan.prepare(["7m-5-rows"])
    whole, part = plan.corpus().train, plan.corpus(2000).train
    ends = np.flatnonzero(whole.tokens == whole.separator_id) + 1
    assert part.num_tokens == ends[ends >= 2000][0] < whole.num_tokens
    assert np.array_equal(part.tokens, whole.tokens[: part.num_tokens])
    plan.run("7m-5-rows", keep_model=True)
    result = json.loads((tmp_path / "7m-5-rows.json").read_text())
    assert result["train_tokens"] == part.num_tokens
    vocabulary = AutoModelForCausalLM.from_pretrained(tmp_path / "7m-5-rows" / "final_model").vocabulary
    f_gram = vocabulary.tokens(vocabulary.vocab_size)
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(part.tokens), len(f_gram))
    assert int((windows == f_gram).all(1).sum()) == vocabulary.counts[0], "counted in the beginning alone"
    with pytest.raises(SconeError, match=r"tokens in .*; expected 1,000,000; prepare more text"):
        plan.corpus(1_000_000)


def test_at_every_evaluation_each_text_is_tested(runner, data, tmp_path):
    """A curve's last point is the finished model's loss on the same tokens."""
    plan = plan_of(runner, "ladder", data, tmp_path, train_tokens=0)
    plan.prepare(["7m-5-rows"])
    plan.run("7m-5-rows", keep_model=True)
    result = plan.merge()["runs"]["7m-5-rows"]
    curve = [entry for entry in result["log"] if "eval_loss" in entry]
    assert [entry["step"] for entry in curve] == [1, 2]
    for name, test in result["tests"].items():
        assert curve[0]["text_losses"][name] != curve[1]["text_losses"][name]
        assert curve[1]["text_losses"][name] == pytest.approx(test["loss"], abs=2e-5)
        assert np.mean(test["block_losses"]) == pytest.approx(test["loss"], abs=0.02)

    from measured_run import check_model

    options, corpus = plan.options["7m-5-rows"], plan.corpus()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "7m-5-rows" / "final_model")
    check_model(model, corpus, options, {"log": result["log"], "steps": 2})
    model.get_output_embeddings().weight.data.mul_(1000)
    with pytest.raises(SconeError, match="with which training ended"):
        check_model(model, corpus, options, {"log": result["log"], "steps": 2})


def test_any_beginning_of_a_mixture_is_a_fair_draw(tmp_path):
    """Of each kind as many characters as its share of all, but for a document; and no held-out document is in it."""
    prepare = experiments.module("prepare_data")
    draw = random.Random(0)
    for kind, size in {"one": 400, "two": 100, "three": 25}.items():
        lines = [json.dumps({"text": f"{kind} {number} " + "x" * draw.randint(1, 200)}) for number in range(size)]
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "texts.jsonl").write_text("\n".join(lines))
    documents = list(prepare.mixture(tmp_path, ["one", "two", "three"]))
    assert documents == list(prepare.mixture(tmp_path, ["one", "two", "three"]))
    total = Counter()
    for text in documents:
        total[text.split()[0]] += len(text)
    seen = Counter()
    for text in documents:
        seen[text.split()[0]] += len(text)
        shares = [seen[kind] / total[kind] for kind in total]
        assert max(shares) - min(shares) < 2 * max(220 / size for size in total.values())
    assert sum(seen.values()) == sum(total.values())
    held_out = {text for kind in total for text in open_documents(str(tmp_path / kind), split="test")}
    assert held_out
    assert not held_out & set(documents)
