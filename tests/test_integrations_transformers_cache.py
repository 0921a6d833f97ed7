"""OnePassCache against transformers' DynamicCache: the same tokens in every use, and no copy of what it holds."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers", minversion="5", reason="the extra [transformers] is not installed")

from test_integrations_transformers import SIZES, decoder, one_thread, prompts  # noqa: E402, F401

from onepass.integrations.transformers import OnePassCache, accelerate, restore  # noqa: E402
from onepass.integrations.transformers import cache as cache_module  # noqa: E402

MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}


def config(**changes):
    return transformers.Gemma3TextConfig(**SIZES | MIXED | changes)


def states(tokens: int, seed: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, tokens, 16, generator=generator), torch.randn(batch, 2, tokens, 8, generator=generator)


def feed(caches, tokens: int, seed: int) -> None:
    """Gives every layer of both caches the same tokens and compares what they return and say."""
    for layer in range(2):
        sizes = [c.get_mask_sizes(tokens, layer) for c in caches]
        assert sizes[0] == sizes[1]
        got = [c.update(*states(tokens, seed + layer, c.layers[layer].batch), layer) for c in caches]
        assert got[0][0].shape[2] == sizes[0][0]
        for ours, theirs in zip(*got, strict=True):
            assert torch.equal(ours, theirs)
        assert caches[0].get_seq_length(layer) == caches[1].get_seq_length(layer)


def pair(batch: int = 2, **changes):
    caches = OnePassCache(config(), **changes), transformers.DynamicCache(config=config())
    for cache in caches:
        for layer in cache.layers:
            layer.batch = batch
    return caches


@pytest.mark.parametrize("lengths", [[1] * 40, [3, 1, 1, 4, 9, 1], [30, 1, 1, 12, 1], [4, 1, 11, 2], [70, 80, 1]])
def test_update_returns_what_a_growing_cache_does(lengths):
    caches = pair()
    for i, tokens in enumerate(lengths):
        feed(caches, tokens, 10 * i)
    caches[0].reset()
    caches[1].reset()
    buffers = [layer.keys.data_ptr() for layer in caches[0].layers]
    for i, tokens in enumerate(lengths[:3]):
        feed(caches, tokens, 1000 + i)
    assert buffers[1] == caches[0].layers[1].keys.data_ptr()


def test_crop_goes_back():
    caches = pair()
    feed(caches, 3, 1)
    for cache in caches:
        cache.crop(-1)
        cache.crop(0)
    feed(caches, 1, 2)
    for cache in caches:
        cache.activate_past_recording()
    for i in range(30):
        feed(caches, 4, 10 + i)
        for cache in caches:
            cache.crop(-(i % 4))
    caches[0].reset()
    assert caches[0].get_seq_length() == 0
    plain = OnePassCache(config())
    for layer in range(2):
        plain.update(*states(20, layer), layer)
    with pytest.raises(RuntimeError, match=r"crop\(-12\): tokens of the window before are gone"):
        plain.crop(-12)
    with pytest.raises(ValueError, match="tokens_to_remove=3: expected 0 or less"):
        plain.crop(3)


def test_rows_change_places():
    caches = pair()
    feed(caches, 6, 1)
    for indices in ([1, 0], [1, 1], [0, 0]):
        for cache in caches:
            cache.reorder_cache(torch.tensor(indices))
        feed(caches, 1, sum(indices))
    for cache in caches:
        cache.batch_repeat_interleave(2)
        for layer in cache.layers:
            layer.batch = 4
    feed(caches, 2, 5)
    for cache in caches:
        cache.batch_select_indices(torch.tensor([True, False, True, True]))
        for layer in cache.layers:
            layer.batch = 3
    feed(caches, 1, 6)


def test_a_fixed_size_is_kept_and_bad_calls_are_refused():
    cache = OnePassCache(config(), max_length=8)
    cache.update(*states(5, 1), 1)
    buffer = cache.layers[1].keys
    cache.update(*states(3, 2), 1)
    assert cache.layers[1].keys is buffer and buffer.shape == (2, 2, 8, 16)
    with pytest.raises(ValueError, match="max_length=8: the cache holds 8 tokens and gets 1 more"):
        cache.update(*states(1, 3), 1)
    assert cache.get_seq_length(1) == 8
    with pytest.raises(ValueError, match="max_length=0: expected 1 or more"):
        OnePassCache(config(), max_length=0)
    with pytest.raises(ValueError, match="key_states requires a gradient"):
        OnePassCache(config()).update(*(x.requires_grad_() for x in states(1, 1)), 0)
    linear = transformers.Qwen3NextConfig(**SIZES, layer_types=["linear_attention", "full_attention"])
    with pytest.raises(ValueError, match="config has layers of type linear_attention: expected full_attention"):
        OnePassCache(linear)


@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 6}], ids=str)
def test_every_way_to_generate_gives_the_same_tokens(name, how):
    model = decoder(name)
    ids, padding = prompts()
    if "prompt_lookup_num_tokens" in how:
        ids, padding = torch.cat([ids[:1, :6]] * 3, 1), torch.ones(1, 18).long()
    accelerate(model)
    try:
        inputs = {"input_ids": ids, "attention_mask": padding, "max_new_tokens": 14, "do_sample": False, **how}
        truth = model.generate(**inputs)
        assert torch.equal(model.generate(**inputs, past_key_values=OnePassCache(config=model.config)), truth)
    finally:
        restore(model)


@pytest.mark.parametrize("max_length", [None, 64])
def test_what_no_token_filled_is_never_read(monkeypatch, max_length):
    poisoned = lambda like, rows, room: cache_module.original(like, rows, room).fill_(torch.nan)
    monkeypatch.setattr(cache_module, "original", cache_module._buffer, raising=False)
    monkeypatch.setattr(cache_module, "_buffer", poisoned)
    model = decoder("Gemma3")
    ids, padding = prompts()
    accelerate(model)
    try:
        inputs = {"input_ids": ids, "attention_mask": padding, "max_new_tokens": 30, "do_sample": False, "num_beams": 2}
        cache = OnePassCache(config=model.config, max_length=max_length)
        assert torch.equal(model.generate(**inputs, past_key_values=cache), model.generate(**inputs))
        full = cache.layers[1]
        assert full.keys[:, :, full.held :].isnan().all() and full.held < full.keys.shape[2]
    finally:
        restore(model)


class CopiedBytes(TorchDispatchMode):
    """Sums what operators that copy have written."""

    COPIES = ("copy_", "clone", "cat", "_to_copy", "index_select", "index_copy", "slice_scatter", "new_full", "repeat")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and func._schema.name.removeprefix("aten::") in self.COPIES:
            self.bytes += out.numel() * out.element_size()
        return out


def test_a_step_copies_its_tokens_and_no_more():
    token, layer = 2 * 2 * (16 + 8) * 4, 2 * 500 * 2 * (16 + 8) * 4
    growing = transformers.DynamicCache(config=config())
    for cache, low, high in ((OnePassCache(config()), token, token), (growing, layer, 2 * layer)):
        cache.update(*states(500, 1), 1)
        with CopiedBytes() as copied:
            cache.update(*states(1, 2), 1)
        assert low <= copied.bytes <= high


def prefilled(model, room: int):
    ids = torch.randint(2, 97, (2, 20), generator=torch.Generator().manual_seed(3))
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    cache = OnePassCache(config=model.config, max_length=room)
    return model(ids, attention_mask=padding, past_key_values=cache).logits[:, -1:], padding, cache


def decode(model, forward, steps: int, room: int = 1024):
    """The logits of greedy steps, each with its own position, and the cache."""
    logits, padding, cache = prefilled(model, room)
    out = []
    for _ in range(steps):
        padding = torch.cat([padding, torch.ones(2, 1, dtype=padding.dtype)], 1)
        positions = (padding.cumsum(1) - 1)[:, -1:]
        logits = forward(
            logits.argmax(-1), attention_mask=padding, past_key_values=cache, position_ids=positions
        ).logits
        out.append(logits)
    return torch.cat(out, 1), cache


@pytest.mark.parametrize(("name", "layers"), [("Llama", 1), pytest.param("Gemma3", 2, marks=pytest.mark.slow)])
def test_a_compiled_step_copies_no_cache(name, layers):
    from torch._inductor.utils import run_and_get_code

    model, room = decoder(name, layers), 1024
    accelerate(model)
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            truth, twin = decode(model, model.forward, 8)
            compiled = torch.compile(model.forward, fullgraph=True)
            (logits, cache), codes = run_and_get_code(lambda: decode(model, compiled, 4))
            with torch._dynamo.config.patch(error_on_recompile=True):
                again, _ = decode(model, compiled, 8)
    finally:
        restore(model)
    torch.testing.assert_close(logits, truth[:, :4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, truth, rtol=1e-4, atol=1e-4)
    held = cache.layers[-1]
    torch.testing.assert_close(held.keys[:, :, :24], twin.layers[-1].keys[:, :, :24], rtol=1e-4, atol=1e-4)
    assert codes and held.keys.shape[2] == room
    for code in codes:      # a copy of a layer needs a buffer of its size, or a loop over its room
        sizes = re.findall(r"= empty_strided_cpu\(\((.*?)\), \(", code)
        sizes = [re.sub(r"\b[su]\d+\b", str(held.held), size) for size in sizes]     # symbols are the tokens held
        numels = [math.prod(eval(f"({size},)", {"Max": max, "Min": min})) for size in sizes]
        assert numels and max(numels) < held.keys[:, :, : held.held].numel()
        bounds = [int(n) for n in re.findall(r"<static_cast<int64_t>\((\d+)L\)", code)]
        assert bounds and max(bounds) < room
