"""Perplexity and zero-shot accuracy of a model: `scone evaluate`, `python -m scone.scripts.evaluate`."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Any

from scone.configs.loading import parse_options
from scone.configs.schema import SconeOptions
from scone.scripts.arguments import arguments, load_engine, number
from scone.utils.command_line import run_main
from scone.utils.errors import SconeError
from scone.utils.files import check_writable, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from scone.evaluation.perplexity import PerplexityResult
    from scone.evaluation.zero_shot import TaskRefusal, TaskResult

EXAMPLES = (
    "scone evaluate --model_path ./outputs/scone-model/final_model --dataset_name wikitext --split test",
    "scone evaluate --model_path ./outputs/scone-model/final_model --embedding_cache_path embeddings.cache "
    "--dataset_name my_texts/",
    "scone evaluate --model_path ./outputs/scone-model/final_model --tasks hellaswag,piqa --task_data evals/",
)
DESCRIPTION = """\
Measure the perplexity of a SCONE model (with or without its table) or a plain model on a dataset split, and its
zero-shot accuracy on tasks. With --tasks, perplexity is measured only if --dataset_name is given too."""
OPTIONS = tuple(
    f"data.{name}" for name in ("dataset_name", "dataset_config_name", "text_column", "max_length", "cache_dir")
)
OPTIONS += ("training.device", "training.seed", "inference")
DEFAULTS = {"inference.batch_size": 8}

ARGUMENTS = arguments(
    "json",
    "model_path",
    "embedding_cache_path",
    "tokenizer_path",
    "placement",
    "quantization",
    split={"default": "test", "metavar": "NAME", "help": "split of the dataset (default: test)"},
    tasks={"metavar": "NAMES", "help": "zero-shot tasks, separated by commas, or all"},
    task_data={
        "metavar": "FOLDER",
        "help": "folder of JSON-lines files, such as piqa_validation.jsonl.zst (default: download)",
    },
    stride={"type": int, "metavar": "N", "help": "tokens between window starts (default: max_length, no overlap)"},
    max_tokens=number(2, "evaluate on the first N tokens only"),
    limit=number(1, "evaluate the first N items of each task only"),
    output={"metavar": "FILE", "help": "also write the result as JSON"},
)


def read_arguments(argv: Sequence[str] | None) -> tuple[SconeOptions, argparse.Namespace]:
    """The options on the command line, and the script's own arguments. Raises SconeError."""
    settings: dict[str, Any] = {"examples": EXAMPLES, "add_arguments": ARGUMENTS, "defaults": DEFAULTS}
    options, extra = parse_options(argv, OPTIONS, DESCRIPTION, **settings)
    if extra.tasks is None:
        given = [name for name in ("task_data", "limit") if getattr(extra, name) is not None]
        if given:
            raise SconeError(f"found --{given[0]} without --tasks; expected both; add --tasks, or leave it out")
    return options, extra


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and print the result."""
    options, extra = read_arguments(argv)
    import torch

    measures_perplexity = extra.tasks is None or "data.dataset_name" in options.given
    _check_early(options, extra, measures_perplexity)
    torch.manual_seed(options.training.seed)
    engine = load_engine(options, extra)
    loaded, tokenizer = engine.loaded, engine.tokenizer
    facts: dict[str, Any] = {"model_path": str(extra.model_path)}
    outcomes: Sequence[TaskResult | TaskRefusal] = ()
    try:
        with redirect_stdout(io.StringIO()) if extra.json else nullcontext():
            if measures_perplexity:
                facts |= _measure_perplexity(options, extra, loaded.model, tokenizer)
            if extra.tasks is not None:
                outcomes = _measure_tasks(options, extra, loaded.model, tokenizer, facts)
            if loaded.table is not None:
                print(loaded.table.describe())
            if loaded.quantization is not None:
                print(loaded.quantization)
    finally:  # also where memory ends, or patience
        if extra.json and len(facts) > 1:
            print(json.dumps(facts, indent=2))
    if extra.output is not None:
        write_json(extra.output, facts)
    if extra.tasks is not None:
        from scone.evaluation.zero_shot import refuse_left_out

        refuse_left_out(outcomes)
    return 0


def _check_early(options: SconeOptions, extra: argparse.Namespace, measures_perplexity: bool) -> None:
    """Refuse what is not there, before a model is loaded. Raises SconeError, or OSError for the output."""
    if extra.output is not None:
        check_writable(extra.output)
    if extra.tasks is not None:
        from scone.evaluation.zero_shot import check_tasks

        check_tasks(extra.tasks, extra.task_data)
    if measures_perplexity:
        from scone.data.sources import open_source, plan
        from scone.tokenization.gguf_files import load_arguments

        load_arguments(extra.model_path)  # a model that is not there is said before a corpus that may come of a default
        data = options.data
        plan(open_source(data.dataset_name, data.dataset_config_name, data.text_column), (extra.split,))


def _measure_perplexity(
    options: SconeOptions, extra: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, object]:
    """Print the perplexity on the dataset; returns what goes into the JSON."""
    from scone.data.prepare import prepare_corpus
    from scone.evaluation.perplexity import perplexity, sizes_of
    from scone.models.trunk import longest_sequence

    data = options.data
    file = prepare_corpus(
        data.dataset_name,
        tokenizer,
        dataset_config_name=data.dataset_config_name,
        text_column=data.text_column,
        splits=(extra.split,),
        cache_dir=data.cache_dir,
    )[extra.split]
    tokens = file.tokens[: extra.max_tokens]
    limit = longest_sequence(model.config)
    if limit is not None and "data.max_length" not in options.given:
        data.max_length = min(data.max_length, limit)  # the default gives way to a shorter model
    result = perplexity(
        model,
        tokens,
        max_length=data.max_length,
        batch_size=options.inference.batch_size,
        stride=extra.stride,
        matcher=getattr(model, "matcher", None),
        separator_id=file.separator_id,
        **sizes_of(tokenizer, tokens),
    )
    _print_perplexity(result)
    windows = {"max_length": data.max_length, "stride": extra.stride or data.max_length}
    return {"dataset_name": data.dataset_name, "split": extra.split} | windows | result.to_dict()


def _measure_tasks(
    options: SconeOptions,
    extra: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: dict[str, Any],
) -> Sequence[TaskResult | TaskRefusal]:
    """Print each accuracy as soon as it is known and add it to ``facts``, which --output has before and after every
    task, with those that are still to do.
    """
    from scone.evaluation.zero_shot import HEADING, TaskResult, check_tasks, evaluate_tasks

    outcomes: list[TaskResult | TaskRefusal] = []
    names, _ = check_tasks(extra.tasks, extra.task_data)
    facts |= {"tasks": {}, "tasks_to_do": names}
    if extra.output is not None:
        write_json(extra.output, facts)
    for outcome in evaluate_tasks(
        model, tokenizer, extra.tasks, extra.task_data, extra.limit, options.inference.batch_size
    ):
        outcomes.append(outcome)
        names.remove(outcome.task)
        if isinstance(outcome, TaskResult):
            if not facts["tasks"]:
                print(HEADING)
            print(outcome, flush=True)
            facts["tasks"][outcome.task] = outcome.to_dict()
        else:
            facts.setdefault("tasks_left_out", {})[outcome.task] = outcome.reason
        if not names:
            del facts["tasks_to_do"]
        if extra.output is not None:
            write_json(extra.output, facts)
    return outcomes


def _print_perplexity(result: PerplexityResult) -> None:
    interval = ""
    if result.perplexity_interval is not None:
        shown = "{:.4f} to {:.4f}".format(*result.perplexity_interval)
        interval = f"   (95 % over {result.num_documents:,} documents: {shown})"
    print(f"perplexity        {result.perplexity:.4f}{interval}")
    print(f"loss              {result.loss:.4f} nats a token ({result.num_predicted:,} tokens predicted)")
    for name, value in {"word perplexity": result.word_perplexity, "bits per byte": result.bits_per_byte}.items():
        if value is not None:
            print(f"{name:<18}{value:.4f}")
    for group in result.by_match_length:
        name = "no f-gram matched" if group["length"] == 1 else f"f-gram of {group['length']} tokens matched"
        print(f"  {name:<34}{group['num_predicted'] / result.num_predicted:6.1%} of tokens, loss {group['loss']:.4f}")
    print(f"speed             {result.tokens_per_second:,.0f} tokens a second, {result.seconds:.1f} s")


if __name__ == "__main__":
    sys.exit(run_main(main))
