"""Small memories of large sets that join: the same whatever the parts and their order.

    Smallest(k)   the k items with the smallest keys (bottom-k, KMV). With key = a seeded hash of the item's place it is
                  a uniform sample without replacement (Cohen and Kaplan, PODC 2007); with key = the item's digest it
                  counts distinct items: exactly up to k, then (k - 1) / (k-th key as a share of the key space), with a
                  relative error of about 1 / sqrt(k - 2) (Bar-Yossef and others, RANDOM 2002).
    Lengths       how many items have each length: exact percentiles, as memory grows with different lengths only.

`join` is commutative and associative, so parts counted anywhere give the whole's figures (a law of the tests).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

KEY_BITS = 64
SPACE = 2**KEY_BITS


def key(*parts: str | int, seed: int = 0) -> int:
    """64 bits of the parts, the same on every machine; lone surrogates are digested as they are."""
    raw = "\x1f".join(str(part) for part in parts).encode("utf-8", "surrogatepass")
    salt = seed.to_bytes(8, "little", signed=True)
    return int.from_bytes(blake2b(raw, digest_size=KEY_BITS // 8, salt=salt).digest(), "little")


@dataclass
class Smallest:
    """The `k` smallest different keys seen, each with what stands under it. Equal keys are met by `meet`."""

    k: int
    meet: Callable[[Any, Any], Any] = lambda mine, other: mine
    held: dict[int, Any] = field(default_factory=dict)
    _heap: list[int] = field(default_factory=list)  # negated, so that the largest key is on top

    def wants(self, at: int) -> bool:
        """Whether an item of this key would be held: asked before anything dear is computed of it."""
        return at in self.held or len(self.held) < self.k or at < -self._heap[0]

    def add(self, at: int, value: Any) -> None:
        if at in self.held:
            self.held[at] = self.meet(self.held[at], value)
        elif self.wants(at):
            self.held[at] = value
            heapq.heappush(self._heap, -at)
            if len(self.held) > self.k:
                del self.held[-heapq.heappop(self._heap)]

    def join(self, other: Smallest) -> None:
        for at, value in other.held.items():
            self.add(at, value)

    @property
    def exact(self) -> bool:
        """Whether nothing was left out."""
        return len(self.held) < self.k

    def distinct(self) -> float:
        """How many different keys there were."""
        if self.exact:
            return float(len(self.held))
        return (self.k - 1) * SPACE / (-self._heap[0] + 1)

    def ordered(self) -> list[Any]:
        """What is held, by key."""
        return [self.held[at] for at in sorted(self.held)]


@dataclass
class Lengths:
    """A histogram of whole numbers."""

    counts: dict[int, int] = field(default_factory=dict)

    def add(self, length: int, times: int = 1) -> None:
        self.counts[length] = self.counts.get(length, 0) + times

    def join(self, other: Lengths) -> None:
        for length, count in other.counts.items():
            self.counts[length] = self.counts.get(length, 0) + count

    def figures(self, percentiles: Iterable[int] = (5, 25, 50, 75, 95, 99)) -> dict[str, float]:
        """Count, mean, least, nearest-rank percentiles, most."""
        ordered, rows = sorted(self.counts.items()), sum(self.counts.values())
        if not rows:
            return {"rows": 0}
        made: dict[str, float] = {"rows": rows, "mean": round(sum(n * c for n, c in ordered) / rows, 1)}
        made["least"] = ordered[0][0]
        for percent in percentiles:
            rank, seen = -(-percent * rows // 100), 0
            for length, count in ordered:
                seen += count
                if seen >= rank:
                    made[f"p{percent}"] = length
                    break
        made["most"] = ordered[-1][0]
        return made


def count(counts: dict[str, int], name: str, by: int = 1) -> None:
    counts[name] = counts.get(name, 0) + by


def join_counts(mine: dict[str, int], other: dict[str, int]) -> None:
    for name, by in other.items():
        count(mine, name, by)
