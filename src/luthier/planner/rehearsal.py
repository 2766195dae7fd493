"""A step rehearsed: forward and backward run with the true shapes and no arithmetic, to see what they hold.

Some methods keep other things in a layer than adapters do (prefixes, bottlenecks, gates, edits of rows); a formula for
each would be a second copy of their code. Here their own code runs, on twins of few layers (planner/twin.py), under a
dispatch mode that makes each operation's outputs and computes nothing: shapes come from torch's meta device, and memory
is asked for and never written, so that no page of it exists and every number is zero. Vectors, operations on whole
numbers and views do run: losses, places and masks are what they would be. Every storage is counted from its making to
its end, as bench/allocated.py does, which also runs in a rival's environment and so shares no line with this one.

    layer = F(3 layers) - F(2)     rest = F(2) - layer     in flight = B - F         F, B the largest of each pass

Left out: GPUs, whose kernels keep less; families that do not pass the engine's checks of packed rows, which compute
every row of the last layer: what they keep is more than this.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from luthier.contracts.batch import Batch, Forest
from luthier.models.trunk import Trunk, TrunkFacts

_FACTORIES = tuple(
    f"aten::{name}" for name in ("zeros", "ones", "full", "rand", "randn", "empty", "scalar_tensor", "linspace")
)
_FREE = frozenset(  # besides views: what reads one number or changes a shape only
    f"aten::{name}" for name in (
        "_local_scalar_dense", "equal", "is_nonzero", "detach", "alias", "t_", "transpose_", "squeeze_", "unsqueeze_",
        "as_strided_", "set_", "resize_", "detach_",
    )
)  # fmt: skip
_FEW = 1 << 17  # elements of a vector that is computed
_SHORTEST = 16  # tokens of a rehearsed row
_PAGES = 1 << 16  # bytes from which a tensor gets memory of its own


Told = TypeVar("Told")


@dataclass(frozen=True, slots=True)
class Seen:
    """Bytes over what was there before the step: the largest of each pass, and what the backward begins with."""

    forward: int
    begun: int
    backward: int


class Hollow(TorchDispatchMode):
    """Within it operations on floating point tensors make their outputs and compute nothing; `now` and `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        before = {_key(t) for t in given}
        found = _run(func, args, kwargs, given)
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and _key(tensor) not in before:
                self._take(tensor.untyped_storage())
        return found

    def _take(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = size
        weakref.finalize(storage, self._give, key)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _give(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


def _run(func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
    """The operation itself where it costs nothing or decides a shape; else its outputs, unwritten."""
    if not given:
        made = kwargs.get("dtype") or torch.get_default_dtype()
        if not made.is_floating_point or not func._schema.name.startswith(_FACTORIES):
            return func(*args, **kwargs)
    elif func.is_view or func._schema.name in _FREE or _small(given) or not any(t.is_floating_point() for t in given):
        return func(*args, **kwargs)
    written = [value for argument, value in _bound(func, args, kwargs) if argument.alias_info is not None
               and argument.alias_info.is_write]  # fmt: skip
    if written:
        returned = [one for one in tree_leaves(written) if isinstance(one, Tensor)]
        count = len(func._schema.returns)
        return None if not count else returned[0] if count == 1 else tuple(returned[:count])
    shapes = func(*_meta(args), **_meta(kwargs))
    return tree_map_only(Tensor, unwritten, shapes)


def unwritten(like: Tensor) -> Tensor:
    """Zeros of the same shape and strides; where they are many, in memory of which no page exists until written to."""
    count = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    if like.numel() == 0 or count * like.element_size() < _PAGES:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).zero_()
    room = mmap.mmap(-1, count * like.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(room, dtype=like.dtype, count=count).as_strided(like.shape, like.stride())


def _small(given: list[Tensor]) -> bool:
    """Vectors are computed: a loss, its factors, what a norm of rows is divided by."""
    return all(tensor.ndim <= 1 and tensor.numel() <= _FEW for tensor in given)


def _bound(func: Any, args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    schema = func._schema.arguments
    return [(argument, args[index] if index < len(args) else kwargs.get(argument.name))
            for index, argument in enumerate(schema)]  # fmt: skip


def _meta(values: Any) -> Any:
    def blank(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    moved = tree_map_only(Tensor, blank, values)
    return tree_map_only(torch.device, lambda _: torch.device("meta"), moved)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def rehearse(model: nn.Module, attach: Callable[[nn.Module], Told], batch: Batch) -> tuple[Seen, Told]:
    """One forward and backward pass, and what `attach` told; `model` is used up."""
    trunk = Trunk(model, TrunkFacts(last_layer="scored rows"))
    try:
        with Hollow() as seen:
            told = attach(model)
            trunk.keep_all()  # as the formula has it
            model.train()
            before, seen.peak = seen.now, seen.now
            total = (trunk.logprobs(batch, batch.weights_N) * batch.weights_N).sum()
            forward, begun = seen.peak, seen.now
            seen.peak = begun
            total.backward()  # type: ignore[no-untyped-call]
            return Seen(forward - before, begun - before, seen.peak - before), told
    finally:
        trunk.close()


def batch_of(tokens: int, scored: int, rows: int, part: int, vocabulary: int) -> Batch:
    """Rows of one length, together so many tokens, the last of each scored; `part` 2: of half the length."""
    length = max(_SHORTEST, tokens // rows // part)
    each = min(max(1, scored // rows // part), length - 1)
    starts = [row * length for row in range(rows)]
    forest = Forest(tuple(starts), tuple(start + length for start in starts), (-1,) * rows)
    scored_N = torch.cat([torch.arange(start + length - 1 - each, start + length - 1) for start in starts])
    tokens_T = torch.arange(rows * length) % vocabulary
    return Batch(
        tokens_T=tokens_T, positions_T=forest.positions_T(), forest=forest, scored_N=scored_N,
        targets_N=tokens_T[scored_N + 1], weights_N=torch.ones(len(scored_N)),
        sequence_N=scored_N // length, group_Q=torch.zeros(rows, dtype=torch.int64),
        samples=tuple(range(rows)), sources=(), segment_sample=tuple(range(rows)),
    )  # fmt: skip
