"""Make the folder that experiments read with ``--data``: a tokenizer and the token files that their YAMLs name.

    python experiments/prepare_data.py --output_dir DATA                             # articles and novels
    python experiments/prepare_data.py --output_dir DATA --kinds all --train_tokens 210000000
    python experiments/prepare_data.py --output_dir DATA --kinds court-opinions --trunk MODEL   # pretrained.yaml

Each kind of text is divided by the content of its documents, as ``scone train`` divides a corpus. Training documents
are shuffled within their kind and stand at even distances, so that any beginning of the training tokens has of each
kind the share that the whole has. The byte-level BPE is trained on such a beginning; a pretrained trunk has its own. A
token file that is there is kept, so an interrupted call goes on with the next.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from common import shared_data  # noqa: E402

from scone.configs.schema import ModelOptions  # noqa: E402
from scone.data.prepare import CorpusEncoder  # noqa: E402
from scone.data.sources import open_documents  # noqa: E402
from scone.data.token_file import TokenFile, TokenFileWriter  # noqa: E402
from scone.models.trunk import build_trunk  # noqa: E402
from scone.tokenization.tokenizers import (  # noqa: E402
    document_separator_id,
    load_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
    vocabulary_size,
)
from scone.utils.command_line import run_main  # noqa: E402
from scone.utils.errors import SconeError  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = (
    *("wikipedia", "novels", "wikipedia-more", "gutenberg", "court-opinions", "arxiv-abstracts", "beige-book"),
    *("microsoft-docs", "stackexchange", "wikitext-2/wiki.train.tokens"),
)
HELD_OUT = {
    "wikipedia_validation": ("wikipedia", "validation", 250_000),
    "wikipedia_test": ("wikipedia", "test", 475_000),
    "novels": ("novels", "test", 350_000),
    "wikitext103_test": ("wikitext-103/wiki.test.tokens", "all", 10**9),
    "c4": ("c4", "all", 10**9),
    "court_opinions_validation": ("court-opinions", "validation", 250_000),
    "court_opinions": ("court-opinions", "test", 350_000),
    "arxiv_abstracts": ("arxiv-abstracts", "test", 350_000),
}
"""Token file → text, its split, and after how many tokens no further document is taken."""
BATCH_CHARACTERS = 1 << 18


def main(argv: Sequence[str] | None = None) -> int:
    """Write what is missing. Raises SconeError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--texts", type=Path, help="folder of the texts (default: the maintainers' shared data)")
    parser.add_argument("--kinds", nargs="+", default=["wikipedia", "novels"], choices=["all", *KINDS], metavar="KIND",
                        help=f"what to train on: all, or some of {', '.join(KINDS)}")  # fmt: skip
    parser.add_argument("--train_tokens", type=int, default=44_000_000, help="about; fewer where the texts have fewer")
    parser.add_argument("--vocab_size", type=int, default=16_384)
    parser.add_argument("--trunk", help="a pretrained model, which is kept as DATA/trunk; its tokenizer is used")
    arguments = parser.parse_args(argv)
    texts, folder = arguments.texts or shared_data(), arguments.output_dir
    if texts is None or not texts.is_dir():
        raise SconeError(
            f"found no texts in {texts or 'shared/data'}; expected wikipedia/, novels/, c4/ and wikitext-103/ there; "
            "give --texts FOLDER"
        )
    kinds = KINDS if "all" in arguments.kinds else arguments.kinds
    made = folder / ("trunk" if arguments.trunk else "tokenizer")
    if not made.exists():
        part = folder / f"{made.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        if arguments.trunk:
            load_tokenizer(arguments.trunk).save_pretrained(part)
            build_trunk(ModelOptions(base_model_name=arguments.trunk, init="pretrained"), None).save_pretrained(part)
        else:
            train_tokenizer(mixture(texts, kinds), arguments.vocab_size, part)
        part.rename(made)
    tokenizer = load_tokenizer(made)
    write(folder / "train", tokenizer, mixture(texts, kinds), arguments.train_tokens)
    for name, (text, split, limit) in HELD_OUT.items():
        write(folder / name, tokenizer, open_documents(str(texts / text), split=split), limit)
    return 0


def mixture(texts: Path, kinds: Iterable[str], seed: int = 1) -> Iterator[str]:
    """The training documents of all kinds, by what share of its kind lies before a document's middle."""
    placed: list[tuple[float, str]] = []
    for kind in kinds:
        documents = list(open_documents(str(texts / kind)))
        random.Random(seed).shuffle(documents)
        ends = list(itertools.accumulate(map(len, documents)))
        placed += [((end - len(text) / 2) / ends[-1], text) for end, text in zip(ends, documents, strict=True)]
    placed.sort()
    return (text for _, text in placed)


def write(folder: Path, tokenizer: PreTrainedTokenizerBase, documents: Iterator[str], limit: int) -> None:
    """A token file of the documents until ``limit`` tokens are reached."""
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        writer = TokenFileWriter(part, vocabulary_size(tokenizer), document_separator_id(tokenizer))
        encoder, threads = CorpusEncoder(tokenizer), len(os.sched_getaffinity(0))
        encoded = encoder.encode_batches(((batch, None) for batch in batches(documents)), threads)
        for tokens in itertools.chain.from_iterable(batch for batch, _ in encoded):
            if writer.num_tokens >= limit:
                encoded.close()
                break
            writer.add_document(tokens)
        writer.finish({"tokenizer_fingerprint": tokenizer_fingerprint(tokenizer)})
        part.rename(folder)
    file = TokenFile.open(folder, check_content=False)
    print(f"{folder.name}: {file.num_tokens:,} tokens, {file.num_documents:,} documents", flush=True)


def batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Of some 256 Ki characters each."""
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


if __name__ == "__main__":
    sys.exit(run_main(main))
