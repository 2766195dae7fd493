"""Luthier's step taken apart in one process, for benches that look inside: the engine's own parts, no loop around.

`Inside` assembles a run as `luthier.train` does and performs its steps by hand: microbatches, log-probabilities,
loss, backward, clip, optimizer. What it leaves out is journal, checkpoints, guard and gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import luthier_worker, work


class Inside:
    """`settings` as bench/luthier_worker.py takes them."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from luthier.assembly import assemble
        from luthier.engine.optimizer import build_optimizer
        from luthier.engine.strategy.single import Single

        rows = Path(settings["directory"]) / f"{settings['name']}.jsonl"
        luthier_worker.write_rows(rows, settings)
        self.made = assemble(luthier_worker.make_recipe(settings, rows))
        self.strategy = Single(self.made.device, self.made.precision)
        self.model = self.strategy.place(self.made.loaded.model).train()
        train = self.made.recipe.train
        self.strategy.bind(build_optimizer(self.made.method, self.model, train, settings["learning_rate"]))
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def batches(self, number: int) -> list[Any]:
        """The microbatches of a step, counted from 0."""
        return self.made.stream.step(number)

    def gradient(self, batches: Sequence[Any]) -> float:
        """Forward and backward of a step; its loss."""
        scorer, objective = self.made.scorer, self.made.objective
        stats = scorer.statistics(batches, (), self.made.stream)
        weight = sum(objective.weight(batch) for batch in batches)
        return self.strategy.forward_backward(batches, lambda batch: scorer.loss(batch, stats), weight)[0]

    def update(self) -> None:
        self.strategy.clip(work.MAX_NORM)
        self.strategy.step()
        self.strategy.zero()

    def unshared(self) -> None:
        """From now on a pair is two whole rows: every leaf carries a copy of its prompt."""
        stream = self.made.stream
        spec, samples = stream.spec, [unshare(sample) for sample in stream.samples]
        self.made.stream = type(stream)(samples, spec)

    def flat_gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.trained if p.grad is not None])


def unshare(sample: Any) -> Any:
    """The same sequences with the prompt written out in each: roots only, prompts never scored."""
    pieces, sequences = [], []
    for sequence in sample.sequences:
        leaf = sample.pieces[sequence]
        if leaf.parent < 0:
            pieces.append(leaf)
        else:
            root = sample.pieces[leaf.parent]
            tokens, weights = [*root.tokens, *leaf.tokens], [0.0] * len(root.tokens) + [*leaf.weights]
            pieces.append(replace(leaf, tokens=tokens, weights=weights, parent=-1))
        sequences.append(len(pieces) - 1)
    return replace(sample, pieces=tuple(pieces), sequences=tuple(sequences))
