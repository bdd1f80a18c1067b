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


TODAY = tempfile.TemporaryDirectory()  # before collection: the tests are named by the experiments
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


def flags_of(experiment: str, data: Path, output_dir: Path, *more: str, **changes: object) -> list[str]:
    pairs = [f"{name}={value}" for name, value in (SMALL | changes).items()]
    folders = ["--data", str(data), "--output_dir", str(output_dir)]
    return [str(PATHS[experiment]), *folders, *more, "--set", *pairs]


def plan_of(runner, experiment: str, data: Path, output_dir: Path, **changes: object):
    return runner.Plan.read(runner.parse(flags_of(experiment, data, output_dir, **changes)))


def trained(runner, experiment: str, data: Path, folder: Path, name: str, **changes: object):
    """The plan, whose run ``name`` was made, and its result."""
    plan = plan_of(runner, experiment, data, folder, **changes)
    plan.prepare([name])
    plan.run(name, keep_model=True)
    return plan, json.loads((folder / f"{name}.json").read_text())


def trunk_weights(data: Path, folder: Path, name: str) -> tuple[dict, dict]:
    """Before and after, by their names in the trunk; after, rows too."""
    after = load_file(folder / name / "final_model" / "model.safetensors")
    after = {key.removeprefix("trunk."): weight for key, weight in after.items()}
    return load_file(data / "trunk" / "model.safetensors"), after


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


def test_a_run_of_two_processes_is_that_of_one(runner, data, tmp_path, monkeypatch):
    """The whole script, whose workers are torchrun's: the same batches and losses, and one result."""
    changes = {"training.batch_size": 4, "training.max_steps": 4}
    _, one = trained(runner, "epochs", data, tmp_path / "1", "epochs1-rows", **changes)
    flags = flags_of("epochs", data, tmp_path / "2", "--processes", "2", "--only", "epochs1-rows", **changes)
    monkeypatch.setattr(sys, "argv", [str(RUNNER), *flags])
    assert runner.main(flags) == 0, (tmp_path / "2" / "epochs1-rows.log").read_text()
    two = json.loads((tmp_path / "2" / "epochs1-rows.json").read_text())
    assert one["tokens"] == two["tokens"] == 4 * 4 * 32
    for test in EXPERIMENTS["epochs"]["tests"]:
        assert two["tests"][test]["loss"] == pytest.approx(one["tests"][test]["loss"], abs=1e-4)
    curves = [[line["text_losses"] for line in run["log"] if "text_losses" in line] for run in (one, two)]
    assert len(curves[0]) == len(curves[1]) == 4


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
    trained(runner, "pretrained", data, tmp_path, name, **{"training.weight_decay": 0.1, "model.learned_rows": 100})
    before, after = trunk_weights(data, tmp_path, name)
    assert before.keys() <= after.keys()
    same = {key for key, weight in before.items() if torch.equal(weight, after[key])}
    assert same == (set() if name == "tuned-rows-1e-4" else before.keys())


@pytest.mark.parametrize("name", ["lora-1e-3", "lora-rows-1e-3"])
def test_adapters_are_merged_into_what_is_saved(runner, data, tmp_path, name):
    """Matrices have changed by no more than the adapters' rank, the rest of the trunk not at all; rows train too."""
    pytest.importorskip("peft", reason="the extra tuning brings PEFT")
    changes = {"lora_rank": 2, "training.weight_decay": 0.1, "training.learning_rate": 0.1, "model.learned_rows": 100}
    _, result = trained(runner, "pretrained", data, tmp_path, name, **changes)
    before, after = trunk_weights(data, tmp_path, name)
    for key, weight in before.items():
        rank = torch.linalg.matrix_rank(after[key] - weight, atol=1e-5).item() if weight.ndim == 2 else None
        assert rank in (1, 2) if "_proj" in key else torch.equal(weight, after[key]), key
    rows = after.keys() - before.keys()
    assert [bool(after[key].any()) for key in rows] == [True] * ("rows" in name)
    cost = result["cost"]
    assert cost["training_flops"] < 2.9 * cost["inference_flops_per_token"] * result["tokens"], "as if all had trained"
    assert result["tests"].keys() == set(EXPERIMENTS["pretrained"]["tests"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--list", "a run of the experiment ablations; expected those of main_claim"),
        ("--only nothing", "found no run"),
        ("--gpus 0", "GPUs; expected 0, at least one"),
        ("--gpus 1000", "GPUs; expected 1000, at least one"),
        ("--processes 0", "batches of 2; expected a multiple of --processes 0, at least one"),
        ("--processes 5", "batches of 2; expected a multiple of --processes 5"),
    ],
)
def test_mistakes_are_told(runner, data, tmp_path, words, message):
    if words == "--list":
        (tmp_path / "rows-10k.json").write_text(json.dumps({"experiment": "ablations", "finished": True}))
    with pytest.raises(SconeError, match=message):
        runner.main(flags_of("main_claim", data, tmp_path, *words.split()))


