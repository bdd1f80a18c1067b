"""The logarithm of the ranking by gain; the scores are compared with a reference in tokenization/test_ranking.py."""

from __future__ import annotations

import math
import sys

from hypothesis import example, given, settings
from hypothesis import strategies as st

from scone.kernels.gain import natural_log


@settings(deadline=None)  # the first call compiles
@given(st.floats(sys.float_info.min, 1e300))
@example(1.0)
@example(math.nextafter(1.0, 0.0))
@example(math.nextafter(1.0, 2.0))
@example(math.sqrt(0.5))
def test_natural_log_is_the_logarithm(value):
    # every operation rounds; near 1, where the logarithm is small, it is 3 units in the last place at most
    assert abs(natural_log(value) - math.log(value)) <= 4 * math.ulp(math.log(value))
