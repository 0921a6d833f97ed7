"""A source of random keys that a program passes around."""
from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from .reference.rng import _MULTIPLIERS, _WEYL

_LIMIT = 2**56              # streams below it belong to the caller; the bits above name the op
_CHILD = 0xFF << 56         # no op draws from these streams: children's seeds come from there


def _word(seed: int, stream: int, block: int) -> int:
    """The first 64 bits of a Philox4x32-10 block."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = block & mask, block >> 32 & mask, stream & mask, stream >> 32 & mask
    k0, k1 = seed & mask, seed >> 32 & mask
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & mask, (p0 >> 32) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + _WEYL[0]) & mask, (k1 + _WEYL[1]) & mask
    return c0 | c1 << 32


class Generator:
    """Hands out (seed, stream) pairs: the same seed, a stream of its own for each call that draws.

    Give it as `generator=` wherever a `seed=` goes; every call takes the next stream. The seed may be an int64 tensor
    [B], one key for each row of a batch. Threads may share it: no pair is handed out twice. `spawn` makes generators
    whose numbers have nothing to do with each other's or the parent's. Not for use inside torch.compile, which would
    freeze the pair: there pass `seed=` and `stream=` as tensors.
    """

    def __init__(
        self,
        seed: int | Tensor | None = None,   # None draws one from torch's default generator
        stream: int = 0,                    # of the first pair, below 2^56
    ) -> None:
        if seed is None:
            seed = int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64))
        if isinstance(seed, Tensor):
            if seed.dtype != torch.int64 or seed.dim() > 1:
                raise TypeError(f"seed is {seed.dtype} {tuple(seed.shape)}, expected an int or int64 tensor [] or [B]")
        elif isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed is {type(seed).__name__}, expected an int or an int64 tensor")
        self._lock = threading.Lock()
        self._seed = seed
        self._children = 0
        self._stream = self._checked(stream)

    @staticmethod
    def _checked(stream: Any) -> int:
        if isinstance(stream, bool) or not isinstance(stream, int):
            raise TypeError(f"stream is {type(stream).__name__}, expected an int")
        if not 0 <= stream < _LIMIT:
            raise ValueError(f"stream={stream}: expected 0 <= stream < 2**56 (the bits above name the op)")
        return stream

    @property
    def seed(self) -> int | Tensor:
        return self._seed

    def next(self) -> tuple[int | Tensor, int]:
        """The next (seed, stream)."""
        if torch.compiler.is_compiling():
            raise ValueError("a Generator inside torch.compile would draw the same pair always: "
                             "take the pair outside and pass seed and stream as tensors")
        with self._lock:
            stream = self._stream
            if stream >= _LIMIT:
                raise ValueError("the generator has handed out all its 2**56 streams")
            self._stream += 1
        return self._seed, stream

    def spawn(self, count: int) -> list[Generator]:
        """`count` new generators; the next call gives others."""
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"count={count!r}: expected an int >= 0")
        with self._lock:
            first, self._children = self._children, self._children + count
        return [Generator(self._child(i)) for i in range(first, first + count)]

    def fork(self) -> Generator:
        """One new generator, as spawn(1) gives."""
        return self.spawn(1)[0]

    def _child(self, index: int) -> int | Tensor:
        if not isinstance(self._seed, Tensor):
            return _word(self._seed, _CHILD, index)
        seeds = [_word(seed, _CHILD, index) for seed in self._seed.reshape(-1).tolist()]
        signed = torch.tensor([(x + 2**63) % 2**64 - 2**63 for x in seeds], dtype=torch.int64)
        return signed.reshape(self._seed.shape).to(self._seed.device)

    def state_dict(self) -> dict[str, Any]:
        """All that the next pairs and children depend on; torch.save takes it."""
        with self._lock:
            seed = self._seed.clone() if isinstance(self._seed, Tensor) else self._seed
            return {"seed": seed, "stream": self._stream, "children": self._children}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        missing = {"seed", "stream", "children"} ^ set(state)
        if missing:
            raise ValueError(f"state has keys {sorted(state)}, expected seed, stream and children")
        other = Generator(state["seed"], state["stream"])
        with self._lock:
            self._seed, self._stream, self._children = other._seed, other._stream, int(state["children"])

    def __getstate__(self) -> dict[str, Any]:
        return self.state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["seed"], state["stream"])       # type: ignore[misc]
        self._children = state["children"]

    def __repr__(self) -> str:
        return f"Generator(seed={self._seed!r}, stream={self._stream})"
