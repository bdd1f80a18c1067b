"""What a run makes once or leaves beside the model: the f-gram vocabulary of its corpus, cached; the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from huggingface_hub import ModelCard, ModelCardData

from scone.configs.schema import DEFAULT_RANKING, DataOptions, SconeOptions
from scone.data.prepare import default_cache_folder
from scone.data.token_file import TokenFile
from scone.models.accounting import parameter_counts
from scone.tokenization.counting import count_f_grams
from scone.tokenization.f_gram_file import FILE_NAME
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.ranking import num_candidates
from scone.utils.errors import SconeError
from scone.utils.files import atomic_path, fingerprint_of, write_json
from scone.utils.text import human_count, parse_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CACHE_VERSION = 2
GAIN_VERSION = "-2"  # of what the candidates are, and their scores
STATISTICS_FILE = "counting.json"


def prepare_vocabulary(
    tokens: TokenFile,
    data: DataOptions,
    *,
    vocab_size: int,
    separator_ids: Sequence[int],
    tokenizer_fingerprint: str,
    quiet: bool = False,
) -> FGramVocabulary:
    """The vocabulary of ``tokens``; from ``data.cache_dir`` where it was counted before, or one that it is the
    beginning of.

    Several processes may ask at once: one counts, the others wait for it. Raises SconeError when no n-gram occurs
    ``data.min_freq`` times.
    """
    max_n, min_freq, max_f_grams, ranking = data.max_n, data.min_freq, data.max_f_grams, data.ranking or DEFAULT_RANKING
    cache_dir = Path(data.cache_dir).expanduser() if data.cache_dir else default_cache_folder()
    key = fingerprint_of(
        f"{CACHE_VERSION} {tokens.fingerprint} {vocab_size} {max_n} {ranking}{GAIN_VERSION * (ranking == 'gain')}",
        " ".join(map(str, sorted(separator_ids))),
        tokenizer_fingerprint,
    )[:24]
    shelf = cache_dir / "vocabularies" / key
    folder = shelf / f"{min_freq}-{max_f_grams}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(shelf / "lock"):
        if not (folder / FILE_NAME).exists():
            vocabulary = truncate_cached_vocabulary(shelf, data)
            if vocabulary is None:
                counted = count_f_grams(
                    [tokens.tokens],
                    vocab_size=vocab_size,
                    max_n=max_n,
                    min_freq=min_freq,
                    max_f_grams=max_f_grams,
                    separator_ids=separator_ids,
                    memory_budget_bytes=parse_bytes(data.memory_budget) if data.memory_budget else None,
                    work_dir=folder / "work",
                    tokenizer_fingerprint=tokenizer_fingerprint,
                    ranking=ranking,
                    quiet=quiet,
                )
                vocabulary = counted.vocabulary
                write_json(folder / STATISTICS_FILE, counted.statistics.to_json())
            if not vocabulary.num_f_grams:
                raise SconeError(
                    f"found no n-gram of 2 to {max_n} tokens that occurs {min_freq} times in {tokens.num_tokens:,} "
                    "tokens; expected at least one f-gram; lower --min_freq or give more text"
                )
            vocabulary.save(folder)
            with suppress(OSError):  # counting leaves it empty
                (folder / "work").rmdir()
    return FGramVocabulary.load(folder)


def truncate_cached_vocabulary(shelf: Path, data: DataOptions) -> FGramVocabulary | None:
    """The vocabulary cut from one on the shelf (of one ranking) whose beginning it is, or None.

    By frequency, the f-grams that occur ``min_freq`` times are a beginning, and so are the first ``max_f_grams``. By
    gain, only the latter, and only where both were chosen from the same candidates.
    """
    min_freq, max_f_grams = data.min_freq, data.max_f_grams
    for file in sorted(shelf.glob(f"*-*/{FILE_NAME}")):
        floor, limit = map(int, file.parent.name.split("-"))
        if floor > min_freq or ranking_of(replace(data, min_freq=floor, max_f_grams=limit)) != ranking_of(data):
            continue
        larger = FGramVocabulary.load(file)
        if limit >= max_f_grams or larger.num_f_grams < limit:  # the latter holds all that reach its floor
            return larger.truncated(min(max_f_grams, int((larger.counts >= min_freq).sum())))
    return None


def ranking_of(data: DataOptions) -> tuple[str | int | None, ...]:
    """Equal for options whose vocabularies, of one corpus and N, are beginnings of one ranking.

    By gain they are where they choose from the same candidates.
    """
    ranking = data.ranking or DEFAULT_RANKING
    return (ranking, data.min_freq, num_candidates(data.max_f_grams)) if ranking == "gain" else (ranking,)


CARD_FILE = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md.j2")


def write_model_card(
    folder: str | Path,
    options: SconeOptions,
    model: PreTrainedModel,
    train_tokens: int,
    steps: int,
    metrics: Mapping[str, float],
) -> Path:
    """Write ``README.md`` into the model's folder, unless somebody wrote one there; returns its path.

    ``train_tokens``: of the training split. ``metrics``: the trainer's last evaluation, empty where there was none.
    """
    path = Path(folder) / CARD_FILE
    made_by = TEMPLATE.read_text(encoding="utf-8").splitlines()[-1]
    if path.exists() and made_by not in path.read_text(encoding="utf-8", errors="replace"):
        return path
    config, data, pretrained = model.config, options.data, options.model.init == "pretrained"
    scone, text_config = hasattr(config, "num_f_grams"), config.get_text_config()
    own: Any = model  # of over-encoding there is none
    ranking = own.vocabulary.ranking if scone else ""
    parameters = parameter_counts(model)  # of rows that are shared out over processes too
    corpus = Path(data.dataset_name).name if Path(data.dataset_name).exists() else data.dataset_name
    limit = options.training.max_eval_tokens
    where = "" if limit is None else f" (first {limit:,} tokens)"
    facts = {
        "parameters of the trunk": human_count(parameters.resident),
        "f-grams": f"{config.num_f_grams:,} of 2 to {config.max_n} tokens, ranked by {ranking}" if ranking else "",
        "learned rows": f"{config.learned_rows:,}" if scone else "",
        "parameters of f-gram model and rows": human_count(parameters.training_only) if scone else "",
        "corpus": " ".join(filter(None, (corpus, data.dataset_config_name))),
        "trained for": f"{steps:,} steps on {train_tokens:,} tokens, {data.max_length:,} a sequence",
        "all options": "`options.yaml`",
        **{
            f"validation {name}{where}": f"{metrics[f'eval_{name}']:.4f}"
            for name in ("loss", "perplexity")
            if f"eval_{name}" in metrics
        },
    }
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["scone", "f-grams"] if scone else ["baseline"],
            base_model=options.model.base_model_name if pretrained else None,
        ),
        template_path=str(TEMPLATE),
        name=Path(options.training.output_dir).name,
        f_grams=f"{config.num_f_grams:,}" if scone else "",
        trunk=f"{text_config.model_type} model, trained from {'pretrained weights' if pretrained else 'scratch'}",
        facts={name: value for name, value in facts.items() if value},
    )
    with atomic_path(path) as temporary:
        temporary.write_text(str(card), encoding="utf-8")
    return path
