"""What a method trained, under the names of PEFT's files, and back. Inverses: `collect` and `restore`.

    base_model.model.<path>.<suffix>            a delta's tensors; the delta gives its suffixes (`peft_tensors`)
    base_model.model.<path>.<name>              a module's full copy (modules_to_save)
    base_model.model.<path>[.base_layer].bias   a base bias that trained in place

A delta is any module with `peft_tensors() -> {suffix: parameter or buffer}`; a new adapter method writes only that.
`restore` takes all or nothing: a name or a shape that differs is a ModelError with the counts and first names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from luthier.contracts.errors import ModelError
from luthier.models.sites import SavedModule, named_sites, original_name, trained_in_place

PREFIX = "base_model.model."
_SHOWN = 3  # names of each kind in an error


@runtime_checkable
class Delta(Protocol):
    """What a site's `delta` offers to be saved; the tensors themselves, not copies."""

    def peft_tensors(self) -> dict[str, Tensor]: ...


def live(model: nn.Module) -> dict[str, Tensor]:
    """File name -> the very tensor in the model (parameters and buffers, still in the graph)."""
    found: dict[str, Tensor] = {}
    for path, site in named_sites(model):
        if isinstance(site, SavedModule):
            found.update({f"{PREFIX}{path}.{name}": t for name, t in site.copy.state_dict(keep_vars=True).items()})
        elif isinstance(delta := getattr(site, "delta", None), Delta):
            found.update({f"{PREFIX}{path}.{suffix}": tensor for suffix, tensor in delta.peft_tensors().items()})
    present = dict(model.named_modules())
    places = {id(module): path for path, module in present.items()}
    for _, module, attribute in trained_in_place(model):
        found[f"{PREFIX}{places[id(module)]}.{attribute}"] = getattr(module, attribute)
    return found


def collect(model: nn.Module) -> dict[str, Tensor]:
    """Detached, contiguous, on the CPU: what goes into the file."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in live(model).items()}


def restore(model: nn.Module, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor] | None = None) -> None:
    """Copy tensors of a file into the model's own (by default `live(model)`), all of them or none."""
    wanted = live(model) if wanted is None else wanted
    check_names(wanted, tensors)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])


def check_names(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """ModelError unless both have the same names and shapes; says counts and the first names that differ."""
    missing = [name for name in wanted if name not in given]
    extra = [name for name in given if name not in wanted]
    if missing or extra:
        parts = [f"{len(wanted) - len(missing)} of {len(wanted)} tensors match"]
        parts += [f"{len(missing)} missing: {_first(missing)}"] if missing else []
        parts += [f"{len(extra)} not of this method: {_first(extra)}"] if extra else []
        raise ModelError(
            f"the adapter's tensors are not the ones this method has on this model ({'; '.join(parts)})",
            remedy="was it made for another base model or with other targets?",
        )
    wrong = [
        f"{name} {tuple(given[name].shape)} where the model has {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if given[name].shape != tensor.shape
    ]
    if wrong:
        raise ModelError(f"{len(wrong)} of {len(wanted)} tensors have another shape", value=_first(wrong))


def module_of(name: str) -> str:
    """Original module path that a name of a PEFT file belongs to."""
    path = original_name(name.removeprefix(PREFIX))
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.startswith("lora_") or part == "token_adapter":
            return ".".join(parts[:index])
    return ".".join(parts[:-1])


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
