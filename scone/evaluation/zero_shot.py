"""Zero-shot accuracy through lm-evaluation-harness: our task descriptions (``tasks/*.yaml``), local or hub data."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from scone.data.readers import COMPRESSIONS, read_rows
from scone.inference.loading import position_limit
from scone.utils.command_line import did_you_mean
from scone.utils.errors import SconeError
from scone.utils.progress import bars_are_visible

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS = (
    *("hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "commonsense_qa", "openbookqa"),
    *("boolq", "sciq", "social_iqa", "lambada_openai"),
)


@dataclass(frozen=True)
class TaskResult:
    """A model's accuracy on ``num_items`` items of a task.

    ``normalized_accuracy`` divides an answer's log-probability by its length in characters before answers are
    compared (None where the task does not do so). ``chance``: accuracy of guessing. ``perplexity``: of the target words
    (LAMBADA alone).
    """

    task: str
    accuracy: float
    normalized_accuracy: float | None
    chance: float
    num_items: int
    perplexity: float | None = None

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """95 % interval of ``accuracy`` over items (Wilson's score interval, which stays within 0 … 1)."""
        z, n = 1.96, self.num_items
        middle = (self.accuracy + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(self.accuracy * (1 - self.accuracy) / n + (z / (2 * n)) ** 2)
        return max(0.0, middle - half), min(1.0, middle + half)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return vars(self) | {"accuracy_interval": self.accuracy_interval}


def task_names(text: str) -> tuple[str, ...]:
    """The tasks that ``--tasks`` names: a comma-separated list, or ``all``. Raises SconeError for an unknown one."""
    names = TASKS if text == "all" else tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in TASKS:
            advice = did_you_mean(name, TASKS) or f"expected {', '.join(TASKS)}, or all"
            raise SconeError(f"--tasks: found the unknown task {name}; {advice}")
    if not names:
        raise SconeError(f"--tasks: found no task; expected {', '.join(TASKS)}, or all")
    return names


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    task_data: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
) -> list[TaskResult]:
    """Accuracy of ``model`` on each of ``tasks``, without examples in the prompt.

    ``task_data``: a folder of JSON-lines files (also .zst, .gz, .xz) with the hub's columns, such as
    ``piqa_validation.jsonl.zst``; None takes the data from the hub. ``limit``: the first items of each task alone.
    ``max_length``: longest prompt in tokens, cut at its beginning (default: the model's positions).

    Raises SconeError: no lm-evaluation-harness here, no data for a task, data with other columns.
    """
    if find_spec("lm_eval") is None:
        raise SconeError(
            "found no lm-evaluation-harness, which runs --tasks; expected the package lm-eval; "
            "install it with pip install 'scone-lm[tasks]'"
        )
    descriptions = [_description(name, None if task_data is None else Path(task_data), limit) for name in tasks]
    with _quiet_harness():
        # evaluate, not simple_evaluate: that one first reads the thousands of tasks that the harness ships
        from lm_eval import evaluate
        from lm_eval.api.task import ConfigurableTask

        loaded = {description["task"]: ConfigurableTask(config=dict(description)) for description in descriptions}
        adapter = _adapter(model, tokenizer, batch_size, max_length or position_limit(model))
        found: Any = evaluate(adapter, loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    return [_result(name, description, found) for name, description in zip(tasks, descriptions, strict=True)]


def _adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, max_length: int | None
) -> HFLM:
    """The harness's wrapper of a Hugging Face model; it refuses answers that the model has no room for in one line."""
    from lm_eval.models.huggingface import HFLM

    class Adapter(HFLM):
        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> Any:
            longest = max((len(answer) for _, _, answer in requests), default=0)
            if longest > self.max_length:
                raise SconeError(
                    f"found an answer of {longest} tokens; the model has {self.max_length} positions; "
                    "leave this task out, or use a model of longer sequences"
                )
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

    return Adapter(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)


def _description(name: str, folder: Path | None, limit: int | None) -> dict[str, Any]:
    """A task in the harness's own form, its items read by us where they are local."""
    text = files("scone.evaluation").joinpath("tasks", f"{name}.yaml").read_text(encoding="utf-8")
    description: dict[str, Any] = yaml.safe_load(text) | {"num_fewshot": 0}
    stems = description["metadata"].pop("files")
    if folder is not None:
        split = description.get("validation_split") or description["test_split"]
        path = _local_file(name, folder, stems)
        description["custom_dataset"] = partial(_local_items, path, split, limit)
        for option in ("dataset_path", "dataset_name"):
            description.pop(option, None)
    return description


def _local_file(name: str, folder: Path, stems: Sequence[str]) -> Path:
    candidates = [folder / f"{stem}.jsonl{compression}" for stem in stems for compression in ("", *COMPRESSIONS)]
    for path in candidates:
        if path.is_file():
            return path
    raise SconeError(
        f"found no data of the task {name} in {folder}; expected {stems[0]}.jsonl (or .jsonl.zst, .gz, .xz); "
        "check --task_data, or leave it out to use the hub"
    )


def _local_items(path: Path, split: str, limit: int | None, **_: Any) -> dict[str, Any]:
    """The items of a file as the harness wants them; it passes the description's metadata along."""
    import datasets

    rows: list[dict[str, Any]] = []
    for row in read_rows(path):
        if limit is not None and len(rows) == limit:
            break
        rows.append(row)
    if not rows:
        raise SconeError(f"found no items in {path}; expected JSON lines; check --task_data")
    return {split: datasets.Dataset.from_list(rows)}


def _result(name: str, description: dict[str, Any], found: Any) -> TaskResult:
    scores = found["results"][description["task"]]
    return TaskResult(
        name,
        float(scores["acc,none"]),
        float(scores["acc_norm,none"]) if "acc_norm,none" in scores else None,
        float(description["metadata"]["chance"]),
        int(found["n-samples"][description["task"]]["effective"]),
        float(scores["perplexity,none"]) if "perplexity,none" in scores else None,
    )


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Keep the harness's notes to itself, and its progress bars where ours are not drawn either."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with nullcontext() if bars_are_visible() else redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


def describe_tasks(results: Sequence[TaskResult]) -> str:
    """A table in text: task, accuracy with its interval, accuracy with normalised answers, chance, items."""
    lines = [f"{'task':<18}{'accuracy':>10}{'95 % over items':>20}{'normalised':>12}{'chance':>9}{'items':>9}"]
    for result in results:
        interval = "{:.4f} to {:.4f}".format(*result.accuracy_interval)
        normalised = "" if result.normalized_accuracy is None else f"{result.normalized_accuracy:.4f}"
        perplexity = "" if result.perplexity is None else f"   perplexity {result.perplexity:.2f}"
        lines.append(
            f"{result.task:<18}{result.accuracy:>10.4f}{interval:>20}{normalised:>12}{result.chance:>9.3f}"
            f"{result.num_items:>9,}{perplexity}"
        )
    return "\n".join(lines)
