"""As flash_attn.bert_padding: between padded batches [B, S, ...] and tokens packed end to end [total, ...]."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, int32


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices]; gradients flow back to those rows."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros [first_axis_dim, ...] with `values` in rows `indices`."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """(tokens, indices, cu_seqlens, max_seqlen_in_batch, seqused) of hidden_states [B, S, ...].

    Keeps the tokens where attention_mask [B, S] or unused_mask is 1; seqused counts those of attention_mask alone.
    Reads the longest length on the host.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, cu_seqlens, longest, attention_mask.sum(-1, dtype=int32)


def pad_input(hidden_states, indices, batch, seqlen):
    """[batch, seqlen, ...] with token i of hidden_states in place indices[i], zeros elsewhere."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


__all__ = ["index_first_axis", "index_put_first_axis", "pad_input", "unpad_input"]
