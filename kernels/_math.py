"""Functions that are the same in the interpreter and on every GPU: the polynomials of csrc/cpu/vec.h, fused alike."""
import triton
import triton.language as tl


@triton.jit
def _reduce(x):
    """(e^r - 1, 2^(k // 2), 2^(k - k // 2)) with x = k ln 2 + r; the scales are two so that each is a float32."""
    k = (x * 1.44269504 + 12582912.0) - 12582912.0          # to the nearest whole number, ties to even
    r = tl.fma(k, k * 0 - 0.693359375, x)
    r = tl.fma(k, k * 0 + 2.12194440e-4, r)
    q = tl.fma(r, r * 0 + 1.3818296e-3, r * 0 + 8.368532e-3)
    q = tl.fma(q, r, r * 0 + 4.1668292e-2)
    q = tl.fma(q, r, r * 0 + 0.16666523)
    q = tl.fma(q, r, r * 0 + 0.49999994)
    whole = tl.where(x == x, k, 0.0).to(tl.int32)
    half = whole >> 1
    low = ((half + 127) << 23).to(tl.float32, bitcast=True)
    high = ((whole - half + 127) << 23).to(tl.float32, bitcast=True)
    return tl.fma(q, r * r, r), low, high


@triton.jit
def exp(x):
    """e^x within 1.5 ulp: above 88.7 inf, below -104 zero, NaN stays NaN."""
    tail, low, high = _reduce(tl.where(x > 89.0, 89.0, tl.where(x < -104.0, -104.0, x)))
    return (tail + 1.0) * low * high


@triton.jit
def expm1(x):
    """e^x - 1 with a small relative error near 0 too."""
    tail, low, high = _reduce(tl.where(x > 89.0, 89.0, tl.where(x < -30.0, -30.0, x)))
    return tl.fma(tail * low, high, tl.fma(low, high, low * 0 - 1.0))
