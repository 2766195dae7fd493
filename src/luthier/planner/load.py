"""What a training step runs through the model: the microbatches as they will be, or a stand-in made of lengths.

Memory follows the largest microbatch, time the sum of all. `pairs` are the products of queries and keys that causal
attention makes; `masks` the numbers of the masks that the last layer needs where it computes scored rows only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from luthier.contracts.batch import Batch
from luthier.data.stream import Stream
from luthier.models.last_layer import WORTH

LOOKED_AT = 20  # steps of the stream whose microbatches are looked at


@dataclass(frozen=True, slots=True)
class Load:
    """One microbatch."""

    tokens: int
    scored: int
    pairs: float
    masks: int
    whole: bool = False  # the last layer computes every row, whatever is scored

    @property
    def kept(self) -> int:
        """Rows that the last layer computes."""
        few = not self.whole and 0 < self.scored <= WORTH * self.tokens
        return self.scored if few else self.tokens

    @property
    def restricted(self) -> bool:
        return self.kept < self.tokens


@dataclass(frozen=True, slots=True)
class Course:
    """A whole training: how many steps, what is in one, and the microbatches that were looked at."""

    steps: int  # 0: not known
    tokens_per_step: float
    scored_per_step: float
    pairs_per_step: float
    microbatches: int  # of the step that has most
    loads: tuple[Load, ...]
    from_rows: bool  # False: lengths were assumed
    evaluation_tokens: int = 0  # of the largest microbatch of held-out rows


def load_of(batch: Batch) -> Load:
    """Of a microbatch as the stream makes it."""
    forest = batch.forest
    lengths = [end - start for start, end in zip(forest.start, forest.end, strict=True)]
    scored = [0] * len(lengths)
    segment = 0
    for row in sorted(set(batch.scored_N.tolist())):
        while row >= forest.end[segment]:
            segment += 1
        scored[segment] += 1
    pairs, masks = 0.0, 0
    for index, length in enumerate(lengths):
        keys = sum(lengths[part] for part in forest.chain(index))
        pairs += length * (keys - length) + length * (length + 1) / 2
        masks += scored[index] * keys
    return Load(batch.tokens, sum(scored), pairs, masks)


def course_of(stream: Stream, steps: int, evaluation: Stream | None = None) -> Course:
    """From the rows: the microbatches of the first steps."""
    seen = [[load_of(batch) for batch in stream.step(step)] for step in range(min(steps, LOOKED_AT))]
    held_out = [] if evaluation is None else [batch.tokens for batch in islice(evaluation.batches(), LOOKED_AT)]
    return Course(
        steps=steps, tokens_per_step=_mean(sum(load.tokens for load in one) for one in seen),
        scored_per_step=_mean(sum(load.scored for load in one) for one in seen),
        pairs_per_step=_mean(sum(load.pairs for load in one) for one in seen),
        microbatches=max(map(len, seen)), loads=tuple(sorted({load for one in seen for load in one}, key=_size)),
        from_rows=True, evaluation_tokens=max(held_out, default=0),
    )  # fmt: skip


def assumed(tokens_per_step: int, microbatch: int, row: int, scored_share: float, steps: int = 0) -> Course:
    """Without rows: full microbatches of rows of one length."""
    microbatch = max(microbatch, row)
    rows, rest = divmod(microbatch, row)
    parts = [row] * rows + ([rest] if rest else [])
    scored = [round(part * scored_share) for part in parts]
    load = Load(
        sum(parts), sum(scored), sum(n * (n + 1) / 2 for n in parts),
        sum(n * m for n, m in zip(scored, parts, strict=True)),
    )  # fmt: skip
    count = max(1, -(-tokens_per_step // load.tokens))
    tokens = max(tokens_per_step, load.tokens)
    times = tokens / load.tokens
    return Course(steps, tokens, load.scored * times, load.pairs * times, count, (load,), from_rows=False)


def _size(load: Load) -> tuple[int, int, int, float]:
    return load.tokens, load.scored, load.masks, load.pairs


def _mean(numbers: Iterable[float]) -> float:
    found: Sequence[float] = list(numbers)
    return sum(found) / len(found)
