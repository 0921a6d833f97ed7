"""Time a decode step of a Llama-shaped model with transformers' attention and cache, and with onepass's.

    python examples/transformers_decode.py [--layers 8] [--hidden 1024] [--prompt 2048] [--dtype bfloat16]

Weights are random; every way to decode is checked against eager attention.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from onepass.integrations.transformers import OnePassCache, register


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("layers", 4), ("hidden", 512), ("heads", 8), ("kv-heads", 2), ("batch", 1), ("prompt", 2048)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--steps", type=int, default=20, help="timed decode steps; the median counts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict[str, float]:
    """Median seconds of a step, by attention and cache."""
    a = arguments(argv)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=a.hidden, intermediate_size=2 * a.hidden, num_hidden_layers=a.layers,
        num_attention_heads=a.heads, num_key_value_heads=a.kv_heads, max_position_embeddings=a.prompt + a.steps + 1,
    )  # fmt: skip
    register()
    model = LlamaForCausalLM(config).eval().to(getattr(torch, a.dtype))
    ids = torch.randint(0, 1000, (a.batch, a.prompt))
    caches = {
        "transformers": lambda: DynamicCache(config=config),
        "onepass": lambda: OnePassCache(config=config, max_length=a.prompt + a.steps),
    }
    arms = [(attention, cache) for cache in caches for attention in ("eager", "sdpa", "onepass")]
    times: dict[str, list[float]] = {}
    logits: dict[str, torch.Tensor] = {}
    held = {}
    for attention, cache in arms:
        model.set_attn_implementation(attention)
        held[attention, cache] = caches[cache]()
        model(ids, past_key_values=held[attention, cache], logits_to_keep=1)
    for step in range(a.steps):     # the arms take turns, so that a busy machine is busy for all of them
        token = torch.full((a.batch, 1), step % 1000)
        for attention, cache in arms:
            model.set_attn_implementation(attention)
            start = time.perf_counter()
            out = model(token, past_key_values=held[attention, cache]).logits
            times.setdefault(f"{attention} attention, {cache} cache", []).append(time.perf_counter() - start)
            logits[f"{attention} attention, {cache} cache"] = out
    truth = logits["eager attention, transformers cache"]
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    base = medians["sdpa attention, transformers cache"]
    print(f"{a.layers} layers of {a.hidden}, {a.heads}/{a.kv_heads} heads, {a.batch} x {a.prompt} tokens, {a.dtype}")
    for name, seconds in medians.items():
        error = float((logits[name] - truth).abs().max() / truth.abs().max())
        print(f"{name:<40} {1e3 * seconds:8.2f} ms a step {base / seconds:6.2f}x   differs from eager by {error:.1e}")
    return medians


if __name__ == "__main__":
    main()
