"""Native texts of composed policies: any chain of the operations in composed_description.py.

With the operations f_1 ... f_n of a table, values a_i, and d_i the cotangent of a_i:

    forward      a_0 = x;  a_i = f_i(a_j, ...);  u = a_n
    linearize    d_n = e_c;  d_j += (df_i / da_j)^T d_i, from the last operation to the first;  J[c] = d_0
    pull         the same for d_n = mu: once, however many controls there are
    weight_grad  adj_p += sum_rows (df_i / dp)^T (sum_c mu_c d_i^c) for weights, biases, scales and shifts p

The functions are generic in the policy, whose operations they read from the table at run time: one kernel
serves all. What they do is in composed.h.
"""

from typing import Any, NamedTuple

import warp as wp

from ..native_text import sections
from ..systems.lanes import sincos
from .native_tiles import PRELUDE, TANH, fill

_TEXT = sections(__file__)


class Texts(NamedTuple):
    """Bodies of a policy's device functions for one dtype."""

    forward: str
    linearize: str
    pull: str
    weight_grad: str


def composed_texts(dtype: Any) -> Texts:
    """The texts of a composed policy for `dtype` (wp.float32 or wp.float64)."""
    single = dtype == wp.float32
    cpu = "#if !defined(__CUDA_ARCH__)\n" + TANH + "  enum { L = VL };\n" + sincos(dtype) + "#endif\n"
    before = PRELUDE + cpu + _TEXT["table"] + _TEXT["vectors"]
    linearize = _TEXT["linearize"].replace("WS_SLOPES", _TEXT["slopes"])
    words = {
        "HIGHEST": "88.0" if single else "709.0",  # 2^n is a number
        "LOWEST": "-87.3" if single else "-708.0",
        "LOG_TERMS": "8" if single else "17",  # the series ends below half a unit in the last place
    }

    def filled(text: str) -> str:
        for word, value in words.items():
            text = text.replace(word, value)
        return fill(text, dtype)

    return Texts(
        filled(before + _TEXT["forward"].replace("WS_VALUES", _TEXT["values"])),
        filled(before + _TEXT["unit_seed"] + linearize),
        filled(before + _TEXT["pull_seed"] + linearize),
        filled(PRELUDE + _TEXT["table"] + _TEXT["weight_grad"]),
    )
