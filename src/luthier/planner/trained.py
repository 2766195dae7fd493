"""What a method leaves behind in a model on the meta device: what trains, and what its sites keep for the backward.

    trained    elements by tensor, so that an optimizer that treats small tensors or embeddings apart is counted right
    saves      which inputs of a layer's linears somebody keeps: an adapted or trained linear keeps its input, a frozen
               one does not
    ranks      numbers that the adapters of one layer keep for each token besides (x A^T)
    outputs    numbers of unscaled outputs kept for each token (DoRA's magnitudes)

Methods that are neither whole weights nor low-rank pairs keep something else in the layer; they are planned as LoRA
is, without ranks, and the plan says that this was not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from luthier.contracts.method import Method, trains
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
class Trained:
    """Everything the plan adds up that is a method's."""

    tensors: tuple[Tensor, ...]
    frozen: int  # elements of the base that stay
    base_trained: int  # elements of the base that train
    saves: frozenset[str]
    ranks: int
    outputs: int
    norms_train: bool
    head_trains: bool
    embedding_trains: bool
    first: int  # the lowest layer in which something trains: those below keep nothing
    measured: bool  # a method whose activations the predictions were measured on

    @property
    def elements(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def largest(self) -> int:
        return max((tensor.elements for tensor in self.tensors), default=0)


def attach(method: Method, model: nn.Module) -> Trained:
    """The method goes into the model; what it trains is read off there."""
    shapes, base = shapes_of(model), {id(p): p.numel() for p in model.parameters()}
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
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
    ranks, outputs = _pairs(model, shapes)
    return Trained(
        tensors=tuple(tensors), frozen=sum(p.numel() for p in model.parameters() if id(p) not in ids),
        base_trained=of_base,
        saves=_saves(model, shapes), ranks=ranks, outputs=outputs,
        norms_train=any(p.ndim == 1 and id(p) in base for p in trained),
        head_trains=head is not None and any(trains(p) for p in head.parameters()),
        embedding_trains=embedding is not None and any(trains(p) for p in embedding.parameters()),
        first=_first(model, shapes),
        measured=bool(ranks) or (of_base == sum(base.values()) and not _scheduled(trained)),
    )  # fmt: skip


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


def _scheduled(trained: Sequence[Any]) -> bool:
    """Whether something of it rests at times (LISA)."""
    return any(not parameter.requires_grad for parameter in trained)


def _states(parameter: Any, projection: Any) -> tuple[int, int]:
    """(both averages and the subspace, the subspace)."""
    if not projection:
        return 2 * parameter.numel(), 0
    sizes = {name: rows * columns for name, (rows, columns) in Projection(**projection).slots(parameter.shape).items()}
    return sum(sizes.values()), sizes.get("left", 0) + sizes.get("right", 0)


def _pairs(model: nn.Module, shapes: Shapes) -> tuple[int, int]:
    """(ranks, outputs) of the layer that has most of them."""
    by_layer: dict[str, list[int]] = {layer: [0, 0] for layer in shapes.layers}
    for path, site in named_sites(model):
        layer = next((layer for layer in shapes.layers if path.startswith(f"{layer}.")), None)
        pair = getattr(site.delta, "lora_A", None) if isinstance(site, AdaptedLinear) else None
        if layer is None or pair is None:
            continue
        by_layer[layer][0] += int(pair.shape[0])
        if getattr(site.delta, "lora_magnitude_vector", None) is not None:
            by_layer[layer][1] += int(site.delta.lora_B.shape[0])
    ranks, outputs = zip(*(by_layer.values() or [(0, 0)]), strict=True)
    return max(ranks), max(outputs)


def _saves(model: nn.Module, shapes: Shapes) -> frozenset[str]:
    """Places whose input is kept, by the linears of the last layer that train or carry something."""
    found, layer = set(), f"{shapes.layers[-1]}." if shapes.layers else ""
    carrying = {path for path, site in named_sites(model) if isinstance(site, AdaptedLinear)}
    for linear in shapes.linears:
        if not linear.path.startswith(layer):
            continue
        name = linear.path.rpartition(".")[2]
        site = linear.path in carrying
        module = model.get_submodule(linear.path) if not site else None
        if site or any(trains(p) for p in module.parameters(recurse=False)):  # type: ignore[union-attr]
            inside = "mlp" in linear.path and name in ("c_proj", "dense")
            found |= {"mlp_out"} if inside else {place for place, names in _PLACES.items() if name in names}
            if name == "c_proj" and not inside:
                found.add("attention_out")
    unnamed = not found and (bool(sites(model)) or any(trains(p) for p in model.parameters()))
    return frozenset(_PLACES) if unnamed and carrying else frozenset(found)
