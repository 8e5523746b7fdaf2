"""Sine and cosine in vector lanes, against numpy in a wider type."""

import numpy as np
import pytest
import warp as wp
from warp_sims.kernels.systems.lanes import sincos

LANES = 16
# Units in the last place of results above 1e-30; measured 1.5 and 1.0.
UNITS = 2.0


def make_kernel(dtype):
    real = "float" if dtype == wp.float32 else "double"
    text = f"""
#if !defined(__CUDA_ARCH__)
  typedef {real} real;
  enum {{ L = {LANES} }};
  typedef real vec __attribute__((ext_vector_type(L)));
{sincos(dtype)}
  vec a, s, c;
  __builtin_memcpy(&a, q.data + at, sizeof(vec));
  sincos(a, s, c);
  __builtin_memcpy(out_s.data + at, &s, sizeof(vec));
  __builtin_memcpy(out_c.data + at, &c, sizeof(vec));
#endif
"""

    @wp.func_native(text)
    def in_lanes(
        q: wp.array(dtype=dtype), out_s: wp.array(dtype=dtype), out_c: wp.array(dtype=dtype), at: int
    ): ...

    @wp.kernel(module="unique", enable_backward=False)
    def evaluate(q: wp.array(dtype=dtype), s: wp.array(dtype=dtype), c: wp.array(dtype=dtype)):
        in_lanes(q, s, c, wp.tid() * LANES)

    return evaluate


def evaluate(q):
    dtype = wp.float32 if q.dtype == np.float32 else wp.float64
    arrays = [wp.array(a, dtype=dtype, device="cpu") for a in (q, np.full_like(q, 7), np.full_like(q, 7))]
    wp.launch(make_kernel(dtype), dim=q.size // LANES, inputs=arrays, device="cpu")
    return arrays[1].numpy(), arrays[2].numpy()


def units(found, expected, dtype):
    return np.abs(found - expected) / np.spacing(np.abs(expected).astype(dtype)).astype(expected.dtype)


def arguments(dtype):
    draw = np.random.default_rng(0)
    near = np.pi / 2 * np.arange(-6000, 6000) + draw.normal(size=12000) * 10.0 ** draw.uniform(-7, 0, 12000)
    wide = draw.choice([-1, 1], 32000) * 10.0 ** draw.uniform(-20, 4, 32000)
    beyond = draw.choice([-1, 1], 8000) * 10.0 ** draw.uniform(4, 9, 8000)
    q = np.concatenate([draw.uniform(-4, 4, 12000), near, wide, beyond]).astype(dtype)
    return q[: q.size // LANES * LANES]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_accuracy(dtype):
    """Near zero, near multiples of pi / 2, up to 1e4 and beyond."""
    q = arguments(dtype)
    wide = q.astype(np.float64 if dtype == np.float32 else np.longdouble)
    for found, expected in zip(evaluate(q), (np.sin(wide), np.cos(wide))):
        assert units(found, expected, dtype)[np.abs(expected) > 1e-30].max() <= UNITS


def test_every_quadrant_and_sign():
    q = np.array([0.0, *(np.pi / 4 * np.arange(-7, 8))], dtype=np.float32)
    s, c = evaluate(q)
    assert s[0] == 0 and c[0] == 1
    np.testing.assert_allclose(s, np.sin(q.astype(np.float64)), atol=1e-7)
    np.testing.assert_allclose(c, np.cos(q.astype(np.float64)), atol=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_not_finite_gives_nan(dtype):
    q = np.linspace(-3, 3, LANES).astype(dtype)
    q[[2, 7, 11]] = np.nan, np.inf, -np.inf
    for found, expected in zip(evaluate(q), (np.sin, np.cos)):
        assert np.isnan(found[[2, 7, 11]]).all()
        rest = np.delete(np.arange(LANES), [2, 7, 11])
        np.testing.assert_allclose(found[rest], expected(q[rest].astype(np.float64)), rtol=1e-6, atol=1e-6)
