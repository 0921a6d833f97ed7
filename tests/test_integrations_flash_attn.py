"""The flash-attn interfaces: signatures as published, values of a textbook in float64, in-place appends, refusals."""

from __future__ import annotations

import inspect

import pytest
import torch

import onepass
from onepass.integrations import flash_attn, flash_attn_3
from onepass.integrations.flash_attn import bert_padding
from onepass.integrations.flash_attn.layers import rotary

from cases import FLOATS
from helpers import assert_as_good_as_torch
from test_attention import core, randn
from test_attention_varlen import Ragged, ends

_COMMON = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
_LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
# github.com/Dao-AILab/flash-attention at 2.8: flash_attn/flash_attn_interface.py, bert_padding.py, layers/rotary.py
FLASH_ATTN_2 = {
    flash_attn.flash_attn_func: f"(q, k, v, {_COMMON})",
    flash_attn.flash_attn_kvpacked_func: f"(q, kv, {_COMMON})",
    flash_attn.flash_attn_qkvpacked_func: f"(qkv, {_COMMON})",
    flash_attn.flash_attn_varlen_func: f"(q, k, v, {_LENGTHS}, {_COMMON}, block_table=None)",
    flash_attn.flash_attn_varlen_kvpacked_func: f"(q, kv, {_LENGTHS}, {_COMMON})",
    flash_attn.flash_attn_varlen_qkvpacked_func: f"(qkv, cu_seqlens, max_seqlen, {_COMMON})",
    flash_attn.flash_attn_with_kvcache: (
        "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False)"
    ),
    bert_padding.unpad_input: "(hidden_states, attention_mask, unused_mask=None)",
    bert_padding.pad_input: "(hidden_states, indices, batch, seqlen)",
    bert_padding.index_first_axis: "(input, indices)",
    rotary.apply_rotary_emb: (
        "(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None)"
    ),
}
_DESCALE = "q_descale=None, k_descale=None, v_descale=None"
_TAIL = "deterministic=False, sm_margin=0, return_attn_probs=False"
# the same repository: hopper/flash_attn_interface.py
FLASH_ATTN_3 = {
    flash_attn_3.flash_attn_func: (
        f"(q, k, v, softmax_scale=None, causal=False, qv=None, {_DESCALE}, window_size=(-1, -1), attention_chunk=0, "
        f"softcap=0.0, num_splits=1, pack_gqa=None, {_TAIL})"
    ),
    flash_attn_3.flash_attn_qkvpacked_func: (
        f"(qkv, softmax_scale=None, causal=False, {_DESCALE}, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
        "deterministic=False, num_heads_q=None, sm_margin=0, return_attn_probs=False)"
    ),
    flash_attn_3.flash_attn_varlen_func: (
        f"(q, k, v, {_LENGTHS}, seqused_q=None, seqused_k=None, softmax_scale=None, causal=False, qv=None, {_DESCALE}, "
        f"window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, {_TAIL})"
    ),
    flash_attn_3.flash_attn_with_kvcache: (
        "(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, "
        f"max_seqlen_q=None, rotary_seqlens=None, {_DESCALE}, softmax_scale=None, causal=False, window_size=(-1, -1), "
        "attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=0, "
        "pack_gqa=None, sm_margin=0, return_softmax_lse=False)"
    ),
    flash_attn_3.flash_attn_combine: "(out_partial, lse_partial, out=None, out_dtype=None)",
}


@pytest.mark.parametrize(("function", "published"), [*FLASH_ATTN_2.items(), *FLASH_ATTN_3.items()])
def test_signatures_are_as_published(function, published):
    plain = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
    assert str(inspect.Signature(plain)) == published


def data(dtype=torch.float32, sq=5, sk=9):
    return [randn(2, s, h, 16, seed=n, dtype=dtype) for n, (s, h) in enumerate(((sq, 4), (sk, 2), (sk, 2)))]


CALLS = [
    ({}, {}),
    ({"causal": True}, {"causal": True}),
    ({"window_size": (3, 1)}, {"window": (3, 1)}),
    ({"window_size": (-5, 0)}, {"window": (-1, 0)}),
    ({"softmax_scale": 0.3, "softcap": 2.0, "causal": True}, {"scale": 0.3, "softcap": 2.0, "causal": True}),
]


