"""Zero-shot tasks: right answers are counted as right, prompts are as documented, table and live model agree."""

from __future__ import annotations

import gzip
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from scone.cli import main
from scone.data.token_file import TokenFileWriter
from scone.evaluation.zero_shot import TASKS, TaskResult, evaluate_tasks, refuse_left_out
from scone.inference.loading import load_model
from scone.tests import tiny
from scone.tests.evaluation import experiments
from scone.tests.processes import forked
from scone.tokenization.tokenizers import load_tokenizer
from scone.utils.command_line import run_main
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
    results = list(evaluate_tasks(model, load_tokenizer(folder), "all", shared_data / "evals", limit=2))
    assert [result.task for result in results] == list(TASKS)
    assert all(result.num_items == 2 for result in results)
    assert "winogrande" in str(results[4])


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


def item_of(tokenizer, num_tokens: int) -> dict:
    """An item of arc_easy whose longest answer has so many tokens."""
    (item,) = arc_items(["A"])
    item["choices"]["text"][1] = " ".join("a" * num_tokens)
    assert len(tokenizer(" a" * num_tokens)["input_ids"]) == num_tokens
    return item


def test_an_answer_fits_up_to_the_last_position(live, tmp_path):
    model, tokenizer = live
    positions = model.config.get_text_config().max_position_embeddings
    write_items(tmp_path, "arc_easy", [item_of(tokenizer, positions)])
    (result,) = evaluate_tasks(*live, "arc_easy", tmp_path)
    assert result.num_items == 1
    write_items(tmp_path, "arc_easy", [item_of(tokenizer, 5), item_of(tokenizer, positions + 1)])
    (refusal,) = evaluate_tasks(*live, "arc_easy", tmp_path)
    assert refusal.reason == f"its longest answer has {positions + 1} tokens, and the model {positions} positions"
    assert "every other" not in tiny.refusal(refuse_left_out, [refusal])


@pytest.fixture
def mixed(live, tmp_path):
    """A folder of three tasks' items; an answer of arc_easy is too long."""
    folder = tmp_path / "items"
    folder.mkdir()
    write_items(folder, "boolq", [{"question": "is the sun hot", "answer": True, "passage": "the sun is hot"}] * 4)
    write_items(folder, "arc_easy", [*arc_items(list("ABCA")), item_of(live[1], 1000)])
    write_items(folder, "lambada_openai", [{"context": "the sun is", "continuation": "hot"}] * 2)
    return folder


TASKS_OF_MIXED = ["--tasks", "boolq,arc_easy,lambada_openai"]


def test_a_task_left_out_costs_no_other_its_result(folder, live, mixed, tmp_path, capsys):
    capsys.readouterr()
    command = ["evaluate", "--model_path", str(folder), *TASKS_OF_MIXED, "--task_data", str(mixed), "--device", "cpu"]
    assert main([*command, "--output", str(tmp_path / "result.json")]) == 2
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["task", "boolq", "lambada_openai"]
    (line,) = shown.err.splitlines()
    reason = "its longest answer has 1000 tokens, and the model 640 positions"
    assert f"cannot evaluate this model on arc_easy ({reason}); every other result is kept; leave out" in line
    written = json.loads((tmp_path / "result.json").read_text())
    alone = [result for task in ("boolq", "lambada_openai") for result in evaluate_tasks(*live, task, mixed)]
    assert written["tasks"] == json.loads(json.dumps({result.task: result.to_dict() for result in alone}))
    assert written["tasks_left_out"] == {"arc_easy": reason}
    assert "tasks_to_do" not in written
    assert main([*command, "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == written


def test_a_task_left_out_costs_a_pair_no_result(folder, live, mixed, tmp_path, capsys):
    users = experiments.module("what_users_ask")
    for text in users.TEXTS:
        writer = TokenFileWriter(tmp_path / text, 300, 0)
        writer.add_document(torch.randint(1, 300, (1400,)).numpy())
        writer.finish({"tokenizer_fingerprint": ""})
    models = ["--plain", str(folder / "plain"), "--rows", str(folder), "--data", str(tmp_path)]
    command = [*models, *TASKS_OF_MIXED, "--task_data", str(mixed), "--json", str(tmp_path / "pair.json")]
    capsys.readouterr()
    assert run_main(users.main, command) == 2
    assert capsys.readouterr().err.count("arc_easy") == 1, "both models, one line"
    (pair,) = json.loads((tmp_path / "pair.json").read_text())["pairs"]
    for kind in ("plain", "rows"):
        assert [result["task"] for result in pair["tasks"][kind]] == ["boolq", "lambada_openai"]
        assert pair["tasks_left_out"][kind].keys() == {"arc_easy"}


def test_ctrl_c_keeps_the_tasks_that_are_done(folder, tmp_path):
    write_items(tmp_path, "boolq", [{"question": "is the sun hot", "answer": True, "passage": "the sun is hot"}] * 4)
    write_items(tmp_path, "arc_easy", arc_items(list("ABCA") * 5000))
    output, said = tmp_path / "result.json", tmp_path / "said"
    command = ["evaluate", "--model_path", str(folder), "--tasks", "boolq,arc_easy", "--task_data", str(tmp_path)]
    process = forked(main, [*command, "--device", "cpu", "--json", "--output", str(output)], said=said)
    while process.is_alive() and not (output.exists() and json.loads(output.read_text())["tasks"]):
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    written = json.loads(output.read_text())
    assert written["tasks"].keys() == {"boolq"}
    assert written["tasks_to_do"] == ["arc_easy"]
    printed, end = said.read_text().rsplit("\ninterrupted; ", 1)
    assert json.loads(printed) == written
    assert "\n" not in end.strip()


@pytest.mark.parametrize("damage", [b"", b'{"question": 1}\n', b"\xff\xfe{"])
def test_a_refusal_gives_its_advice_once(folder, damage, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no folder of git's
    write_items(tmp_path, "boolq", [{"question": "is the sun hot", "answer": True, "passage": "the sun is hot"}] * 4)
    (tmp_path / "arc_easy.jsonl").write_bytes(damage)
    capfd.readouterr()
    command = ["evaluate", "--model_path", str(folder), "--tasks", "arc_easy,boolq", "--task_data", str(tmp_path)]
    assert main([*command, "--device", "cpu"]) == 2
    shown = capfd.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["task", "boolq"]
    (line,) = shown.err.splitlines()
    assert line.count("--debug") == 1
    assert line.count("; ") == 2


def test_a_task_without_an_accuracy_is_left_out(live, tmp_path):
    write_items(tmp_path, "wikitext", [{"page": "the sun is hot"}])
    write_items(tmp_path, "arc_easy", arc_items(["A"]))
    refusal, result = evaluate_tasks(*live, "wikitext,arc_easy", tmp_path)
    assert (refusal.task, refusal.reason, result.task) == ("wikitext", "it has no accuracy", "arc_easy")


def test_missing_harness_gets_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SconeError, match=r"found no lm-evaluation-harness.*pip install 'scone-lm\[tasks\]'"):
        evaluate_tasks(tiny.trunk(), None, ["piqa"])
