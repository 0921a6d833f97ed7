"""Arithmetic that Triton's interpreter gets wrong, put right.

It keeps bfloat16 as 16-bit patterns and computes on them as on integers: a sum of two bfloat16 is the sum of their
patterns. Here casts and arithmetic on bfloat16 go through float32 and round to nearest even, as on a GPU and bit-equal
to torch. Smaller defects: a scalar comparison keeps the type of its operands, and broadcast it is no mask; before
Triton 3.9 `tl.fma` rounds twice; before 3.7 a loop over `range(tensor)` fails with numpy 2.4 and later.
"""
from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
_BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift}
_TOWARDS_ZERO = interpreter._ir.ROUNDING_MODE.RTZ


def widen(bits: Any) -> np.ndarray:
    """bfloat16 patterns as float32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(x: Any, towards_zero: bool = False) -> np.ndarray:
    """float32 as bfloat16 patterns, to nearest even; every NaN becomes the quiet one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    if not towards_zero:
        bits = bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))
    return np.where(np.isnan(x), np.uint16(0x7FC0), (bits >> 16).astype(np.uint16)).reshape(np.shape(x))


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x y + z of float32, rounded once: the float64 sum is made odd where it is not exact, then rounding is right."""
    with np.errstate(invalid="ignore", over="ignore"):
        product, z = x.astype(np.float64) * y, np.broadcast_to(z, np.broadcast_shapes(x.shape, y.shape, z.shape))
        total = product + z
        back = total - product
        lost = (product - (total - back)) + (z - back)
        even = (total.view(np.int64) & 1) == 0
        away = np.where(lost > 0, np.inf, -np.inf)
        nudge = np.isfinite(total) & (lost != 0) & even
        return np.where(nudge, np.nextafter(total, away), total).astype(np.float32)


def _is_bf16(handle: Any) -> bool:
    return not isinstance(handle.dtype, tl.pointer_type) and handle.dtype.scalar == tl.bfloat16


def _as_float32(handle: Any) -> Any:
    return Handle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _float32_like(kind: Any) -> Any:
    return tl.block_type(tl.float32, kind.shape) if kind.is_block() else tl.float32


def install() -> None:
    plain_convert, plain_cast = interpreter._convert_float, Builder.cast_impl
    plain_binary, plain_unary, plain_dot = Builder.binary_op, Builder.unary_op, Builder.create_dot
    plain_clamp, plain_fma = Builder.create_clampf, Builder.create_fma
    plain_rmw, plain_patch = Builder.create_atomic_rmw, interpreter._patch_lang_tensor

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.bfloat16 and target != tl.bfloat16:
            wide = widen(data)
            return wide.view(np.uint32) if target == tl.float32 else plain_convert(wide, tl.float32, target, mode)
        if target == tl.bfloat16 and source != tl.bfloat16:
            wide = np.asarray(data) if source == tl.float32 else np.asarray(data).astype(np.float32)
            return narrow(wide.view(np.float32), mode == _TOWARDS_ZERO)
        return plain_convert(data, source, target, mode)

    def cast(self: Any, source: Any, target: Any) -> Any:
        if _is_bf16(source):
            return source if target.scalar == tl.bfloat16 else plain_cast(self, _as_float32(source), target)
        if target.scalar == tl.bfloat16:
            return Handle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return plain_cast(self, source, target)

    def binary(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not (_is_bf16(left) and _is_bf16(right)) or op in _BITWISE:
            plain = plain_binary(self, left, right, op)
            return Handle(plain.data, tl.int1) if plain.data.dtype == np.bool_ else plain
        result = op(widen(left.data), widen(right.data))
        return Handle(result, tl.int1) if result.dtype == np.bool_ else Handle(narrow(result), tl.bfloat16)

    def unary(self: Any, x: Any, op: Any) -> Any:
        return Handle(narrow(op(widen(x.data))), tl.bfloat16) if _is_bf16(x) else plain_unary(self, x, op)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, _as_float32(a), _as_float32(b), *rest)

    def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
        if _is_bf16(z):
            wide = [_as_float32(h).data.astype(np.float64) for h in (x, y, z)]
            return Handle(narrow((wide[0] * wide[1] + wide[2]).astype(np.float32)), tl.bfloat16)
        if z.data.dtype == np.float32:
            return Handle(fma(x.data, y.data, z.data), z.dtype.scalar)
        return plain_fma(self, x, y, z)

    def clamp(self: Any, x: Any, low: Any, high: Any, *mode: Any) -> Any:
        if not _is_bf16(x):
            return plain_clamp(self, x, low, high, *mode)
        wide = plain_clamp(self, *map(_as_float32, (x, low, high)), *mode)
        return Handle(narrow(wide.data), tl.bfloat16)

    def rmw(self: Any, op: Any, pointer: Any, value: Any, *rest: Any) -> Any:
        if _is_bf16(value):
            raise NotImplementedError("an atomic on bfloat16: the interpreter would add bit patterns")
        return plain_rmw(self, op, pointer, value, *rest)

    def reduction(plain: Any) -> Any:
        def apply(self: Any, inputs: Any, *rest: Any, **names: Any) -> Any:
            if isinstance(inputs, tuple) or inputs.dtype.scalar != tl.bfloat16:
                return plain(self, inputs, *rest, **names)
            wide = plain(self, tl.tensor(_as_float32(inputs.handle), _float32_like(inputs.type)), *rest, **names)
            several = wide if isinstance(wide, (list, tuple)) else [wide]
            half = [x if x.dtype.scalar != tl.float32 else self.to_tensor(narrow(x.handle.data), tl.bfloat16)
                    for x in several]
            return type(wide)(half) if isinstance(wide, (list, tuple)) else half[0]

        return apply

    def scan(self: Any, inputs: Any) -> Any:
        """In log2(n) steps over whole arrays, as on a GPU, and not element by element."""
        shape = inputs[0].handle.data.shape
        kinds = [x.dtype for x in inputs]
        place = np.arange(shape[self.axis]).reshape([-1 if d == self.axis else 1 for d in range(len(shape))])
        data, step = [x.handle.data for x in inputs], 1
        while step < shape[self.axis]:
            pairs = [[self.to_tensor(x, kind) for x, kind in zip(xs, kinds, strict=True)]
                     for xs in ([np.roll(x, step, self.axis) for x in data], data)]
            joined = self.combine_fn.fn(*pairs[0], *pairs[1])
            joined = joined if isinstance(joined, tuple) else (joined,)
            data = [np.where(place >= step, new.handle.data, old) for new, old in zip(joined, data, strict=True)]
            step *= 2
        return [self.to_tensor(x, kind) for x, kind in zip(data, kinds, strict=True)]

    def patch_tensor(tensor: Any, scope: Any) -> None:
        plain_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    for kind, names in ((interpreter.ReduceOps, ("sum", "min_max")), (interpreter.ScanOps, ("cumsum", "cumprod"))):
        for name in names:
            setattr(kind, name, reduction(getattr(kind, name)))
    interpreter.ScanOps.generic_scan = scan
    interpreter._convert_float = convert
    interpreter._patch_lang_tensor = patch_tensor
    Builder.cast_impl, Builder.binary_op, Builder.unary_op, Builder.create_dot = cast, binary, unary, dot
    Builder.create_fma, Builder.create_clampf, Builder.create_atomic_rmw = fused, clamp, rmw
    Builder.create_rsqrt = lambda self, x: self.unary_op(x, lambda value: 1 / np.sqrt(value))
    Builder.get_bf16 = lambda self, value: Handle(narrow(np.array([value], np.float32)), tl.bfloat16)
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(Builder, f"create_{name}", lambda self, source, target: self.cast_impl(source, target))