@pytest.mark.parametrize(("theirs", "ours"), CALLS, ids=str)
@pytest.mark.parametrize("module", [flash_attn, flash_attn_3])
def test_values_are_the_textbooks(module, theirs, ours):
    for dtype in FLOATS:
        q, k, v = data(dtype)
        out = module.flash_attn_func(q, k, v, **theirs)
        truth = core(q.double(), k.double(), v.double(), **ours)
        assert_as_good_as_torch(out, core(q, k, v, **ours)[0], truth[0])
        full = module.flash_attn_func(q, k, v, **theirs, return_attn_probs=True)
        assert len(full) == (3 if module is flash_attn else 2) and torch.equal(full[0], out)
        assert full[1].shape == (2, 4, 5) and full[1].dtype == torch.float32
        torch.testing.assert_close(full[1].double(), truth[1], rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-2)
        qkv = torch.stack([q, *(x.repeat_interleave(2, 2)[:, :5] for x in (k, v))], 2)
        packed = module.flash_attn_qkvpacked_func(qkv, **theirs)
        assert torch.equal(packed, module.flash_attn_func(*qkv.unbind(2), **theirs))
    kv = torch.stack([k, v], 2)
    packed = flash_attn.flash_attn_kvpacked_func(q, kv, **theirs)
    assert torch.equal(packed, flash_attn.flash_attn_func(q, k, v, **theirs))
    grouped = torch.cat([q, k[:, :5], v[:, :5]], 2)
    assert torch.equal(
        flash_attn_3.flash_attn_qkvpacked_func(grouped, num_heads_q=4, **theirs),
        flash_attn_3.flash_attn_func(q, k[:, :5], v[:, :5], **theirs),
    )


@pytest.mark.parametrize(("theirs", "ours"), CALLS, ids=str)
def test_ragged_rows_are_the_rows(theirs, ours):
    case = Ragged(((3, 5), (0, 4), (9, 9)), dim=16, value_dim=16)
    for module in (flash_attn, flash_attn_3):
        out, lse, *_ = module.flash_attn_varlen_func(
            *case.tensors(), *case.lengths(), **theirs, return_attn_probs=True
        )
        assert lse.shape == (4, 12)
        for b in (0, 2):
            at = slice(int(case.cu_q[b]), int(case.cu_q[b + 1]))
            truth = core(*(case.row(b, x).double() for x in case.tensors()), **ours)
            torch.testing.assert_close(out[at].double(), truth[0][0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse[:, at].double(), truth[1][0], rtol=1e-5, atol=1e-5)
    kv = torch.stack([case.k, case.v], 1)
    packed = flash_attn.flash_attn_varlen_kvpacked_func(case.q, kv, *case.lengths(), **theirs)
    assert torch.equal(packed, out)
    qkv, cu = randn(12, 3, 4, 16, seed=7), ends((3, 9))
    packed = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, 9, **theirs)
    one = flash_attn.flash_attn_func(*(x[None, 3:] for x in qkv.unbind(1)), **theirs)
    assert torch.equal(packed[3:], one[0])
    k, v, table = case.pages(4)
    paged = flash_attn.flash_attn_varlen_func(case.q, k, v, *case.lengths(), block_table=table, **theirs)
    assert torch.equal(paged, out)


@pytest.mark.parametrize("module", [flash_attn, flash_attn_3])
@pytest.mark.parametrize(
    ("queries", "keys", "picture"),
    [(2, 5, ["11110", "11111"]), (5, 2, ["00", "00", "00", "10", "11"])],      # from flash_attn_func's documentation
)
def test_causal_is_aligned_as_published(module, queries, keys, picture):
    q, k = torch.zeros(1, queries, 1, keys), torch.zeros(1, keys, 1, keys)
    out = module.flash_attn_func(q, k, torch.eye(keys).reshape(1, keys, 1, keys), causal=True)
    seen = ["".join("1" if x else "0" for x in row) for row in out[0, :, 0].tolist()]
    assert seen == picture


