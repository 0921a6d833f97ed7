"""What a model's mask becomes: nothing, the padding alone, or the whole table where the pattern is an unusual one."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from ... import _checks as check


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,       # [B, tokens so far] bool: False is padding
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that `attention_forward` takes, in the interface of transformers' AttentionMaskInterface.

    None: the causal rule and the window say all. [B, kv_length] bool: they and this padding, whose attribute `leftpad`,
    int32 [B], is there where all of it lies at the left. [B, 1, q_length, kv_length] bool: the table itself.
    """
    window = local_size is not None
    if window:
        known = local_size == getattr(config, "sliding_window", None) != getattr(config, "attention_chunk_size", None)
    else:
        known = mask_function is causal_mask_function
    last = isinstance(q_offset, (int, torch.SymInt)) and q_offset + q_length == kv_offset + kv_length
    plain = allow_is_causal_skip and known and last
    plain = plain or (allow_is_bidirectional_skip and not window and mask_function is bidirectional_mask_function)
    if not plain:
        return sdpa_mask(
            batch_size, q_length, kv_length, cast(Any, q_offset), kv_offset, mask_function, attention_mask, local_size,
            allow_is_causal_skip=False, allow_is_bidirectional_skip=False, config=config, **kwargs,
        )
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is None:
        return None
    padding = padding[:, kv_offset : kv_offset + kv_length]
    return _told(padding) if check.readable(padding) else padding


def _told(padding: Tensor) -> Tensor | None:
    """None where nothing is padded; else the padding, with `leftpad` where rows are padded at their left alone."""
    if padding.all():
        return None
    first = padding.int().argmax(1)
    if torch.equal(first + padding.sum(1), torch.full_like(first, padding.shape[1])):
        padding = padding.clone()
        padding.leftpad = first.int()       # type: ignore[attr-defined]
    return padding
