"""What a model is made of, read from its modules: linears, head, embedding, decoder layers, and what is left.

Paths are those of the model as it stands; ask before a method attaches its sites. Experts that are kept as one
3-D parameter have no linear module: their share is reported, so that "all linears" never silently means "not the
experts". Embedding and head count as covered by neither: they are named apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.models.score_head import score_head
from luthier.models.weights import numbers_of


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear of the body. `transposed`: GPT-2's Conv1D keeps its weight as (in, out)."""

    path: str
    in_features: int
    out_features: int
    transposed: bool


@dataclass(frozen=True, slots=True)
class Shapes:
    """The parts of one model."""

    linears: tuple[Linear, ...]  # without the head
    head: str | None
    embedding: str | None
    tied: bool
    layers: tuple[str, ...]  # paths of the decoder layers, in order
    layers_pattern: str | None  # `model.layers`
    parameters: int
    uncovered: tuple[tuple[str, int], ...]  # matrices and stacks in no linear, embedding or head: (name, elements)

    @property
    def uncovered_share(self) -> float:
        """Share of all parameters that a site on every linear would not reach."""
        return sum(count for _, count in self.uncovered) / max(1, self.parameters)

    def beyond_linears(self) -> tuple[float, list[str]]:
        """(share of the layers' matrices that are no linear's, what these are called): experts in one parameter."""
        inside = [(name, count) for name, count in self.uncovered if name.startswith(f"{self.layers_pattern}.")]
        beyond, linear = sum(count for _, count in inside), sum(x.in_features * x.out_features for x in self.linears)
        names = {re.sub(r"^\d+\.", "", name.removeprefix(f"{self.layers_pattern}.")) for name, _ in inside}
        return beyond / max(1, beyond + linear), sorted(names)


def shapes_of(model: nn.Module) -> Shapes:
    """Look at every module once."""
    paths = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), output_head(model)
    read = read_as_weights(model)
    linears = tuple(
        _linear(path, module)
        for path, module in model.named_modules()
        if _is_linear(module) and module is not head and path not in read
    )
    pattern, layers = decoder_layers(model)
    known = {f"{linear.path}.weight" for linear in linears}
    known |= {f"{paths[id(part)]}.weight" for part in (embedding, head) if id(part) in paths}
    named = list(model.named_parameters())
    uncovered = tuple((name, p.numel()) for name, p in named if p.ndim > 1 and name not in known)
    return Shapes(
        linears=linears,
        head=paths.get(id(head)),
        embedding=paths.get(id(embedding)),
        tied=head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", 0),
        layers=tuple(layers),
        layers_pattern=pattern,
        parameters=numbers_of(model),
        uncovered=uncovered,
    )


def output_head(model: nn.Module) -> nn.Module | None:
    """The language head, or a reward model's score head."""
    asked = getattr(model, "get_output_embeddings", lambda: None)()
    return score_head(model) if asked is None else asked


def table_parameters(model: nn.Module) -> frozenset[int]:
    """Ids of embeddings' and of the head's own parameters, in whose rows single tokens move; adapters on them apart."""
    head = output_head(model)
    heads = [] if head is None else [module for module in head.modules() if isinstance(module, nn.Linear)]
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return frozenset(id(p) for module in [*tables, *heads] for p in module.parameters(recurse=False))


def decoder_layers(model: nn.Module) -> tuple[str | None, list[str]]:
    """(path of the list, paths of its layers): the list as long as the text model is deep, else the longest."""
    config = model.config.get_text_config() if hasattr(model, "config") else None
    depth = getattr(config, "num_hidden_layers", None)
    best: tuple[str | None, list[str]] = (None, [])
    for path, module in model.named_modules():
        inside_layer = re.search(r"\.\d+\.", path) is not None
        if isinstance(module, nn.ModuleList) and not inside_layer:
            found = path, [f"{path}.{index}" for index in range(len(module))]
            if len(module) == depth:
                return found
            best = max(best, found, key=lambda pair: len(pair[1]))
    return best


def read_as_weights(model: nn.Module) -> set[str]:
    """Linears whose weight the model reads and never calls: a site there would do nothing (Mamba's step sizes)."""
    return {
        f"{path}.dt_proj"
        for path, module in model.named_modules()
        if "A_log" in module._parameters and isinstance(module._modules.get("dt_proj"), nn.Linear)
    }


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _linear(path: str, module: nn.Module) -> Linear:
    if isinstance(module, Conv1D):
        return Linear(path, module.nx, module.nf, True)
    assert isinstance(module, nn.Linear)
    return Linear(path, module.in_features, module.out_features, False)


def max_positions(config: Any) -> int | None:
    """The longest row that a model was built for, by its configuration; None where it does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return most if isinstance(most, int) else None
