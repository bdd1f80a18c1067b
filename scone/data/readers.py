"""One file's documents, streamed: decompression, decoding, rows, articles, pieces of plain text."""

from __future__ import annotations

import codecs
import json
import lzma
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import IO, Any

from scone.utils.errors import SconeError

FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".tokens": "articles",
    ".py": "file",
    ".jsonl": "rows",
    ".json": "rows",
    ".parquet": "parquet",
}
COMPRESSIONS = (".zst", ".gz", ".xz")

PIECE_BYTES = 1 << 16
COMPRESSED_PIECE_BYTES = 1 << 10  # of a file of nothing but zeros this becomes 40 MiB
LONGEST_LINE = 1 << 29  # characters
PIECE_CHARACTERS = 1 << 14  # a plain text is cut at the first blank line after this many,
LINE_PIECE_CHARACTERS = 1 << 16  # where there is none at the first line end after this many,
LONGEST_PIECE_CHARACTERS = 1 << 18  # and at the latest here
LONGEST_ARTICLE_CHARACTERS = 1 << 20

CountBytes = Callable[[int], object]


def kind_of(path: Path) -> tuple[str, str] | None:
    """(format, compression suffix or "") of a file by its name; None for files that are not read."""
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
    stem = path.with_suffix("") if compression else path
    file_format = FORMATS.get(stem.suffix.lower())
    return (file_format, compression) if file_format else None


def read_documents(path: Path, text_column: str, count_bytes: CountBytes = lambda n: None) -> Iterator[str]:
    """The documents of one file in order; never more than one document and a piece of the file in memory.

    Rows (JSON lines, parquet): one row, one document. ``.tokens`` (WikiText): one article, one document. ``.py``: one
    file, one document. Other text: pieces of 16 KiB or more that end at blank lines, so that one long file can still
    be split and streamed. ``count_bytes`` is told about the bytes of the file as they are read.
    Raises SconeError, with the file's name and the line where there is one, for anything that cannot be read.
    """
    kind = kind_of(path)
    assert kind is not None, path
    file_format, compression = kind
    if file_format == "parquet":
        yield from _parquet_documents(path, compression, text_column, count_bytes)
        return
    text = _decoded(path, _byte_pieces(path, compression, count_bytes))
    if file_format == "rows":
        yield from _json_documents(path, text, text_column)
    elif file_format == "articles":
        yield from split_articles(_lines(path, text))
    elif file_format == "file":
        yield "".join(text)
    else:
        yield from cut_text(text)


def cut_text(pieces: Iterable[str]) -> Iterator[str]:
    """Documents of 16 Ki characters or more whose concatenation is the concatenation of ``pieces``.

    Where a text is cut depends on the text alone, not on how it arrives.
    """
    waiting = ""
    for piece in chain(pieces, [None]):
        waiting += piece or ""
        while len(waiting) >= LONGEST_PIECE_CHARACTERS or (piece is None and waiting):
            end = _cut_position(waiting[:LONGEST_PIECE_CHARACTERS])
            yield waiting[:end]
            waiting = waiting[end:]


_BLANK_LINE = re.compile(r"\n[ \t\r]*\n\s*")
_LINE_END = re.compile(r"\n")


def _cut_position(window: str) -> int:
    for pattern, start in ((_BLANK_LINE, PIECE_CHARACTERS), (_LINE_END, LINE_PIECE_CHARACTERS)):
        if match := pattern.search(window, start):
            return match.end()
    if len(window) < LONGEST_PIECE_CHARACTERS:
        return len(window)
    space = max(window.rfind(" "), window.rfind("\n"))
    return space + 1 if space > 0 else len(window)


