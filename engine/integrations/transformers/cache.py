"""A cache for transformers whose layers write new tokens in place and hand out views of what they hold."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

_FIRST_ROOM = 64    # tokens that a layer without max_length has room for at first


def _buffer(like: Tensor, rows: int, room: int) -> Tensor:
    """Room for this many tokens of the heads of `like`, [B, Hkv, S, D], laid out as [B, room, Hkv, D]."""
    return like.new_empty(rows, room, like.shape[1], like.shape[3]).transpose(1, 2)


class OnePassLayer(CacheLayerMixin):
    """Keys and values of one layer in buffers [B, Hkv, room, D], whose first `held` places are the last tokens seen.

    The heads of a token lie together in memory. `update` copies the new tokens and no others, and returns views.
    Without a max_length a full buffer is replaced by one of twice the size. Inference only.
    """

    is_compileable = False      # of generate(), which would want static shapes; torch.compile of a step takes the cache
    is_croppable = True
    is_sliding = False

    def __init__(self, max_length: int | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.keys: Tensor
        self.values: Tensor
        self.max_length = max_length
        self.seen = self.held = 0
        self._spare: tuple[Tensor, Tensor] | None = None    # buffers for the next reordering of rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._allocate(key_states.shape[2], key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError("key_states requires a gradient: the cache is for inference, use torch.no_grad()")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        if self.held + new > self.keys.shape[2]:
            self._make_room(new)
        self._append(key_states, value_states)
        return self._last(self._visible(new))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1 if self.max_length is None else self.max_length

    def reset(self) -> None:
        """Forgets the tokens; the buffers stay."""
        self.seen = self.held = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -tokens_to_remove tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove}: expected 0 or less, the tokens to take off the end")
        removed = min(-tokens_to_remove, self.seen)
        self.seen, self.held = self.seen - removed, self.held - removed

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i becomes row indices[i]: the tokens held go to spare buffers, which then change places with these."""
        if not self.is_initialized:
            return
        indices = indices.to(self.device)
        indices = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        rows, room = indices.shape[0], self.keys.shape[2]
        old, spare = (self.keys, self.values), self._spare
        if spare is None or spare[0].shape[0] != rows:
            spare = _buffer(old[0], rows, room), _buffer(old[1], rows, room)
        for target, source in zip(spare, old, strict=True):
            target[:, :, : self.held] = source[:, :, : self.held].index_select(0, indices)
        (self.keys, self.values), self._spare = spare, old

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def _allocate(self, new: int, *states: Tensor) -> None:
        room = self.max_length or max(_FIRST_ROOM, 2 * new)
        self.keys, self.values = (_buffer(x, x.shape[0], room) for x in states)

    def _make_room(self, new: int) -> None:
        if self.max_length is not None:
            raise ValueError(f"max_length={self.max_length}: the cache holds {self.held} tokens and gets {new} more")
        self._keep_last(self.held, 2 * (self.held + new))

    def _keep_last(self, tokens: int, room: int) -> None:
        """The last tokens held go to the front of buffers with this room, the same ones where that is their room."""
        for name in ("keys", "values"):
            buffer = getattr(self, name)
            last = buffer[:, :, self.held - tokens : self.held]
            if room == buffer.shape[2]:
                last = last.clone()     # the places may overlap
            else:
                buffer, self._spare = _buffer(buffer, buffer.shape[0], room), None
                setattr(self, name, buffer)
            buffer[:, :, :tokens] = last
        self.held = tokens

    def _append(self, *states: Tensor) -> None:
        new = states[0].shape[2]
        for buffer, x in zip((self.keys, self.values), states, strict=True):
            buffer.narrow(2, self.held, new).copy_(x)
        self.seen, self.held = self.seen + new, self.held + new

    def _visible(self, new: int) -> int:
        return self.held

    def _last(self, tokens: int) -> tuple[Tensor, Tensor]:
        first = self.held - tokens
        return self.keys.narrow(2, first, tokens), self.values.narrow(2, first, tokens)


class OnePassSlidingLayer(OnePassLayer):
    """The same with a window: room for twice the window, and where it is full its last part moves to the front."""

    is_sliding = True

    def __init__(self, sliding_window: int, max_length: int | None = None, **kwargs: Any) -> None:
        super().__init__(max_length)
        self.sliding_window = sliding_window
        self.record_past = False

    def activate_past_recording(self) -> None:
        """From now on tokens are dropped by `crop` only, so that it can go back by any number of new ones."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new, before = key_states.shape[2], self.sliding_window - 1
        if self.seen or new <= 2 * self.sliding_window or self.record_past:
            return super().update(key_states, value_states, *args, **kwargs)
        # A long prompt is attended as it came; what later tokens see is kept.
        super().update(key_states[:, :, new - before :], value_states[:, :, new - before :])
        self.seen = new
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = min(self.seen, self.sliding_window - 1)
        return past + query_length, self.seen - past

    def get_max_length(self) -> int:
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -tokens_to_remove tokens; past the window only while they are recorded."""
        left = self.seen - min(max(-tokens_to_remove, 0), self.seen)
        if self.held - (self.seen - left) < min(left, self.sliding_window - 1):
            raise RuntimeError(
                f"crop({tokens_to_remove}): tokens of the window before are gone, call activate_past_recording() first"
            )
        super().crop(tokens_to_remove)
        if self.record_past and self.is_initialized and 2 * self.held > self.keys.shape[2]:
            self._keep_last(min(self.held, self.sliding_window - 1), self.keys.shape[2])

    def _allocate(self, new: int, *states: Tensor) -> None:
        self.keys, self.values = (_buffer(x, x.shape[0], 2 * self.sliding_window) for x in states)

    def _make_room(self, new: int) -> None:
        kept = self.held if self.record_past else min(self.held, self.sliding_window - 1)
        room = self.keys.shape[2]
        self._keep_last(kept, room if kept + new <= room else 2 * (kept + new))

    def _visible(self, new: int) -> int:
        return min(self.held, self.sliding_window - 1 + new)


_LAYERS = {
    "full_attention": OnePassLayer,
    "sliding_attention": OnePassSlidingLayer,
    "chunked_attention": OnePassSlidingLayer,
}


class OnePassCache(Cache):
    """A cache for `generate(past_key_values=...)` and for models' forward: OnePassCache(config=model.config).

    With max_length every buffer has its final size from the first token on. Rows of a batch are padded at their left,
    as transformers pads prompts: the attention mask says where each one starts.
    Raises ValueError for models whose layers are neither full, sliding nor chunked attention.
    """

    def __init__(self, config: Any, max_length: int | None = None) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length}: expected 1 or more, or None")
        types, arguments = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        unknown = sorted(set(types) - set(_LAYERS))
        if unknown:
            raise ValueError(f"config has layers of type {', '.join(unknown)}: expected {', '.join(_LAYERS)}")
        super().__init__(layers=[_LAYERS[t](max_length=max_length, **a) for t, a in zip(types, arguments, strict=True)])


__all__ = ["OnePassCache", "OnePassLayer", "OnePassSlidingLayer"]
