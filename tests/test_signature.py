"""A call like an earlier one is not checked again: nothing that checks or choices read may escape its signature."""
from __future__ import annotations

import pytest
import torch

import onepass
from onepass import _attention_checks, _native, _ops

from helpers import needs_native

pytestmark = [needs_native, pytest.mark.usefixtures("nothing_kept")]


def qkv(**options):
    return [torch.randn(2, n, 4, 8, **options) for n in (1, 16, 16)]


def cached(k_cache=None, **options):
    q, k, v = qkv()
    return onepass.attention_with_kvcache(q, k if k_cache is None else k_cache, v, **options)


def test_a_second_call_is_not_checked(monkeypatch):
    lengths = torch.tensor([3, 16], dtype=torch.int32)
    before = onepass.attention(*qkv()), cached(cache_seqlens=lengths)
    monkeypatch.setattr(_attention_checks, "is_rank", lambda *_: pytest.fail("checked again"))
    torch.manual_seed(0)
    onepass.attention(*qkv())
    cached(cache_seqlens=lengths)
    cached(cache_seqlens=lengths.flip(0))       # values are no part of it
    with pytest.raises(pytest.fail.Exception, match="checked again"):
        onepass.attention(*(x[:1] for x in qkv()))
    assert all(x.isfinite().all() for x in before)


def test_both_ways_through_a_function_agree():
    q, k, v = qkv()
    mask = torch.rand(1, 16) > 0.3
    k_new, v_new = torch.randn(2, 2, 1, 4, 8)

    def run():
        caches = k.clone(), v.clone()
        yield from onepass.attention(q, k, v, mask=mask, softcap=3.0, return_lse=True)
        yield onepass.attention_with_kvcache(q, *caches, k_new, v_new, cache_seqlens=9, window=(4, 0))
        yield from caches
        yield onepass.attention(q, k, v, causal=True, out=torch.empty(2, 1, 4, 8))

    first, second = list(run()), list(run())
    assert all(map(torch.equal, first, second))


