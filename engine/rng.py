"""Random numbers keyed by (seed, stream, element): the same bits on every backend, in any batch, from any offset.

Philox4x32-10 with key `seed` modulo 2^64 and counter (offset + i // 4, stream); element i of a row, in logical
row-major order, is word i % 4 of its block. `reference/rng.py` defines how a word becomes a float32; half types round
that float32 once.

All functions take
    shape     sizes of the result
    seed      int, or int64 tensor [] or [shape[0]] on `device`; None draws one from torch's default generator
    stream    int or int64 tensor [] or [shape[0]]; bits 56 to 63 are 0 here and name the op elsewhere
    offset    blocks of four elements to skip: int or int64 tensor [] or [shape[0]]
    dtype     float32 (default: torch's default dtype), bfloat16, float16 or float64
    device    default: that of `seed` where it is a tensor, else torch's default device
    out       a tensor to write, of that shape and dtype
    generator instead of a seed: a `Generator`, whose next (seed, stream) is taken (`stream` counts from it); a
              torch.Generator, from which a seed is drawn; or a list of either, one for each row of dim 0
    backend   "cpu", "reference", ...; None chooses
With a [shape[0]] tensor each row of dim 0 has its own key and counts its own elements; otherwise the whole tensor is
one row. They raise ValueError or TypeError that names the argument.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks as check
from ._generator import Generator
from ._ops import keep, recall, route, signature
from ._torch_cuda import torch_cuda_normal, torch_cuda_offset_after, torch_cuda_uniform

Source = Generator | torch.Generator | Sequence[Generator | torch.Generator] | None


def _seed_of(source: Generator | torch.Generator, device: torch.device) -> tuple[int | Tensor, int]:
    if isinstance(source, Generator):
        seed, stream = source.next()
        return (seed.to(device) if isinstance(seed, Tensor) else seed), stream
    if not isinstance(source, torch.Generator):
        kind = type(source).__name__
        raise TypeError(f"generator is {kind}, expected a Generator, a torch.Generator or a list of them")
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=source.device, generator=source)
    return seed.to(device, non_blocking=True), 0


def keyed(
    generator: Source, seed: int | Tensor | None, stream: int | Tensor, rows: int, device: torch.device
) -> tuple[int | Tensor, int | Tensor]:
    """The (seed, stream) of a call: the generator's where there is one, else the seed, else a fresh one."""
    if generator is None:
        return check.fresh_seed(device) if seed is None else seed, stream
    if seed is not None:
        raise ValueError("seed and generator are both given: expected at most one of them")
    if not isinstance(generator, (list, tuple)):
        own, first = _seed_of(generator, device)        # type: ignore[arg-type]
        return own, stream + first
    if len(generator) != rows:
        raise ValueError(f"generator is a list of {len(generator)}, expected one for each of {rows} rows")
    pairs = [_seed_of(source, device) for source in generator]
    if any(isinstance(own, Tensor) and own.dim() for own, _ in pairs):
        raise ValueError("generator is a list whose generators have a seed for each row: expected one seed each")
    seeds = torch.stack([own if isinstance(own, Tensor) else _signed(own, device) for own, _ in pairs])
    return seeds, stream + torch.tensor([first for _, first in pairs], dtype=torch.int64, device=device)


def key_of(
    generator: Source, seed: int | Tensor | None, stream: int | Tensor, offset: int | Tensor, rows: int,
    device: torch.device, tag: int | None = None,
) -> tuple[int, Tensor | None, int, Tensor | None, int, Tensor | None]:
    """A call's key as core ops take it; `tag` names an op in the bits of the stream that are its own."""
    if generator is None and type(seed) is int and type(stream) is int and type(offset) is int and (
            0 <= seed < 2**63 and 0 <= stream < 2**56 and 0 <= offset < 2**63):        # what most calls have
        return seed, None, stream if tag is None else (tag << 56) + stream, None, offset, None
    seed, stream = keyed(generator, seed, stream, rows, device)
    return check.random_keys(seed, stream if tag is None else check.tagged_stream(tag, stream), offset, rows, device)


