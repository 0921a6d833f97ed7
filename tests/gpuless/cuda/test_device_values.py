"""Values on a device: kernels pass over what is out of range; with ONEPASS_CHECK=1 calls raise as on the CPU."""
from __future__ import annotations

import pytest
import torch

import onepass
from onepass import _checks, plans

from helpers import run_python


@pytest.fixture
def unread(monkeypatch, device):
    """A device whose values the host leaves alone: the emulator's tensors lie in host memory."""
    if device == "cpu":
        monkeypatch.setattr(_checks, "on_host", lambda x: False)
    return device


def denoise(device, **options):
    plan, x = plans.dpmpp_2m(4).to(device), torch.ones(3, 8, device=device)
    state = torch.full((3, plan.slots, 8), 7.0, device=device)
    steps = torch.tensor([1, 4, -1], device=device)
    out = torch.full_like(x, 7.0)
    try:
        onepass.denoise_step(x, x, plan, steps, state=state, out=out, **options)
    finally:
        written = out[0].ne(7).any(), out[1:].ne(7).any(), state[1:].ne(7).any()
    return [bool(w) for w in written]


def decode(device, lengths=(9, 3), table=((0, 1, 2), (3, 4, 5)), leftpad=None, append=1, **options):
    """Two rows over pages of four keys; whether keys were appended."""
    cache = torch.zeros(6, 4, 2, 16, device=device)
    new = torch.ones(2, append, 2, 16, device=device)
    i32 = lambda values: None if values is None else torch.tensor(values, dtype=torch.int32, device=device)
    try:
        onepass.attention_with_kvcache(
            torch.ones(2, append, 4, 16, device=device), cache, cache.clone(), new, new, cache_seqlens=i32(lengths),
            block_table=i32(table), cache_leftpad=i32(leftpad), causal=True, **options,
        )
    finally:
        written = bool(cache.any())
    return written


def ragged(device, queries=(0, 2, 5), keys=(0, 4, 9), longest=3, **options):
    i32 = lambda values: torch.tensor(values, dtype=torch.int32, device=device)
    q, k = torch.ones(5, 4, 16, device=device), torch.ones(9, 2, 16, device=device)
    return onepass.attention_varlen(q, k, k, i32(queries), i32(keys), longest, 5, **options).isfinite().all()


def rays(device, offsets=(0, 5, 3, 8), **options):
    x = torch.ones(8, device=device)
    packed = torch.tensor(offsets, device=device)
    return onepass.composite(x, torch.ones(8, 3, device=device), 0 * x, x, ray_offsets=packed, **options).opacity


WRONG = {
    "step": (denoise, {}),
    "cache_seqlens": (decode, {"lengths": (9, 12)}),
    "block_table": (decode, {"table": ((0, 1, 6), (3, -1, 5))}),
    "cache_leftpad": (decode, {"leftpad": (0, 5)}),
    "cu_seqlens_q": (ragged, {"queries": (0, 6, 5)}),
    "cu_seqlens_k": (ragged, {"keys": (0, 4, 8)}),
    "max_seqlen_q": (ragged, {"longest": 2}),
    "ray_offsets": (rays, {}),
}


@pytest.mark.parametrize("name", WRONG)
def test_values_are_checked_where_asked_for(name, unread, monkeypatch):
    call, arguments = WRONG[name]
    with monkeypatch.context() as host:
        host.setattr(_checks, "on_host", lambda x: x.device.type == "cpu")
        with pytest.raises(ValueError, match=name) as expected:
            call("cpu", backend="reference", **arguments)
    monkeypatch.setattr(_checks, "ON_DEVICES", True)
    with pytest.raises(ValueError, match=name) as raised:
        call(unread, backend="cuda", **arguments)
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("name", WRONG)
def test_kernels_pass_over_what_is_out_of_range(name, unread):
    call, arguments = WRONG[name]
    result = call(unread, backend="cuda", **arguments)
    if name == "step":
        assert result == [True, False, False]       # the row whose step there is, and no other
    elif call is decode:
        assert result                               # the other row's keys are appended
    elif name == "ray_offsets":
        assert bool((result >= 0).all() and (result <= 1).all())


def test_nothing_is_written_before_the_check(unread, monkeypatch):
    monkeypatch.setattr(_checks, "ON_DEVICES", True)
    cache = torch.zeros(6, 4, 2, 16, device=unread)
    new = torch.ones(2, 1, 2, 16, device=unread)
    lengths = torch.tensor([9, 12], dtype=torch.int32, device=unread)
    table = torch.arange(6, dtype=torch.int32, device=unread).view(2, 3)
    with pytest.raises(ValueError, match=r"cache_seqlens\[1\]=12"):
        onepass.attention_with_kvcache(
            torch.ones(2, 1, 4, 16, device=unread), cache, cache.clone(), new, new, cache_seqlens=lengths,
            block_table=table, backend="cuda",
        )
    assert not cache.any()


@pytest.mark.parametrize(("value", "expected"), [("1", "True"), ("0", "False"), ("", "False")])
def test_the_environment_is_read_at_import(value, expected):
    assert run_python("from onepass import _checks; print(_checks.ON_DEVICES)", ONEPASS_CHECK=value).strip() == expected
