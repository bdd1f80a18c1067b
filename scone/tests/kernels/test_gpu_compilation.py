"""Every Triton kernel compiles for GPUs, which needs none: the interpreter takes programs that the compiler refuses."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted (TRITON_INTERPRET=1)", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from scone.kernels import ancestor_attention_triton, rows_triton, table_lookup_triton  # noqa: E402

AMPERE, HOPPER = 80, 90
STORED = [("", "fp32"), ("", "fp16"), ("", "bf16"), ("int8", "u8"), ("int4", "u8")]
"""What kernels call a row type, and what its rows are read as."""


def kernel_compiles(kernel: Any, pointers: Mapping[str, str], constants: Mapping[str, Any], capability: int) -> None:
    """Compile ``kernel`` whose arguments are ``pointers`` to types, ``constants``, and integers."""
    names = kernel.arg_names
    assert {*pointers, *constants} <= set(names)
    integers = {name: "i64" if name in LONG else "i32" for name in names}
    types = integers | {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(constants, "constexpr")
    types |= {"scale": "fp32"} if "scale" in names else {}
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    assert compiled.asm["cubin"]


LONG = {
    *("length", "past_length", "token_row", "past_row", "num_f_grams", "num_buckets", "rank_bits"),
    *("max_probes", "vocab_size", "num_near", "num_requests", "history_stride"),
}
"""Arguments that the lookup declares to be 64 bits wide."""


def lookups() -> Iterator[tuple[tuple[str, str], str, bool, int, int]]:
    """Row types, vectors, with a history of fixed size or not, N, and the row's width in blocks."""
    for stored, vectors in itertools.product(STORED, ("fp32", "bf16")):
        yield stored, vectors, True, 5, 1
    for has_places, longest in itertools.product((False, True), (2, 3, 8)):
        yield ("", "bf16"), "bf16", has_places, longest, 2


@pytest.mark.parametrize(("stored", "vectors", "has_places", "longest", "num_blocks"), list(lookups()))
def test_the_lookups_compile(
    stored: tuple[str, str], vectors: str, has_places: bool, longest: int, num_blocks: int
) -> None:
    row_type, rows = stored
    shared = {"vectors": vectors, "output": vectors, "near": rows, "far": rows, "counts": "i64", "keys": "i32"}
    constants = {"longest": longest, "row_type": row_type, "num_blocks": num_blocks, "block": 1024}
    constants |= {"context_size": triton.next_power_of_2(longest)}
    pointers = shared | {"found": "u8", "slots": "i32"} | dict.fromkeys(("tokens", "past", "places"), "i64")
    kernel_compiles(table_lookup_triton._look_up, pointers, constants | {"has_places": has_places}, HOPPER)
    # ragged; request slots are of 32 or 64 bits, by the version of the server
    pointers = shared | dict.fromkeys(("tokens", "query_starts", "histories", "num_computed", "slots_of_index"), "i32")
    pointers |= {"slots": "i64" if has_places else "i32"}
    kernel_compiles(table_lookup_triton._look_up_ragged, pointers, constants | {"starts_size": 256}, HOPPER)


@pytest.mark.parametrize("out", ["fp32", "bf16"])
@pytest.mark.parametrize("stored", STORED)
def test_the_gather_compiles(stored: tuple[str, str], out: str) -> None:
    row_type, rows = stored
    pointers = {"source": rows, "ranks": "i64", "out": out}
    kernel_compiles(rows_triton._gather, pointers, {"row_type": row_type, "block": 256}, AMPERE)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("max_n", "block"), [(1, 1), (5, 64)])
def test_attention_along_the_trie_compiles(dtype: str, max_n: int, block: int) -> None:
    constants = {"max_n": max_n, "nodes_at_once": 16, "block": block}
    pointers = dict.fromkeys(("query", "key", "value"), dtype) | {"ancestors": "i64", "weights": "fp32"}
    kernel_compiles(ancestor_attention_triton._forward, pointers | {"output": dtype}, constants, AMPERE)
    gradients = {"grad_output": dtype, "grad_query": dtype, "grad_key": "fp32", "grad_value": "fp32"}
    kernel_compiles(ancestor_attention_triton._backward, pointers | gradients, constants, AMPERE)
