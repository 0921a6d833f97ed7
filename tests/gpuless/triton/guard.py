"""Memory checks inside Triton's interpreter: what a GPU would do silently raises a GuardError that names the tensor.

- out of bounds: a lane that is not masked off touches bytes that belong to no element of any tensor argument. Bytes
  between the rows of a view (the other half of a chunked tensor, the padding of a crop) belong to none.
- race: two programs of one launch store the same byte, or one stores what another reads, without atomics.
- stale: a program reads what it stored itself with no barrier between: its threads need not see each other's stores.
- conflict: two lanes of one store write different values to one place.
- undefined lanes: a masked-off lane of a load without `other` gives NaN (integers: a large number), not 0.
"""
from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Handle, Builder, Executor = interpreter.TensorHandle, interpreter.InterpreterBuilder, interpreter.GridExecutor
NOBODY, SEVERAL = -1, -2
_UNDEFINED_INTEGER = 0x5A5A5A5A5A5A5A5A


class GuardError(Exception):
    """A kernel touched memory in a way that is not defined on a GPU."""


@dataclass
class Region:
    """Adjoining or overlapping tensor arguments: for each byte whether it belongs to an element, and who touched it."""

    start: int
    names: list[tuple[int, int, int, str]]              # start, end, element size, argument
    valid: np.ndarray
    writer: np.ndarray = field(init=False)              # a program, NOBODY
    reader: np.ndarray = field(init=False)              # a program, NOBODY or SEVERAL
    epoch: np.ndarray = field(init=False)               # barriers the writer had passed when it stored
    atomic: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.writer, self.reader = (np.full(self.valid.size, NOBODY, np.int64) for _ in range(2))
        self.epoch, self.atomic = np.zeros(self.valid.size, np.int64), np.zeros(self.valid.size, bool)

    def describe(self, address: int) -> str:
        near = min(self.names, key=lambda n: max(n[0] - address, address - n[1] + 1, 0))
        return f"{near[3]}[{(address - near[0]) // near[2]:+d}] of {(near[1] - near[0]) // near[2]} elements"


def _tensors(name: str, value: Any) -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, tuple):
        return [found for i, item in enumerate(value) for found in _tensors(f"{name}.{i}", item)]
    value = getattr(value, "base", value)                # a TensorWrapper, a TensorDescriptor
    return [(name, value)] if isinstance(value, torch.Tensor) and value.numel() else []


