"""Zero-shot tasks: right answers are counted as right, prompts are as documented, table and live model agree."""

from __future__ import annotations

import gzip
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from scone.cli import main
from scone.evaluation.zero_shot import TASKS, TaskResult, describe_tasks, evaluate_tasks
from scone.inference.loading import load_model
from scone.tests import tiny
from scone.tokenization.tokenizers import load_tokenizer
from scone.utils.errors import SconeError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of the harness's own imports
]


@pytest.fixture(scope="module")
def folder(served_model):
    pytest.importorskip("lm_eval")
    return served_model


@pytest.fixture(scope="module")
def live(folder):
    """Model and tokenizer."""
    return load_model(folder, device="cpu").model, load_tokenizer(folder)


def write_items(folder: Path, name: str, items: list[dict]) -> None:
    text = "".join(json.dumps(item) + "\n" for item in items)
    (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))


def arc_items(answers: list[str]) -> list[dict]:
    choices = {"text": ["a dog", "a cat", "the sun"], "label": ["A", "B", "C"]}
    return [{"id": str(i), "question": f"which animal barks? {i}", "choices": choices, "answerKey": answer}
            for i, answer in enumerate(answers)]  # fmt: skip


def log_probability(model: torch.nn.Module, tokenizer, context: str, answer: str) -> float:
    """Reference of what the harness asks for: log-probability of the answer's tokens after the context."""
    before = tokenizer(context, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([tokenizer(context + answer, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        log_probabilities = torch.log_softmax(model(input_ids=tokens).logits[0].double(), dim=-1)
    return sum(float(log_probabilities[i - 1, tokens[0, i]]) for i in range(len(before), tokens.shape[1]))


def test_accuracy_equals_the_plain_loop(live, tmp_path):
    items = arc_items(list("ABCABCAB"))
    write_items(tmp_path, "arc_easy", items)
    (result,) = evaluate_tasks(*live, ["arc_easy"], tmp_path)
    right = normalised = 0
    for item in items:
        scores = [
            log_probability(*live, f"Question: {item['question']}\nAnswer:", f" {choice}")
            for choice in item["choices"]["text"]
        ]
        gold = "ABC".index(item["answerKey"])
        right += max(range(3), key=scores.__getitem__) == gold
        normalised += max(range(3), key=lambda i: scores[i] / len(item["choices"]["text"][i])) == gold
    assert result == TaskResult("arc_easy", right / 8, normalised / 8, pytest.approx(1 / 3), 8)


def test_table_and_live_model_agree_on_the_command_line(folder, tmp_path, capsys):
    write_items(tmp_path, "arc_easy_validation", arc_items(list("ABCAB")))
    write_items(tmp_path, "boolq", [{"question": "is the sun hot", "answer": True, "passage": "the sun is hot"}] * 4)
    write_items(tmp_path, "lambada_openai", [{"context": "the sun is", "continuation": "hot"}] * 2)
    command = ["evaluate", "--model_path", str(folder), "--tasks", "arc_easy,boolq,lambada_openai"]
    command += ["--task_data", str(tmp_path), "--limit", "3", "--device", "cpu"]
    capsys.readouterr()
    assert main([*command, "--output", str(tmp_path / "live.json")]) == 0
    live = capsys.readouterr().out
    assert "perplexity        " not in live, "no data set was named"
    table = ["--embedding_cache_path", str(folder / "embeddings.cache")]
    assert main([*command, *table, "--output", str(tmp_path / "table.json")]) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if not line.startswith("embedding table")] == live.splitlines()
    results = json.loads((tmp_path / "table.json").read_text())["tasks"]
    assert {name: result["num_items"] for name, result in results.items()} == {
        "arc_easy": 3, "boolq": 3, "lambada_openai": 2,
    }  # fmt: skip
    assert results["lambada_openai"]["perplexity"] > 1
    low, high = results["boolq"]["accuracy_interval"]
    assert 0 <= low <= results["boolq"]["accuracy"] <= high <= 1


def test_every_task_runs_on_real_items(folder, shared_data):
    model = load_model(folder, folder / "embeddings.cache", device="cpu").model
    results = evaluate_tasks(model, load_tokenizer(folder), "all", shared_data / "evals", limit=2)
    assert [result.task for result in results] == list(TASKS)
    assert all(result.num_items == 2 for result in results)
    assert "winogrande" in describe_tasks(results)


def test_interval_stays_between_never_and_always():
    never = TaskResult("a", 0.0, None, 0.5, 10)
    assert never.accuracy_interval[0] == 0
    assert 0.2 < never.accuracy_interval[1] < 0.35
    low, high = TaskResult("a", 0.5, None, 0.5, 10_000).accuracy_interval
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.25 / 10_000), rel=0.01)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "helaswag"], "--tasks: found the unknown task helaswag; did you mean hellaswag"),
        (["--tasks", ","], "--tasks: found no task"),
        (["--tasks", "piqa", "--task_data", "nowhere"], "found no data of the task piqa in nowhere"),
    ],
)
def test_mistakes_get_one_line(folder, argv, message, capsys):
    assert main(["evaluate", "--model_path", str(folder), "--device", "cpu", *argv]) == 2
    assert message in capsys.readouterr().err


def test_answers_that_do_not_fit_get_one_line(live, tmp_path):
    write_items(tmp_path, "arc_easy", arc_items(["A"]))
    write_items(tmp_path, "lambada_openai", [{"context": "the sun is", "continuation": "hot" * 2000}])
    with pytest.raises(SconeError, match=r"cannot evaluate lambada_openai with this model .*has \d+ positions"):
        evaluate_tasks(*live, ["arc_easy", "lambada_openai"], tmp_path)


def test_missing_harness_gets_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SconeError, match=r"found no lm-evaluation-harness.*pip install 'scone-lm\[tasks\]'"):
        evaluate_tasks(tiny.trunk(), None, ["piqa"])
