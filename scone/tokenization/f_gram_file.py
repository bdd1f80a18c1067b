"""Reading and writing ``f_grams.safetensors``, the file of an f-gram vocabulary (described in docs/formats.md)."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from scone.kernels.child_index import num_slots, rank_bits
from scone.tokenization.f_gram_links import node_dtype
from scone.utils.errors import SconeError
from scone.utils.files import atomic_path, fingerprint_of

FILE_NAME = "f_grams.safetensors"
FORMAT = "scone-f-gram-vocabulary"
VERSION = "1"

_DTYPE_NAMES = {"uint8": "U8", "uint32": "U32", "uint64": "U64"}
_HEADER_LIMIT = 1 << 24
_ALIGNMENT = 64


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
    arrays = {}
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = next(dtype for dtype, known in _DTYPE_NAMES.items() if known == entry["dtype"])
        begin, end = entry["data_offsets"]
        count = int(np.prod(entry["shape"], dtype=np.int64))
        if 8 + size + end > len(mapped):
            raise damaged(path, f"it has {len(mapped)} bytes and should have {8 + size + end} or more")
        arrays[name] = np.frombuffer(mapped, dtype, count, 8 + size + begin).reshape(entry["shape"])
    if 8 + size + end != len(mapped):
        raise damaged(path, f"it has {len(mapped)} bytes and should have {8 + size + end}")
    _check_shapes(path, arrays, header["__metadata__"])
    return arrays, header["__metadata__"]


def _check_shapes(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Refuse arrays that a kernel would read out of bounds. Raises SconeError."""
    found = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    size = len(arrays["keys"]) if "keys" in arrays else 0
    nodes = node_dtype(int(metadata["vocab_size"]), size).name
    expected = {
        "slots": ("uint32", (num_slots(size),)),
        "counts": ("uint64", (size,)),
        "keys": (nodes, (size, 2)),
        "suffixes": (nodes, (size,)),
        "lengths": ("uint8", (size,)),
    }
    if found != expected or int(metadata["rank_bits"]) != rank_bits(size):
        raise damaged(path, f"it has the arrays {found}, not {expected}")


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
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SconeError(
            f"found {path}, which has no f-gram vocabulary header; expected a file that scone wrote"
        ) from error
    if found != (FORMAT, VERSION):
        raise SconeError(
            f"found {path} of format {found[0]} version {found[1]}; expected {FORMAT} version {VERSION}; "
            "count f-grams again with this version"
        )
    is_intact = fingerprint_of(_encoded(header)) == checksum
    metadata["header_sha256"] = checksum
    if not is_intact or _encoded(header) != raw:
        raise damaged(path, "its header differs from its checksum")
    return header


def damaged(path: Path, how: str) -> SconeError:
    """The error to raise for a file that is not as it was written."""
    return SconeError(
        f"found a damaged f-gram vocabulary {path}: {how}; expected it as written; count or copy it again"
    )
