"""Streams after one another: a training in stages, addressed by the global step like any stream.

    step       0 … n_0 - 1 | n_0 … n_0 + n_1 - 1 | …          each part counts its own steps from 0

Parts may differ in the size of a step, in seed and in rows. Rows of all parts are numbered through, lists that several
parts share once. Past the end the last part goes on: rollbacks pass over data. Epochs add up over the parts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from luthier.contracts.record import Sample
from luthier.data.stream import Stream


@dataclass(frozen=True)
class Part:
    """A stream, and how many of its steps are taken."""

    stream: Stream
    steps: int


class Staged(Stream):
    """Its `spec` and its epoch are those of the first part, where somebody asks before the first step."""

    def __init__(self, parts: Sequence[Part]) -> None:
        samples: list[Sample] = []
        places: dict[int, int] = {}  # a list of samples -> number of its first row
        for part in parts:
            if id(part.stream.samples) not in places:
                places[id(part.stream.samples)] = len(samples)
                samples.extend(part.stream.samples)
        super().__init__(samples, parts[0].stream.spec)
        self.parts = list(parts)
        self._offsets = [places[id(part.stream.samples)] for part in parts]
        self._firsts = [0, *accumulate(part.steps for part in parts[:-1])]

    @property
    def steps_per_epoch(self) -> int:
        return self.parts[0].stream.steps_per_epoch

    def total_steps(self, epochs: float = 1.0) -> int:
        """Of all parts; they have lengths of their own."""
        return sum(part.steps for part in self.parts)

    def rows(self, step: int) -> list[int]:
        part, inside = self._at(step)
        return [self._offsets[part] + row for row in self.parts[part].stream.rows(inside)]

    def epoch_at(self, step: int) -> float:
        if step == 0:
            return 0.0
        last, inside = self._at(step - 1)
        before = sum(part.stream.epoch_at(part.steps) for part in self.parts[:last])
        return before + self.parts[last].stream.epoch_at(inside + 1)

    def fill(self, steps: int | None = None) -> float:
        return self.parts[0].stream.fill(steps)

    def with_microbatches(self, tokens: int | None) -> Stream:
        return Staged([Part(part.stream.with_microbatches(tokens), part.steps) for part in self.parts])

    def _at(self, step: int) -> tuple[int, int]:
        """(part, step within it)."""
        if step < 0:
            raise IndexError(f"steps count from 0, not {step}")
        part = bisect_right(self._firsts, step) - 1
        return part, step - self._firsts[part]
