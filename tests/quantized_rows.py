"""Rows over quantized caches, laid out in every way, for test_attention_quantized*.py."""

from __future__ import annotations

import torch

import onepass
from onepass.reference import kvcache as reference

INT8, E4M3 = torch.int8, torch.float8_e4m3fn
CODES = (INT8, E4M3)
ROTARY = tuple(f(torch.arange(2048)[:, None] * torch.tensor([1.0, 0.2, 0.05])) for f in (torch.cos, torch.sin))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def raw(x: torch.Tensor) -> torch.Tensor:
    """The bytes, so that NaN and the sign of zero count."""
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.uint8)


def dequantized(cache: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The values of a cache whose first dim is the batch, in float64."""
    if scale is None:
        return cache.double()
    return cache.double() * (scale[:, None, :, None] if scale.dim() == 2 else scale[..., None]).double()


class Rows:
    """Old keys as codes with their scales, new ones as values; `call` lays them out with poison in every other slot."""

    def __init__(
        self, lengths=(0, 5, 150), new=3, heads=4, kv_heads=2, dim=32, value_dim=32, dtype=torch.float32, codes=INT8,
        kinds=("head", "token"),
    ):  # fmt: skip
        self.lengths, self.new, self.codes = lengths, new, codes
        self.q = randn(len(lengths), new, heads, dim, seed=1, dtype=dtype)
        self.tokens, self.parts = [], []
        for seed, kind, width in ((2, kinds[0], dim), (3, kinds[1], value_dim)):
            self.tokens.append(randn(len(lengths), new, kv_heads, width, seed=seed, dtype=dtype))
            per_head = randn(len(lengths), kv_heads, seed=seed).abs() * (0.01 if codes == INT8 else 0.005) + 0.001
            parts = []
            for b, n in enumerate(lengths):
                values = randn(n, kv_heads, width, seed=10 * seed + b)
                scale = per_head[b].expand(n, -1)
                if kind == "token":
                    scale = values.abs().amax(-1) / (127 if codes == INT8 else 448)
                elif kind == "none":
                    scale = torch.ones(n, kv_heads)
                parts.append((reference.quantize(values, scale, codes), scale))
            self.parts.append((kind, per_head, parts))

    def only(self, b: int) -> Rows:
        one = Rows.__new__(Rows)
        one.lengths, one.new, one.codes, one.q = self.lengths[b : b + 1], self.new, self.codes, self.q[b : b + 1]
        one.tokens = [x[b : b + 1] for x in self.tokens]
        one.parts = [(kind, per_head[b : b + 1], parts[b : b + 1]) for kind, per_head, parts in self.parts]
        return one

    def layout(self, page=0, leftpad=False, shuffled=False, heads_first=False):
        """(caches, scales, keyword arguments) with extreme codes and NaN scales where no key is."""
        batch, pads = len(self.lengths), [3 + 2 * b if leftpad else 0 for b in range(len(self.lengths))]
        starts = [n + p for n, p in zip(self.lengths, pads, strict=True)]
        capacity = max(starts) + self.new + 7
        kwargs = {"cache_seqlens": torch.tensor(starts, dtype=torch.int32)}
        if leftpad:
            kwargs["cache_leftpad"] = torch.tensor(pads, dtype=torch.int32)
        blocks = -(-capacity // page) if page else 1
        table = torch.randperm(batch * blocks + 3, generator=torch.Generator().manual_seed(1))[: batch * blocks]
        table = table.reshape(batch, blocks).int()
        index = torch.arange(batch).flip(0).int() + 2 if shuffled else torch.arange(batch).int()
        if page:
            kwargs["block_table"] = table.clone()
            for b, start in enumerate(starts):
                kwargs["block_table"][b, -(-(start + self.new) // page) :] = 2**30
        if shuffled:
            kwargs["cache_batch_idx"] = index
        caches, scales = [], []
        for kind, per_head, parts in self.parts:
            shape = (batch * blocks + 3, page) if page else (batch + 2, capacity) if shuffled else (batch, capacity)
            kv_heads, width = parts[0][0].shape[1:]
            cache = torch.full((*shape, kv_heads, width), 127, dtype=torch.uint8)  # 127 as int8, NaN as float8
            scale = torch.full((*shape, kv_heads), torch.nan)
            if heads_first:
                cache, scale = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (cache, scale))
            for b, (codes, of) in enumerate(parts):
                slot = torch.arange(len(codes)) + pads[b]
                at = (table[b, slot // page].long(), slot % page) if page else (int(index[b]), slot)
                cache[at], scale[at] = raw(codes), of
            caches.append(cache.view(self.codes))
            scales.append({"head": per_head, "token": scale, "none": None}[kind])
        return caches, scales, kwargs

    def call(self, ragged=False, layout=None, backend=None, **options):
        caches, (k_scale, v_scale), kwargs = self.layout(**(layout or {}))
        q, (k, v) = self.q, self.tokens
        if ragged:
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
            kwargs |= {"cu_seqlens_q": torch.arange(len(self.lengths) + 1).int() * self.new, "max_seqlen_q": self.new}
        out, lse = onepass.attention_with_kvcache(
            q, *caches, k, v, k_scale=k_scale, v_scale=v_scale, return_lse=True, backend=backend, **kwargs, **options
        )
        if ragged:
            out, lse = out.unflatten(0, (-1, self.new)), lse.unflatten(1, (-1, self.new)).transpose(0, 1)
        return out, lse

    def truth(self, **options):
        """Float64 attention of the reference over the dequantized cache, new tokens in it put by the reference."""
        caches, scales, kwargs = self.layout()
        rotary = [options.pop(name, default) for name, default in (
            ("rotary_cos", None), ("rotary_sin", None), ("rotary_interleaved", True))]  # fmt: skip
        per_head = [None if s is None or s.dim() == 3 else s for s in scales]
        per_token = [None if s is None or s.dim() == 2 else s for s in scales]
        seqlens = kwargs["cache_seqlens"]
        reference.kvcache_append(
            *caches, *self.tokens, seqlens, None, None, None, None, self.new, *rotary, *per_head, *per_token
        )
        keys, values = (dequantized(c, s) for c, s in zip(caches, scales, strict=True))
        q = self.q.double()
        if rotary[0] is not None:
            ordered = options.get("causal") or "window" in options or "tree_mask" in options
            position = seqlens.long()[:, None] + (torch.arange(self.new) if ordered else torch.zeros(self.new).long())
            q = reference.rotate(q, position, rotary[0].double(), rotary[1].double(), rotary[2])
        return onepass.attention_with_kvcache(
            q, keys, values, cache_seqlens=seqlens + self.new, return_lse=True, backend="reference", **options
        )