def test_after_the_deadline_nothing_runs_and_the_curves_so_far_are_kept(runner, data, tmp_path, capsys):
    partial = {"finished": False, "seed": 1, "steps": 1, "max_steps": 2, "log": [{"step": 1, "eval_loss": 5.0}]}
    (tmp_path / "rows-10k.json").write_text(json.dumps(partial))
    assert runner.main(flags_of("main_claim", data, tmp_path, "--only", "rows-10k", "--deadline_s", "0")) == 0
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
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")  # runs of two processes see two each
    assert runner.run_all(names[:2], tmp_path, 2, [sys.executable, "-c", program], gpus=4, processes=2) == ([], [])
    assert sorted((tmp_path / f"{name}.log").read_text().strip() for name in names[:2]) == ["4,5", "6,7"]


def test_a_worker_does_not_look_for_the_gpus_of_the_others(runner, data, tmp_path):
    """It sees the one that it was given (here none: it trains on the CPU)."""
    assert runner.main(flags_of("main_claim", data, tmp_path, "--gpus", "1000", "--worker", "plain-seed1")) == 0
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


def test_a_run_of_fewer_tokens_trains_and_counts_on_whole_documents_of_the_beginning(runner, data, tmp_path):
    plan, result = trained(runner, "ladder", data, tmp_path, "7m-5-rows-seed1", train_tokens=2000)
    whole, part = plan.corpus().train, plan.corpus(2000).train
    ends = np.flatnonzero(whole.tokens == whole.separator_id) + 1
    assert part.num_tokens == ends[ends >= 2000][0] < whole.num_tokens
    assert np.array_equal(part.tokens, whole.tokens[: part.num_tokens])
    assert result["train_tokens"] == part.num_tokens
    vocabulary = AutoModelForCausalLM.from_pretrained(tmp_path / "7m-5-rows-seed1" / "final_model").vocabulary
    f_gram = vocabulary.tokens(vocabulary.vocab_size)
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(part.tokens), len(f_gram))
    assert int((windows == f_gram).all(1).sum()) == vocabulary.counts[0], "counted in the beginning alone"
    with pytest.raises(SconeError, match=r"tokens in .*; expected 1,000,000; prepare more text"):
        plan.corpus(1_000_000)


def test_at_every_evaluation_each_text_is_tested(runner, data, tmp_path):
    """A curve's last point is the finished model's loss on the same tokens."""
    plan, _ = trained(runner, "ladder", data, tmp_path, "7m-5-rows-seed1", train_tokens=0)
    result = plan.merge()["runs"]["7m-5-rows-seed1"]
    curve = [entry for entry in result["log"] if "eval_loss" in entry]
    assert [entry["step"] for entry in curve] == [1, 2]
    for name, test in result["tests"].items():
        assert curve[0]["text_losses"][name] != curve[1]["text_losses"][name]
        assert curve[1]["text_losses"][name] == pytest.approx(test["loss"], abs=2e-5)
        assert np.mean(test["block_losses"]) == pytest.approx(test["loss"], abs=0.02)

    from measured_run import check_model

    options, corpus = plan.options["7m-5-rows-seed1"], plan.corpus()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "7m-5-rows-seed1" / "final_model")
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
