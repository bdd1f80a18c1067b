"""Check files that SCONE wrote, byte by byte: `scone verify PATH`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from scone.configs.loading import load_options, parse_options
from scone.scripts.arguments import arguments, check_tokenizer
from scone.utils.command_line import run_main
from scone.utils.errors import SconeError, library_refusal
from scone.utils.files import read_json
from scone.utils.progress import hide_library_bars, is_quiet
from scone.utils.text import human_bytes

EXAMPLES = (
    "scone verify ./outputs/scone-model/final_model",
    "scone verify ./outputs/scone-model/embeddings.cache --model_path ./outputs/scone-model/final_model",
)
DESCRIPTION = "Recognise each path (model folder, f-gram vocabulary, embedding table, token file) and check all of it."
ARGUMENTS = arguments(
    "json",
    paths={"positional": True, "nargs": "+", "metavar": "PATH", "help": "what to check"},
    model_path={"metavar": "FOLDER", "help": "model to compare an embedding table with"},
)
VOCABULARY = "f_grams.safetensors"
_HEADER_LIMIT = 1 << 24
_BY_MEMBER = {"config.json": "model", "tokens.json": "tokens", "corpus.json": "corpus"}
_BY_MEMBER |= {VOCABULARY: "vocabulary", "final_model": "run"}
_BY_FORMAT = {"scone-f-gram-vocabulary": "vocabulary", "scone-embedding-table": "table"}
_BY_NAME = {VOCABULARY: "vocabulary", "tokens.npy": "tokens", "tokens.json": "tokens", ".cache": "table"}
read_arguments = partial(
    parse_options, sections=(), description=DESCRIPTION, examples=EXAMPLES, add_arguments=ARGUMENTS
)


def main(argv: Sequence[str] | None = None) -> int:
    """Check every path and print one line per intact file. Raises SconeError at the first damaged one."""
    _, extra = read_arguments(argv)
    found: dict[str, list[str]] = {}
    for path in extra.paths:
        found[path] = verify(Path(path), Path(extra.model_path) if extra.model_path else None)
        if not extra.json and not is_quiet():
            print("\n".join(found[path]), flush=True)
    if extra.json:
        print(json.dumps({"whole": found}, indent=2))
    return 0


def verify(path: Path, model_folder: Path | None = None) -> list[str]:
    """Check what is at ``path``, a table also against ``model_folder``; returns one line per intact part.

    Raises SconeError: nothing of ours, or damaged.
    """
    return [f"{where}: whole: {what}" for where, what in _verified(path, model_folder)]


def _verified(path: Path, model_folder: Path | None = None) -> Iterator[tuple[Path, str]]:
    from scone.data.prepare import splits_of_corpus
    from scone.data.token_file import TokenFile
    from scone.tokenization.f_gram_vocabulary import FGramVocabulary

    kind = _recognise(path)
    if kind == "run":
        yield from _verified_model(path / "final_model")
        for table in sorted(path.glob("*.cache")):
            yield _verified_table(table, path / "final_model")
    elif kind == "model":
        yield from _verified_model(path)
    elif kind == "corpus":
        for split in splits_of_corpus(path):
            yield from _verified(path / split)
    elif kind == "table":
        yield _verified_table(path, model_folder)
    elif kind == "tokens":
        tokens = TokenFile.open(path, check_content=True)
        yield path, f"{tokens.num_tokens:,} tokens in {tokens.num_documents:,} documents"
    else:
        vocabulary = FGramVocabulary.load(path)
        vocabulary.verify()
        yield path, f"{vocabulary.num_f_grams:,} f-grams of up to {vocabulary.longest} tokens"


def _recognise(path: Path) -> str:
    """What is there, by content first and name second. Raises SconeError for anything but ours."""
    if path.is_dir():
        found = next((kind for name, kind in _BY_MEMBER.items() if (path / name).exists()), None)
        what = f"a folder {path} without anything of SCONE"
    elif path.exists():
        found = _BY_FORMAT.get(_stated_format(path)) or _BY_NAME.get(path.name) or _BY_NAME.get(path.suffix)
        what = f"{path}, which states none of SCONE's formats"
    else:
        found, what = None, f"nothing at {path}"
    if found is None:
        raise SconeError(
            f"found {what}; expected a model folder, {VOCABULARY}, an embedding table or a token file; check the path"
        )
    return found


def _stated_format(path: Path) -> str:
    """What the metadata of a safetensors header calls its format; "" where there is none."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size) if size <= _HEADER_LIMIT else b""
    try:
        return str(json.loads(header)["__metadata__"]["format"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def _verified_table(path: Path, model_folder: Path | None) -> tuple[Path, str]:
    """A table, and some of its rows against those of the model that it was made from."""
    from scone.inference.precompute import verify_table

    model = None
    if model_folder:  # a table by itself needs no model's libraries
        from scone.models.language_model import SconeForCausalLM

        hide_library_bars()
        model = SconeForCausalLM.from_pretrained(model_folder)
    check = verify_table(path, model=model)
    row = check.layout.row_format
    compared = f"; {check.sampled_rows:,} of them are the rows of {model_folder}" if model_folder else ""
    return path, f"embedding table, {check.layout.num_rows:,} rows of {row.width} {row.row_type}{compared}"


def _verified_model(folder: Path) -> Iterator[tuple[Path, str]]:
    """A model folder: weights, f-gram vocabulary, tokenizer and options, each by itself and that they fit together."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise SconeError(f"found {folder / 'config.json'} without a configuration; expected an object; copy it again")
    yield folder, _verified_weights(folder)
    import scone.models.language_model  # noqa: F401 (registers itself: else AutoTokenizer asks to run the folder's code)
    from scone.inference.loading import load_model
    from scone.tokenization.f_gram_vocabulary import FGramVocabulary
    from scone.tokenization.tokenizers import load_tokenizer

    with library_refusal(f"cannot use the tokenizer in {folder}", "copy it again"):
        tokenizer = load_tokenizer(folder)
    yield folder, "tokenizer"
    if config.get("num_f_grams"):
        yield from _verified(folder / VOCABULARY)
        vocabulary, again = FGramVocabulary.load(folder), "copy the whole folder again"
        expected = config.get("vocabulary_fingerprint")
        if expected and vocabulary.fingerprint != expected:
            raise SconeError(f"{folder}: the f-gram vocabulary does not fit the model's configuration; {again}")
        check_tokenizer(tokenizer, vocabulary, again)
    # the weights are those of the model that config.json speaks of: none missing, none of another shape
    parameters = sum(parameter.numel() for parameter in load_model(folder, device="cpu").model.parameters())
    yield folder, f"model, {parameters:,} parameters"
    if (folder / "options.yaml").exists():
        load_options(folder / "options.yaml")
        yield folder / "options.yaml", "options"


def _verified_weights(folder: Path) -> str:
    """Every tensor of every weight file is readable and finite."""
    from safetensors import safe_open

    files = sorted(file for file in folder.glob("*.safetensors") if file.name != VOCABULARY)
    if not files:
        raise SconeError(f"found no weights in {folder}; expected model.safetensors; copy the whole folder again")
    tensors = 0
    for file in files:
        with library_refusal(f"found damaged weights {file}", "copy them again"), safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is no dictionary)
                if not bool(weights.get_tensor(name).isfinite().all()):
                    raise SconeError(f"{file}: the tensor {name} is not finite; expected numbers; train again")
                tensors += 1
    return f"weights, {tensors} tensors, {human_bytes(sum(file.stat().st_size for file in files))}"


if __name__ == "__main__":
    sys.exit(run_main(main))
