"""A small decoder-only transformer: RMSNorm, rotary embedding, grouped-query attention, SwiGLU, tied embedding.

Attention is a callable that the caller passes in, so training, the stock cache and onepass's run the same weights.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# (layer, q [B,S,Hq,D], k [B,S,Hkv,D], v [B,S,Hkv,D]), q and k not yet rotated -> [B,S,Hq,D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


_DROPOUT = 0.1  # in training


@dataclasses.dataclass(frozen=True)
class Config:
    vocab: int = 2048
    width: int = 192
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    hidden: int = 384
    context: int = 512


class Block(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.head_dim
        self.norm_attn = nn.RMSNorm(c.width, eps=1e-6)
        self.qkv = nn.Linear(c.width, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=False)
        self.out = nn.Linear(c.heads * c.head_dim, c.width, bias=False)
        self.norm_mlp = nn.RMSNorm(c.width, eps=1e-6)
        self.gate_up = nn.Linear(c.width, 2 * c.hidden, bias=False)
        self.down = nn.Linear(c.hidden, c.width, bias=False)

    def forward(self, x: Tensor, layer: int, attend: Attend) -> Tensor:
        qkv = self.qkv(self.norm_attn(x)).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        x = x + F.dropout(self.out(attend(layer, q, k, v).flatten(2)), _DROPOUT, self.training)
        gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, dim=-1)
        return x + F.dropout(self.down(F.silu(gate) * up), _DROPOUT, self.training)


class Transformer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: Tensor, attend: Attend) -> Tensor:
        """Hidden states [B, S, width] of `tokens` [B, S]; `logits` turns them into scores."""
        x = self.embed(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, attend)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed.weight)


def rotary_tables(positions: int, dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin, each [positions, dim / 2], of the rotary embedding (Su et al., 2021)."""
    rate = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * rate
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` [B,S,H,D] turned by angles given as cos and sin, broadcastable to [B,S,1,D/2]; halves are paired."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def train_attend(cos: Tensor, sin: Tensor) -> Attend:
    """Attention over whole sequences from position 0, for training."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[1]
        c, s = cos[:n, None], sin[:n, None]
        q, k = rotate(q, c, s), rotate(k, c, s)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2)

    return attend
