"""Large blocks of memory go back to the system."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys
from scone.utils.memory import return_large_blocks

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Mallinfo
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "yes":
    assert return_large_blocks()
library.free(library.malloc(8 << 20))
before = library.mallinfo2().hblkhd
block = library.malloc(8 << 20)
print(library.mallinfo2().hblkhd - before >= 8 << 20)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc 2.33 and later tells of its blocks")
def test_large_blocks_are_the_systems_once_asked_for() -> None:
    """A block that follows a freed one is mapped by itself; unasked, it comes from what was kept."""
    for asked, is_mapped in (("yes", "True"), ("no", "False")):
        done = subprocess.run([sys.executable, "-c", PROGRAM, asked], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == is_mapped
