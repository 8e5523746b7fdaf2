"""Sine and cosine of many numbers at once, in vector lanes on a CPU: for native snippets.

Defines, after `real` and a vector type `vec` of L lanes, `sincos(q, s, c)`. The argument is reduced by the
nearest multiple n of pi / 2 in three parts (Cody and Waite) with fused multiply-adds; then polynomials for
|r| <= pi / 4: those of Cephes in single, of fdlibm in double precision. Beyond |q| = 1e4, and for NaN and
infinity, the library's functions are called lane by lane. Error: below 2 units in the last place.
"""

from typing import Any

import warp as wp

from ..native_text import sections

_TEXT = sections(__file__)


_CONSTANTS = {
    "float": {
        "PARTS": ("1.5707963705062866", "-4.371138828673793e-08", "-1.7151245100058819e-15"),
        "SINE": ("-1.9515295891e-4", "8.3321608736e-3", "-1.6666654611e-1"),
        "COSINE": ("2.443315711809948e-5", "-1.388731625493765e-3", "4.166664568298827e-2"),
        "INT": "int",
        "SHIFT": "12582912.0",  # 1.5 * 2^23
    },
    "double": {
        "PARTS": ("1.5707963267948966", "6.123233995736766e-17", "-1.4973849048591698e-33"),
        "SINE": (
            "1.58969099521155010221e-10",
            "-2.50507602534068634195e-08",
            "2.75573137070700676789e-06",
            "-1.98412698298579493134e-04",
            "8.33333333332248946124e-03",
            "-1.66666666666666324348e-01",
        ),
        "COSINE": (
            "-1.13596475577881948265e-11",
            "2.08757232129817482790e-09",
            "-2.75573143513906633035e-07",
            "2.48015872894767294178e-05",
            "-1.38888888888741095749e-03",
            "4.16666666666666019037e-02",
        ),
        "INT": "long long",
        "SHIFT": "6755399441055744.0",  # 1.5 * 2^52
    },
}


def sincos(dtype: Any) -> str:
    """Returns the source of `sincos(vec q, vec& s, vec& c)` for `dtype`."""
    constants = _CONSTANTS["float" if dtype == wp.float32 else "double"]
    text = _TEXT["sincos"]
    for name in ("COSINE", "SINE"):  # one name ends with the other
        last, *rest = constants[name]
        variable = "ps" if name == "SINE" else "pc"
        terms = " ".join(f"{variable} = fma({variable}, t, (vec)(real({c})));" for c in rest)
        text = text.replace(f"{name}_LAST", last).replace(f"    {name}\n", f"    {terms}\n")
    for i, part in enumerate(constants["PARTS"], 1):
        text = text.replace(f"PART_{i}", part)
    return text.replace("INT", constants["INT"]).replace("SHIFT", constants["SHIFT"])
