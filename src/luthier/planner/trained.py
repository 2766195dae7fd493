"""What a method leaves behind in a model on the meta device: what trains, and what its sites keep for the backward.

    tensors    elements by tensor, so that an optimizer that treats small tensors or embeddings apart is counted right
    active     elements with a gradient at a time: fewer where layers take turns
    layers     of each layer what is kept for each token: which inputs of its linears (one that is adapted or trains
               keeps its input, a frozen one does not), x A^T of its adapters, outputs before they are scaled (DoRA)
    buffers    bytes of what the method keeps besides: factors that do not train, averages, masks
    extra      what a rehearsal saw a layer keep beyond that (planner/rehearsal.py)

`measured`: whole weights and low-rank pairs, whose formula was measured. Other methods keep something else in a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from luthier.contracts.method import Method, trains
from luthier.models.last_layer import EVERY_ROW
from luthier.models.projection import Projection
from luthier.models.shapes import Shapes, output_head, shapes_of, table_parameters
from luthier.models.sites import AdaptedLinear, named_sites, sites

_PLACES = {
    "attention_in": ("q_proj", "k_proj", "v_proj", "c_attn", "qkv_proj", "query_key_value"),
    "attention_out": ("o_proj", "out_proj", "dense"),
    "mlp_in": ("gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in"),
    "mlp_out": ("down_proj", "fc2", "fc_out"),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that trains. `states`: elements that an optimizer with two averages keeps of it, `subspace` of them in
    the basis that its gradient is projected to."""

    elements: int
    embedding: bool
    states: int
    shape: tuple[int, ...]
    subspace: int = 0


@dataclass(frozen=True, slots=True)
class Keeps:
    """Of one layer, for each token."""

    saves: frozenset[str] = frozenset()
    ranks: int = 0
    outputs: int = 0


@dataclass(frozen=True, slots=True)
class Line:
    """Bytes of float32: `fixed`, and `each` for every token."""

    fixed: float = 0.0
    each: float = 0.0

    def at(self, tokens: int, compute: int) -> int:
        return round((self.fixed + self.each * tokens) * compute / 4)


@dataclass(frozen=True, slots=True)
class Extra:
    """Beyond the formula: of an ordinary layer, of the last with what comes after it, of a layer's backward."""

    layer: Line = Line()
    last: Line = Line()
    flight: Line = Line()