def test_gradients_flow():
    leaves = [x.requires_grad_() for x in data(sk=5)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    got = torch.autograd.grad(flash_attn.flash_attn_func(*leaves, causal=True).square().sum(), leaves)
    truth = torch.autograd.grad(core(*wide, causal=True)[0].square().sum(), wide)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    qkv = randn(12, 3, 4, 16, seed=7).requires_grad_()
    flash_attn.flash_attn_varlen_qkvpacked_func(qkv, ends((3, 9)), 9, causal=True).sum().backward()
    assert qkv.grad.abs().sum() > 0


def test_lse_of_a_row_without_keys_is_minus_infinity():
    q, k, v = data(sq=5, sk=3)
    out, lse, probs = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert not out[:, :2].any() and torch.isneginf(lse[..., :2]).all() and lse[..., 2:].isfinite().all()
    assert probs.numel() == 0


@pytest.mark.parametrize("module", [flash_attn, flash_attn_3])
@pytest.mark.parametrize("paged", [False, True])
def test_the_cache_is_appended_in_place(module, paged):
    q, k, v = data(sq=2, sk=2)
    old_k, old_v = randn(2, 8, 2, 16, seed=8), randn(2, 8, 2, 16, seed=9)
    seqlens = torch.tensor([3, 6], dtype=torch.int32)
    table = torch.tensor([[3, 0, 5, 1], [2, 6, 4, 7]], dtype=torch.int32)
    caches, extra = [old_k.clone(), old_v.clone()], {}
    if paged:
        caches = [torch.full((8, 2, 2, 16), torch.nan) for _ in range(2)]
        for cache, old in zip(caches, (old_k, old_v), strict=True):
            cache[table.long()] = old.unflatten(1, (4, 2))
        extra = {"block_table" if module is flash_attn else "page_table": table}
    angles = torch.arange(8.0)[:, None] * torch.tensor([1.0, 0.3, 0.1])
    cos, sin = angles.cos(), angles.sin()
    out, lse = module.flash_attn_with_kvcache(
        q.clone().requires_grad_(), *caches, k, v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=seqlens, causal=True,
        return_softmax_lse=True, **extra,
    )
    assert not out.requires_grad
    flat = [c[table.long()].flatten(1, 2) if paged else c for c in caches]
    turn = lambda x: flash_attn.apply_rotary_emb(x.double(), cos, sin, interleaved=True, seqlen_offsets=seqlens)
    for b, n in enumerate(seqlens.tolist()):
        assert torch.equal(flat[1][b, n : n + 2], v[b]) and torch.equal(flat[1][b, :n], old_v[b, :n])
        torch.testing.assert_close(flat[0][b, n : n + 2].double(), turn(k)[b], rtol=1e-5, atol=1e-5)
        keys, values = torch.cat([old_k[b, :n], turn(k)[b]]).double(), torch.cat([old_v[b, :n], v[b]]).double()
        truth = core(turn(q)[b : b + 1], keys[None], values[None], causal=True)
        torch.testing.assert_close(out[b].double(), truth[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[b].double(), truth[1][0], rtol=1e-5, atol=1e-5)


def test_a_cache_without_lengths_is_full():
    q, k, v = data(sk=8)
    for module in (flash_attn, flash_attn_3):
        assert torch.equal(module.flash_attn_with_kvcache(q, k, v), onepass.attention(q, k, v))
        three = module.flash_attn_with_kvcache(q, k, v, cache_seqlens=3)
        assert torch.equal(three, onepass.attention(q, k[:, :3], v[:, :3]))


def test_flash_attn_3_appends_ragged_rows():
    cu, seqlens = ends((3, 1)), torch.tensor([2, 0], dtype=torch.int32)
    q, k, v = randn(4, 4, 16), randn(4, 2, 16, seed=1), randn(4, 2, 16, seed=2)
    caches = [randn(2, 6, 2, 16, seed=s) for s in (3, 4)]
    out = flash_attn_3.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=seqlens, cu_seqlens_q=cu, cu_seqlens_k_new=cu, max_seqlen_q=3, causal=True
    )
    assert torch.equal(caches[1][0, 2:5], v[:3]) and torch.equal(caches[1][1, 0], v[3])
    torch.testing.assert_close(out[:3], core(q[None, :3], caches[0][:1, :5], caches[1][:1, :5], causal=True)[0][0])


def test_flash_attn_3_combines_parts():
    q, k, v = data(sk=9)
    parts = [onepass.attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in ((0, 4), (4, 9))]
    outs, lses = torch.stack([o for o, _ in parts]), torch.stack([x.transpose(1, 2) for _, x in parts])
    out, lse = flash_attn_3.flash_attn_combine(outs, lses)
    whole = onepass.attention(q, k, v, return_lse=True)
    torch.testing.assert_close((out, lse), (whole[0], whole[1].transpose(1, 2)), rtol=1e-5, atol=1e-5)
    assert flash_attn_3.flash_attn_combine(outs, lses, out_dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_padding_there_and_back():
    hidden = randn(3, 5, 2, 4).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0]])
    tokens, indices, cu, longest, used = bert_padding.unpad_input(hidden, mask)
    assert indices.tolist() == [0, 1, 11, 12, 13] and cu.tolist() == [0, 2, 2, 5] and cu.dtype == torch.int32
    assert longest == 3 and used.tolist() == [2, 0, 3] and torch.equal(tokens, hidden.flatten(0, 1)[indices])
    back = bert_padding.pad_input(tokens, indices, 3, 5)
    assert torch.equal(back, hidden * mask[..., None, None])
    back.square().sum().backward()
    assert torch.equal(hidden.grad, 2 * hidden.detach() * mask[..., None, None])
    unused = torch.zeros_like(mask)
    unused[1, 4] = 1
    tokens, indices, cu, longest, used = bert_padding.unpad_input(hidden, mask, unused)
    assert indices.tolist() == [0, 1, 9, 11, 12, 13] and cu.tolist() == [0, 2, 3, 6] and used.tolist() == [2, 0, 3]


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_a_complex_product(interleaved):
    x = randn(2, 3, 2, 10).double()
    angles = (torch.arange(9.0)[:, None] * torch.tensor([1.0, 0.3, 0.1])).double()
    offsets = torch.tensor([0, 6])
    out = flash_attn.apply_rotary_emb(x, angles.cos(), angles.sin(), interleaved, seqlen_offsets=offsets)
    pairs = x[..., :6].unflatten(-1, (3, 2)) if interleaved else x[..., :6].unflatten(-1, (2, 3)).transpose(-1, -2)
    position = offsets[:, None] + torch.arange(3)
    unit = torch.polar(torch.ones(()).double(), angles[position])[:, :, None]
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * unit)
    turned = (turned if interleaved else turned.transpose(-1, -2)).flatten(-2)
    torch.testing.assert_close(out, torch.cat([turned, x[..., 6:]], -1))
    packed = flash_attn.apply_rotary_emb(
        x.flatten(0, 1), angles.cos(), angles.sin(), interleaved, seqlen_offsets=offsets, cu_seqlens=ends((3, 3))
    )
    assert torch.equal(packed, out.flatten(0, 1))
    assert torch.autograd.gradcheck(
        lambda y: flash_attn.apply_rotary_emb(y, angles.cos(), angles.sin(), interleaved), x.requires_grad_()
    )
    y = x.detach().clone()
    result = flash_attn.apply_rotary_emb(y, angles.cos(), angles.sin(), interleaved, True, offsets)
    assert result is y and torch.equal(y, out)
    with pytest.raises(ValueError, match="cos has 9 positions, this call reaches 8 to 10"):
        flash_attn.apply_rotary_emb(x, angles.cos(), angles.sin(), seqlen_offsets=8)


