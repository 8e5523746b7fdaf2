"""Sine and cosine of many numbers at once, in vector lanes on a CPU: for native snippets.

Defines, after `real` and a vector type `vec` of L lanes, `sincos(q, s, c)`. The argument is reduced by the
nearest multiple n of pi / 2 in three parts (Cody and Waite) with fused multiply-adds; then polynomials for
|r| <= pi / 4: those of Cephes in single, of fdlibm in double precision. Beyond |q| = 1e4, and for NaN and
infinity, the library's functions are called lane by lane. Error: below 2 units in the last place.
"""

from typing import Any

import warp as wp

_SINCOS = """
  const auto fma = [](vec a, vec b, vec c) -> vec { return __builtin_elementwise_fma(a, b, c); };
  const auto sincos = [&](vec q, vec& s, vec& c) {
    const vec n = __builtin_elementwise_roundeven(q * real(0.63661977236758134308));
    vec r = fma(n, (vec)(real(-(PART_1))), q);
    r = fma(n, (vec)(real(-(PART_2))), r);
    r = fma(n, (vec)(real(-(PART_3))), r);
    const vec t = r * r;
    vec ps = (vec)(real(SINE_LAST)), pc = (vec)(real(COSINE_LAST));
    SINE
    COSINE
    const vec sine = fma(t * r, ps, r), cosine = fma(t * t, pc, fma(t, (vec)(real(-0.5)), (vec)(real(1))));
    typedef INT whole; typedef whole ivec __attribute__((ext_vector_type(L)));
    // quadrant n mod 4 from the low bits of a float, which hold for |n| < 2^22
    ivec k; const vec shifted = n + real(SHIFT); __builtin_memcpy(&k, &shifted, sizeof(vec));
    const auto odd = (k & 1) != 0;
    s = odd ? cosine : sine;
    c = odd ? sine : cosine;
    enum { TO_SIGN = 8 * (int)sizeof(real) - 2 };
    const ivec sign_s = (k & 2) << TO_SIGN, sign_c = ((k + 1) & 2) << TO_SIGN;
    ivec bits;
    __builtin_memcpy(&bits, &s, sizeof(vec)); bits ^= sign_s; __builtin_memcpy(&s, &bits, sizeof(vec));
    __builtin_memcpy(&bits, &c, sizeof(vec)); bits ^= sign_c; __builtin_memcpy(&c, &bits, sizeof(vec));
    const vec size = __builtin_elementwise_abs(q);
    bool small = true;
    _Pragma("unroll") for (int l = 0; l < L; ++l) small &= size[l] <= real(1e4);
    if (!small)  // only these lanes: a world does not depend on its neighbours
      for (int l = 0; l < L; ++l)
        if (!(size[l] <= real(1e4))) { s[l] = wp::sin((real)q[l]); c[l] = wp::cos((real)q[l]); }
  };
"""

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
    text = _SINCOS
    for name in ("COSINE", "SINE"):  # one name ends with the other
        last, *rest = constants[name]
        variable = "ps" if name == "SINE" else "pc"
        terms = " ".join(f"{variable} = fma({variable}, t, (vec)(real({c})));" for c in rest)
        text = text.replace(f"{name}_LAST", last).replace(f"    {name}\n", f"    {terms}\n")
    for i, part in enumerate(constants["PARTS"], 1):
        text = text.replace(f"PART_{i}", part)
    return text.replace("INT", constants["INT"]).replace("SHIFT", constants["SHIFT"])
