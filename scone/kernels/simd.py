"""Two instructions that numba has no words for: look at 16 slots at once, and ask for a cache line ahead of its use."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
"""Slots that `largest_match` compares: 64 bytes, one cache line."""

_INT32 = ir.IntType(32)
_VECTOR = ir.VectorType(_INT32, LANES)


def _pointer_to(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _largest_match(typing_context, slots, start, wanted, low_mask):
    """The largest of ``slots[start : start + 16]`` (uint32) that equals ``wanted`` above ``low_mask``; 0 for none.

    In numpy: ``max(0, *group[(group ^ wanted) <= low_mask])``. Nothing checks the bounds. LLVM makes of it what the
    processor has: three instructions with AVX-512, a loop elsewhere.
    """
    signature = types.uint32(slots, types.uint64, types.uint32, types.uint32)

    def generate(context, builder, signature, arguments):
        array, start, wanted, low_mask = arguments
        pointer = _pointer_to(context, builder, signature.args[0], array, start)
        group = builder.load(builder.bitcast(pointer, _VECTOR.as_pointer()))
        group.align = 4
        differs = builder.xor(group, _in_all_lanes(builder, wanted))
        is_match = builder.icmp_unsigned("<=", differs, _in_all_lanes(builder, low_mask))
        kept = builder.select(is_match, group, ir.Constant(_VECTOR, [0] * LANES))
        name = f"llvm.vector.reduce.umax.v{LANES}i32"
        largest = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_INT32, [_VECTOR]), name)
        return builder.call(largest, [kept])

    return signature, generate


def _in_all_lanes(builder, value):
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first_lane = builder.insert_element(undefined, value, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first_lane, undefined, ir.Constant(_VECTOR, [0] * LANES))


def _prefetch(typing_context, array, index):
    """Ask for the cache line of ``array[index]`` and do not wait. Any index is harmless: a prefetch never faults.

    Args:
        array: one-dimensional, contiguous.
    """
    signature = types.void(array, types.uint64)

    def generate(context, builder, signature, arguments):
        pointer = _pointer_to(context, builder, signature.args[0], *arguments)
        byte_pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte_pointer, _INT32, _INT32, _INT32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, keep_in_all_caches, data = (ir.Constant(_INT32, number) for number in (0, 3, 1))
        builder.call(function, [builder.bitcast(pointer, byte_pointer), read, keep_in_all_caches, data])
        return context.get_dummy_value()

    return signature, generate


# `Any`, because numba supplies the first argument and type checkers cannot know it.
largest_match: Any = intrinsic(_largest_match)
prefetch: Any = intrinsic(_prefetch)
