"""Check files that SCONE wrote, byte by byte: `scone verify PATH`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from scone.configs.loading import load_options, parse_options
from scone.scripts.arguments import add_shared
from scone.utils.command_line import run_main
from scone.utils.errors import SconeError, library_refusal
from scone.utils.files import read_json
from scone.utils.progress import is_quiet
from scone.utils.text import human_bytes

EXAMPLES = (
    "scone verify ./outputs/scone-model/final_model",
    "scone verify ./outputs/scone-model/embeddings.cache --model_path ./outputs/scone-model/final_model",
)
_HEADER_LIMIT = 1 << 24
_EXPECTED = "expected a model folder, f_grams.safetensors, an embedding table or a token file"


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The paths to check. Raises SconeError."""
    _, extra = parse_options(
        argv,
        (),
        "Recognise each path (model folder, f-gram vocabulary, embedding table, token file) and check all its content.",
        examples=EXAMPLES,
        add_arguments=_add_arguments,
        config_flag=False,
    )
    return extra


def main(argv: Sequence[str] | None = None) -> int:
    """Check every path and print one line per intact file. Raises SconeError at the first damaged one."""
    extra = read_arguments(argv)
    found: dict[str, list[str]] = {}
    for path in map(Path, extra.paths):
        found[str(path)] = verify(path, Path(extra.model_path) if extra.model_path else None)
        if not extra.json and not is_quiet():
            print("\n".join(found[str(path)]), flush=True)
    if extra.json:
        print(json.dumps({"whole": found}, indent=2))
    return 0


def verify(path: Path, model_folder: Path | None = None) -> list[str]:
    """Check what is at ``path``, a table also against ``model_folder``; returns one line per intact part.

    Raises SconeError.
    """
    if not path.exists():
        raise SconeError(f"found nothing at {path}; {_EXPECTED}; check the path")
    kind = recognise(path)
    return _verify_table(path, model_folder) if kind == "table" else _VERIFIERS[kind](path)


def recognise(path: Path) -> str:
    """ "model", "run", "vocabulary", "table", "tokens" or "corpus", by content first and name second.

    Raises SconeError for anything else.
    """
    if path.is_dir():
        found = next((kind for name, kind in _BY_MEMBER.items() if (path / name).exists()), None)
        what = f"a folder {path} without anything of SCONE"
    else:
        found = _BY_FORMAT.get(_stated_format(path)) or _BY_NAME.get(path.name) or _BY_NAME.get(path.suffix)
        what = f"{path}, which states none of SCONE's formats"
    if found is None:
        raise SconeError(f"found {what}; {_EXPECTED}; check the path")
    return found


_BY_MEMBER = {"config.json": "model", "tokens.json": "tokens", "corpus.json": "corpus"}
_BY_MEMBER |= {"f_grams.safetensors": "vocabulary", "final_model": "run"}
_BY_FORMAT = {"scone-f-gram-vocabulary": "vocabulary", "scone-embedding-table": "table"}
_BY_NAME = {"f_grams.safetensors": "vocabulary", "tokens.npy": "tokens", "tokens.json": "tokens", ".cache": "table"}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="what to check")
    add_shared(parser, "json")
    parser.add_argument("--model_path", metavar="FOLDER", help="model to compare an embedding table with")


