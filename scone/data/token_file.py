"""Token files: a corpus split as one memory-mapped integer array, and a JSON that records its origin."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from scone.utils.errors import SconeError
from scone.utils.files import fingerprint_of, read_json, sync_folder, write_json

TOKENS_NAME = "tokens.npy"
METADATA_NAME = "tokens.json"
FORMAT = "scone-tokens"
FORMAT_VERSION = 1
HEADER_BYTES = 128
CHECKED_ON_OPENING_BYTES = 64 << 20

_FIELDS = {
    "vocab_size": int,
    "separator_id": int,
    "num_tokens": int,
    "num_documents": int,
    "dtype": str,
    "content_sha256": str,
    "tokenizer_fingerprint": str,
}


def token_type(vocab_size: int) -> np.dtype:
    """The narrowest type for token ids below ``vocab_size``: uint16 up to 65,536, else uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class TokenFile:
    """An opened token file. Documents stand one after the other, each followed by ``separator_id``.

    Pickles as its path, so that the workers of a data loader map the same file and copy nothing.

    Attributes: ``tokens`` [num_tokens], uint16 or uint32, read-only, memory-mapped; ``num_tokens`` (separators
    included), ``num_documents``, ``separator_id`` (which ends every document), ``vocab_size`` (V: every token is below
    it); ``folder``, ``metadata``.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, Any], tokens: np.ndarray) -> None:
        self.folder, self.metadata, self.tokens = folder, metadata, tokens
        self.num_tokens: int = metadata["num_tokens"]
        self.num_documents: int = metadata["num_documents"]
        self.separator_id: int = metadata["separator_id"]
        self.vocab_size: int = metadata["vocab_size"]

    @classmethod
    def open(cls, path: str | Path, check_content: bool | None = None) -> TokenFile:
        """Map the token file in folder ``path``; format, sizes and metadata are always checked.

        ``check_content`` also compares the checksum of all tokens (None: where they are at most 64 MiB).
        Raises SconeError when the file is missing, damaged, or of another version.
        """
        folder = Path(path)
        folder = folder.parent if folder.name in (TOKENS_NAME, METADATA_NAME) else folder
        if not (folder / METADATA_NAME).is_file():
            raise SconeError(f"found no token file in {str(folder)!r}; expected {METADATA_NAME} there; check the path")
        metadata = _checked_metadata(folder / METADATA_NAME)
        tokens = _mapped_tokens(folder / TOKENS_NAME, metadata)
        token_file = cls(folder, metadata, tokens)
        if check_content is None:
            check_content = tokens.nbytes <= CHECKED_ON_OPENING_BYTES
        if check_content:
            token_file.verify()
        return token_file

    @property
    def fingerprint(self) -> str:
        """Identifies tokens, tokenizer and separator, wherever the file lies and whatever source it came from."""
        facts = (self.metadata["content_sha256"], self.metadata["tokenizer_fingerprint"], str(self.separator_id))
        return fingerprint_of(*facts)

    def verify(self) -> None:
        """Read every token and compare the checksum. Raises SconeError when the content is not what was written."""
        found = content_checksum(self.folder / TOKENS_NAME)
        if found != self.metadata["content_sha256"]:
            raise SconeError(_damaged(self.folder / TOKENS_NAME, "its checksum is another than the one noted"))

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFile.open, (self.folder, False)


class TokenFileWriter:
    """Writes a token file document by document; it appears under its name only when ``finish`` returns.

    Up to then ``tokens.npy.part`` holds what was added, and after ``sync`` what was added is on disk: a writer made
    with the numbers of then (``resume_tokens``, ``resume_documents``) goes on from there, or raises SconeError when
    less than that is there.
    """

    def __init__(
        self,
        folder: str | Path,
        vocab_size: int,
        separator_id: int,
        resume_tokens: int = 0,
        resume_documents: int = 0,
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.dtype = token_type(vocab_size)
        self.vocab_size = vocab_size
        self.separator_id = separator_id
        self.num_tokens = resume_tokens
        self.num_documents = resume_documents
        self._separator = np.array([separator_id], self.dtype).tobytes()
        self._part = self.folder / f"{TOKENS_NAME}.part"
        size = HEADER_BYTES + resume_tokens * self.dtype.itemsize
        if resume_tokens:
            finished = self.folder / TOKENS_NAME
            if finished.exists() and not self._part.exists():  # killed while finishing: what was written still stands
                (self.folder / METADATA_NAME).unlink(missing_ok=True)
                os.replace(finished, self._part)
            if not self._part.exists() or self._part.stat().st_size < size:
                raise SconeError(_damaged(self._part, "it is shorter than what was noted of it"))
        self._file: BinaryIO = self._part.open("r+b" if resume_tokens else "wb")
        self._file.truncate(size)
        self._file.seek(size)

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Add one document's tokens (without its separator, which is added here). Raises ValueError above V."""
        array = np.asarray(tokens)
        if array.size and (int(array.max()) >= self.vocab_size or int(array.min()) < 0):
            raise ValueError(f"token {int(array.max())} in a vocabulary of {self.vocab_size}")
        self._file.write(array.astype(self.dtype, copy=False).tobytes())
        self._file.write(self._separator)
        self.num_tokens += array.size + 1
        self.num_documents += 1

    def sync(self) -> None:
        """Sync to disk what was added so far."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Leave the unfinished file as it is."""
        self._file.close()

    def discard(self) -> None:
        """Remove the unfinished file, and the folder where nothing else is in it."""
        self._file.close()
        self._part.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def finish(self, metadata: Mapping[str, Any]) -> TokenFile:
        """Write the header and the JSON, give both their names, and open the result.

        ``metadata`` must name ``tokenizer_fingerprint``; the rest of it is free.
        """
        self._file.seek(0)
        self._file.write(_header(self.num_tokens, self.dtype))
        self.sync()
        self._file.close()
        facts = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "vocab_size": self.vocab_size,
            "separator_id": self.separator_id,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "dtype": self.dtype.name,
            "content_sha256": content_checksum(self._part),
        } | dict(metadata)
        os.replace(self._part, self.folder / TOKENS_NAME)
        sync_folder(self.folder)
        write_json(self.folder / METADATA_NAME, facts | {"metadata_sha256": _metadata_checksum(facts)})
        return TokenFile.open(self.folder, check_content=False)


