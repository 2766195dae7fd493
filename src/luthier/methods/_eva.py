"""EVA's look at the training rows: every pair's A from what its layer is given, ranks where they explain most.

Layers that read one tensor (models/shared_input.py) are looked at once. Passes go on until every direction that got a
rank is settled, or the rows of an epoch are over. A layer's scale stays what it was, whatever rank it gets; one that
gets none loses its adapter. All tokens count, those of prompts too (PEFT's `use_label_mask: false`). An embedding, and
an expert that no token reached, keep the plain start and their rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from luthier.models import row_pca
from luthier.models.low_rank import LowRank
from luthier.models.shared_input import share_inputs
from luthier.models.sites import AdaptedLinear, locate, named_sites, replace


@dataclass
class _Input:
    """One tensor that one or several sites read."""

    sites: list[AdaptedLinear]
    each: list[int]  # the most directions that a site may get
    pca: row_pca.RowPca | None = None
    settled: Tensor | None = None
    waiting: list[Tensor] = field(default_factory=list)  # rows of batches smaller than `most`

    @property
    def most(self) -> int:
        return max(self.each)

    def explained(self, site: int) -> Tensor:
        assert self.pca is not None
        return self.pca.explained_N[: self.each[site]]

    def take(self, x: Tensor) -> None:
        self.waiting.append(x.detach().reshape(-1, x.shape[-1]))
        if sum(map(len, self.waiting)) < self.most:
            return
        rows_TD, self.waiting = torch.cat(self.waiting), []
        before, self.pca = self.pca, row_pca.take(self.pca, rows_TD, self.most)
        self.settled = row_pca.settled(before, self.pca)

    def done(self, rank: int) -> bool:
        return self.settled is not None and bool(self.settled[:rank].all())


def look(model: nn.Module, passes: Iterable[Callable[[], None]], rho: float) -> None:
    """Carry out the start on freshly attached sites."""
    inputs = _inputs(model, rho)
    training = model.training
    model.eval()
    try:
        ranks = _watch(inputs, passes)
    finally:
        model.train(training)
    paths = {id(site): path for path, site in named_sites(model)}
    for one, own in zip(inputs, ranks, strict=True):
        for site, rank in zip(one.sites, own, strict=True):
            if one.pca is None:
                continue
            if rank == 0:
                replace(model, locate(model, paths[id(site)]), site.base_layer)
                continue
            delta: LowRank = site.delta  # type: ignore[assignment]
            a_RD = one.pca.directions_ND[:rank]
            delta.begin(a_RD, a_RD.new_zeros(len(delta.lora_B), rank))
    share_inputs(model)


def _inputs(model: nn.Module, rho: float) -> list[_Input]:
    grouped: dict[int, list[AdaptedLinear]] = {}
    for _, site in named_sites(model):
        if isinstance(site, AdaptedLinear):
            grouped.setdefault(id(site.shared), []).append(site)
    return [_Input(sites, [_most(site, rho) for site in sites]) for sites in grouped.values()]


def _most(site: AdaptedLinear, rho: float) -> int:
    """Directions that a site may get: rho times its rank, and no more than its matrix has."""
    return min(round(_rank(site) * rho), site.in_features, site.out_features)


def _rank(site: AdaptedLinear) -> int:
    return int(site.delta.rank)  # type: ignore[arg-type]


def _watch(inputs: list[_Input], passes: Iterable[Callable[[], None]]) -> list[list[int]]:
    """Ranks of all sites, after as many passes as it takes; an input that is settled rests until it gets more."""
    ranks = [list(one.each) for one in inputs]
    for run in passes:
        awake = [one for one, own in zip(inputs, ranks, strict=True) if not one.done(max(own))]
        if not awake:
            break
        hooks = [one.sites[0].register_forward_pre_hook(lambda _, args, one=one: one.take(args[0])) for one in awake]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        ranks = _shared_out(inputs, ranks)
    return ranks


def _shared_out(inputs: list[_Input], ranks: list[list[int]]) -> list[list[int]]:
    """The ranks of all sites whose inputs were seen, dealt out anew."""
    seen = [(index, n) for index, one in enumerate(inputs) if one.pca is not None for n in range(len(one.sites))]
    explained = [inputs[index].explained(n) for index, n in seen]
    budget = sum(_rank(inputs[index].sites[n]) for index, n in seen)
    dealt = [list(own) for own in ranks]
    for (index, n), rank in zip(seen, row_pca.share(explained, budget) if seen else [], strict=True):
        dealt[index][n] = rank
    return dealt