def _stated_format(path: Path) -> str:
    """What the metadata of a safetensors header calls its format; "" where there is none."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size) if size <= _HEADER_LIMIT else b""
    try:
        return str(json.loads(header)["__metadata__"]["format"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def _verify_vocabulary(path: Path) -> list[str]:
    from scone.tokenization.f_gram_vocabulary import FGramVocabulary

    vocabulary = FGramVocabulary.load(path)
    vocabulary.verify()
    return [f"{path}: whole: {vocabulary.num_f_grams:,} f-grams of up to {vocabulary.longest} tokens"]


def _verify_table(path: Path, model_folder: Path | None = None) -> list[str]:
    """A table, and some of its rows against those of the model that it was made from."""
    from scone.inference.table_check import verify_table

    model = None
    if model_folder:  # a table by itself needs no model's libraries
        from scone.models.language_model import SconeForCausalLM
        from scone.utils.progress import hide_library_bars

        hide_library_bars()
        model = SconeForCausalLM.from_pretrained(model_folder)
    check = verify_table(path, model=model)
    row, compared = check.layout.row_format, ""
    if model_folder:
        compared = f"; {check.sampled_rows:,} of them are the rows of {model_folder}"
    return [f"{path}: whole: embedding table, {check.layout.num_rows:,} rows of {row.width} {row.row_type}{compared}"]


def _verify_tokens(path: Path) -> list[str]:
    from scone.data.token_file import TokenFile

    tokens = TokenFile.open(path, check_content=True)
    return [f"{path}: whole: {tokens.num_tokens:,} tokens in {tokens.num_documents:,} documents"]


def _verify_corpus(path: Path) -> list[str]:
    from scone.data.prepare import splits_of_corpus

    return [line for split in splits_of_corpus(path) for line in _verify_tokens(path / split)]


def _verify_run(path: Path) -> list[str]:
    model = path / "final_model"
    tables = [line for table in sorted(path.glob("*.cache")) for line in _verify_table(table, model)]
    return _verify_model(model) + tables


def _verify_model(folder: Path) -> list[str]:
    """A model folder: weights, f-gram vocabulary, tokenizer and options, each by itself and that they fit together."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise SconeError(f"found {folder / 'config.json'} without a configuration; expected an object; copy it again")
    lines = [_verify_weights(folder)]
    import scone.models.language_model  # noqa: F401 (registers itself: else AutoTokenizer asks to run the folder's code)
    from scone.inference.loading import load_model
    from scone.tokenization.f_gram_vocabulary import FGramVocabulary
    from scone.tokenization.tokenizers import load_tokenizer, tokenizer_fingerprint

    with library_refusal(f"cannot use the tokenizer in {folder}", "copy it again"):
        fingerprint = tokenizer_fingerprint(load_tokenizer(folder))
    lines.append(f"{folder}: whole: tokenizer")
    if config.get("num_f_grams"):
        lines += _verify_vocabulary(folder / "f_grams.safetensors")
        vocabulary = FGramVocabulary.load(folder)
        for what, found, expected in (
            ("model's configuration", vocabulary.fingerprint, config.get("vocabulary_fingerprint")),
            ("tokenizer", vocabulary.tokenizer_fingerprint, fingerprint),
        ):
            if found and expected and found != expected:
                raise SconeError(
                    f"{folder}: the f-gram vocabulary does not fit the {what} (fingerprint {found[:12]}…); "
                    f"expected {str(expected)[:12]}…; copy the whole folder again"
                )
    # the weights are those of the model that config.json speaks of: none missing, none of another shape
    parameters = sum(parameter.numel() for parameter in load_model(folder, device="cpu").model.parameters())
    lines.append(f"{folder}: whole: model, {parameters:,} parameters")
    if (folder / "options.yaml").exists():
        load_options(folder / "options.yaml")
        lines.append(f"{folder / 'options.yaml'}: whole: options")
    return lines


def _verify_weights(folder: Path) -> str:
    """Every tensor of every weight file is readable and finite."""
    from safetensors import SafetensorError, safe_open

    files = sorted(file for file in folder.glob("*.safetensors") if file.name != "f_grams.safetensors")
    if not files:
        raise SconeError(f"found no weights in {folder}; expected model.safetensors; copy the whole folder again")
    tensors = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 (it is no dictionary)
                    if not bool(weights.get_tensor(name).isfinite().all()):
                        raise SconeError(f"{file}: the tensor {name} is not finite; expected numbers; train again")
                    tensors += 1
        except (SafetensorError, OSError) as error:
            raise SconeError(
                f"found damaged weights {file}: {error}; expected them as written; copy them again"
            ) from error
    size = human_bytes(sum(file.stat().st_size for file in files))
    return f"{folder}: whole: weights, {tensors} tensors, {size}"


_VERIFIERS: dict[str, Callable[[Path], list[str]]] = {
    "model": _verify_model,
    "run": _verify_run,
    "vocabulary": _verify_vocabulary,
    "tokens": _verify_tokens,
    "corpus": _verify_corpus,
}


if __name__ == "__main__":
    sys.exit(run_main(main))
