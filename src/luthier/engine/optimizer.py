"""The optimizer over a method's groups, and its state as plain tensors and plain numbers.

`train.optimizer` names a file of engine/optimizers; the formula is told there. A method's groups carry the names of
their parameters, so state is saved and restored by name; `lr_scale` multiplies the group's rate (LoRA+), `lr` is a peak
rate of its own under the same schedule. Tensors of one dimension get no weight decay unless a group says so. Where
averages are kept in 8 bits, embeddings and the head are a group of their own, because they keep 32. Groups with a
`projection` keep their averages in a subspace (engine/projected.py), the others beside them do not.
Inverses side by side: `state_tensors` / `load_state`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from luthier.contracts.errors import CheckpointError, RecipeError
from luthier.contracts.method import Method, trains
from luthier.engine.averages import Slot
from luthier.engine.stepping import Stepping, name_of
from luthier.models.shapes import table_parameters
from luthier.recipe import resolve

_EPS = 1e-8
_PLAIN = ("lr", "lr_scale", "betas", "eps", "weight_decay")
_OF_ONE = ("betas", "eps", "weight_decay", "projection", "seed", "table", "lr_scale")


def kind_of(name: str) -> type[Stepping]:
    """The class behind `train.optimizer`; RecipeError for a name that nothing is behind."""
    kind: type[Stepping] = resolve.load("optimizers", name)
    return kind


def optimizer_notes(method: type[Method], train: Any, device: torch.device) -> list[str]:
    """What a person should know of this choice; RecipeError or ResourceError where it cannot be."""
    kind = kind_of(train.optimizer)
    kind.check(device)
    check_together(method, train.optimizer)
    return kind.advice(train, device)


def check_together(method: type[Method], name: str) -> None:
    """RecipeError where the optimizer cannot step what the method gives it."""
    if method.projects and not kind_of(name).projects:
        _refuse_projection(name)


def build_optimizer(method: Method, model: nn.Module, spec: Any, learning_rate: float) -> Stepping:
    """`spec` is the recipe's train section: optimizer, weight_decay, adam_betas, seed."""
    kind = kind_of(spec.optimizer)
    groups = []
    for group in method.groups(model):
        scale = float(group["lr"]) / learning_rate if "lr" in group else float(group.get("lr_scale", 1.0))
        decay = float(group.get("weight_decay", spec.weight_decay))
        made = {"params": list(group["params"]), "names": list(group["names"]), "lr_scale": scale,
                "lr": learning_rate * scale, "weight_decay": decay}  # fmt: skip
        if projection := group.get("projection"):
            if not kind.projects:
                _refuse_projection(spec.optimizer)
            made["projection"] = dict(projection)
        groups.append(made)
    _check(groups, model)
    if kind.eight_bits:
        groups = [part for group in groups for part in _tables_apart(group, table_parameters(model))]
    return kind(
        groups, lr=learning_rate, betas=kind.betas(tuple(spec.adam_betas)), eps=_EPS, weight_decay=spec.weight_decay,
        fused=_can_fuse(groups), seed=getattr(spec, "seed", 0),
    )  # fmt: skip


def of_one(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> Stepping:
    """An optimizer of the same kind for a single parameter of a group, with the very state of the large one."""
    if not isinstance(optimizer, Stepping):
        raise TypeError(f"{type(optimizer).__name__} is not one of engine/optimizers")
    settings = {key: group[key] for key in _OF_ONE if key in group}
    fused = group["fused"] and optimizer.is_torchs(group, parameter)
    made = settings | {"params": [parameter], "names": [name_of(group, parameter)], "fused": fused}
    one = type(optimizer)([made], lr=group["lr"])
    one.state = optimizer.state
    return one


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The rate of this step, before each group's own scale."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


def state_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """(`name::slot` -> tensor, groups as JSON). Moments that do not exist yet are absent, and stay so."""
    tensors: dict[str, Tensor] = {}
    groups = []
    for group in optimizer.param_groups:
        groups.append({"names": list(group["names"]), **{key: _json(group[key]) for key in _PLAIN}})
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for slot, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}::{slot}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors, groups


