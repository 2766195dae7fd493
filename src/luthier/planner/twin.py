"""Two short twins of a model, for what counting alone does not tell; the rest of the layers is by what the third adds.

    what trains   adapters after blocks, prefixes and the like look for their places by one forward pass, which the
                  meta device cannot give
    what is kept  of methods that no formula was measured for: their step is rehearsed (planner/rehearsal.py) at two
                  numbers of tokens, and what it holds beyond the formula is a line through both

Twins of two and of three layers have the model's widths and zeros that no page was written for, so they cost little.
Exact where layers are alike; an estimate where the first layers differ from the others.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from luthier.contracts.batch import Batch
from luthier.contracts.errors import RecipeError
from luthier.contracts.method import Method
from luthier.planner import activations, head
from luthier.planner.activations import Again, Numbers
from luthier.planner.load import Load, load_of
from luthier.planner.rehearsal import Hollow, batch_of, rehearse, unwritten
from luthier.planner.shape import blank_model, read_shape
from luthier.planner.trained import Extra, Line, Tensor, Trained, attach

_FEW = 2
_LOAD = Load(tokens=512, scored=307, pairs=512 * 256 / 2, masks=0)  # where nothing is said


def trained_by(method: Method, config: Any, reads: str = "logprobs", load: Load = _LOAD) -> Trained:
    """On the meta device, or by twins where the method refuses a model that cannot run; and what its layers keep."""
    found = counted(method, config, reads)
    if found.measured or found.base_trained or reads != "logprobs":
        return found
    return replace(found, extra=_beyond(method, config, load))


def counted(method: Method, config: Any, reads: str = "logprobs") -> Trained:
    """What trains, without a rehearsal."""
    try:
        return attach(method, blank_model(copy.deepcopy(config), reads))
    except (RecipeError, NotImplementedError, RuntimeError):
        layers = _text(config).num_hidden_layers
        if layers <= _FEW:
            return _attached(method, _twin(config, layers, reads))
    small, large = (_attached(method, _twin(config, count, reads)) for count in (_FEW, _FEW + 1))
    return _grown(small, large, layers - _FEW)


def _attached(method: Method, model: nn.Module) -> Trained:
    """Its places are found by passes without arithmetic."""
    with Hollow():
        return attach(method, model)


def _beyond(method: Method, config: Any, load: Load) -> Extra | None:
    """What rehearsals of the load and of half of it hold beyond the formula; None where the family runs otherwise."""
    rows = max(1, round(load.tokens**2 / (2 * load.pairs))) if load.pairs else 1
    batches = [batch_of(load.tokens, load.scored, rows, part, _text(config).vocab_size) for part in (2, 1)]
    try:
        seen = [_rehearsed(method, config, batch) for batch in batches]
    except Exception:  # noqa: BLE001 a foreign family may fail in any way: the plan then says that it does not know
        return None
    small, large = (batch.tokens for batch in batches)
    return Extra(*(_line(small, large, *pair) for pair in zip(*seen, strict=True)))


def _rehearsed(method: Method, config: Any, batch: Batch) -> tuple[float, float, float]:
    """Bytes beyond the formula: an ordinary layer's, the rest's, those of the largest moment."""
    shape = read_shape(_twin(config, _FEW, "logprobs"))
    rehearsed = [rehearse(_twin(config, n, "logprobs"), partial(attach, method), batch) for n in (_FEW, _FEW + 1)]
    seen, trained = [one for one, _ in rehearsed], rehearsed[0][1]
    load, numbers = replace(load_of(batch), whole=trained.every_row), Numbers(4, 4)
    kept = activations.kept(shape.form, trained, load, numbers)
    logits = head.head_bytes(shape.form, load, head.mode_of(trained, reads="logprobs", linear=True), numbers, "cpu")
    layer = seen[1].forward - seen[0].forward
    last = seen[0].forward - (activations.held_by_forward(kept, Again(_FEW)) - kept.layer + layer) - logits
    formula = max(activations.held_in_last(kept, Again(_FEW)), activations.held_in_backward(kept, Again(_FEW)))
    flight = seen[0].backward - formula - (layer - kept.layer) - last
    return layer - kept.layer, last, flight if seen[0].backward > seen[0].begun else min(0, flight)


def _line(small: int, large: int, of_small: float, of_large: float) -> Line:
    each = (of_large - of_small) / max(1, large - small)
    return Line(of_small - each * small, each)


def _twin(config: Any, layers: int, reads: str) -> nn.Module:
    short = copy.deepcopy(config)
    text = _text(short)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    model = blank_model(short, reads)._apply(unwritten).eval()
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model


def _grown(small: Trained, large: Trained, times: int) -> Trained:
    """`small` and `times` what `large` has more: new tensors, and rows of those that grow with the layers."""
    more, gone = Counter(large.tensors) - Counter(small.tensors), Counter(small.tensors) - Counter(large.tensors)
    tensors = list((Counter(small.tensors) - gone).elements())
    for old in gone.elements():
        new = next(one for one in more if more[one] and _differ(old.shape, one.shape) == 1)
        more[new] -= 1
        tensors.append(_longer(old, new, times))
    tensors += [tensor for tensor, count in more.items() for _ in range(count * times)]
    return replace(
        small, tensors=tuple(tensors), frozen=_further(small.frozen, large.frozen, times),
        base_trained=_further(small.base_trained, large.base_trained, times),
        active=_further(small.active, large.active, times), buffers=_further(small.buffers, large.buffers, times),
    )  # fmt: skip


def _further(small: int, large: int, times: int) -> int:
    return small + times * (large - small)


def _differ(old: tuple[int, ...], new: tuple[int, ...]) -> int:
    """In how many dimensions."""
    return sum(a != b for a, b in zip(old, new, strict=True)) if len(old) == len(new) else len(old) + len(new)


def _longer(old: Tensor, new: Tensor, times: int) -> Tensor:
    shape = tuple(a + times * (b - a) for a, b in zip(old.shape, new.shape, strict=True))
    elements, states = (a + times * (b - a) for a, b in ((old.elements, new.elements), (old.states, new.states)))
    return replace(old, elements=elements, states=states, shape=shape)


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config