def _signed(seed: int, device: torch.device) -> Tensor:
    return torch.tensor((seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)


def _fill(
    distribution: str,
    shape: Sequence[int],
    seed: int | Tensor | None,
    stream: int | Tensor,
    offset: int | Tensor,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    generator: Source,
    out: Tensor | None,
    backend: str | None,
) -> Tensor:
    if device is None:
        own = generator.seed if isinstance(generator, Generator) else None
        given = [x for x in (seed, stream, offset, out, own) if isinstance(x, Tensor)]
        place = given[0].device if given else torch.empty(0).device     # Dynamo refuses get_default_device
    else:
        place = torch.device(device)
    plain = generator is None and type(stream) is type(offset) is int and (seed is None or type(seed) is int)
    known = signature(
        "rng_fill", distribution, tuple(shape) if type(shape) is list else shape, dtype or torch.get_default_dtype(),
        place, out, backend, seed is None,
    ) if plain else None
    if (found := recall(known)) is not None:
        run, sizes, kind = found
        args = sizes, distribution, *key_of(None, seed, stream, offset, 1, place), kind, place
        return run(*args) if out is None else run(*args, out=out)
    sizes = [shape] if isinstance(shape, int) else list(shape)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)) or size < 0:
            raise ValueError(f"shape={tuple(sizes)}: expected sizes >= 0")
    kind = dtype or (out.dtype if isinstance(out, Tensor) else torch.get_default_dtype())
    if kind not in check.FLOATS and distribution != "bits":
        raise TypeError(f"dtype={kind}: expected float32, bfloat16, float16 or float64")
    check.is_out(out, sizes, kind, place)
    args = sizes, distribution, *key_of(generator, seed, stream, offset, sizes[0] if sizes else 1, place), kind, place
    run = route("rng_fill", args, backend)
    keep(known, (run, sizes, kind))
    return run(*args) if out is None else run(*args, out=out)


def bits(
    shape: Sequence[int], *, seed: int | Tensor | None = None, stream: int | Tensor = 0, offset: int | Tensor = 0,
    device: torch.device | str | None = None, generator: Source = None, out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The generator's 32-bit words as int32: what every other function makes its numbers of."""
    return _fill("bits", shape, seed, stream, offset, torch.int32, device, generator, out, backend)


def uniform(
    shape: Sequence[int], *, seed: int | Tensor | None = None, stream: int | Tensor = 0, offset: int | Tensor = 0,
    dtype: torch.dtype | None = None, device: torch.device | str | None = None, generator: Source = None,
    out: Tensor | None = None, backend: str | None = None,
) -> Tensor:
    """Uniform on the open interval (0, 1): the smallest float32 is 2^-33, the largest 1 - 2^-24."""
    return _fill("uniform", shape, seed, stream, offset, dtype, device, generator, out, backend)


def normal(
    shape: Sequence[int], *, seed: int | Tensor | None = None, stream: int | Tensor = 0, offset: int | Tensor = 0,
    dtype: torch.dtype | None = None, device: torch.device | str | None = None, generator: Source = None,
    out: Tensor | None = None, backend: str | None = None,
) -> Tensor:
    """Standard normal by Box and Muller (1958), two words a pair; |z| < 6.77."""
    return _fill("normal", shape, seed, stream, offset, dtype, device, generator, out, backend)


def gumbel(
    shape: Sequence[int], *, seed: int | Tensor | None = None, stream: int | Tensor = 0, offset: int | Tensor = 0,
    dtype: torch.dtype | None = None, device: torch.device | str | None = None, generator: Source = None,
    out: Tensor | None = None, backend: str | None = None,
) -> Tensor:
    """Standard Gumbel, -ln(-ln(1 - u))."""
    return _fill("gumbel", shape, seed, stream, offset, dtype, device, generator, out, backend)


def exponential(
    shape: Sequence[int], *, seed: int | Tensor | None = None, stream: int | Tensor = 0, offset: int | Tensor = 0,
    dtype: torch.dtype | None = None, device: torch.device | str | None = None, generator: Source = None,
    out: Tensor | None = None, backend: str | None = None,
) -> Tensor:
    """Exponential of rate 1, -ln u."""
    return _fill("exponential", shape, seed, stream, offset, dtype, device, generator, out, backend)


def laplace(
    shape: Sequence[int], *, seed: int | Tensor | None = None, stream: int | Tensor = 0, offset: int | Tensor = 0,
    dtype: torch.dtype | None = None, device: torch.device | str | None = None, generator: Source = None,
    out: Tensor | None = None, backend: str | None = None,
) -> Tensor:
    """Laplace of scale 1: ln(2 u) below one half, else -ln(2 (1 - u))."""
    return _fill("laplace", shape, seed, stream, offset, dtype, device, generator, out, backend)


def logistic(
    shape: Sequence[int], *, seed: int | Tensor | None = None, stream: int | Tensor = 0, offset: int | Tensor = 0,
    dtype: torch.dtype | None = None, device: torch.device | str | None = None, generator: Source = None,
    out: Tensor | None = None, backend: str | None = None,
) -> Tensor:
    """Standard logistic, ln u - ln(1 - u)."""
    return _fill("logistic", shape, seed, stream, offset, dtype, device, generator, out, backend)


__all__ = [
    "Generator",
    "bits",
    "exponential",
    "gumbel",
    "laplace",
    "logistic",
    "normal",
    "torch_cuda_normal",
    "torch_cuda_offset_after",
    "torch_cuda_uniform",
    "uniform",
]