def split_articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText articles whose concatenation is the concatenation of ``lines`` (each with its line end).

    An article starts at a level-1 heading: a line `` = Title = ``, not `` = = Section = = ``, between blank lines
    (formulas and table rows that look like headings are not). Gives the 600, 60 and 60 articles of WikiText-2.
    """
    article: list[str] = []
    size = 0
    after_blank = True
    for line, following in pairwise(chain(lines, [""])):
        starts = after_blank and not following.strip() and _is_title(line) and any(map(str.strip, article))
        if starts or size > LONGEST_ARTICLE_CHARACTERS:
            yield "".join(article)
            article, size = [], 0
        article.append(line)
        size += len(line)
        after_blank = not line.strip()
    if article:
        yield "".join(article)


def _is_title(line: str) -> bool:
    words = line.split()
    return len(words) > 2 and words[0] == words[-1] == "=" and words[1] != "=" and words[-2] != "="


def _json_documents(path: Path, pieces: Iterable[str], text_column: str) -> Iterator[str]:
    """The text of every line that is not blank."""
    for number, line in enumerate(_lines(path, pieces), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SconeError(
                f"{where} is not JSON ({error}); expected one JSON object a line (`jq -c '.[]'` makes them of an array)"
            ) from error
        if not isinstance(row, dict):
            raise SconeError(f"{where} holds a JSON {type(row).__name__}; expected one JSON object a line")
        yield text_of_row(row, text_column, where)


def text_of_row(row: dict[str, Any], text_column: str, where: str) -> str:
    """The text of a row; a null is an empty text. Raises SconeError when the column is missing or not text."""
    if text_column not in row:
        raise SconeError(unknown_column(where, text_column, row))
    text = row[text_column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise SconeError(
            f"{where}: column {text_column!r} holds {type(text).__name__}; expected text; choose another --text_column"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which is no character
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def unknown_column(where: str, text_column: str, columns: Iterable[str]) -> str:
    """The one-line error for a missing text column."""
    names = ", ".join(map(repr, columns)) or "none"
    return f"{where} has no column {text_column!r}; its columns are {names}; choose one by --text_column"


def _lines(path: Path, pieces: Iterable[str]) -> Iterator[str]:
    """Lines with their ends, split at "\\n" only (U+2028 and U+0085 are characters of a text)."""
    waiting: list[str] = []
    size = 0
    for piece in pieces:
        *complete, rest = piece.split("\n")
        for line in complete:
            yield "".join(waiting) + line + "\n"
            waiting.clear()
            size = 0
        waiting.append(rest)
        size += len(rest)
        if size > LONGEST_LINE:
            raise SconeError(f"{path} has a line longer than {LONGEST_LINE:,} characters; expected documents; split it")
    if last := "".join(waiting):
        yield last


def _decoded(path: Path, pieces: Iterable[bytes]) -> Iterator[str]:
    """UTF-8 text of a file, without a byte order mark. Raises SconeError where it is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    num_bytes = 0
    for piece in chain(pieces, [b""]):
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            at = num_bytes - len(decoder.getstate()[0]) + error.start
            raise SconeError(f"{path} is not UTF-8 ({error.reason} at byte {at}); convert it to UTF-8") from error
        yield text if num_bytes else text.removeprefix("\ufeff")
        num_bytes += len(piece)


def _byte_pieces(path: Path, compression: str, count_bytes: CountBytes) -> Iterator[bytes]:
    """The decompressed bytes of a file. Raises SconeError when it cannot be read, is damaged or ends too early."""
    import zstandard

    def raw_pieces(file: IO[bytes]) -> Iterator[bytes]:
        # small pieces, because a compressed piece may become any amount of text
        while piece := file.read(COMPRESSED_PIECE_BYTES if compression else PIECE_BYTES):
            count_bytes(len(piece))
            yield piece

    try:
        with path.open("rb") as file:
            yield from _decompressed(raw_pieces(file), compression) if compression else raw_pieces(file)
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError) as error:
        raise SconeError(f"{path} is damaged as a {compression} file ({error}); copy or make it again") from error
    except OSError as error:
        raise SconeError(f"cannot read {path} ({error.strerror}); check the path and its permissions") from error


def _decompressed(raw_pieces: Iterable[bytes], compression: str) -> Iterator[bytes]:
    """Frames one after the other. The libraries' own file objects take a cut-off .zst file, or a .xz file with
    anything behind its end, for a whole one.
    """
    import zstandard

    decompressors: dict[str, Callable[[], Any]] = {
        ".gz": lambda: zlib.decompressobj(wbits=31),
        ".xz": lzma.LZMADecompressor,
        ".zst": zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj,
    }
    decompressor, anything = None, False
    for raw in raw_pieces:
        while raw:
            if decompressor is None:
                raw = raw.lstrip(b"\0") if anything else raw  # padding between frames
                if not raw:
                    break
                decompressor, anything = decompressors[compression](), True
            if text := decompressor.decompress(raw):
                yield text
            raw = b""
            if decompressor.eof:
                raw, decompressor = decompressor.unused_data, None
    if decompressor is not None or not anything:
        raise EOFError("it ends too early")


def _parquet_documents(path: Path, compression: str, text_column: str, count_bytes: CountBytes) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with tempfile.TemporaryFile() as plain:  # parquet is read from its end, so not as a stream
            if compression:
                plain.writelines(_byte_pieces(path, compression, count_bytes))
            with pyarrow.parquet.ParquetFile(plain if compression else path, pre_buffer=False) as file:
                if text_column not in file.schema_arrow.names:
                    raise SconeError(unknown_column(str(path), text_column, file.schema_arrow.names))
                bytes_a_row = 0 if compression else path.stat().st_size / max(1, file.metadata.num_rows)
                for batch in file.iter_batches(batch_size=256, columns=[text_column], use_threads=False):
                    count_bytes(round(batch.num_rows * bytes_a_row))
                    for text in batch.column(0).to_pylist():
                        yield text_of_row({text_column: text}, text_column, str(path))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SconeError(f"{path} is damaged as a parquet file ({reason}); copy or make it again") from error
