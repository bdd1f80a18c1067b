"""Train through Hydra's overrides and sweeps: `python -m scone.scripts.hydra_train data.max_n=4 …`."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from scone.configs.loading import Layer, flatten, merge, print_notices, suggestion, to_mapping
from scone.configs.schema import SconeOptions
from scone.configs.values import entries
from scone.utils.command_line import describe_error, is_first_process, one_line, run_main
from scone.utils.errors import SconeError

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
            from scone.training.processes import destroy_process_group

            destroy_process_group()
    return 0


def _train(options: SconeOptions) -> None:
    from scone.training.run import train

    final_model = train(options)
    if is_first_process():
        print(f"final model: {final_model}", flush=True)


def run_jobs(argv: Sequence[str], run: Callable[[SconeOptions], None]) -> None:
    """Call ``run`` with the checked options of every job that ``argv`` describes, in order. Raises as :func:`main`."""
    arguments = without_local_rank(argv)
    check_override_names(arguments)
    failures: list[tuple[str, Exception]] = []
    jobs = _run_hydra(arguments, run, failures)
    if len(failures) == 1 and jobs == 1:
        raise failures[0][1]
    if failures:
        which = "; ".join(f"[{name}] {describe_error(error)[0]}" for name, error in failures)
        raise SconeError(f"{len(failures)} of {jobs} jobs failed: {which}") from failures[0][1]


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """``argv`` without the ``--local-rank N`` that torch.distributed.launch adds and Hydra rejects.

    The trainer reads LOCAL_RANK from the environment, where it is put if the launcher did not.
    """
    kept: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        found = re.fullmatch(r"--local[-_]rank(?:=(\d+))?", word)
        if found:
            rank = found[1] or (words.pop(0) if words else "0")
            os.environ.setdefault("LOCAL_RANK", rank)
        else:
            kept.append(word)
    return kept


def check_override_names(argv: Sequence[str]) -> None:
    """Refuse an override of an unknown option with the nearest known one, before Hydra does it in its own words."""
    for word in argv:
        found = re.fullmatch(r"([A-Za-z_][\w.]*)=.*", word, flags=re.DOTALL)
        if found and found[1] not in entries() and found[1].split(".")[0] != "hydra":
            raise SconeError(f"found the unknown option {found[1]}; {suggestion(found[1])}")


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
        jobs.append(", ".join(overrides))
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
    with tempfile.TemporaryDirectory() as scratch, _process_state([*arguments, *_rank_overrides(scratch)]):
        try:
            entry()
        except (HydraException, OmegaConfBaseException) as error:
            raise SconeError(f"{one_line(str(error))}; see --help") from error
    return len(jobs)


def _swept_options(arguments: Sequence[str]) -> set[str]:
    """The options that a sweep gives several values; of ``training.output_dir`` each value is a folder already."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    words = [word for word in arguments if "=" in word and not word.startswith("-")]
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except OverrideParseException as error:
        raise SconeError(f"{one_line(str(error))}; see --help") from error
    return {each.key_or_group for each in overrides if each.is_sweep_override()} - {"training.output_dir"}


def _rank_overrides(scratch: str) -> list[str]:
    """Only the first process writes Hydra's own files; the others get a folder that goes away."""
    return [] if is_first_process() else [f"hydra.sweep.dir={scratch}"]


@contextmanager
def _process_state(arguments: list[str]) -> Iterator[None]:
    """Hydra reads the process's arguments, and reports errors itself unless told not to."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0] or "hydra_train", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


if __name__ == "__main__":
    sys.exit(run_main(main))
