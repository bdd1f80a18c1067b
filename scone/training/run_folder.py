"""The folder of a training run: who may write it, where to resume, and whether that checkpoint is this run's."""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from scone.configs.schema import SconeOptions
from scone.models.learned_rows import LearnedRows
from scone.models.row_files import ROWS_FOLDER, saved_shape
from scone.tokenization.f_gram_file import file_of
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.utils.errors import SconeError, library_refusal
from scone.utils.files import read_json

logger = logging.getLogger(__name__)

OPTIONS_FILE = "options.yaml"
FINAL_MODEL = "final_model"
LOCK_FILE = ".lock"
COMPLETE_MARKER = "complete.json"
_NOT_OF_THE_FUNCTION = (
    # what every configuration has: names, labels, what is given back, and the type of weights
    *(name for name in PreTrainedConfig().to_dict() if name not in ("model_type", "tie_word_embeddings")),
    *("use_cache", "rows_dtype", "vocab_size"),  # the shapes of weights tell the vocabulary's size
    # of training alone
    *("output_router_logits", "router_aux_loss_coef", "aux_loss_coef", "router_jitter_noise", "input_jitter_noise"),
)
_NOT_OF_THE_FUNCTION_BY_PART = ("drop", "token_id", "initializer", "init_std")
"""Parts of names in configurations whose values may change when a run is resumed. All others decide what the weights
compute: architectures have some 600 names for that, and new ones come with every version of transformers.
"""
_ADVICE = "give the corpus and the options that the run began with, or start anew with another --output_dir"


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


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folders = [path.parent for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE_MARKER}")]
    return sorted(folders, key=lambda folder: int(folder.name.rsplit("-", 1)[1]))


def as_begun(options: SconeOptions, checkpoint: Path | None) -> SconeOptions:
    """The same options, with the ranking of f-grams that the run began with where they name none."""
    if checkpoint is None or options.data.ranking is not None or not file_of(checkpoint).exists():
        return options
    return replace(options, data=replace(options.data, ranking=FGramVocabulary.load(checkpoint).ranking))


def check_resume(checkpoint: Path, model: PreTrainedModel, facts: Mapping[str, str]) -> None:
    """Refuse to train ``model`` on from a checkpoint of another one: weights of one meaning loaded as another's.

    ``facts`` are fingerprints of the run's "tokenizer" and "tokens" (its training split), which checkpoints carry.
    Other training data with the same vocabulary is only warned of: to go on with more text may be what is wanted.
    Raises SconeError naming the first difference.
    """
    noted = read_json(checkpoint / COMPLETE_MARKER)  # checkpoints of older versions hold no fingerprints
    if noted.get("tokenizer", facts["tokenizer"]) != facts["tokenizer"]:
        raise _refusal(checkpoint, f"another tokenizer (fingerprint {facts['tokenizer'][:12]})", noted["tokenizer"])
    before, now = _saved_settings(checkpoint, type(model.config)), _settings(model.config)
    if now.get("vocabulary_fingerprint") != before.get("vocabulary_fingerprint"):
        own: Any = model.vocabulary
        ranking = FGramVocabulary.load(checkpoint).ranking
        if own.ranking != ranking:  # of a run that was begun before there were two, for one
            raise SconeError(
                f"cannot resume from {checkpoint}: found f-grams ranked by {own.ranking}; expected the checkpoint's, "
                f"ranked by {ranking}; give --ranking {ranking}"
            )
        raise SconeError(
            f"cannot resume from {checkpoint}: corpus and options give other f-grams (found {now['num_f_grams']:,}, "
            f"fingerprint {now['vocabulary_fingerprint'][:12]}; expected {before['num_f_grams']:,}, fingerprint "
            f"{before['vocabulary_fingerprint'][:12]}), so what was learned of one f-gram would become another's; "
            f"{_ADVICE}"
        )
    for name, value, expected in _differences(now, before):
        raise _refusal(checkpoint, f"{name} {value}", str(expected))
    for name, shape, expected in _other_weights(checkpoint, model):
        raise _refusal(checkpoint, f"{name} {shape}", expected)
    if noted.get("tokens", facts["tokens"]) != facts["tokens"]:
        logger.warning(
            "the training split differs from the one that %s was trained on: training continues on the new one, in its "
            "own order",
            checkpoint.name,
        )


