"""Train several f-gram configurations on one corpus: `scone train-configurations --configs small-100k medium-500k`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scone.configs.loading import Layer, get_option, load_options, merge, parse_layers, print_notices, save_options
from scone.configs.presets import F_GRAM_CONFIGURATIONS
from scone.configs.schema import SconeOptions, entries
from scone.scripts.arguments import arguments, number, switch
from scone.utils.command_line import did_you_mean, run_main
from scone.utils.errors import SconeError

DESCRIPTION = """\
Train one model per named configuration, each in OUTPUT_DIR/scone-NAME/final_model. The corpus is tokenised once
and counted once, by gain once for each min_freq. A configuration fixes the f-gram model's sizes, max_n, min_freq and
max_f_grams; it overrides a --config file, and flags override it. Finished configurations are kept: after an
interruption run the same command again.
`scone benchmark` compares what was trained."""
EXAMPLES = (
    "scone train-configurations --base_model_name gpt2 --output_dir ./outputs --configs small-100k medium-100k",
    "scone train-configurations --distributed --num_gpus 4 --fp16 --configs medium-100k medium-500k",
)
ARGUMENTS = arguments(
    configs={"nargs": "+", "default": [], "metavar": "NAME", "help": f"some of {', '.join(F_GRAM_CONFIGURATIONS)}"},
    distributed=switch("train in several processes, one per GPU"),
    num_gpus=number(1, "number of processes (default: one per GPU)"),
)
DEFAULTS = {"training.output_dir": "./outputs"}
_MAY_CHANGE = ("training.resume_from_checkpoint", "training.output_dir", "training.device", "data.num_workers")


def read_arguments(argv: Sequence[str] | None) -> tuple[dict[str, SconeOptions], argparse.Namespace]:
    """The options of every configuration that was named, in that order, and the script's own arguments.

    Raises SconeError.
    """
    layers, extra = parse_layers(
        argv, ("data", "model", "training"), DESCRIPTION, examples=EXAMPLES, add_arguments=ARGUMENTS, defaults=DEFAULTS
    )
    if not extra.configs:
        raise SconeError(f"found no --configs; expected one or more of {', '.join(F_GRAM_CONFIGURATIONS)}")
    *files, flags = layers
    options_of: dict[str, SconeOptions] = {}
    for name in extra.configs:
        if name not in F_GRAM_CONFIGURATIONS:
            advice = did_you_mean(name, F_GRAM_CONFIGURATIONS) or f"expected {', '.join(F_GRAM_CONFIGURATIONS)}"
            raise SconeError(f"--configs: found the unknown configuration {name}; {advice}")
        preset = Layer(f"configuration {name}", F_GRAM_CONFIGURATIONS[name])
        merged, notices = merge([*files, preset, flags], DEFAULTS)
        folder = Path(merged.training.output_dir) / f"scone-{name}"
        options_of[name] = replace(merged, training=replace(merged.training, output_dir=str(folder)))
    fixed = F_GRAM_CONFIGURATIONS[extra.configs[0]]
    replaced = [f"--{entries()[name].flag} {value}" for name, value in flags.values.items() if name in fixed]
    notices += [f"{', '.join(replaced)}: used instead of what the configurations say"] if replaced else []
    print_notices(notices)
    return options_of, extra


def main(argv: Sequence[str] | None = None) -> int:
    """Train the unfinished configurations and print the models' paths."""
    options_of, extra = read_arguments(argv)
    processes = _processes(extra) if extra.distributed else 1
    waiting = [options for name, options in options_of.items() if not is_finished(name, options)]
    if len(waiting) > 1 and waiting[0].model.use_f_gram_embeddings:
        from scone.evaluation.sweep import count_once
        from scone.training.options import check_model, check_training
        from scone.training.run import prepare_run_corpus

        for options in waiting:  # before anything is counted
            check_training(options.training)
            check_model(options)
        count_once(waiting, prepare_run_corpus(waiting[0]), num_processes=processes)
    for position, (name, options) in enumerate(options_of.items(), start=1):
        print(f"[{position}/{len(options_of)}] scone-{name}", flush=True)
        if options in waiting:
            train_one(name, options, processes)
        else:
            print(f"final model: {Path(options.training.output_dir) / 'final_model'} (finished before)", flush=True)
    return 0


def is_finished(name: str, options: SconeOptions) -> bool:
    """Whether the configuration's final model exists.

    Raises SconeError when its folder holds a run, finished or not, with other options.
    """
    folder = Path(options.training.output_dir)
    if (folder / "options.yaml").is_file():
        before = load_options(folder / "options.yaml")
        for option in entries():
            old, new = get_option(before, option), get_option(options, option)
            follows = option == "data.ranking" and new is None  # as `train` has it: what the run began with
            if old != new and option not in _MAY_CHANGE and not follows:
                raise SconeError(
                    f"found {folder}, begun with {option} {old}; expected {new}; "
                    f"choose another --output_dir, or remove the folder to train {name} again"
                )
    return (folder / "final_model" / "options.yaml").is_file()  # the last file that a run writes


def train_one(name: str, options: SconeOptions, processes: int) -> None:
    """Train one configuration from its newest checkpoint, here or in ``processes`` processes of torch.distributed.run.

    Raises SconeError when those fail.
    """
    if processes == 1:
        from scone.evaluation.sweep import train_or_resume

        print(f"final model: {train_or_resume(options)}", flush=True)
        return
    resume = options.training.resume_from_checkpoint or "true"
    options = replace(options, training=replace(options.training, resume_from_checkpoint=resume))
    path = Path(options.training.output_dir).with_suffix(".yaml")
    save_options(options, path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    status = subprocess.run([*launch, "-m", "scone.scripts.train", "--config", str(path)], check=False).returncode
    if status:
        raise SconeError(
            f"training scone-{name} in {processes} processes ended with status {status} (its error is above); "
            "finished configurations are kept; mend it and run the same command again"
        )


def _processes(extra: argparse.Namespace) -> int:
    """How many processes to start; on a machine without GPUs they train on the CPU."""
    import torch

    if "WORLD_SIZE" in os.environ:
        raise SconeError(
            "found --distributed inside a distributed launch; expected one of them; "
            "leave --distributed or the launcher out"
        )
    available = torch.cuda.device_count()
    wanted = extra.num_gpus if extra.num_gpus is not None else max(1, available)
    if available == 0:
        print_notices([f"this machine has no GPU: {wanted} processes train on its CPU"])
    elif wanted > available:
        raise SconeError(f"--num_gpus: found {wanted}; expected at most {available}, the GPUs of this machine")
    return wanted


if __name__ == "__main__":
    sys.exit(run_main(main))