CHANGES = {
    "dtype": (TypeError, lambda q, k, v: (q, k.double(), v)),
    "shape": (ValueError, lambda q, k, v: (q, k[:, :8], v)),
    "rank": (ValueError, lambda q, k, v: (q[0], k[0], v[0])),
    "device": (ValueError, lambda q, k, v: (q, k.to("meta"), v)),
    "type": (TypeError, lambda q, k, v: (q, k.numpy(), v)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_checked(change):
    error, changed = CHANGES[change]
    q, k, v = qkv()
    onepass.attention(q, k, v)
    with pytest.raises(error):
        onepass.attention(*changed(q, k, v))
    cached(cache_seqlens=3)
    with pytest.raises(error):
        onepass.attention_with_kvcache(*changed(q, k, v), cache_seqlens=3)


@pytest.mark.parametrize("options", [
    {"softcap": -1.0}, {"softcap": float("nan")}, {"window": (-2, 0)}, {"window": (1.0, 0)}, {"sinks": torch.zeros(3)},
    {"mask": torch.zeros(3, 16)}, {"out": torch.empty(2, 1, 4, 9)}, {"backend": "best"},
], ids=lambda options: "-".join(options))
def test_other_options_are_checked(options):
    onepass.attention(*qkv(), softcap=1.0)
    with pytest.raises((ValueError, TypeError)):
        onepass.attention(*qkv(), **({"softcap": 1.0} | options))


@pytest.mark.parametrize(("lengths", "match"), [
    (17, r"cache_seqlens\[0\]=17"), (-1, r"cache_seqlens\[0\]=-1"), (True, "bool"), (3.0, "float"),
    (torch.tensor([3, 17], dtype=torch.int32), r"cache_seqlens\[1\]=17"), (torch.tensor([3, 4]), "int64"),
], ids=str)
def test_lengths_are_looked_at_each_time(lengths, match):
    cached(cache_seqlens=3)
    cached(cache_seqlens=torch.tensor([3, 4], dtype=torch.int32))
    with pytest.raises((ValueError, TypeError), match=match):
        cached(cache_seqlens=lengths)


def test_other_values_are_looked_at_each_time():
    ints = lambda *x: torch.tensor(x, dtype=torch.int32)
    lengths, new = ints(3, 4), torch.randn(2, 2, 1, 4, 8)
    q, k, v = qkv()
    for name, good, bad in (
        ("cache_leftpad", ints(0, 2), ints(0, 5)),
        ("cache_batch_idx", ints(1, 0), ints(1, 2)),
        ("block_table", ints(0, 1)[:, None], ints(0, 2)[:, None]),
    ):
        onepass.attention_with_kvcache(q, k, v, cache_seqlens=lengths, **{name: good})
        with pytest.raises(ValueError, match=name):
            onepass.attention_with_kvcache(q, k, v, cache_seqlens=lengths, **{name: bad})
    onepass.attention_with_kvcache(q, k, v, *new, cache_seqlens=lengths, cache_batch_idx=ints(1, 0))
    with pytest.raises(ValueError, match="two rows would append"):
        onepass.attention_with_kvcache(q, k, v, *new, cache_seqlens=lengths, cache_batch_idx=ints(1, 1))
    ragged = {"cache_seqlens": lengths, "max_seqlen_q": 2}
    onepass.attention_with_kvcache(q[:, 0], k, v, cu_seqlens_q=ints(0, 1, 2), **ragged)
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        onepass.attention_with_kvcache(q[:, 0], k, v, cu_seqlens_q=ints(0, 1, 3), **ragged)


def test_values_of_ragged_rows_are_looked_at_each_time():
    ints = lambda *x: torch.tensor(x, dtype=torch.int32)
    q, (k, v) = torch.randn(5, 4, 8), torch.randn(2, 20, 4, 8)
    pages, table = torch.randn(2, 6, 4, 4, 8), ints(0, 1, 2, 3, 4, 5).reshape(2, 3)
    given = {"q": q, "k": k, "v": v, "cu_seqlens_q": ints(0, 2, 5), "cu_seqlens_k": ints(0, 8, 20)}
    given |= {"max_seqlen_q": 3, "max_seqlen_k": 12}
    run = lambda **changes: onepass.attention_varlen(**(given | changes))
    paged = {"k": pages[0], "v": pages[1], "block_table": table}
    for _ in range(2):
        whole = run()
        torch.testing.assert_close(whole[:2], onepass.attention(q[None, :2], k[None, :8], v[None, :8])[0])
        torch.testing.assert_close(run(cu_seqlens_q=ints(0, 3, 5))[3:], run(cu_seqlens_k=ints(0, 8, 20))[3:])
        torch.testing.assert_close(run(**paged), run(**paged, backend="reference"))
    kept = len(_ops._kept)
    for bad, match in (
        ({"cu_seqlens_q": ints(0, 2, 6)}, "cu_seqlens_q"), ({"cu_seqlens_k": ints(0, 21, 20)}, "cu_seqlens_k"),
        ({"max_seqlen_q": 2}, "max_seqlen_q=2"), ({"max_seqlen_k": 11}, "max_seqlen_k=11"),
        ({"max_seqlen_q": -1}, "max_seqlen_q=-1"), ({"max_seqlen_k": 3.0}, "max_seqlen_k is float"),
        ({**paged, "block_table": table + 1}, r"block_table\[1, 2\]=6"),
        ({**paged, "cu_seqlens_k": ints(0, 13, 20), "max_seqlen_k": 13}, "cu_seqlens_k gives row 0 13 keys"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            run(**bad)
    assert len(_ops._kept) == kept
    with pytest.raises(ValueError, match="requires a gradient"):
        run(**{**paged, "q": q.clone().requires_grad_()})


def test_keys_and_noise_are_looked_at_each_time():
    mean, logvar, noise = torch.randn(3, 4, 5)
    seeds = torch.arange(4)
    run = lambda **options: onepass.reparameterize(mean, logvar, **options)
    expected = [run(seed=s, backend="reference") for s in (1, 2)], run(seed=seeds, stream=3, backend="reference")
    for _ in range(2):
        torch.testing.assert_close([run(seed=s) for s in (1, 2)], expected[0])
        torch.testing.assert_close(run(seed=seeds, stream=3), expected[1])
        assert len({run().sum().item() for _ in range(8)}) == 8
        torch.testing.assert_close(run(noise=noise), mean + (0.5 * logvar).exp() * noise)
    assert len(_ops._kept) <= 8                 # no number is part of a signature
    for options in (
        {"seed": 1.0}, {"seed": True}, {"seed": seeds.int()}, {"seed": seeds[:3]}, {"seed": 1, "stream": 2**56},
        {"seed": 1, "stream": 0.5}, {"seed": 1, "offset": "a"}, {"noise": noise, "seed": 1}, {"noise": noise[:3]},
        {"noise": noise, "generator": torch.Generator()},
    ):
        with pytest.raises((ValueError, TypeError)):
            run(**options)


def test_a_gradient_is_still_given_and_a_backend_still_obeyed():
    q, k, v = qkv()
    plain = onepass.attention(q, k, v)
    out = onepass.attention(q.requires_grad_(), k, v)
    assert out.requires_grad and not plain.requires_grad
    kept = len(_ops._kept)
    again = onepass.attention(q, k, v)
    assert again.requires_grad and len(_ops._kept) == kept      # a step of training is like the one before
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], torch.autograd.grad(again.sum(), q)[0])
    assert not onepass.attention(q.detach(), k, v).requires_grad
    assert onepass.attention(q.detach(), k, v.requires_grad_()).requires_grad
    with torch.no_grad():
        assert not onepass.attention(q, k, v).requires_grad
    for backend in ("reference", "cpu"):
        with onepass.use_backend(backend), torch.no_grad():
            assert torch.allclose(onepass.attention(q, k, v), plain, atol=1e-5)
    with torch.no_grad(), pytest.raises(ValueError, match="backend='triton' cannot take this call"):
        onepass.attention(q, k, v, backend="triton")


class Tagged(torch.Tensor):
    pass


def test_a_call_that_is_not_plain_has_no_signature():
    x = torch.randn(3)
    assert _ops.signature(x, 1, "a", (1, 2.0), None, True) is not None
    odd = x.as_subclass(Tagged), torch.ones(2).to_sparse(), torch.empty(2, device="meta")
    for other in (*odd, [1], 2**70, object()):
        assert _ops.signature(other) is None
    leaf = x.clone().requires_grad_()
    assert None is not _ops.signature(leaf) != _ops.signature(x)
    assert _ops.signature(leaf, x) != _ops.signature(x, leaf)
    with torch.no_grad():
        assert _ops.signature(leaf) == _ops.signature(x) != _ops.signature(x.half())
    seen = []
    torch.vmap(lambda row: seen.append(_ops.signature(x)) or row)(x)
    with torch.autocast("cpu", torch.bfloat16):
        seen.append(_ops.signature(x))
    with torch.device("cpu"):
        seen.append(_ops.signature(x))
    assert seen == [None] * 3


def test_signatures_tell_apart():
    x = torch.randn(4, 4)
    different = [
        (1,), (True,), (1.0,), (0.0,), (-0.0,), ("1",), (None,), ((1,),), ((1, 2),), (1, 2), ((), 1), ((1,), 2),
        ("ab", "c"), ("a", "bc"), (x,), (x.mT,), (x[:2],), (x.double(),), (x.int(),), (x.bool(),), (x.half(),),
        (x.bfloat16(),), (x.flatten(),), (x[None],), (x, x), (x, None), (None, x),
    ]
    assert len({_ops.signature(*arguments) for arguments in different}) == len(different)
    assert _ops.signature(*([x] * 200)) is None         # too long to keep: looked at anew


def test_only_so_many_are_kept(monkeypatch):
    monkeypatch.setattr(_ops, "_MOST", 4)
    q, k, v = qkv()
    for length in range(1, 10):
        onepass.attention(q, k[:, :length], v[:, :length])
        assert 1 <= len(_ops._kept) <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attributes_say_what_the_table_of_functions_says(dtype):
    q, k, v = (x.to(dtype) for x in qkv())
    mask = torch.rand(4, 1, 16) > 0.5
    run = lambda: [
        onepass.attention(q, k, v, mask=mask),
        onepass.attention(q, k[..., ::2, :], v[:, :, 1:3], sinks=torch.ones(4)),
        onepass.attention_with_kvcache(q, k.clone(), v.clone(), q, q, cache_seqlens=5),
    ]
    keys = lambda: [_ops.signature(x) for x in (q, k[..., ::2, :], mask, torch.tensor([1], dtype=torch.int32))]
    fast, fast_keys = run(), keys()
    _native._C.read_by_attributes(True)
    assert all(map(torch.equal, run(), fast)) and keys() == fast_keys