@dataclass(frozen=True, slots=True)
class Trained:
    """Everything the plan adds up that is a method's."""

    tensors: tuple[Tensor, ...]
    frozen: int  # elements of the base that stay
    base_trained: int  # elements of the base that train
    active: int
    buffers: int
    layers: tuple[Keeps, ...]
    norms_train: bool
    head_trains: bool
    embedding_trains: bool
    every_row: bool  # the last layer computes all of them, whatever is scored
    first: int  # the lowest layer in which something trains: those below keep nothing
    measured: bool  # a method whose activations the predictions were measured on
    extra: Extra | None = None

    @property
    def elements(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def largest(self) -> int:
        return max((tensor.elements for tensor in self.tensors), default=0)

    @property
    def saves(self) -> frozenset[str]:
        return frozenset().union(*(layer.saves for layer in self.layers))

    @property
    def ranks(self) -> int:
        return max((layer.ranks for layer in self.layers), default=0)

    @property
    def outputs(self) -> int:
        return max((layer.outputs for layer in self.layers), default=0)


def attach(method: Method, model: nn.Module) -> Trained:
    """The method goes into the model; what it trains is read off there."""
    shapes, base = shapes_of(model), {id(p): p.numel() for p in model.parameters()}
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    before = {id(buffer) for buffer in model.buffers()}
    method.attach(model)
    trained = [p for p in model.parameters() if trains(p)]
    ids = {id(p) for p in trained}
    head = output_head(model)
    tables = table_parameters(model)
    projections = {
        id(p): group["projection"] for group in method.groups(model) if group.get("projection")
        for p in group["params"]
    }  # fmt: skip
    tensors = []
    for p in trained:
        states, subspace = _states(p, projections.get(id(p)))
        tensors.append(Tensor(p.numel(), id(p) in tables, states, tuple(p.shape), subspace))
    of_base = sum(count for key, count in base.items() if key in ids)
    return Trained(
        tensors=tuple(tensors), frozen=sum(p.numel() for p in model.parameters() if id(p) not in ids),
        base_trained=of_base,
        active=sum(p.numel() for p in trained if p.requires_grad),
        buffers=sum(b.numel() * b.element_size() for b in model.buffers() if id(b) not in before),
        layers=_layers(model, shapes), norms_train=any(p.ndim == 1 and id(p) in base for p in trained),
        head_trains=head is not None and any(trains(p) for p in head.parameters()),
        embedding_trains=embedding is not None and any(trains(p) for p in embedding.parameters()),
        every_row=bool(getattr(model, EVERY_ROW, False)), first=_first(model, shapes),
        measured=_is_plain(model, of_base > 0),
    )  # fmt: skip


def _is_plain(model: nn.Module, trains_base: bool) -> bool:
    """Nothing but low-rank pairs beside linears, or nothing but whole matrices of the base."""
    found = sites(model)
    if not found or trains_base:
        return not found and trains_base
    return all(isinstance(site, AdaptedLinear) and _is_pair(site.delta) for site in found)


def _is_pair(delta: Any) -> bool:
    """A pair whose product is all that is added, or that product and scaled rows; nothing of its input is dropped."""
    if getattr(delta, "dropout", 0.0):
        return False
    scaled = getattr(delta, "lora_magnitude_vector", None) is not None
    return scaled or (hasattr(delta, "pair") and delta.pair() is not None)


def _first(model: nn.Module, shapes: Shapes) -> int:
    """0 where anything outside the layers trains but what follows them: the head and the last norm."""
    head, names = shapes.head or "", [name for name, p in model.named_parameters() if trains(p)]
    above = (f"{head}.", f"{(shapes.layers_pattern or '').rpartition('.')[0]}.norm.")
    number = {layer: index for index, layer in enumerate(shapes.layers)}
    found = []
    for name in names:
        layer = next((layer for layer in shapes.layers if name.startswith(f"{layer}.")), None)
        if layer is None and name.startswith(above) and not shapes.tied:
            continue
        found.append(0 if layer is None else number[layer])
    return min(found, default=0)


def _states(parameter: Any, projection: Any) -> tuple[int, int]:
    if not projection:
        return 2 * parameter.numel(), 0
    sizes = {name: rows * columns for name, (rows, columns) in Projection(**projection).slots(parameter.shape).items()}
    return sum(sizes.values()), sizes.get("left", 0) + sizes.get("right", 0)


def _layers(model: nn.Module, shapes: Shapes) -> tuple[Keeps, ...]:
    """Of every layer, in order."""
    carrying = {path: site for path, site in named_sites(model) if isinstance(site, AdaptedLinear)}
    found = []
    for name in shapes.layers:
        inside = f"{name}."
        deltas: list[Any] = [site.delta for path, site in carrying.items() if path.startswith(inside)]
        pairs = [delta for delta in deltas if getattr(delta, "lora_A", None) is not None]
        scaled = [delta for delta in pairs if getattr(delta, "lora_magnitude_vector", None) is not None]
        paths = [linear.path for linear in shapes.linears if linear.path.startswith(inside)]
        found.append(
            Keeps(
                _saves(model, paths, set(carrying)), sum(int(delta.lora_A.shape[0]) for delta in pairs),
                sum(int(delta.lora_B.shape[0]) for delta in scaled),
            )
        )  # fmt: skip
    return tuple(found)


def _saves(model: nn.Module, paths: Sequence[str], carrying: set[str]) -> frozenset[str]:
    """Places whose input is kept, by those linears of one layer that train at the moment or carry something."""
    found: set[str] = set()
    kept = [path for path in paths if path in carrying or _moves(model.get_submodule(path))]
    for path in kept:
        name = path.rpartition(".")[2]
        inside = "mlp" in path and name in ("c_proj", "dense")
        found |= {"mlp_out"} if inside else {place for place, names in _PLACES.items() if name in names}
        if name == "c_proj" and not inside:
            found.add("attention_out")
    return frozenset(_PLACES) if kept and not found else frozenset(found)


def _moves(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))