def check_kind(checkpoint: Path, kind: type[PreTrainedConfig], trunk: PreTrainedConfig) -> None:
    """The part of `check_resume` that needs no corpus: refuse a checkpoint of a model that is not of this ``kind``, or
    around another trunk. Raises SconeError.
    """
    before = _saved_settings(checkpoint, kind)
    part = "text_config." if "text_config" in before else ""
    for name, value, expected in _differences(_settings(trunk), before.get("text_config", before), part):
        if not name.endswith("tie_word_embeddings"):  # pretrained weights may say otherwise when they are read
            raise _refusal(checkpoint, f"{name} {value}", str(expected))


def _saved_settings(checkpoint: Path, kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """A checkpoint's configuration, with defaults for what older versions did not know. Raises SconeError for one that
    cannot be read, or is of another kind.
    """
    saved = read_json(checkpoint / "config.json")
    if saved.get("model_type") != kind.model_type:
        raise _refusal(checkpoint, f"model_type {kind.model_type}", str(saved.get("model_type")))
    with library_refusal(f"cannot read {checkpoint / 'config.json'}", "resume from another checkpoint"):
        return _settings(kind.from_dict(saved))


def _refusal(checkpoint: Path, found: str, expected: str) -> SconeError:
    return SconeError(
        f"cannot resume from {checkpoint}: found {found}; expected the checkpoint's {expected[:100]}; {_ADVICE}"
    )


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The configuration as a mapping, read back as from a file, an f-gram model's settings with its defaults."""
    config = type(config).from_dict(json.loads(config.to_json_string()))  # some are another then: None to a default
    settings = json.loads(config.to_json_string(use_diff=False))  # JSON has no tuples, a configuration that is made may
    f_gram_model = getattr(config, "f_gram_model_config", None)
    return settings | ({"f_gram_model": f_gram_model.to_dict()} if f_gram_model is not None else {})


def _differences(now: Mapping[str, Any], before: Mapping[str, Any], part: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What differs of the function, as (name, now, before)."""
    # a configuration has defaults for all that it knows: what one of the two lacks is another version's
    names = now.keys() & before.keys() if "model_type" in now else now.keys() | before.keys()
    for name in sorted(names - set(_NOT_OF_THE_FUNCTION)):
        if any(each in name for each in _NOT_OF_THE_FUNCTION_BY_PART):
            continue
        ours, theirs = now.get(name), before.get(name)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _differences(ours, theirs, f"{part}{name}.")
        elif ours != theirs:
            yield f"{part}{name}", ours, theirs


def _other_weights(checkpoint: Path, model: PreTrainedModel) -> Iterator[tuple[str, Any, str]]:
    """Weights that are missing, left over or of another shape; those that are tied are saved once."""
    ours = model.state_dict()
    saved: dict[str, tuple[int, ...]] = {}
    for path in sorted(checkpoint.glob("model*.safetensors")):
        with library_refusal(f"cannot read {path}", "resume from another checkpoint"), safe_open(path, "pt") as file:
            saved |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    shares = checkpoint / ROWS_FOLDER
    if shares.exists():
        with library_refusal(f"cannot read {shares}", "resume from another checkpoint"):
            shape = saved_shape(shares)
        saved |= {f"{name}.weight": shape for name, part in model.named_modules() if isinstance(part, LearnedRows)}
    present = {ours[name].data_ptr() for name in saved if name in ours}
    for name, shape in saved.items():
        if name not in ours:
            yield "no weights", name, f"{name} {shape}"
        elif tuple(ours[name].shape) != shape:
            yield name, tuple(ours[name].shape), str(shape)
    for name, tensor in ours.items():
        if name not in saved and tensor.data_ptr() not in present:
            yield name, tuple(tensor.shape), "weights, which have none of that name"
