"""Train the language model of `onepass demo --only lm` on the reference texts that every Python carries.

    python examples/train_lm.py [--out FOLDER] [--steps N]

The text is that of `help("topics")` and the licence: about 0.5 MB. About eight minutes on two cores; the result depends
on the Python version, whose texts it reads, and on the machine's matrix products.
"""
from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import sysconfig
from pydoc_data import topics

import torch
from rich.progress import track
from torch.nn import functional as F

from onepass.demo import checkpoints
from onepass.demo.bpe import Tokenizer, learn
from onepass.demo.transformer import Config, Transformer, rotary_tables, train_attend


def corpus() -> str:
    """The language reference as pydoc shows it, one topic after the other, then the licence where it is installed."""
    parts = [topics.topics[name].strip() for name in sorted(topics.topics)]
    licence = pathlib.Path(sysconfig.get_path("stdlib"), "LICENSE.txt")
    if licence.exists():
        parts.append(licence.read_text(encoding="utf-8").strip())
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=checkpoints.FOLDER, help="folder of lm.safetensors")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()

    torch.manual_seed(0)
    config = Config()
    text = corpus()
    merges = learn(text, config.vocab)
    tokenizer = Tokenizer(merges)
    pieces = [tokenizer.encode(part + "\n\n") for part in text.split("\n\n")]
    tokens = torch.tensor([token for piece in pieces for token in piece])
    starts = torch.tensor([0] + [len(piece) for piece in pieces[:-1]]).cumsum(0)
    print(f"{len(text):,} characters, {len(tokens):,} tokens, {len(pieces):,} paragraphs")

    model = Transformer(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    attend = train_attend(*rotary_tables(config.context, config.head_dim))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    warmup = min(50, max(1, args.steps // 10))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * i / args.steps)))
    )
    span = torch.arange(config.context // 2 + 1)
    mean = math.log(config.vocab)
    for step in track(range(args.steps), description="lm"):
        # Long rows now and then, so that late positions are learned too.
        rows, length = (args.batch // 2, config.context) if step % 8 == 7 else (args.batch, config.context // 2)
        # Rows begin where paragraphs do, as prompts will.
        start = starts[torch.randint(len(starts), (rows, 1))].clamp_max(len(tokens) - length - 1)
        if len(span) != length + 1:
            span = torch.arange(length + 1)
        window = tokens[start + span]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(window[:, :-1], attend)
            logits = model.logits(hidden)
        loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        mean += (loss.item() - mean) * 0.02
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}: loss {mean:.3f} nats a token")
    path = checkpoints.save(model, "lm", args.out, config=dataclasses.asdict(config), merges=merges)
    print(f"wrote {path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
