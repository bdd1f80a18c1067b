"""Zero-shot accuracy by lm-evaluation-harness, with its own tasks; their items from the hub or from local files."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scone.models.trunk import longest_sequence
from scone.utils.command_line import did_you_mean
from scone.utils.errors import SconeError, library_refusal
from scone.utils.hub import refuse_unreachable_dataset
from scone.utils.progress import bars_are_visible

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS = (
    *("hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "commonsense_qa", "openbookqa"),
    *("boolq", "sciq", "social_iqa", "lambada_openai"),
)
"""What ``--tasks all`` stands for; every other task of the harness that has an accuracy can be named too."""
HEADING = f"{'task':<18}{'accuracy':>10}{'95 % over items':>20}{'normalised':>12}{'chance':>9}{'items':>9}"
# files of these often have other columns than the data set of the hub that the harness reads
_LOCAL_COLUMNS: dict[str, dict[str, Any]] = {
    "boolq": {"doc_to_target": "{{ label if label is defined else answer | int }}"},
    "lambada_openai": {
        "doc_to_text": "{{ context if context is defined else text.rsplit(' ', 1)[0] }}",
        "doc_to_target": "{{ ' ' ~ (continuation | trim if continuation is defined else text.rsplit(' ', 1)[1]) }}",
        "should_decontaminate": False,
    },
}


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

    def __str__(self) -> str:
        """A row of the table that `HEADING` is the first line of."""
        interval = "{:.4f} to {:.4f}".format(*self.accuracy_interval)
        optional = [self.normalized_accuracy, self.perplexity]
        normalised, perplexity = ("" if value is None else f"{value:.4f}" for value in optional)
        return (
            f"{self.task:<18}{self.accuracy:>10.4f}{interval:>20}{normalised:>12}{self.chance:>9.3f}"
            f"{self.num_items:>9,}" + (f"   perplexity {perplexity}" if perplexity else "")
        )


@dataclass(frozen=True)
class TaskRefusal:
    """A task that could not be evaluated: why, in a clause, and what was raised."""

    task: str
    reason: str
    cause: SconeError


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str],
    task_data: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> Iterator[TaskResult | TaskRefusal]:
    """Accuracy of ``model`` on each of ``tasks``, no examples in the prompt; each as soon as it is known.

    ``tasks`` and ``task_data`` as for `check_tasks`. ``limit``: the first items of each task alone. A task that cannot
    be evaluated (an answer of more tokens than the model has positions, no accuracy) costs no other its result:
    `refuse_left_out` makes it an error when all are done.

    Raises SconeError as `check_tasks` does.
    """
    names, local = check_tasks(tasks, task_data)
    # only in a group does the harness take changes to a task of its own
    wanted = [{"group": "local", "task": [description]} for description in local] if local else names
    return _outcomes(model, tokenizer, dict(zip(names, wanted, strict=True)), limit, batch_size)


def _outcomes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Mapping[str, Any],
    limit: int | None,
    batch_size: int,
) -> Iterator[TaskResult | TaskRefusal]:
    with _quiet_harness():
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM

        class Adapter(HFLM):
            """Refuses a task whose answers do not fit before it computes anything of it."""

            def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **options: Any) -> Any:
                longest = max((len(answer) for _, _, answer in requests), default=0)
                if longest > self.max_length:
                    raise SconeError(
                        f"its longest answer has {longest} tokens, and the model {self.max_length} positions"
                    )
                return super()._loglikelihood_tokens(requests, *arguments, **options)

        settings: dict[str, Any] = {"batch_size": batch_size, "max_length": longest_sequence(model.config)}
        adapter = Adapter(pretrained=model, tokenizer=tokenizer, **settings)  # type: ignore[arg-type]
    for name, task in wanted.items():
        outcome: TaskResult | TaskRefusal
        try:
            with _quiet_harness(), _without_git(evaluator), library_refusal("the harness fails on it"):
                found: Any = evaluator.simple_evaluate(
                    adapter, tasks=[task], num_fewshot=0, limit=limit, bootstrap_iters=0, task_manager=_task_manager()
                )
                outcome = _result(name, found)
        except SconeError as error:
            outcome = TaskRefusal(name, str(error), error)
        yield outcome


def refuse_left_out(outcomes: Sequence[TaskResult | TaskRefusal]) -> None:
    """Raise a SconeError that names all tasks without a result, if there are any: when the others' are kept."""
    refusals = [outcome for outcome in outcomes if isinstance(outcome, TaskRefusal)]
    if refusals:
        which = ", ".join(dict.fromkeys(f"{each.task} ({each.reason})" for each in refusals))
        kept = "every other result is kept; " if len(refusals) < len(outcomes) else ""
        advice = "leave out what is named here, take a model that can do it, or see --debug"
        raise SconeError(f"--tasks: cannot evaluate this model on {which}; {kept}{advice}") from refusals[0].cause


