"""The last decoder layer computes only the rows that are read, without a line of any family's code.

After the last attention no row looks at another: of T packed rows only the K scored ones are needed. A pre-hook on
the layer runs its forward twice. The first pass goes over all rows until attention is reached, where keys and values
are taken and the pass is broken off; the second is the layer's own call, given only the kept rows (every argument of
shape (1, T, ...) picked along its rows), whose queries attend to the keys and values of the first.

Cost: norm and q, k, v products of the kept rows once more; gain: the rest of the layer over T - K rows, forward and
backward. What to keep, and the keys and values taken, travel in the mask: a layer that is recomputed in the backward
pass (without reentrance) finds them there. A layer that attends twice, or not at all, raises; the probe shows for
each family that numbers stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from luthier.models.attention import ForestMask, ForestUnsupported, Kept
from luthier.models.recompute import keeping
from luthier.models.shapes import decoder_layers
from luthier.models.sites import innermost

EVERY_ROW = "luthier_every_row"  # attribute of a model: true while something in it counts all rows (a router's load)
WORTH = 0.8  # of the rows kept; above it the second pass costs what it saves


class Restricted:
    """Within its life the model's last layer computes the kept rows only, whenever its mask says which."""

    def __init__(self, model: nn.Module) -> None:
        _, layers = decoder_layers(model)
        if not layers:
            raise ForestUnsupported("the model has no list of layers")
        layer: Any = innermost(model.get_submodule(layers[-1]))  # what stands around it sees the kept rows only
        self._hooks = [
            layer.register_forward_pre_hook(_keep_rows, with_kwargs=True),
            layer.register_forward_hook(_attended_once, with_kwargs=True),
        ]

    def undo(self) -> None:
        for hook in self._hooks:
            hook.remove()


class _KeysValues(Exception):
    """Carries the keys and values of all rows out of a pass that goes no further."""


@dataclass(frozen=True, eq=False)
class _Taking(ForestMask):
    """The mask of the first pass."""

    def admit(self, query: Tensor, key: Tensor, value: Tensor) -> NoReturn:
        super().admit(query, key, value)
        raise _KeysValues(key, value)


@dataclass(frozen=True, eq=False)
class _Giving(ForestMask):
    """The mask of the second pass: the kept rows ask, keys and values are those of the first."""

    asking: Kept = field(kw_only=True)
    key: Tensor = field(kw_only=True)
    value: Tensor = field(kw_only=True)
    calls: list[int] = field(default_factory=list)

    @property
    def query_lengths(self) -> list[int]:
        return self.asking.lengths

    def query_rows(self, segment: int, device: torch.device) -> Tensor:
        return self.asking.local[segment].to(device)

    def admit(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append(1)
        return super().admit(query, self.key, self.value)


def _keep_rows(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    mask = _mask_in(args, kwargs)
    if mask is None or mask.kept is None:
        return None
    table: dict[str, Any] = {name: getattr(mask, name) for name in ("forest", "window", "chunk", "kernel", "prefix")}
    try:
        with keeping(layer):  # a pass that is broken off cannot be run again
            layer.forward(*_given(args, mask, _Taking(**table)), **_given(kwargs, mask, _Taking(**table)))
    except _KeysValues as taken:
        key, value = taken.args
    else:
        raise ForestUnsupported("the last layer does not attend")
    giving = _Giving(**table, asking=mask.kept, key=key, value=value)
    return _given(args, mask, giving), _given(kwargs, mask, giving)


def _attended_once(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    mask = _mask_in(args, kwargs)
    if isinstance(mask, _Giving) and len(mask.calls) != 1:
        raise ForestUnsupported(f"the last layer attends {len(mask.calls)} times")


def _mask_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForestMask | None:
    masks = [x for x in (*args, *kwargs.values()) if isinstance(x, ForestMask)]
    if len({id(mask) for mask in masks}) > 1:
        raise ForestUnsupported("the last layer receives more than one mask")
    return masks[0] if masks else None


def _given(value: Any, mask: ForestMask, instead: ForestMask) -> Any:
    """An argument of the layer with the mask exchanged and, in the second pass, with the kept rows only."""
    if value is mask:
        return instead
    if isinstance(value, tuple):
        return tuple(_given(part, mask, instead) for part in value)
    if isinstance(value, dict):
        return {name: _given(part, mask, instead) for name, part in value.items()}
    if isinstance(value, Tensor) and isinstance(instead, _Giving) and value.shape[:2] == (1, mask.forest.tokens):
        return value.index_select(1, instead.asking.rows_K)
    return value