def content_checksum(path: Path) -> str:
    """Hex SHA-256 of the bytes after the header (read, not mapped: mapped pages would count as our memory)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(HEADER_BYTES)
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _header(num_tokens: int, dtype: np.dtype) -> bytes:
    """The 128 bytes before the data of a one-dimensional ``.npy`` file (numpy pads any length to the same size)."""
    buffer = io.BytesIO()
    description = {"descr": dtype.str, "fortran_order": False, "shape": (num_tokens,)}
    np.lib.format.write_array_header_1_0(buffer, description)
    header = buffer.getvalue()
    assert len(header) == HEADER_BYTES, len(header)
    return header


def _metadata_checksum(facts: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in facts.items() if name != "metadata_sha256"}
    return fingerprint_of(json.dumps(rest, sort_keys=True))


def _checked_metadata(path: Path) -> dict[str, Any]:
    try:
        metadata = read_json(path)
    except SconeError as error:
        raise SconeError(_damaged(path, "it is not JSON")) from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise SconeError(_damaged(path, f"it does not say format {FORMAT!r}"))
    if metadata.get("format_version") != FORMAT_VERSION:
        raise SconeError(
            f"{path} has format version {metadata.get('format_version')!r}; expected {FORMAT_VERSION}; delete its "
            "folder to make it again"
        )
    if metadata.get("metadata_sha256") != _metadata_checksum(metadata):
        raise SconeError(_damaged(path, "it is not as it was written"))
    for name, kind in _FIELDS.items():
        if type(metadata.get(name)) is not kind:
            raise SconeError(_damaged(path, f"its {name!r} is no {kind.__name__}"))
    if not 0 <= metadata["separator_id"] < metadata["vocab_size"] <= 1 << 32 or metadata["num_tokens"] < 0:
        raise SconeError(_damaged(path, "its numbers cannot be those of tokens"))
    return metadata


def _mapped_tokens(path: Path, metadata: Mapping[str, Any]) -> np.ndarray:
    dtype = token_type(metadata["vocab_size"])
    expected_size = HEADER_BYTES + metadata["num_tokens"] * dtype.itemsize
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
    except OSError as error:
        raise SconeError(_damaged(path, f"it cannot be read: {error.strerror}")) from error
    if size != expected_size or header != _header(metadata["num_tokens"], dtype):
        raise SconeError(_damaged(path, f"it has {size} bytes; {expected_size} of {dtype.name} were expected"))
    if metadata["num_tokens"] == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r", HEADER_BYTES)


def _damaged(path: Path, reason: str) -> str:
    return f"token file {path} is damaged: {reason}; delete its folder to make it again"
