"""How one table row is stored: float32, float16, bfloat16, or int8/int4 codes with their scales inside the row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scone.utils.errors import SconeError

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

        The reference of the compiled kernels (`scone.kernels.dequantize` on CPU, `dequantize_triton` on CUDA).
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
