"""Reading and writing ``f_grams.safetensors``, the file of an f-gram vocabulary (described in docs/formats.md)."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scone.configs.schema import RANKINGS
from scone.kernels.f_gram_trie import MOST_F_GRAMS, num_slots, rank_bits
from scone.utils.errors import SconeError
from scone.utils.files import atomic_path, fingerprint_of

FILE_NAME = "f_grams.safetensors"
FORMAT = "scone-f-gram-vocabulary"
VERSION = "1"

MAX_VOCAB_SIZE = 2**32 - 1
MAX_F_GRAM_LENGTH = 255

_DTYPE_NAMES = {"uint8": "U8", "uint32": "U32", "uint64": "U64"}
_HEADER_LIMIT = 1 << 24
_ALIGNMENT = 64


def check_limits(vocab_size: int, max_n: int, separator_ids: Sequence[int], ranking: str = "frequency") -> None:
    """Raise ValueError unless 1 ≤ V < 2³², 1 ≤ N ≤ 255, every separator is a token and the ranking one of ours."""
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size is {vocab_size}; expected 1 … {MAX_VOCAB_SIZE}")
    if not 1 <= max_n <= MAX_F_GRAM_LENGTH:
        raise ValueError(f"max_n is {max_n}; expected 1 … {MAX_F_GRAM_LENGTH}")
    for separator in separator_ids:
        if not 0 <= separator < vocab_size:
            raise ValueError(f"separator {separator} is no token; expected 0 … {vocab_size - 1}")
    if ranking not in RANKINGS:
        raise ValueError(f"ranking is {ranking!r:.40}; expected {' or '.join(RANKINGS)}")


def node_dtype(vocab_size: int, num_f_grams: int) -> np.dtype:
    """uint32 where all V + S nodes fit it, else uint64."""
    return np.dtype(np.uint32 if vocab_size + num_f_grams <= 2**32 else np.uint64)


def file_of(path_or_folder: str | Path) -> Path:
    """The vocabulary file that a path means: itself when it ends in ``.safetensors``, else the file in that folder."""
    path = Path(path_or_folder)
    return path if path.suffix == ".safetensors" else path / FILE_NAME


def write_file(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write ``tensors`` and ``metadata`` as safetensors, atomically; the same content gives the same bytes.

    The metadata gains the checksums that `open_file` and `check_data` compare.
    """
    header: dict[str, dict] = {}
    offset = 0
    digest = hashlib.sha256()
    for name, array in tensors.items():
        header[name] = {
            "dtype": _DTYPE_NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
        digest.update(_bytes_of(array))
    header["__metadata__"] = {
        **metadata,
        "format": FORMAT,
        "format_version": VERSION,
        "data_sha256": digest.hexdigest(),
    }
    header["__metadata__"]["header_sha256"] = fingerprint_of(_encoded(header))
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        encoded = _encoded(header)
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for array in tensors.values():
            file.write(_bytes_of(array))


def open_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Map a vocabulary file: read-only arrays that are read from disk when touched, and the metadata.

    Checks that the header is complete and unaltered, that the file has exactly the length that it states and that the
    arrays have the shapes of a vocabulary; their content is checked by `check_data`. Raises SconeError.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise SconeError(
            f"cannot read the f-gram vocabulary {path}: {error}; count f-grams again, or copy it"
        ) from error
    size = int.from_bytes(mapped[:8], "little")
    if len(mapped) < 8 or size > min(len(mapped) - 8, _HEADER_LIMIT):
        raise damaged(path, "its header is cut off")
    header = _decoded(path, mapped[8 : 8 + size])
    metadata = header.pop("__metadata__")
    expected = _expected_entries(path, header, metadata)
    end = 8 + size + next(reversed(expected.values()))["data_offsets"][1]
    if end != len(mapped):
        raise damaged(path, f"it has {len(mapped)} bytes and should have {end}")
    if header != expected or list(header) != list(expected):
        raise damaged(path, f"it has the arrays {str(header)[:300]}, not {expected}")
    arrays = {}
    for name, entry in expected.items():
        dtype = next(dtype for dtype, known in _DTYPE_NAMES.items() if known == entry["dtype"])
        count = int(np.prod(entry["shape"], dtype=np.int64))
        arrays[name] = np.frombuffer(mapped, dtype, count, 8 + size + entry["data_offsets"][0]).reshape(entry["shape"])
    return arrays, metadata


def _expected_entries(path: Path, header: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, dict]:
    """What the header of a vocabulary of so many f-grams must say of its arrays, so that no kernel reads beyond them.

    Nothing is allocated from its numbers. Raises SconeError when they are not those of a vocabulary.
    """
    try:
        size = header["keys"]["shape"][0]
        texts = [metadata[name] for name in ("fingerprint", "tokenizer_fingerprint", "data_sha256")]
        if not all(isinstance(value, str) for value in (*texts, *metadata.values())) or type(size) is not int:
            raise TypeError("a value of another type")
        vocab_size, max_n, bits, max_probes = (
            int(metadata[name]) for name in ("vocab_size", "max_n", "rank_bits", "max_probes")
        )
        separators = json.loads(metadata["separator_ids"])
        if not 0 <= size <= MOST_F_GRAMS or not all(type(separator) is int for separator in separators):
            raise ValueError("a number that is out of bounds")
        check_limits(vocab_size, max_n, separators, metadata.get("ranking", "frequency"))
        if bits != rank_bits(size) or not 0 <= max_probes <= num_slots(size):
            raise ValueError("an index of another size")
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        raise damaged(
            path, f"its header is not that of a vocabulary ({type(error).__name__}: {error!s:.80})"
        ) from error
    nodes = node_dtype(vocab_size, size).name
    shapes = {"slots": [num_slots(size)], "counts": [size], "keys": [size, 2], "suffixes": [size], "lengths": [size]}
    dtypes = {"slots": "uint32", "counts": "uint64", "keys": nodes, "suffixes": nodes, "lengths": "uint8"}
    entries: dict[str, dict] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * np.dtype(dtypes[name]).itemsize
        entries[name] = {"dtype": _DTYPE_NAMES[dtypes[name]], "shape": shape, "data_offsets": [begin, end]}
    return entries


def check_data(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Compare every byte of the data with its checksum. Raises SconeError."""
    digest = hashlib.sha256()
    for array in tensors.values():
        digest.update(_bytes_of(array))
    if digest.hexdigest() != metadata["data_sha256"]:
        raise damaged(path, "its data differs from its checksum")


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B") if array.size else memoryview(b"")


def _encoded(header: Mapping[str, Mapping]) -> bytes:
    """The header in the one spelling that we write: compact JSON, and spaces until the data begins a cache line."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    return text + b" " * (-(8 + len(text)) % _ALIGNMENT)


def _decoded(path: Path, raw: bytes) -> dict[str, dict]:
    """The header as a dictionary, once its format, version and checksum are right."""
    try:
        header = json.loads(raw)
        metadata = header["__metadata__"]
        found = (metadata["format"], metadata["format_version"])
        checksum = metadata.pop("header_sha256")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SconeError(
            f"found {path}, which has no f-gram vocabulary header; expected a file that scone wrote"
        ) from error
    if found != (FORMAT, VERSION):
        raise SconeError(
            f"found {path} of format {found[0]!s:.40} version {found[1]!s:.40}; expected {FORMAT} version {VERSION}; "
            "count f-grams again with this version"
        )
    is_intact = fingerprint_of(_encoded(header)) == checksum
    metadata["header_sha256"] = checksum
    if not is_intact or _encoded(header) != raw:
        raise damaged(path, "its header differs from its checksum")
    return header


def damaged(path: Path, how: str) -> SconeError:
    """The error for a damaged file."""
    return SconeError(
        f"found a damaged f-gram vocabulary {path}: {how}; expected it as written; count or copy it again"
    )
