"""Native text that all dense layers of dense.h share: vectors, register tiles and tanh."""

from typing import Any

import warp as wp

from ..native_text import sections
from .layout import BLOCK

_TEXT = sections(__file__)

PRELUDE = _TEXT["prelude"]

# tanh(x) = t / (t + 2) with t = e^{2x} - 1 = 2^n (e^r - 1) + (2^n - 1), |r| <= ln2 / 2: relative accuracy
# near 0, where controllers start. The series is cut where its remainder is below half a unit in the last
# place. The clamps let NaN through.
TANH = _TEXT["tanh"]


def fill(text: str, dtype: Any) -> str:
    """Native text for `dtype`, with its constants."""
    single = dtype == wp.float32
    # sum_{k >= 2} r^(k-2) / k!, highest power first
    last = 7 if single else 14
    factorial = [1.0]
    for k in range(1, last + 1):
        factorial.append(factorial[-1] * k)
    series = "\n    ".join(
        f"q = WS_FMA(q, r, (vec)(real({1.0 / factorial[k]!r})));" for k in range(last - 1, 1, -1)
    )
    values = {
        "SERIES_LAST": repr(1.0 / factorial[last]),
        "SERIES": series,
        "LIMIT": "9.1" if single else "20.0",
        "LN2_HI": "0.693359375" if single else "0.693147180369123816490",
        "LN2_LO": "-2.12194440054690581e-4" if single else "1.90821492927058770002e-10",
        "INT": "int" if single else "long long",
        "EXPONENT_BIAS": "127" if single else "1023",
        "MANTISSA": "23" if single else "52",
        "REAL": "float" if single else "double",
        "BLOCK": str(BLOCK),
    }
    for name, value in values.items():
        text = text.replace(name, value)
    return text
