"""Text from a small transformer: prompts of several lengths in one batch, a KV cache, greedy rows and sampled rows.

The stock cache is a preallocated buffer that SDPA reads up to the longest row, under a mask; onepass appends, rotates
and attends in one call that reads each row up to its own length.
"""
from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import attention_with_kvcache, rng
from . import checkpoints
from .bpe import Tokenizer
from .transformer import Config, Transformer, rotary_tables, rotate
from .workload import Bar, Figure, Result, Stopwatch, race

NAME = "lm"
TEMPERATURE = 0.7
_SEED = 11
_SHOWN = 3  # texts of either kind in the report

GREEDY = [
    'The "try" statement specifies exception handlers', "Attribute references", 'The "with" statement is used to wrap',
    "Class creation can be customized", "Dictionaries", "A string literal", "Objects of type", "Operator precedence",
]
SAMPLED = [
    'The "for" statement is used to iterate over', "Functions are", 'The "import" statement', "Raised when",
    "A class definition defines", "An expression", "The following", "Note that coroutine objects",
]


class Cache(Protocol):
    def begin(self, start: Tensor, tokens: int, longest: int) -> None:
        """The next pass has `tokens` a row, the first at slot `start` [B]; then no row holds more than `longest`."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append k and v, then attend from q; [B, tokens, heads, D]."""


class StockCache:
    def __init__(self, c: Config, batch: int, device: torch.device, op: Stopwatch) -> None:
        shape = (c.layers, batch, c.kv_heads, c.context, c.head_dim)    # heads first, as SDPA reads them
        self._k, self._v = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        self._cos, self._sin = (table.to(device) for table in rotary_tables(c.context, c.head_dim))
        self._rows = torch.arange(batch, device=device)[:, None]
        self._slots = torch.arange(c.context, device=device)
        self._op = op

    def begin(self, start: Tensor, tokens: int, longest: int) -> None:
        with self._op:
            self._at = start[:, None] + self._slots[:tokens]
            self._turn = self._cos[self._at][:, :, None], self._sin[self._at][:, :, None]
            self._mask = (self._slots[:longest] <= self._at[:, :, None])[:, None]
            self._longest = longest

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with self._op:
            self._k[layer][self._rows, :, self._at] = rotate(k, *self._turn)
            self._v[layer][self._rows, :, self._at] = v
            out = F.scaled_dot_product_attention(
                rotate(q, *self._turn).transpose(1, 2),
                self._k[layer][:, :, : self._longest], self._v[layer][:, :, : self._longest],
                attn_mask=self._mask, enable_gqa=True,
            )
            return out.transpose(1, 2)


class OnepassCache:
    def __init__(self, c: Config, batch: int, device: torch.device, op: Stopwatch) -> None:
        shape = (c.layers, batch, c.context, c.kv_heads, c.head_dim)
        self._k, self._v = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        self._cos, self._sin = (table.to(device) for table in rotary_tables(c.context, c.head_dim))
        self._op = op

    def begin(self, start: Tensor, tokens: int, longest: int) -> None:
        with self._op:
            self._start = start.to(torch.int32)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with self._op:
            out = attention_with_kvcache(
                q, self._k[layer], self._v[layer], k, v, cache_seqlens=self._start, causal=True,
                rotary_cos=self._cos, rotary_sin=self._sin, rotary_interleaved=False,
            )
        assert isinstance(out, Tensor)  # a pair only with return_lse
        return out


def generate(
    model: Transformer,
    cache: Cache,
    prompts: Tensor,    # [B, longest] int64, padded on the right
    lengths: Tensor,    # [B] int64
    noise: Tensor,      # [steps, B, vocab]: added to the logits; zero in a greedy row
) -> Tensor:            # [B, steps] int64
    """The continuation of each prompt: the largest logit, or with Gumbel noise a draw from the softmax."""
    longest = prompts.shape[1]
    cache.begin(torch.zeros_like(lengths), longest, longest)
    hidden = model(prompts, cache.attend)[torch.arange(len(prompts), device=prompts.device), lengths - 1]
    tokens = [(model.logits(hidden) + noise[0]).argmax(-1)]
    for step in range(1, len(noise)):
        cache.begin(lengths + step - 1, 1, longest + step)
        hidden = model(tokens[-1][:, None], cache.attend)[:, 0]
        tokens.append((model.logits(hidden) + noise[step]).argmax(-1))
    return torch.stack(tokens, dim=1)


@torch.inference_mode()
def run(device: torch.device, bar: Bar, quick: bool = False) -> Result:
    state, metadata = checkpoints.load(NAME)
    config = Config(**metadata["config"])
    tokenizer = Tokenizer([(left, right) for left, right in metadata["merges"]])
    model = Transformer(config).to(device).eval()
    model.load_state_dict(state)

    greedy, sampled = (GREEDY[:2], SAMPLED[:2]) if quick else (GREEDY, SAMPLED)
    steps, repeats = (24, 1) if quick else (400, 5)
    encoded = [tokenizer.encode(text) for text in greedy + sampled]
    lengths = torch.tensor([len(ids) for ids in encoded], device=device)
    prompts = torch.zeros(len(encoded), int(lengths.max()), dtype=torch.long, device=device)
    for row, ids in zip(prompts, encoded, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    # argmax(logits + T gumbel) draws from softmax(logits / T).
    noise = torch.zeros(steps, len(encoded), config.vocab, device=device)
    noise[:, len(greedy):] = TEMPERATURE * rng.gumbel((steps, len(sampled), config.vocab), seed=_SEED, device=device)

    stock, onepass, stock_side, onepass_side = race(
        lambda op: generate(model, StockCache(config, len(encoded), device, op), prompts, lengths, noise),
        lambda op: generate(model, OnepassCache(config, len(encoded), device, op), prompts, lengths, noise),
        device, bar, repeats,
    )
    same = int((stock == onepass).all(dim=1).sum())
    agrees = same == len(encoded)
    texts = [tokenizer.decode(ids) for ids in onepass.tolist()]
    kinds = [(i, "greedy") for i in range(len(greedy))][:_SHOWN]
    kinds += [(len(greedy) + i, f"sampled at temperature {TEMPERATURE}") for i in range(len(sampled))][:_SHOWN]
    parameters = sum(p.numel() for p in model.parameters())
    return Result(
        name=NAME,
        what=f"{len(encoded)} prompts continued by {steps} tokens each, by a transformer of {parameters / 1e6:.1f} M "
             f"parameters with {config.heads} heads over {config.kv_heads} of the cache",
        op="attention_with_kvcache",
        stock=stock_side,
        onepass=onepass_side,
        agrees=agrees,
        agreement=f"{stock.numel()} tokens equal" if agrees else f"{len(encoded) - same} of {len(encoded)} rows differ",
        notes=[
            f"{stock.numel() / stock_side.whole.seconds:,.0f} tokens a second stock, "
            f"{stock.numel() / onepass_side.whole.seconds:,.0f} with onepass.",
            f"{len(greedy)} rows greedy, {len(sampled)} sampled with the same Gumbel noise on both sides; prompts of "
            f"{int(lengths.min())} to {int(lengths.max())} tokens. The op is rotary embedding, append and attention.",
            "The model has read the Python language reference for some minutes: it has the tone, not the facts.",
        ],
        figures=[Figure((greedy + sampled)[i], kind, (greedy + sampled)[i] + texts[i]) for i, kind in kinds],
    )
