"""What the append writes to a quantized cache, bit by bit."""

from __future__ import annotations

import pytest
import torch

from cases import FLOATS
from helpers import BACKENDS, ISAS, run_python
from quantized_rows import CODES, E4M3, INT8, ROTARY, randn, raw


def difficult(dtype: torch.dtype, dim: int) -> torch.Tensor:
    """Tokens [12, dim] with ties, zeros of both signs, the least and the largest numbers, Inf and NaN."""
    x = randn(12, dim, seed=7) * torch.logspace(-8, 8, 12)[:, None]
    largest, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    x[0] = (torch.arange(dim) - dim // 2) * 0.5
    x[1], x[2, 0] = 0.0, -0.0
    x[3] = torch.linspace(-1, 1, dim) * 2.0**-6
    x[4, :3] = torch.tensor([largest, -largest, least])[:dim]
    x[5] = randn(dim, seed=8) * least
    x[6, -1], x[7, 0], x[8, -1] = torch.inf, -torch.inf, torch.nan
    return x.to(dtype)


@pytest.mark.parametrize("kind", ["head", "token", "none"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("codes", CODES, ids=str)
def test_append_writes_the_bits_of_the_reference(codes, dtype, kind):
    if kind == "none" and codes == INT8:
        return
    for dim, value_dim, rotary in ((33, 20, (None, None, True)), (128, 256, (*ROTARY, True)), (8, 1, (*ROTARY, False))):
        k = torch.stack([difficult(dtype, dim), randn(12, dim, seed=1, dtype=dtype)], 1)[None]
        v = torch.stack([randn(12, value_dim, seed=2, dtype=dtype), difficult(dtype, value_dim)], 1)[None]
        table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
        written = []
        for backend in ("cpu", "reference"):
            caches = [torch.full((3, 5, 2, x.shape[-1]), 85, dtype=torch.uint8).view(codes) for x in (k, v)]
            per_token = [torch.full((3, 5, 2), torch.nan) if kind == "token" else None for _ in "kv"]
            per_head = [torch.tensor([[0.5, 2e-5]]) if kind == "head" else None for _ in "kv"]
            torch.ops.onepass.kvcache_append(
                *caches, k, v, torch.tensor([1], dtype=torch.int32), table, None, None, None, 12, *rotary, *per_head,
                *per_token, backend=backend,
            )  # fmt: skip
            written.append([*caches, *(x for x in per_token if x is not None)])
            assert (raw(caches[0])[2, 0] == 85).all() and (raw(caches[1])[1, 3:] == 85).all()
        for ours, theirs in zip(*written, strict=True):
            same = raw(ours) == raw(theirs)
            if ours.dtype != INT8:
                same |= ours.float().isnan() & theirs.float().isnan()
            assert same.all(), (dim, raw(ours)[~same], raw(theirs)[~same])


def appended(x, codes, scale, backend):
    """The codes of x [D] and their scale."""
    cache = torch.zeros(1, 1, 1, len(x), dtype=codes)
    per_token = torch.full((1, 1, 1), torch.nan) if scale is None else None
    of = (None if scale is None else torch.tensor([[scale]]),) * 2
    x, zero = torch.as_tensor(x, dtype=torch.float32)[None, None, None], torch.zeros(1, dtype=torch.int32)
    other = None if per_token is None else per_token.clone()
    torch.ops.onepass.kvcache_append(
        cache, cache.clone(), x, x, zero, None, None, None, None, 1, None, None, True, *of, per_token, other,
        backend=backend,
    )
    return cache[0, 0, 0], per_token


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_known_codes(backend):
    inf, nan = torch.inf, torch.nan
    values = [1.0, 3.0, 5.0, -1.0, -3.0, 253.0, 255.0, 1e9, -1e9, inf, -inf, nan, 0.0]
    codes, _ = appended(values, INT8, 2.0, backend)
    assert codes.tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -127, 127, -127, 0, 0]
    codes, scale = appended([-12.7, 6.33, 0.04, 0.16, 0.0], INT8, None, backend)
    assert codes.tolist() == [-127, 63, 0, 2, 0]
    assert scale.item() == torch.tensor(12.7) / torch.tensor(127.0)
    codes, scale = appended([0.0, -0.0], INT8, None, backend)
    assert codes.tolist() == [0, 0] and scale.item() == 0
    assert appended([1.0, inf], INT8, None, backend)[1].item() == inf
    assert appended([1.0, nan], INT8, None, backend)[1].isnan()

    values = [1.0, 17.0, 19.0, -1e9, inf, 448.0, 2.0**-9, 2.0**-10, 3 * 2.0**-10, 2.0**-6, 0.0]
    codes, _ = appended(values, E4M3, 1.0, backend)
    assert codes.float().tolist() == [1, 16, 20, -448, 448, 448, 2.0**-9, 0, 2.0**-8, 2.0**-6, 0]
    assert appended([nan], E4M3, 1.0, backend)[0].float().isnan()
    codes, scale = appended([0.0, 0.0], E4M3, None, backend)
    assert codes.float().tolist() == [0, 0] and scale.item() == 0
    assert appended([224.0, 1.0], E4M3, None, backend)[1].item() == 0.5


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    code = """
import itertools
from test_attention_quantized_append import *
torch.set_num_threads(1)
for codes, dtype, kind in itertools.product(CODES, FLOATS, ("head", "token", "none")):
    test_append_writes_the_bits_of_the_reference(codes, dtype, kind)
"""
    run_python(f"import sys; sys.path.insert(0, {__file__.rsplit('/', 1)[0]!r})\n" + code, ONEPASS_CPU_ISA=isa)