def regions_of(arguments: list[tuple[str, Any]]) -> list[Region]:
    spans = []
    for name, tensor in (found for argument in arguments for found in _tensors(*argument)):
        size = tensor.element_size()
        elements = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        spans.append((tensor.data_ptr(), tensor.data_ptr() + elements * size, size, name, tensor))
    spans.sort(key=lambda span: span[0])
    groups: list[list[Any]] = []
    for span in spans:
        if groups and span[0] < max(other[1] for other in groups[-1]):
            groups[-1].append(span)
        else:
            groups.append([span])
    regions = []
    for group in groups:
        start, end = group[0][0], max(span[1] for span in group)
        valid = np.zeros(end - start, bool)
        for first, last, size, _, tensor in group:
            mine = torch.zeros((last - first) // size, dtype=torch.bool)
            mine.as_strided(tensor.shape, tensor.stride()).fill_(True)
            valid[first - start : last - start] |= np.repeat(mine.numpy(), size)
        regions.append(Region(start, [span[:4] for span in group], valid))
    return regions


class Guard:
    """The state of one launch."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.barriers: collections.Counter[int] = collections.Counter()

    def program(self, builder: Any) -> int:
        (x, y, z), (nx, ny, _) = builder.grid_idx, builder.grid_dim
        return x + nx * (y + ny * z)

    def access(self, builder: Any, what: str, pointers: Any, mask: Any, value: Any = None) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        where, on = np.broadcast_arrays(pointers.data, mask)
        addresses = where[on].astype(np.int64)
        if not addresses.size:
            return
        program, found = self.program(builder), np.zeros(addresses.shape, bool)
        who = f"program {builder.grid_idx}"
        for region in self.regions:
            inside = (addresses >= region.start) & (addresses + size <= region.start + region.valid.size)
            if not inside.any():
                continue
            at = (addresses[inside] - region.start)[:, None] + np.arange(size)
            owned = region.valid[at].all(1)
            if not owned.all():
                lost = int(addresses[inside][~owned][0])
                raise GuardError(f"out of bounds: {who} {what}s between the elements at {region.describe(lost)}")
            found |= inside
            getattr(self, what)(region, at, program, who)
        if not found.all():
            lost = int(addresses[~found][0])
            named = [region.describe(lost) for region in self.regions if region.start - lost < 1 << 40]
            distance = [max(r.start - lost, lost - r.start - r.valid.size + 1, 0) for r in self.regions]
            near = self.regions[int(np.argmin(distance))].describe(lost) if named else "memory of no argument"
            count = np.count_nonzero(~found)
            raise GuardError(f"out of bounds: {who} {what}s {count} lanes outside, the first at {near}")
        if what == "store" and value is not None:
            self.conflicts(np.broadcast_to(value, where.shape)[on], addresses, who)

    def _complain(self, bad: np.ndarray, region: Region, at: np.ndarray, text: str) -> None:
        if bad.any():
            raise GuardError(f"{text} at {region.describe(region.start + int(at[bad][0]))}")

    def load(self, region: Region, at: np.ndarray, program: int, who: str) -> None:
        writer = region.writer[at]
        self._complain((writer != NOBODY) & (writer != program), region, at,
                       f"race: {who} reads what another program stored")
        stale = (writer == program) & (region.epoch[at] == self.barriers[program])
        self._complain(stale, region, at, f"stale: {who} reads what it stored, with no barrier between")
        reader = region.reader[at]
        region.reader[at] = np.where((reader == NOBODY) | (reader == program), program, SEVERAL)

    def store(self, region: Region, at: np.ndarray, program: int, who: str, atomic: bool = False) -> None:
        writer, reader = region.writer[at], region.reader[at]
        others = (writer != NOBODY) & (writer != program)
        self._complain(others & ~(region.atomic[at] & atomic), region, at,
                       f"race: {who} stores what another program stored")
        self._complain((reader != NOBODY) & (reader != program), region, at,
                       f"race: {who} stores what another program reads")
        region.writer[at], region.epoch[at], region.atomic[at] = program, self.barriers[program], atomic

    def atomic(self, region: Region, at: np.ndarray, program: int, who: str) -> None:
        self.store(region, at, program, who, atomic=True)

    def conflicts(self, values: np.ndarray, addresses: np.ndarray, who: str) -> None:
        order = np.argsort(addresses, kind="stable")
        same = np.diff(addresses[order]) == 0
        bits = np.ascontiguousarray(values[order])
        different = bits.view(np.uint8).reshape(bits.size, -1)
        if (same & (different[1:] != different[:-1]).any(1)).any():
            raise GuardError(f"conflict: two lanes of one store of {who} write different values to one place")


guard = Guard()


def _undefined(shape: tuple[int, ...], dtype: Any) -> Any:
    kind = interpreter._get_np_dtype(dtype)
    if kind.kind == "f":
        return Handle(np.full(shape, np.nan, kind), dtype)
    if dtype == tl.bfloat16:
        return Handle(np.full(shape, 0x7FC0, kind), dtype)
    return Handle(np.full(shape, _UNDEFINED_INTEGER & np.iinfo(kind).max if kind.kind in "iu" else True, kind), dtype)


def install() -> None:
    plain_load, plain_store = Builder.create_masked_load, Builder.create_masked_store
    plain_rmw, plain_cas = Builder.create_atomic_rmw, Builder.create_atomic_cas
    plain_barrier, plain_arguments = Builder.create_barrier, Executor._init_args_hst

    def arguments(self: Any, positional: Any, keywords: Any) -> Any:
        hosted, named = plain_arguments(self, positional, keywords)
        guard.regions = regions_of([*zip(self.arg_names, hosted, strict=False), *named.items()])
        guard.barriers.clear()
        return hosted, named

    def load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        guard.access(self, "load", pointers, mask.data)
        if other is None:
            other = _undefined(np.broadcast_shapes(pointers.data.shape, mask.data.shape), pointers.get_element_ty())
        return plain_load(self, pointers, mask, other, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        guard.access(self, "store", pointers, mask.data, value.data)
        return plain_store(self, pointers, value, mask, *rest)

    def rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        guard.access(self, "atomic", pointers, mask.data)
        return plain_rmw(self, op, pointers, value, mask, *rest)

    def cas(self: Any, pointers: Any, *rest: Any) -> Any:
        guard.access(self, "atomic", pointers, np.ones_like(pointers.data, bool))
        return plain_cas(self, pointers, *rest)

    def barrier(self: Any) -> Any:
        guard.barriers[guard.program(self)] += 1
        return plain_barrier(self)

    Executor._init_args_hst = arguments
    Builder.create_masked_load, Builder.create_masked_store = load, store
    Builder.create_atomic_rmw, Builder.create_atomic_cas, Builder.create_barrier = rmw, cas, barrier
