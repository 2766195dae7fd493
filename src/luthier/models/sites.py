"""Sites: the only way into a model. A module is swapped in place for a `Site` that calls it and edits the result.

    AdaptedLinear     y = base(x), then delta(x, y, base)     nn.Linear, GPT-2 Conv1D, quantised linears
    AdaptedInput      y = base(delta(x))                      a linear whose input is edited
    AdaptedEmbedding  y = base(ids), then delta(ids, y, base)
    AdaptedModule     y = base(...), then delta(x, y): after an attention, a feed-forward block, a layer
    SavedModule       a trainable full copy beside the frozen original (PEFT's `modules_to_save`)

The base is only ever *called*, so method x weight format is never multiplied out. The wrapped module sits under
the child name `base_layer`; `original_name` strips it, so base weights keep their names whatever was attached.
Base parameters that a method trains in place (biases) go through `train_in_place`, which keeps the original
beside them: `switched_off` then gives exactly the base again, trained biases and module copies included.
Left out: methods that train the whole base (they need a frozen copy), and hooks (nothing is patched).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.contracts.errors import ModelError

BASE = "base_layer"
_ORIGINAL = "luthier_original_"  # buffer beside a base parameter that trains in place
_REPLACED = "luthier_replaced_"  # buffer beside a frozen base parameter that stands in another form (LoftQ's NF4)


class Site(nn.Module):
    """Anything that stands where a module of the base stood. `on=False`: exactly that module again."""

    on: bool = True

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        """What the site does not have itself is asked of the module it stands for (`weight`, `embed_scale`, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            stand_in = self.__dict__.get("_modules", {}).get(self._shown())
            if stand_in is None or name.startswith("__"):
                raise
            return getattr(stand_in, name)

    def _shown(self) -> str:
        """Name of the child that answers for attributes."""
        return BASE


class AdaptedLinear(Site):
    """y = delta(x, base(x), base). The delta owns what trains and may write into y: nobody else holds it.

    `shared` (models/shared_input.py) may make the same y faster, together with the sites that read the same x.
    """

    shared: Any = None

    def __init__(self, base: nn.Module, delta: nn.Module) -> None:
        super().__init__(base)
        self.delta = delta
        delta.train(base.training)

    @property
    def in_features(self) -> int:
        return features(self.base_layer)[0]

    @property
    def out_features(self) -> int:
        return features(self.base_layer)[1]

    def forward(self, x: Tensor) -> Tensor:
        if self.on and self.shared is not None and (made := self.shared.result(self, x)) is not None:
            finish = getattr(self.delta, "finish", None)  # what a delta does after the pair (DoRA's magnitudes)
            return made if finish is None else finish(made, self.base_layer)  # type: ignore[no-any-return]
        y: Tensor = self.base_layer(x)
        return self.delta(x, y, self.base_layer) if self.on else y


class AdaptedInput(Site):
    """y = base(delta(x)): what goes into a linear is edited, not what comes out."""

    def __init__(self, base: nn.Module, delta: nn.Module) -> None:
        super().__init__(base)
        self.delta = delta
        delta.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(self.delta(x) if self.on else x)
        return y


class AdaptedEmbedding(Site):
    """y = delta(ids, base(ids), base)."""

    def __init__(self, base: nn.Module, delta: nn.Module) -> None:
        super().__init__(base)
        self.delta = delta
        delta.train(base.training)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.base_layer(ids)
        return self.delta(ids, y, self.base_layer) if self.on else y


class AdaptedModule(Site):
    """Any module whose first argument is hidden rows (..., D): what it returns first becomes delta(x, y).

    `models/blocks.py` says where the attentions and feed-forward blocks of a model are.
    """

    def __init__(self, base: nn.Module, delta: nn.Module) -> None:
        super().__init__(base)
        self.delta = delta
        delta.train(base.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.base_layer(*args, **kwargs)
        if not self.on:
            return out
        x = args[0] if args else kwargs["hidden_states"]
        if isinstance(out, tuple):
            return self.delta(x, out[0]), *out[1:]
        return self.delta(x, out)


class SavedModule(Site):
    """A trainable full copy of any module; the original stays beside it, frozen."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.copy = copy.deepcopy(base)
        self.copy.requires_grad_(True)

    def _shown(self) -> str:
        return "copy" if self.on else BASE

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.copy if self.on else self.base_layer)(*args, **kwargs)


def innermost(module: nn.Module) -> nn.Module:
    """The base's own module under the sites that stand around it."""
    while isinstance(module, Site):
        module = module.base_layer  # type: ignore[assignment]
    return module


def features(linear: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear, also of GPT-2's Conv1D, which stores its weight the other way round."""
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    return linear.in_features, linear.out_features  # type: ignore[return-value]


def is_linear(module: nn.Module) -> bool:
    """True for what `AdaptedLinear` can stand for: any module with in_features and out_features, and Conv1D."""
    if isinstance(module, SavedModule):
        return False
    return isinstance(module, (nn.Linear, Conv1D)) or (
        hasattr(module, "in_features") and hasattr(module, "out_features") and not isinstance(module, nn.Embedding)
    )


def original_name(name: str) -> str:
    """The name in the untouched model of a module or parameter: `a.q_proj.base_layer.weight` -> `a.q_proj.weight`."""
    return ".".join(part for part in name.split(".") if part != BASE)


def named_sites(model: nn.Module) -> Iterator[tuple[str, Site]]:
    """(original path, site) in model order; a site around a site comes before the one inside it."""
    for name, module in model.named_modules():
        if isinstance(module, Site):
            yield original_name(name), module


def sites(model: nn.Module) -> list[Site]:
    """All sites of the model, outermost first."""
    return [site for _, site in named_sites(model)]


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where `path` (as the model stands now, sites included) points."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def locate(model: nn.Module, original: str) -> str:
    """Present path of the OUTERMOST module that stands at an original path."""
    for name, _ in model.named_modules():
        if original_name(name) == original:
            return name
    raise ModelError("the model has no such module", value=original)


def unwrap(model: nn.Module, kind: type[Site] = Site) -> None:
    """Take every site of this kind out again: what stood there before comes back (for a SavedModule, its copy)."""
    for name, site in reversed([(n, m) for n, m in model.named_modules() if isinstance(m, kind)]):
        replace(model, name, getattr(site, site._shown()))


def detach(model: nn.Module) -> None:
    """Undo an attach: every site out, every base parameter back to its original value."""
    _swap(model)
    settle_in_place(model)
    for name, site in reversed([(n, m) for n, m in model.named_modules() if isinstance(m, Site)]):
        replace(model, name, site.base_layer)


def freeze(model: nn.Module) -> None:
    """Nothing trains any more. Methods call it first, then switch on what is theirs."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def train_in_place(module: nn.Module, name: str) -> None:
    """Let a base parameter train where it is, its original kept beside it for `switched_off` and `base_state`."""
    parameter = getattr(module, name)
    module.register_buffer(_ORIGINAL + name, parameter.detach().clone(), persistent=False)
    parameter.requires_grad_(True)


def put_in_place(module: nn.Module, name: str, value: Tensor) -> None:
    """Another value for a frozen base parameter, its original kept beside it as with `train_in_place`."""
    parameter = getattr(module, name)
    module.register_buffer(_REPLACED + name, parameter.detach().clone(), persistent=False)
    parameter.data = value.to(parameter)


def trained_in_place(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(original path of the parameter, module, attribute) of every base parameter that trains in place."""
    return [(path, module, attribute) for path, module, attribute, kept in _in_place(model) if kept[0] == _ORIGINAL]


def _in_place(model: nn.Module) -> list[tuple[str, nn.Module, str, tuple[str, str]]]:
    """(original path, module, attribute, (prefix, buffer that keeps the original)) of what trains or stands there."""
    found = []
    for path, module in model.named_modules():
        for buffer in list(module._buffers):
            for prefix in (_ORIGINAL, _REPLACED):
                if buffer.startswith(prefix):
                    attribute = buffer.removeprefix(prefix)
                    own = original_name(f"{path}.{attribute}" if path else attribute)
                    found.append((own, module, attribute, (prefix, buffer)))
    return found


def settle_in_place(model: nn.Module) -> None:
    """What was trained or put in place becomes the base: the kept originals are dropped (part of a merge)."""
    for _, module, _, (_, buffer) in _in_place(model):
        delattr(module, buffer)


def _swap(model: nn.Module) -> None:
    for _, module, attribute, (_, buffer) in _in_place(model):
        parameter, kept = getattr(module, attribute), getattr(module, buffer)
        parameter.data, kept.data = kept.data, parameter.data


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Within it the model computes exactly what the base computed; nests; restores on any way out."""
    before = [(site, site.on) for site in sites(model)]
    fresh = not getattr(model, "luthier_off", False)
    if fresh:
        _swap(model)
        model.luthier_off = True  # type: ignore[assignment]
    try:
        for site, _ in before:
            site.on = False
        yield
    finally:
        for site, on in before:
            site.on = on
        if fresh:
            _swap(model)
            del model.luthier_off


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """State of the base under its original names, detached, nothing of any site; tied weights stay one object."""
    inside = [f"{name}." for name, module in model.named_modules() if isinstance(module, Site)]
    kept = {name: getattr(module, buffer) for name, module, _, (_, buffer) in _in_place(model)}
    kept = {} if getattr(model, "luthier_off", False) else kept  # switched off: the originals are in their places
    seen: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if any(name.startswith(prefix) and not name.startswith(f"{prefix}{BASE}.") for prefix in inside):
            continue
        original = original_name(name)
        source = kept.get(original, value)
        found[original] = seen.setdefault(id(source), source.detach())
    return found


def tied_to(model: nn.Module, path: str) -> list[str]:
    """Original paths of the other modules whose weight is the very parameter of the module at `path`."""
    weight = getattr(model.get_submodule(path), "weight", None)
    if not isinstance(weight, torch.nn.Parameter):
        return []
    return [
        original_name(name)
        for name, module in model.named_modules()
        if name != path and module._parameters.get("weight") is weight
    ]
