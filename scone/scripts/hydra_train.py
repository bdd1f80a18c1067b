"""Train through Hydra's overrides and sweeps: `python -m scone.scripts.hydra_train data.max_n=4 …`."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scone.configs.loading import Layer, flatten, merge, print_notices, suggestion, to_mapping
from scone.configs.schema import SconeOptions, entries
from scone.utils.command_line import describe_error, is_first_process, one_line, run_main
from scone.utils.errors import SconeError, library_refusal

OVERRIDE = "override"
_LONGEST_FOLDER_NAME = 120


def main(argv: Sequence[str] | None = None) -> int:
    """Train once, or once per combination with ``--multirun``; the other jobs go on when one fails.

    Works in every process of torchrun and torch.distributed.launch. Raises SconeError for a bad override, and after
    the last job when jobs failed.
    """
    try:
        run_jobs(sys.argv[1:] if argv is None else argv, _train)
    finally:
        if "RANK" in os.environ:  # a launcher started this process, and others
            from scone.training.distributed import destroy_process_group

            destroy_process_group()
    return 0


def _train(options: SconeOptions) -> None:
    from scone.training.run import train

    final_model = train(options)
    if is_first_process():
        print(f"final model: {final_model}", flush=True)


def run_jobs(argv: Sequence[str], run: Callable[[SconeOptions], None]) -> None:
    """Call ``run`` with the checked options of every job that ``argv`` describes, in order. Raises as :func:`main`."""
    arguments = read_arguments(argv)
    failures: list[tuple[str, Exception]] = []
    jobs = _run_hydra(arguments, run, failures)
    if len(failures) == 1 and jobs == 1:
        raise failures[0][1]
    if failures:
        which = "; ".join(f"[{name}] {describe_error(error)[0]}" for name, error in failures)
        raise SconeError(f"{len(failures)} of {jobs} jobs failed: {which}") from failures[0][1]


def read_arguments(argv: Sequence[str]) -> list[str]:
    """``argv`` without the ``--local-rank`` that torch.distributed.launch adds and Hydra rejects. The trainer reads
    LOCAL_RANK from the environment, where it is put if the launcher did not. Raises SconeError for an unknown option.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--local-rank", "--local_rank", dest="rank")
    known, kept = parser.parse_known_args(list(argv))
    if known.rank is not None:
        os.environ.setdefault("LOCAL_RANK", known.rank)
    for word in kept:  # before Hydra refuses it in its own words
        found = re.fullmatch(r"([A-Za-z_][\w.]*)=.*", word, flags=re.DOTALL)
        if found and found[1] not in entries() and found[1].split(".")[0] != "hydra":
            raise SconeError(f"found the unknown option {found[1]}; {suggestion(found[1])}")
    return kept


def options_of_job(config: dict[str, Any], overrides: Sequence[str]) -> SconeOptions:
    """Checked options of one job. ``config`` is Hydra's composed mapping, ``overrides`` the job's own.

    Only what was overridden counts as given, so that an option's defaults never contradict an override.
    """
    values = flatten(config, "")
    names = {re.sub(r"^\+{0,2}", "", override.partition("=")[0]) for override in overrides}
    defaults = flatten(to_mapping(SconeOptions()), "")
    given = {name: value for name, value in values.items() if name in names or value != defaults[name]}
    options, notices = merge([Layer(OVERRIDE, given)])
    print_notices(notices)
    return options


def job_folder(overrides: Sequence[str], swept: Collection[str]) -> str:
    """A folder name for a job of a sweep, made of what was swept: "data.max_n=3,model.base_model_name=gpt2"."""
    told = [override for override in overrides if override.partition("=")[0] in swept]
    name = re.sub(r"[^\w.=,+-]+", "_", ",".join(sorted(told))).strip("._") or "job"
    if len(name) > _LONGEST_FOLDER_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name[: _LONGEST_FOLDER_NAME - 9]}-{digest}"
    return name


def _run_hydra(arguments: list[str], run: Callable[[SconeOptions], None], failures: list[tuple[str, Exception]]) -> int:
    """Let Hydra run the jobs; returns how many there were and adds to ``failures``."""
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # A plain mapping: a frozen dataclass would become a read-only configuration. Types and bounds are checked by ours.
    ConfigStore.instance().store(name="scone_options", node=to_mapping(SconeOptions()))
    jobs: list[str] = []
    swept = _swept_options(arguments)

    def job(config: DictConfig) -> None:
        settings = HydraConfig.get()
        overrides = list(settings.overrides.task)
        jobs.append(job_folder(overrides, swept or {"training.output_dir"}))
        try:
            container = OmegaConf.to_container(config, resolve=True)
            assert isinstance(container, dict)
            options = options_of_job({str(key): value for key, value in container.items()}, overrides)
            if settings.mode == RunMode.MULTIRUN:
                folder = Path(options.training.output_dir) / job_folder(overrides, swept)
                options = replace(options, training=replace(options.training, output_dir=str(folder)))
            run(options)
        except Exception as error:  # kept for the end: Hydra would print its own report, and stop the sweep
            failures.append((jobs[-1], error))

    entry = hydra.main(version_base="1.3", config_path="pkg://scone.configs", config_name="hydra_config")(job)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra reports errors itself
    argv = sys.argv
    with tempfile.TemporaryDirectory() as scratch:
        # only the first process writes Hydra's own files; the others get a folder that goes away
        sys.argv = [argv[0], *arguments, *([] if is_first_process() else [f"hydra.sweep.dir={scratch}"])]
        try:
            entry()
        except (HydraException, OmegaConfBaseException) as error:
            raise SconeError(f"{one_line(str(error))}; see --help") from error
        finally:
            sys.argv = argv
    return len(jobs)


def _swept_options(arguments: Sequence[str]) -> set[str]:
    """The options that a sweep gives several values; of ``training.output_dir`` each value is a folder already."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = [word for word in arguments if "=" in word and not word.startswith("-")]
    with library_refusal("found overrides that Hydra cannot read", "see --help"):
        overrides = OverridesParser.create().parse_overrides(words)
    return {each.key_or_group for each in overrides if each.is_sweep_override()} - {"training.output_dir"}


if __name__ == "__main__":
    sys.exit(run_main(main))
