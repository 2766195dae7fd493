"""The stream of optimizer steps: step number in, microbatches out. The step number is its only state.

`step(n)` is pure: a resumed run asks for step n and gets the very batches that the unbroken run saw. Epochs follow
one another; each has its own shuffle and so, when steps are cut by tokens, perhaps one step more or less than the
first. `total_steps(epochs)` therefore counts real steps; `steps_per_epoch` is that of the first epoch.
The microbatches of a step are its rows in as few, equally full bins of about `microbatch_tokens` as hold them
(pack.balance), the fullest first, so that a machine that is too small says so at the first microbatch; a single longer
row makes a larger one. How a step is split changes its cost, never its result.
Batches are made when they are asked for: 5 ms for a step of 16,384 tokens in 80 rows, 0.4 s for the plan of an epoch of
200,000 rows (one thread), far below 1 % of a step; so no worker, no prefetch, and nothing that a resume must restore.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from luthier.contracts.batch import Batch
from luthier.contracts.record import Sample
from luthier.data.collate import collate
from luthier.data.order import PlanSpec, plan_epoch
from luthier.data.pack import balance

_PLANS_KEPT = 2
_TOKENS_PER_STEP = 16384


@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """How samples become steps. The last three do not decide which rows a step holds."""

    seed: int = 42
    tokens_per_step: int | None = 16384  # not looked at where rows_per_step is given
    rows_per_step: int | None = None
    window: int = 1024
    microbatch_tokens: int | None = None  # None = a whole step at once
    packing: str = "forest"  # forest | none (one sample per microbatch)
    reserved_per_root: int = 0  # rows that a method adds in front of every root (`Method.virtual_tokens`)


class Stream:
    """Optimizer steps over prepared samples; pure functions of the step number."""

    def __init__(self, samples: Sequence[Sample], spec: StreamSpec) -> None:
        if not samples:
            raise ValueError("a stream needs at least one sample")
        if spec.packing not in ("forest", "none"):
            raise ValueError(f"packing is forest or none, not {spec.packing!r}")
        self.samples, self.spec = samples, spec
        self.lengths = [sample.length for sample in samples]
        self._sizes = [self._size(sample) for sample in samples]  # rows through the model
        self._tokens = spec.tokens_per_step or _TOKENS_PER_STEP
        self._plans: OrderedDict[int, list[list[int]]] = OrderedDict()
        self._starts = [0]  # first global step of each epoch planned so far, and of the next

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of the first epoch."""
        return len(self.plan(0))

    @property
    def tokens_per_epoch(self) -> int:
        return sum(self.lengths)

    @property
    def microbatch_tokens(self) -> int:
        """Room of one microbatch: as given, else that of a step, and never less than the longest row."""
        return self.spec.microbatch_tokens or max(self._tokens, max(self._sizes))

    def total_steps(self, epochs: float) -> int:
        """Steps of `epochs` epochs, the last one perhaps in part; at least one."""
        whole = int(epochs)
        self._reach_epoch(whole)
        part = epochs - whole
        extra = math.ceil(part * len(self.plan(whole)) - 1e-9) if part > 0 else 0
        return max(1, self._starts[whole] + extra)

    def plan(self, epoch: int) -> list[list[int]]:
        """The rows of each step of an epoch."""
        if epoch not in self._plans:
            spec = self.spec
            plan = PlanSpec(
                seed=spec.seed, epoch=epoch, tokens_per_step=self._tokens,
                rows_per_step=spec.rows_per_step, window=spec.window,
            )  # fmt: skip
            self._plans[epoch] = plan_epoch(self.lengths, plan)
            while len(self._plans) > _PLANS_KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(epoch)
        return self._plans[epoch]

    def place(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of a global step, counted from 0."""
        if step < 0:
            raise IndexError(f"steps count from 0, not {step}")
        while self._starts[-1] <= step:
            self._reach_epoch(len(self._starts))
        epoch = bisect_right(self._starts, step) - 1
        return epoch, step - self._starts[epoch]

    def epoch_at(self, step: int) -> float:
        """Epochs passed when `step` steps (counted from the start) are done."""
        if step == 0:
            return 0.0
        epoch, inside = self.place(step - 1)
        return epoch + (inside + 1) / (self._starts[epoch + 1] - self._starts[epoch])

    def rows(self, step: int) -> list[int]:
        """Indices into `samples` of a global step."""
        epoch, inside = self.place(step)
        return list(self.plan(epoch)[inside])

    def step(self, step: int) -> list[Batch]:
        """The microbatches of a global step."""
        return self._batches(self.rows(step))

    def batches(self) -> Iterator[Batch]:
        """All samples once, window by window in their own order: for evaluation."""
        for first in range(0, len(self.samples), self.spec.window):
            yield from self._batches(range(first, min(first + self.spec.window, len(self.samples))))

    def with_microbatches(self, tokens: int | None) -> Stream:
        """The same steps, computed in microbatches of another size."""
        return Stream(self.samples, replace(self.spec, microbatch_tokens=tokens))

    def packed(self, samples: Sequence[Sample]) -> list[Batch]:
        """Samples from elsewhere in microbatches like the stream's own."""
        bins = self._bins([self._size(sample) for sample in samples])
        return [collate([samples[i] for i in members]) for members in bins]

    def fill(self, steps: int | None = None) -> float:
        """Used tokens / (microbatches x largest microbatch of its step), over the first `steps` steps (None: an epoch).

        The largest sets memory and time of a step, so 1 means that no pass through the model is partly empty.
        """
        used = room = 0
        for rows in self.plan(0)[:steps]:
            sizes = [sum(self._sizes[row] for row in members) for members in self._members(rows)]
            used, room = used + sum(sizes), room + len(sizes) * max(sizes)
        return used / room

    def _size(self, sample: Sample) -> int:
        return sample.length + self.spec.reserved_per_root * sample.roots

    def _members(self, rows: Sequence[int]) -> list[list[int]]:
        return [[rows[i] for i in members] for members in self._bins([self._sizes[row] for row in rows])]

    def _bins(self, lengths: Sequence[int]) -> list[list[int]]:
        if self.spec.packing == "none":
            return [[index] for index in range(len(lengths))]
        return balance(lengths, self.microbatch_tokens)

    def _batches(self, rows: Sequence[int]) -> list[Batch]:
        return [collate([self.samples[row] for row in members]) for members in self._members(rows)]

    def _reach_epoch(self, epoch: int) -> None:
        """Know the first step of `epoch`."""
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + len(self.plan(len(self._starts) - 1)))
