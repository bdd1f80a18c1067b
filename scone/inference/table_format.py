"""The file `embeddings.cache`: how one row is stored, the header, what is checked in it (docs/formats.md)."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import SEEK_END, fstat, lseek
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scone.utils.errors import SconeError
from scone.utils.files import Closing

ROW_TYPES = ("fp32", "fp16", "bf16", "int8", "int4")
DEFAULT_GROUP_SIZE = 64
_FLOAT_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Lowest and highest code. A value may lie half a step beyond either and still be within half a step of its code.
_CODES = {"int8": (-128, 127), "int4": (-8, 7)}
# Quantised at a time: what stays in a processor's cache; on an accelerator, what takes little of its memory.
_NUMBERS_ON_A_HOST, _NUMBERS_ON_AN_ACCELERATOR = 1 << 18, 1 << 23


@dataclass(frozen=True)
class RowFormat:
    """The bytes of one row of ``width`` = D numbers.

    ``group_size``: how many neighbouring numbers share one bfloat16 scale (int8 and int4 only; 0 for float types).
    A quantised row is ⌈D / group_size⌉ scales, then the codes (int4: two a byte, the even position in the low
    nibble). The scale is a bfloat16 because the product of its 8 significant bits with a code's 7 is exact in
    float32: dequantising adds no error to rounding. A scale may be negative: codes reach one step further below
    zero than above, so the sign is chosen that gives the smaller step.
    """

    row_type: str
    width: int
    group_size: int = 0

    @staticmethod
    def of(row_type: str, width: int, group_size: int | None = None) -> RowFormat:
        """Check a user's choice; ``group_size`` None means 64. Raises SconeError."""
        if row_type not in ROW_TYPES:
            raise SconeError(f"found row type {row_type!r}; expected one of {', '.join(ROW_TYPES)}; choose one of them")
        if width < 1:
            raise ValueError(f"width must be positive, found {width}")
        if row_type in _FLOAT_TYPES:
            return RowFormat(row_type, width)
        group_size = DEFAULT_GROUP_SIZE if group_size is None else group_size
        if group_size < 2 or group_size % 2:
            raise SconeError(f"found group size {group_size}; expected an even number of at least 2; use 64")
        return RowFormat(row_type, width, group_size)

    @property
    def num_groups(self) -> int:
        """Scales in a row (0 for float types)."""
        return -(-self.width // self.group_size) if self.group_size else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, scales included."""
        code_bytes = {"fp32": 4 * self.width, "int8": self.width, "int4": (self.width + 1) // 2}
        return 2 * self.num_groups + code_bytes.get(self.row_type, 2 * self.width)

    @property
    def float_dtype(self) -> torch.dtype | None:
        """The torch type whose bytes a row is; None for quantised rows."""
        return _FLOAT_TYPES.get(self.row_type)

    @property
    def storage_dtype(self) -> torch.dtype:
        """The torch type in which a stored row is held: its float type, else bytes."""
        return self.float_dtype or torch.uint8

    @property
    def storage_width(self) -> int:
        """Numbers of ``storage_dtype`` in a row."""
        return self.row_bytes // self.storage_dtype.itemsize

    def encode(self, rows: Tensor) -> np.ndarray:
        """Rows as they are stored: float [n, D] on any device → uint8 [n, row_bytes] on the host.

        They are converted where they are, to the same bytes. Every dequantised number is within half a step (its
        group's |scale|) of the original. Raises SconeError when a number is not finite, or too large for the row type.
        """
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ValueError(f"expected rows of shape [n, {self.width}], found {list(rows.shape)}")
        rows = rows.detach().float()
        if not _all_finite(rows):
            raise SconeError("found a row with a number that is not finite; expected finite rows; check the model")
        if self.float_dtype is not None:
            typed = rows.to(self.float_dtype).contiguous()
            if self.row_type != "fp32" and not _all_finite(typed):
                raise SconeError(
                    f"found a number of magnitude {rows.abs().max():.3g}, which {self.row_type} cannot hold; "
                    "expected smaller rows; choose row type bf16 or fp32"
                )
            return typed.view(torch.uint8).reshape(len(rows), self.row_bytes).cpu().numpy()
        numbers = _NUMBERS_ON_A_HOST if rows.device.type == "cpu" else _NUMBERS_ON_AN_ACCELERATOR
        blocks = [self._quantised(block) for block in rows.split(max(1, numbers // self.width))]
        return torch.cat(blocks).cpu().numpy()

    def _quantised(self, rows: Tensor) -> Tensor:
        n, low_high = len(rows), _CODES[self.row_type]
        padded_width = self.num_groups * self.group_size
        padded = torch.nn.functional.pad(rows.double(), (0, padded_width - self.width))
        groups = padded.view(n, self.num_groups, self.group_size)
        scales = _scales(groups, *low_high)
        # In float64 the quotient of a float32 and a bfloat16 is never rounded onto or across a tie.
        divisor = torch.where(scales == 0, 1.0, scales.double()).unsqueeze(2)
        codes = (groups / divisor).round_().clamp_(*low_high).to(torch.int8).view(n, padded_width)[:, : self.width]
        scale_bytes = scales.to(torch.bfloat16).view(torch.uint8).view(n, 2 * self.num_groups)
        if self.row_type == "int4":
            if self.width % 2:
                codes = torch.nn.functional.pad(codes, (0, 1))
            nibbles = codes.contiguous().view(torch.uint8) & 15
            code_bytes = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
        else:
            code_bytes = codes.contiguous().view(torch.uint8)
        return torch.cat([scale_bytes, code_bytes], dim=1)

    def decode(self, raw: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Stored rows as numbers, on whatever device they are: uint8 [n, row_bytes] → ``dtype`` [n, D].

        The reference of the compiled kernels (`scone.kernels.dequantize` on CPU, `rows_triton` on CUDA).
        """
        n = len(raw)
        if self.float_dtype is not None:
            return raw.contiguous().view(self.float_dtype).view(n, self.width).to(dtype)
        codes = raw[:, 2 * self.num_groups :]
        if self.row_type == "int8":
            values = codes.contiguous().view(torch.int8)
        else:
            nibbles = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)[:, : self.width]
            values = (nibbles ^ 8).to(torch.int8) - 8
        return (values.float() * self._scales_of(raw)).to(dtype)

    def steps(self, raw: Tensor) -> Tensor:
        """The step |scale| that each quantised number was rounded to: uint8 [n, row_bytes] → float32 [n, D]."""
        return self._scales_of(raw).abs()

    def _scales_of(self, raw: Tensor) -> Tensor:
        """The scale of every number: float32 [n, D]."""
        scale_bytes = raw[:, : 2 * self.num_groups].clone(memory_format=torch.contiguous_format)
        scales = scale_bytes.view(torch.bfloat16).float()
        return scales.repeat_interleave(self.group_size, dim=1)[:, : self.width]


def _all_finite(numbers: Tensor) -> bool:
    """Whether all are. Their sum is not where one is not, and takes a tenth of the time of looking at each."""
    return bool(torch.isfinite(numbers.sum(dtype=torch.float32))) or bool(torch.isfinite(numbers).all())


def _scales(groups: Tensor, lowest: int, highest: int) -> Tensor:
    """Signed scale of each group: float64 [n, groups, group_size] → float32 [n, groups], every one a bfloat16.

    The step is the smallest bfloat16 with which every number lies in [(lowest − ½) step, (highest + ½) step].
    """
    largest, smallest = groups.amax(2).clamp_(min=0), groups.amin(2).neg_().clamp_(min=0)
    negative = largest > smallest  # the farther end goes to the side that has one code more
    far, near = torch.maximum(largest, smallest), torch.minimum(largest, smallest)
    step = torch.maximum(far / (0.5 - lowest), near / (highest + 0.5))
    rounded = _bfloat16_at_least(step)
    if not torch.isfinite(rounded).all():
        raise SconeError("found a number too large to quantise; expected rows below 1e38; choose row type fp32")
    return torch.where(negative, -rounded, rounded)


def _bfloat16_at_least(values: Tensor) -> Tensor:
    """The smallest bfloat16 that is not below each of ``values`` (float64, not negative), as float32."""
    nearest = values.to(torch.bfloat16)
    bits = nearest.view(torch.int16)
    # For numbers that are not negative, the next bit pattern is the next larger number.
    return torch.where(nearest.double() < values, bits + 1, bits).view(torch.bfloat16).float()


PAGE_BYTES = 4096
FORMAT_NAME = "scone-embedding-table"
FORMAT_VERSION = 1
DIGEST_BYTES = 32  # SHA-256
FINGERPRINT_NAMES = ("weights", "vocabulary", "tokenizer")
_MAX_HEADER_BYTES = 1 << 20
_CHECKSUM_SPAN_BYTES = 4 << 20


def _derived() -> Any:
    return field(init=False, compare=False, repr=False)


@dataclass(frozen=True)
class TableLayout:
    """Everything that a table's header says.

    ``compute_dtype``: precision that the rows were computed in, before they were stored as ``row_format`` says.
    ``fingerprints``: hex digests of what the rows were made from (``weights``, ``vocabulary``, ``tokenizer``), "" where
    unknown. ``rows_checksum``: SHA-256 (hex) of the chunk checksums, which are SHA-256 of ``checksum_rows`` rows each.
    """

    num_rows: int
    row_format: RowFormat
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    compute_dtype: str = "fp32"
    rows_checksum: str = "0" * (2 * DIGEST_BYTES)

    row_bytes: int = _derived()
    """Bytes from one row to the next."""
    payload_bytes: int = _derived()
    """Bytes of all rows."""
    checksum_rows: int = _derived()
    """Rows under one checksum: about 4 MiB of them. It depends on nothing but the row's size."""
    num_checksums: int = _derived()
    data_start: int = _derived()
    """Byte at which row 0 starts: a multiple of 4,096."""
    checksums_start: int = _derived()
    """Byte at which the chunk checksums start: directly after the rows."""
    file_bytes: int = _derived()

    def __post_init__(self) -> None:
        known = vars(self)  # frozen for others
        known["row_bytes"] = self.row_format.row_bytes
        known["payload_bytes"] = self.num_rows * self.row_bytes
        known["checksum_rows"] = max(1, _CHECKSUM_SPAN_BYTES // self.row_bytes)
        known["num_checksums"] = -(-self.num_rows // self.checksum_rows)
        known["data_start"] = len(self.header())
        known["checksums_start"] = self.data_start + self.payload_bytes
        known["file_bytes"] = self.checksums_start + DIGEST_BYTES * self.num_checksums

    def header(self) -> bytes:
        """The file's first bytes: length (8 bytes, little-endian), JSON, spaces up to a multiple of 4,096.

        It is a function of the layout, so a reader rebuilds it and compares: any changed byte is found.
        """
        metadata = {
            "format": FORMAT_NAME,
            "format_version": str(FORMAT_VERSION),
            "row_type": self.row_format.row_type,
            "num_rows": str(self.num_rows),
            "width": str(self.row_format.width),
            "row_bytes": str(self.row_bytes),
            "group_size": str(self.row_format.group_size),
            "compute_dtype": self.compute_dtype,
            "checksum_rows": str(self.checksum_rows),
            "rows_checksum": self.rows_checksum,
        }
        metadata |= {f"{name}_fingerprint": self.fingerprints.get(name, "") for name in FINGERPRINT_NAMES}
        metadata["header_checksum"] = _metadata_checksum(metadata)
        row, end = self.row_format, self.payload_bytes
        kind = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}.get(row.row_type, "U8")
        shape = [self.num_rows, row.row_bytes if kind == "U8" else row.width]
        sums = [self.num_checksums, DIGEST_BYTES]
        header = {
            "__metadata__": metadata,
            "rows": {"dtype": kind, "shape": shape, "data_offsets": [0, end]},
            "chunk_checksums": {"dtype": "U8", "shape": sums, "data_offsets": [end, end + sums[0] * sums[1]]},
        }
        text = json.dumps(header, separators=(",", ":")).encode("ascii")
        length = -(-(8 + len(text)) // PAGE_BYTES) * PAGE_BYTES - 8
        return struct.pack("<Q", length) + text.ljust(length)


class TableFile(Closing):
    """An open table file whose header has been checked. The descriptor stays open, so renaming or deleting is harmless.

    Attributes: ``path``, ``descriptor``, ``layout``.
    """

    def __init__(self, path: str | Path, expected_fingerprints: Mapping[str, str] | None = None) -> None:
        """Raises SconeError when the file is missing, damaged, foreign, of a newer version, or of another model."""
        self.path = Path(path)
        try:
            self.descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise SconeError(
                f"cannot open the embedding table {self.path}: {error.strerror}; "
                "check the path, or make the table with `scone precompute`"
            ) from error
        try:
            self.layout = _read_layout(self.descriptor, self.path)
            check_fingerprints(self.path, self.layout.fingerprints, expected_fingerprints)
            status = os.fstat(self.descriptor)
            self._size, self._time = status.st_size, status.st_mtime_ns
        except OSError as error:
            os.close(self.descriptor)
            raise SconeError(f"cannot read {self.path}: {error.strerror}; check the disk") from error
        except BaseException:
            os.close(self.descriptor)
            raise

    def check_unchanged(self) -> None:
        """Raise SconeError when the file was written to or cut since it was opened; called before every batch.

        Reading a mapped page that a truncation took away would kill the process, and a row that was overwritten would
        be a wrong row.
        """
        status = fstat(self.descriptor)
        if status.st_size != self._size or status.st_mtime_ns != self._time:
            raise self._changed()

    def check_size(self) -> None:
        """Raise SconeError when the file is longer or shorter than it was: in a quarter of `check_unchanged`'s time."""
        if lseek(self.descriptor, 0, SEEK_END) != self._size:
            raise self._changed()

    def _changed(self) -> SconeError:
        return SconeError(
            f"the embedding table {self.path} was changed while it was being read; expected a file that nobody "
            "writes to; open it again (new tables are renamed into place, never edited)"
        )

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``. Raises SconeError when the file ends early or the disk fails."""
        content = bytearray(size)
        self.read_into(offset, memoryview(content))
        return bytes(content)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` from ``offset`` on. Raises as `read` does."""
        while len(target):
            try:
                got = os.preadv(self.descriptor, [target], offset)
            except OSError as error:
                raise SconeError(f"cannot read {self.path}: {error.strerror}; check the disk") from error
            if not got:
                raise damaged(self.path, f"it ends at byte {offset:,}")
            offset, target = offset + got, target[got:]

    def checksums(self) -> list[bytes]:
        """The stored checksum of every chunk. Raises SconeError when they do not fit the header."""
        layout = self.layout
        stored = self.read(layout.checksums_start, DIGEST_BYTES * layout.num_checksums)
        if hashlib.sha256(stored).hexdigest() != layout.rows_checksum:
            raise damaged(self.path, "its checksums do not fit its header")
        return [stored[at : at + DIGEST_BYTES] for at in range(0, len(stored), DIGEST_BYTES)]

    def close(self) -> None:
        """Release the descriptor; calling it again does nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def layout_in_the_way(path: Path) -> TableLayout | None:
    """The header of the table that a new one at ``path`` would replace; None where there is nothing.

    Raises SconeError when there is something that is no sound table: it is the user's to delete.
    """
    if not path.exists():
        return None
    try:
        with TableFile(path) as file:
            return file.layout
    except SconeError as error:
        raise SconeError(f"found {path} in the way: {error}; delete it, or choose another output path") from error


def damaged(path: Path, what: str) -> SconeError:
    """The error for a file that does not say what its writer wrote."""
    return SconeError(f"the embedding table {path} is damaged: {what}; expected an unchanged file; make it again")


def check_fingerprints(path: Path, found: Mapping[str, str], expected: Mapping[str, str] | None) -> None:
    """Compare those fingerprints that both sides know. Raises SconeError naming the first that differs."""
    for name in FINGERPRINT_NAMES:
        want, have = (expected or {}).get(name, ""), found.get(name, "")
        if want and have and want != have:
            raise SconeError(
                f"the embedding table {path} was made from other {name} (fingerprint {have[:12]}…); "
                f"expected {want[:12]}…; give the table that belongs to this model, or precompute it again"
            )


def _read_layout(descriptor: int, path: Path) -> TableLayout:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise _foreign(path, "it is no file")
    size = status.st_size
    first = os.pread(descriptor, 8, 0)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise _foreign(path, "it does not start with a safetensors header")
    header = first + os.pread(descriptor, length, 8)
    try:
        metadata = json.loads(header[8:].decode("utf-8"))["__metadata__"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _foreign(path, "its header has no metadata") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT_NAME:
        raise _foreign(path, "its header does not name the format")
    layout = _layout_from_metadata(metadata, path)
    if layout.header() != header:
        raise damaged(path, "its header was changed")
    if layout.file_bytes != size:
        raise damaged(path, f"it has {size:,} bytes where its header says {layout.file_bytes:,}")
    return layout


def _layout_from_metadata(metadata: Mapping[str, Any], path: Path) -> TableLayout:
    """Turn metadata into a layout, whose header will be compared; nothing is allocated from its numbers."""
    version = str(metadata.get("format_version"))
    if version != str(FORMAT_VERSION) and version.isdigit():
        raise SconeError(
            f"the embedding table {path} has format version {version:.9}; expected {FORMAT_VERSION}; update scone, or "
            "make the table again"
        )
    try:
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("a value that is no text")  # as safetensors has them; int() of JSON's Infinity overflows
        num_rows, width, group_size = (int(metadata[name]) for name in ("num_rows", "width", "group_size"))
        row_format = RowFormat.of(metadata["row_type"], width, group_size)
        if num_rows < 0:
            raise ValueError(num_rows)
        fingerprints = {name: metadata.get(f"{name}_fingerprint", "") for name in FINGERPRINT_NAMES}
        rest = (str(metadata["compute_dtype"]), str(metadata["rows_checksum"]))
    except (SconeError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, "its header makes no sense") from error
    return TableLayout(num_rows, row_format, fingerprints, *rest)


def _metadata_checksum(metadata: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode("ascii")).hexdigest()


def _foreign(path: Path, what: str) -> SconeError:
    return SconeError(
        f"{path} is no embedding table ({what}); expected a file made by `scone precompute`; check the path"
    )
