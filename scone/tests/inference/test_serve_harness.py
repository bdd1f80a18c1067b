"""lm-evaluation-harness reads a saved model from its folder, offline, with no import of ours by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scone.models.language_model import SconeForCausalLM
from scone.tests.inference.served import make_model
from scone.tokenization.tokenizers import load_tokenizer

TASK = """task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
def test_the_harness_evaluates_a_saved_folder(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    folder = make_model(tmp_path / "model")
    model, tokenizer = SconeForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    items, expected = [], []
    for number, question in enumerate(["the cat sat on the", "the dog ran under the", "then it", "the mat and the"]):
        choices = [" mat", " hill", " slept"]
        scores = []
        for choice in choices:
            ids = tokenizer(question + choice, return_tensors="pt", add_special_tokens=False).input_ids
            before = len(tokenizer(question, add_special_tokens=False).input_ids)
            with torch.no_grad():
                found = model(ids).logits[0].log_softmax(-1)
            scores.append(sum(float(found[place - 1, ids[0, place]]) for place in range(before, ids.shape[1])))
        answer = number % 3
        expected.append(scores[answer] == max(scores))
        items.append({"question": question, "choices": [choice.strip() for choice in choices], "answer": answer})
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    (tmp_path / "local_choice.yaml").write_text(TASK.format(items=tmp_path / "items.jsonl"), encoding="utf-8")
    subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "local_choice", "--device", "cpu"),
            *("--model_args", f"pretrained={folder},trust_remote_code=True,dtype=float32", "--batch_size", "2"),
            *("--include_path", str(tmp_path), "--output_path", str(tmp_path / "results.json")),
        ],
        env=os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        cwd=tmp_path,
        check=True,
        timeout=300,
    )
    (path,) = tmp_path.rglob("results*.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["results"]["local_choice"]["acc,none"] == pytest.approx(sum(expected) / len(expected))
