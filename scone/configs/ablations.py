"""Ablations by name: each changes one choice of a base configuration, and says which values to try in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from scone.configs.schema import SMALLEST_ROWS_LEARNING_RATE, SconeOptions

Runs = Mapping[str, Mapping[str, Any]]
"""Run name → dotted option → value."""


_MODEL, _ROWS = "an f-gram model", "learned rows"
_SIZES = "--f_gram_hidden_size, --f_gram_num_hidden_layers and --f_gram_num_attention_heads"


@dataclass(frozen=True)
class Ablation:
    """What is tried (``help``), the runs for a base configuration, and the part that a base must have for them."""

    help: str
    runs: Callable[[SconeOptions], Runs]
    needs: str | None = None

    def missing(self, base: SconeOptions) -> str | None:
        """The part that ``base`` lacks, None where the ablation applies."""
        sizes = base.model.f_gram
        has = {
            _MODEL: base.model.f_gram.num_hidden_layers != 0,
            _ROWS: base.model.learned_rows > 0,
            _SIZES: all((sizes.hidden_size, sizes.num_hidden_layers, sizes.num_attention_heads)),
        }
        return None if self.needs is None or has[self.needs] else self.needs


def _baselines(base: SconeOptions) -> Runs:
    most = min(base.model.learned_rows, base.data.max_f_grams) or base.data.max_f_grams
    runs: dict[str, Mapping[str, Any]] = {"over-encoding": {"model.over_encoding_rows": most}}
    if base.model.learned_rows and base.model.f_gram.num_hidden_layers != 0:
        runs["model-only"] = {"model.learned_rows": 0}
        runs["rows-only"] = {"model.f_gram.num_hidden_layers": 0}
    return runs


def _starts(base: SconeOptions) -> Runs:
    replaced = {"model.combination": "replace", "model.f_gram.output_norm": False}
    return {
        "start-random": {"model.f_gram.start": "random"},
        "start-identity": replaced | {"model.f_gram.start": "identity"},
    }


def _combinations(base: SconeOptions) -> Runs:
    others = ["add", "gate"] if base.model.f_gram.num_hidden_layers == 0 else ["add", "replace", "gate"]
    return {f"combination-{one}": {"model.combination": one} for one in others if one != base.model.combination}


def _scales(base: SconeOptions) -> Runs:
    plain = {"model.use_f_gram_embeddings": False}
    return {
        f"{name}scale-{factor:g}": part | {"model.embedding_scale": factor}
        for factor in (2.0, 4.0, 8.0)
        for name, part in (("", {}), ("plain-", plain))
    }


def _rows(base: SconeOptions) -> Runs:
    most = min(base.model.learned_rows, base.data.max_f_grams)
    return {f"rows-{most // part}": {"model.learned_rows": most // part} for part in (3, 10, 30) if most >= part}


def _sizes(base: SconeOptions) -> Runs:
    sizes = [base.data.max_f_grams // part for part in (3, 10, 30)]
    return {f"s-{size}": {"data.max_f_grams": size} for size in sizes if size}


def _lengths(base: SconeOptions) -> Runs:
    return {f"n-{length}": {"data.max_n": length} for length in (2, 3, 4, 5, 8) if length != base.data.max_n}


def _depths(base: SconeOptions) -> Runs:
    """About equal operations (layers × width²): one layer wide, four times as many layers at half the width; and more
    of the same width. Heads go with the width.
    """
    sizes = base.model.f_gram
    assert sizes.hidden_size is not None
    assert sizes.num_hidden_layers is not None
    assert sizes.num_attention_heads is not None
    width, layers = sizes.hidden_size, sizes.num_hidden_layers
    heads = sizes.num_attention_heads

    def shape(name: str, more_layers: float, wider: float) -> Runs:
        new_heads = max(1, round(heads * wider))
        new_width = round(width * wider / new_heads) * new_heads
        values = (round(layers * more_layers), new_width, new_heads, 4 * new_width)
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        return {name: {f"model.f_gram.{option}": value for option, value in zip(names, values, strict=True)}}

    wide = shape("f-gram-1-layer-wide", 1 / layers, layers**0.5) if layers > 1 else {}
    return {**wide, **shape("f-gram-deep-narrow", 4, 0.5), **shape("f-gram-2x-deeper", 2, 1)}


def _rates(option: str, rate: float, name: str) -> Runs:
    return {f"{name}-lr-x{factor}": {option: float(f"{rate * factor:.3g}")} for factor in (0.3, 3)}


def _f_gram_rates(base: SconeOptions) -> Runs:
    rate = base.training.f_gram_learning_rate
    option = "training.f_gram_learning_rate"
    return _rates(option, base.training.learning_rate if rate is None else rate, "f-gram")


def _row_rates(base: SconeOptions) -> Runs:
    rate = base.training.rows_learning_rate
    default = max(base.training.learning_rate, SMALLEST_ROWS_LEARNING_RATE)
    return _rates("training.rows_learning_rate", default if rate is None else rate, "rows")


ABLATIONS: Mapping[str, Ablation] = {
    "baselines": Ablation("over-encoding with as many rows; f-gram model or learned rows alone", _baselines),
    "controls": Ablation(
        "every f-gram takes the vector of another one of its length, or all that of one",
        lambda base: {f"control-{one}": {"model.control": one} for one in ("shuffled", "single")},
    ),
    "start": Ablation("a random start of the f-gram model, or the identity", _starts, _MODEL),
    "combination": Ablation("replacing the token embedding, or gating the correction", _combinations),
    "scale": Ablation("larger input vectors against the position embeddings, for plain too", _scales),
    "rows": Ablation("learned rows for fewer of the most frequent f-grams", _rows, _ROWS),
    "backoff": Ablation(
        "the longest f-gram's row, or the sum over its suffixes",
        lambda base: {
            "no-backoff" if base.model.rows_backoff else "backoff": {"model.rows_backoff": not base.model.rows_backoff}
        },
        _ROWS,
    ),
    "output": Ablation(
        "the f-gram model's vector without its norm, without its gain",
        lambda base: {"no-norm": {"model.f_gram.output_norm": False}, "no-gain": {"model.f_gram.output_gain": False}},
        _MODEL,
    ),
    "token_embeddings": Ablation(
        "token embeddings of the f-gram model's own",
        lambda base: {"own-tokens": {"model.f_gram.token_embeddings": "separate"}},
        _MODEL,
    ),
    "max_f_grams": Ablation("fewer f-grams", _sizes),
    "max_n": Ablation("shorter and longer f-grams", _lengths),
    "min_freq": Ablation(
        "only f-grams that occur 4 and 16 times as often",
        lambda base: {
            f"min-freq-{base.data.min_freq * more}": {"data.min_freq": base.data.min_freq * more} for more in (4, 16)
        },
    ),
    "depth": Ablation(
        "an f-gram model that is shallow and wide, deep and narrow, or deeper",
        _depths,
        _SIZES,
    ),
    "f_gram_learning_rate": Ablation("0.3 and 3 times the f-gram model's learning rate", _f_gram_rates, _MODEL),
    "rows_learning_rate": Ablation("0.3 and 3 times the rows' learning rate", _row_rates, _ROWS),
}
"""By name, as ``scone ablate --ablations`` takes them."""
