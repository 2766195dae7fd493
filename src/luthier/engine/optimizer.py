"""AdamW over a method's groups, and its state as plain tensors and plain numbers.

    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  p <- p (1 - lr wd) - lr mhat / (sqrt(vhat) + eps)

A method's groups carry the names of their parameters, so state is saved and restored by name; `lr_scale`
multiplies the group's rate (LoRA+), `lr` is a peak rate of its own under the same schedule. Tensors of one dimension
get no weight decay unless a group says so. Groups with a `projection` keep their moments in a subspace
(engine/projected.py), the others beside them do not.
torch's fused kernel runs where all parameters are floating point on a CPU or a CUDA device. Inverses side by
side: `state_tensors` / `load_state`. Left out: every other optimizer, which is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from luthier.contracts.errors import CheckpointError, RecipeError
from luthier.contracts.method import Method, trains
from luthier.engine.projected import ProjectedAdamW
from luthier.models.projection import Projection

OPTIMIZERS = ("adamw",)
_EPS = 1e-8
_PLAIN = ("lr", "lr_scale", "betas", "eps", "weight_decay")


def build_optimizer(method: Method, model: nn.Module, spec: Any, learning_rate: float) -> torch.optim.Optimizer:
    """`spec` is the recipe's train section: optimizer, weight_decay, adam_betas."""
    if spec.optimizer not in OPTIMIZERS:
        raise RecipeError(
            "unknown optimizer", where="train.optimizer", value=spec.optimizer,
            remedy=f"what exists: {', '.join(OPTIMIZERS)}",
        )  # fmt: skip
    groups = []
    for group in method.groups(model):
        scale = float(group["lr"]) / learning_rate if "lr" in group else float(group.get("lr_scale", 1.0))
        decay = float(group.get("weight_decay", spec.weight_decay))
        made = {"params": list(group["params"]), "names": list(group["names"]), "lr_scale": scale,
                "lr": learning_rate * scale, "weight_decay": decay}  # fmt: skip
        groups.append(made | ({"projection": dict(group["projection"])} if group.get("projection") else {}))
    _check(groups, model)
    kind = ProjectedAdamW if any("projection" in group for group in groups) else torch.optim.AdamW
    return kind(
        groups, lr=learning_rate, betas=tuple(spec.adam_betas), eps=_EPS, weight_decay=spec.weight_decay,
        fused=_can_fuse(groups),
    )  # fmt: skip


def of_one(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> torch.optim.Optimizer:
    """An optimizer of the same kind for a single parameter of a group, with the very state of the large one."""
    settings: dict[str, Any] = {
        key: group[key] for key in ("betas", "eps", "weight_decay", "fused", "projection") if key in group
    }
    kind: Any = type(optimizer)
    one: torch.optim.Optimizer = kind([settings | {"params": [parameter]}], lr=group["lr"])
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


def load_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> None:
    """Inverse of `state_tensors`: every tensor finds its parameter by name, or CheckpointError."""
    here = [list(group["names"]) for group in optimizer.param_groups]
    if (there := [list(group["names"]) for group in groups]) != here:
        differ = sorted({name for g in here for name in g} ^ {name for g in there for name in g})[:5]
        raise CheckpointError("the optimizer's groups differ from the checkpoint's", value=differ or "other order")
    left = dict(tensors)
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            slots = {key.split("::", 1)[1]: key for key in tensors if key.split("::", 1)[0] == name}
            if slots:
                shapes = _shapes(group, parameter)
                optimizer.state[parameter] = {
                    slot: _placed(left.pop(key), parameter, shapes.get(slot)) for slot, key in slots.items()
                }
            else:
                optimizer.state.pop(parameter, None)
    if left:
        raise CheckpointError("optimizer tensors without a parameter", value=sorted(left)[:5])


def _shapes(group: dict[str, Any], parameter: nn.Parameter) -> Mapping[str, tuple[int, ...]]:
    """Slot -> shape of the state of one parameter."""
    if group.get("projection"):
        return Projection(**group["projection"]).slots(parameter.shape)
    return dict.fromkeys(("exp_avg", "exp_avg_sq"), tuple(parameter.shape))


def _placed(value: Tensor, parameter: nn.Parameter, shape: tuple[int, ...] | None) -> Tensor:
    if value.ndim and value.shape != shape:
        raise CheckpointError(
            f"optimizer state of shape {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}"
        )
    return value.to(parameter.device, copy=True)


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
    return devices in ({"cpu"}, {"cuda"}) and all(p.dtype == torch.float32 for p in parameters)


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
