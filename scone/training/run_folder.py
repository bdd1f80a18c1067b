"""The folder of a training run: who may write it, where to resume, and whether that checkpoint is this run's."""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from scone.models.learned_rows import LearnedRows
from scone.models.row_files import ROWS_FOLDER, saved_shape
from scone.utils.errors import SconeError, library_refusal
from scone.utils.files import read_json

logger = logging.getLogger(__name__)

OPTIONS_FILE = "options.yaml"
FINAL_MODEL = "final_model"
LOCK_FILE = ".lock"
COMPLETE_MARKER = "complete.json"
# What decides a model's function and does not show in the shapes of its weights, by the names of configurations.
_OF_THE_FUNCTION = (
    *("model_type", "max_n", "combination", "embedding_scale", "separator_ids"),
    *("num_attention_heads", "n_head", "num_key_value_heads", "hidden_act", "activation_function"),
    *("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "own_tokens"),
    # how positions are told apart, and how far attention reaches
    *("rope_type", "rope_theta", "factor", "partial_rotary_factor", "rotary_pct", "rotary_dim", "attention_factor"),
    *("low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "sliding_window", "layer_types"),
    *("tie_word_embeddings", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "use_parallel_residual"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "logit_scale", "logits_scaling"),
    *("attention_multiplier", "embedding_multiplier", "residual_multiplier"),
)
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


def check_resume(checkpoint: Path, model: PreTrainedModel, facts: Mapping[str, str]) -> None:
    """Refuse to train ``model`` on from a checkpoint of another one: weights of one meaning loaded as another's.

    ``facts`` are fingerprints of the run's "tokenizer" and "tokens" (its training split), which checkpoints carry.
    Other training data with the same vocabulary is only warned of: to go on with more text may be what is wanted.
    Raises SconeError naming the first difference.
    """
    noted = read_json(checkpoint / COMPLETE_MARKER)  # checkpoints of older versions hold no fingerprints
    if noted.get("tokenizer", facts["tokenizer"]) != facts["tokenizer"]:
        raise _refusal(checkpoint, f"another tokenizer (fingerprint {facts['tokenizer'][:12]})", noted["tokenizer"])
    saved = read_json(checkpoint / "config.json")
    if saved.get("model_type") != model.config.model_type:
        raise _refusal(checkpoint, f"model_type {model.config.model_type}", str(saved.get("model_type")))
    with library_refusal(f"cannot read {checkpoint / 'config.json'}", "resume from another checkpoint"):
        before = _settings(type(model.config).from_dict(saved))  # defaults for what older versions did not know
    now = _settings(model.config)
    if now.get("vocabulary_fingerprint") != before.get("vocabulary_fingerprint"):
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


def _refusal(checkpoint: Path, found: str, expected: str) -> SconeError:
    return SconeError(
        f"cannot resume from {checkpoint}: found {found}; expected the checkpoint's {expected[:100]}; {_ADVICE}"
    )


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The configuration as a mapping, an f-gram model's settings with its defaults."""
    settings = json.loads(config.to_json_string(use_diff=False))  # JSON has no tuples, a configuration that is made may
    f_gram_model = getattr(config, "f_gram_model_config", None)
    return settings | ({"f_gram_model": f_gram_model.to_dict()} if f_gram_model is not None else {})


def _differences(now: Mapping[str, Any], before: Mapping[str, Any], part: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(now.keys() | before.keys()):
        ours, theirs = now.get(name), before.get(name)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _differences(ours, theirs, f"{part}{name}.")
        elif name in _OF_THE_FUNCTION and ours != theirs:
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