def load_state(optimizer: Stepping, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> None:
    """Inverse of `state_tensors`: every tensor finds its parameter by name, or CheckpointError."""
    here = [list(group["names"]) for group in optimizer.param_groups]
    if (there := [list(group["names"]) for group in groups]) != here:
        differ = sorted({name for g in here for name in g} ^ {name for g in there for name in g})[:5]
        raise CheckpointError("the optimizer's groups differ from the checkpoint's", value=differ or "other order")
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, slot = key.partition("::")
        by_name.setdefault(name, {})[slot] = tensor
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if slots := by_name.pop(name, None):
                optimizer.state[parameter] = _taken_up(optimizer, group, parameter, slots)
            else:
                optimizer.state.pop(parameter, None)
    if by_name:
        raise CheckpointError("optimizer tensors without a parameter", value=sorted(by_name)[:5])


def state_bytes(optimizer: Stepping) -> int:
    """Of the whole state, made or not yet."""
    found = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            slots = [*optimizer.keeps(group, parameter).values(), Slot((), torch.float32)]
            found += sum(torch.Size(slot.shape).numel() * slot.dtype.itemsize for slot in slots)
    return found


def _taken_up(
    optimizer: Stepping, group: dict[str, Any], parameter: nn.Parameter, saved: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """State of one parameter, where this optimizer keeps it."""
    wanted = optimizer.keeps(group, parameter)
    if set(saved) != {"step", *wanted}:
        raise CheckpointError("the checkpoint is another optimizer's", where=name_of(group, parameter),
                              value=sorted(saved), remedy="give it the train.optimizer it was made with")  # fmt: skip
    made = {"step": optimizer.counter(group, parameter).copy_(saved["step"])}
    for slot, kept in wanted.items():
        tensor = saved[slot]
        if tuple(tensor.shape) != tuple(kept.shape) or tensor.dtype != kept.dtype:
            raise CheckpointError(
                f"optimizer state of shape {tuple(tensor.shape)} for a parameter of {tuple(parameter.shape)}",
                where=name_of(group, parameter), value=f"{tensor.dtype} for {kept.dtype}",
            )  # fmt: skip
        made[slot] = optimizer.room(parameter, kept).copy_(tensor)
    return made


def _refuse_projection(name: str) -> None:
    exist = [other for other in resolve.names("optimizers") if kind_of(other).projects]
    raise RecipeError(
        "the method projects its gradients, which this optimizer does not know", where="train.optimizer", value=name,
        remedy=f"use {' or '.join(exist[:2])}, or another method",
    )  # fmt: skip


def _tables_apart(group: dict[str, Any], tables: frozenset[int]) -> list[dict[str, Any]]:
    """The group without embeddings and head, and these."""
    found = []
    for table in (False, True):
        pairs = [(n, p) for n, p in zip(group["names"], group["params"], strict=True) if (id(p) in tables) is table]
        if pairs:
            names, parameters = zip(*pairs, strict=True)
            found.append({**group, "names": list(names), "params": list(parameters), "table": table})
    return found


def _check(groups: list[dict[str, Any]], model: nn.Module) -> None:
    """Each trainable parameter in exactly one group: neither forgotten nor stepped twice."""
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = {id(parameter): name for name, parameter in model.named_parameters() if trains(parameter)}
    if not listed:
        raise RecipeError("nothing to train", where="method", remedy="the method made no parameter trainable")
    if len(set(listed)) != len(listed) or set(listed) != set(trainable):
        lost = [name for key, name in trainable.items() if key not in set(listed)][:5]
        raise RuntimeError(f"the method's groups do not cover what trains exactly once; missing {lost}")


def _can_fuse(groups: list[dict[str, Any]]) -> bool:
    parameters = [parameter for group in groups for parameter in group["params"]]
    devices = {parameter.device.type for parameter in parameters}
    return devices in ({"cpu"}, {"cuda"}) and all(p.dtype in (torch.float32, torch.bfloat16) for p in parameters)


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
