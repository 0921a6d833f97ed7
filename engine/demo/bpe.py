"""Byte-level byte-pair encoding: 256 bytes, then one token per merge, learned on a text and stored as pairs of ids."""
from __future__ import annotations

import collections
import itertools
import re

_WORD = re.compile(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\n+|\s+(?!\S)|\s+")

Pair = tuple[int, int]


def _merge(ids: list[int], pair: Pair, token: int) -> list[int]:
    """`ids` with every occurrence of `pair`, taken from the left, replaced by `token`."""
    out: list[int] = []
    i = 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            out.append(token)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def learn(text: str, vocab: int) -> list[Pair]:
    """The `vocab` - 256 merges that shorten `text` most, one after the other; ties go to the smaller pair."""
    words = [(list(word.encode()), n) for word, n in collections.Counter(_WORD.findall(text)).items()]
    merges: list[Pair] = []
    for token in range(256, vocab):
        counts: collections.Counter[Pair] = collections.Counter()
        for ids, n in words:
            for pair in itertools.pairwise(ids):
                counts[pair] += n
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        words = [(_merge(ids, best, token) if best[0] in ids else ids, n) for ids, n in words]
    return merges


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, merges: list[Pair]) -> None:
        self.merges = merges
        self._rank = {pair: 256 + i for i, pair in enumerate(merges)}
        self._bytes = [bytes([i]) for i in range(256)]
        for left, right in merges:
            self._bytes.append(self._bytes[left] + self._bytes[right])
        self._words: dict[str, list[int]] = {}

    def _encode_word(self, word: str) -> list[int]:
        ids = list(word.encode())
        while len(ids) > 1:
            pair = min(itertools.pairwise(ids), key=lambda p: self._rank.get(p, len(self._bytes)))
            if pair not in self._rank:
                break
            ids = _merge(ids, pair, self._rank[pair])
        return ids

    def encode(self, text: str) -> list[int]:
        out: list[int] = []
        for word in _WORD.findall(text):
            if word not in self._words:
                self._words[word] = self._encode_word(word)
            out += self._words[word]
        return out

    def decode(self, ids: list[int]) -> str:
        return b"".join(self._bytes[i] for i in ids).decode(errors="replace")