def test_what_is_not_taken_is_refused_by_name():
    q, k, v = data(sk=5)
    qkv, kv, one = torch.stack([q] * 3, 2), torch.stack([k, v], 2), torch.ones(1)
    cu = ends((1,))
    ragged = (q[0, :1], k[0, :1], v[0, :1], cu, cu, 1, 1)
    calls = [
        ("dropout_p", lambda **x: flash_attn.flash_attn_func(q, k, v, **x), {"dropout_p": 0.1}),
        ("dropout_p", lambda **x: flash_attn.flash_attn_qkvpacked_func(qkv, **x), {"dropout_p": 0.1}),
        ("dropout_p", lambda **x: flash_attn.flash_attn_kvpacked_func(q, kv, **x), {"dropout_p": 0.1}),
        ("dropout_p", lambda **x: flash_attn.flash_attn_varlen_func(*ragged, **x), {"dropout_p": 0.1}),
        ("cache_seqlens", lambda **x: flash_attn.flash_attn_with_kvcache(q, k, v, k, v, **x), {}),
        ("cu_seqlens_k_new", lambda **x: flash_attn_3.flash_attn_with_kvcache(q, k, v, k, v, **x),
         {"cache_seqlens": 0, "cu_seqlens_k_new": cu}),
        ("num_heads_q", lambda **x: flash_attn_3.flash_attn_qkvpacked_func(qkv[:, :, 0], **x), {"num_heads_q": 3}),
        ("qkv", lambda **x: flash_attn.flash_attn_qkvpacked_func(q, **x), {}),
        ("kv", lambda **x: flash_attn.flash_attn_kvpacked_func(q, k, **x), {}),
    ]  # fmt: skip
    cached_3 = lambda **x: flash_attn_3.flash_attn_with_kvcache(q, k, v, **x)
    for name in ("qv", "q_descale", "k_descale", "v_descale", "attention_chunk"):
        value = {name: 4 if name == "attention_chunk" else one}
        calls.append((name, lambda **x: flash_attn_3.flash_attn_func(q, k, v, **x), value))
        calls.append((name, lambda **x: flash_attn_3.flash_attn_varlen_func(*ragged, **x), value))
        calls.append((name, cached_3, value))
    for name in ("seqused_q", "seqused_k"):
        calls.append((name, lambda **x: flash_attn_3.flash_attn_varlen_func(*ragged, **x), {name: cu[1:]}))
    calls.append(("rotary_seqlens", cached_3, {"rotary_seqlens": cu}))
    for name, call, arguments in calls:
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            call(**arguments)
