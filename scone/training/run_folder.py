"""The folder of a training run: who may write it, and where to resume."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scone.training.trainer import complete_checkpoints
from scone.utils.errors import SconeError

OPTIONS_FILE = "options.yaml"
FINAL_MODEL = "final_model"
LOCK_FILE = ".lock"


@contextmanager
def one_run_at_a_time(output_dir: Path) -> Iterator[None]:
    """Lock the folder against other runs inside the block. Raises SconeError if another run holds it.

    The lock is the process's own: it ends with it, however it ends, and workers that outlive it do not hold it.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / LOCK_FILE).open("w", encoding="ascii") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise SconeError(
                f"found another run that is writing to {output_dir}; expected one at a time; wait for it, or choose "
                "another --output_dir"
            ) from None
        except OSError:  # some network file systems have no locks
            pass
        yield


def resume_point(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint to resume from; None for a fresh start.

    Raises SconeError when the folder holds something that a fresh start would mix with or overwrite, or the checkpoint
    asked for is not there.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise SconeError(f"found a file at {output_dir}; expected a folder; choose another --output_dir")
    checkpoints = complete_checkpoints(output_dir)
    if resume_from_checkpoint is None or resume_from_checkpoint.lower() == "false":
        _refuse_foreign_content(output_dir, checkpoints)
        return None
    if resume_from_checkpoint.lower() != "true":
        return _named_checkpoint(Path(resume_from_checkpoint))
    if not checkpoints and (output_dir / FINAL_MODEL).exists():
        raise SconeError(
            f"found a finished model but no checkpoint in {output_dir}; expected a checkpoint to resume from; "
            "choose another --output_dir to train anew"
        )
    if not checkpoints:
        _refuse_foreign_content(output_dir, checkpoints)
    return checkpoints[-1] if checkpoints else None


def _refuse_foreign_content(output_dir: Path, checkpoints: list[Path]) -> None:
    content = {path.name for path in output_dir.iterdir()} if output_dir.is_dir() else set()
    content -= {name for name in content if name.startswith(f".{OPTIONS_FILE}.")}  # left by a kill at the very start
    content -= {LOCK_FILE, ".hydra", "runs", "logs"} | {name for name in content if name.endswith(".log")}
    if not content:
        return
    if OPTIONS_FILE not in content:
        raise SconeError(
            f"{output_dir} holds something else (found {', '.join(sorted(content)[:3])}); expected an empty folder "
            "or an earlier run; choose another --output_dir"
        )
    if FINAL_MODEL in content:
        raise SconeError(
            f"{output_dir} holds a finished run; expected an empty folder; choose another --output_dir, or delete it"
        )
    if checkpoints:
        raise SconeError(
            f"{output_dir} holds an unfinished run (up to {checkpoints[-1].name}); expected --resume_from_checkpoint; "
            "add it to go on, or choose another --output_dir"
        )


def _named_checkpoint(folder: Path) -> Path:
    state = folder / "trainer_state.json"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SconeError(
            f"{folder} is no complete checkpoint ({state.name} cannot be read); expected a checkpoint-N folder; "
            "check --resume_from_checkpoint"
        ) from error
    return folder