def check_tasks(
    tasks: str | Sequence[str], task_data: str | Path | None = None
) -> tuple[list[str], list[dict[str, Any]]]:
    """The names of ``tasks`` (separated by commas, or "all"), and how the harness reads each from ``task_data``.

    ``task_data``: a folder of JSON-lines files (also .zst, .gz, .xz) with the hub's columns, such as
    ``piqa_validation.jsonl.zst``; None takes the data from the hub.

    Raises SconeError: no lm-evaluation-harness here, an unknown task, no data for one.
    """
    names = [name.strip() for name in tasks.split(",")] if isinstance(tasks, str) else list(tasks)
    names = list(TASKS) if names == ["all"] else list(dict.fromkeys(name for name in names if name))
    if not names:
        raise SconeError(f"--tasks: found no task; expected {', '.join(TASKS)}, or all")
    local = [] if task_data is None else [_from_file(name, Path(task_data)) for name in names]
    if task_data is None:
        refuse_unreachable_dataset("found no --task_data", "give a folder with the tasks' items by --task_data")
    if find_spec("lm_eval") is None:
        raise SconeError(
            "found no lm-evaluation-harness, which runs --tasks; expected the package lm-eval; "
            "install it with pip install 'scone-lm[tasks]'"
        )
    if others := [name for name in names if name not in TASKS]:
        known = _task_manager().all_tasks
        for name in others:
            if name not in known:
                advice = did_you_mean(name, TASKS) or f"expected {', '.join(TASKS)}, all, or another of the harness"
                raise SconeError(f"--tasks: found the unknown task {name}; {advice}")
    return names, local


@cache
def _task_manager() -> Any:
    """What knows the harness's tasks, which takes it some ten seconds to find."""
    with _quiet_harness():
        from lm_eval.tasks import TaskManager

        return TaskManager()


def _quiet_harness() -> AbstractContextManager[Any]:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return nullcontext() if bars_are_visible() else redirect_stderr(io.StringIO())


@contextmanager
def _without_git(evaluator: Any) -> Iterator[None]:
    """The harness asks git for the commit of the folder where we are, and git says "fatal" where there is none."""
    asks, evaluator.get_git_commit_hash = evaluator.get_git_commit_hash, lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asks


def _from_file(name: str, folder: Path) -> dict[str, Any]:
    """What a task's own description is overridden with, to read its items from the file in ``folder`` whose name begins
    with the task's, wherever that has underscores; of several the shortest.
    """
    files = sorted(folder.glob("*.jsonl*"), key=lambda path: len(path.name))
    path = next((path for path in files if path.name.replace("_", "").startswith(name.replace("_", ""))), None)
    if path is None:
        raise SconeError(
            f"found no data of the task {name} in {folder}; expected {name}_validation.jsonl (.zst, .gz, .xz); "
            "check --task_data, or leave it out to use the hub"
        )
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        **_LOCAL_COLUMNS.get(name, {}),
    }


def _result(name: str, found: Any) -> TaskResult:
    scores, samples = found["results"][name], found["samples"].get(name, [])
    if "acc,none" not in scores:
        raise SconeError("it has no accuracy")
    answers = [len(sample["arguments"]) for sample in samples]
    return TaskResult(
        name,
        scores["acc,none"],
        scores.get("acc_norm,none"),
        sum(1 / count for count in answers if count > 1) / max(len(answers), 1),
        int(found["n-samples"][name]["effective"]),
        scores.get("perplexity,none"),
    )
