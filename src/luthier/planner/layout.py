"""Memory and traffic of training on several devices: what each holds, what each sends, how long a pipeline idles.

    per device, mixed Adam, P parameters, N ranks           ddp 16 P          zero1 4 P + 12 P / N
                                                            zero2 2 P + 14 P / N      zero3 (fsdp) 16 P / N
    with P_L of them trained (LoRA on bf16)                 ddp 2 P + 16 P_L  zero2 2 P + 2 P_L + 14 P_L / N
                                                            zero3 (2 P + 16 P_L) / N
    sent by each rank in a step, elements x (N - 1) / N     ddp, zero1, zero2 2 P   zero3 3 P: 1.5 times, not 3 times
    idle share of a pipeline (GPipe and 1F1B alike)         (p - 1) / (v m + p - 1)

methods.md E6. `base` is bytes of a frozen weight (2 in bf16, 0.516 in NF4). Gathered units come on top: with FSDP
the weights of the unit in use and of those fetched ahead. Offload moves the optimizer's 12 bytes to the host.
"""

from __future__ import annotations

from dataclasses import dataclass

from luthier.contracts.errors import UsageError

WAYS = ("ddp", "zero1", "zero2", "zero3")
_WORKING, _GRADIENT, _STATES = 2, 2, 12  # bf16 weight, bf16 gradient, fp32 master and two averages


@dataclass(frozen=True, slots=True)
class Sharded:
    """Bytes that each device holds."""

    way: str
    ranks: int
    device_bytes: float
    sent_elements: float  # by each rank in a step
    host_bytes: float = 0.0


def full_states(parameters: float, ranks: int, way: str, *, offload: bool = False) -> Sharded:
    """Every weight trains."""
    divided = _divided(way)
    parts = {"weight": _WORKING * parameters, "gradient": _GRADIENT * parameters, "states": _STATES * parameters}
    held = {name: size / ranks if name in divided else size for name, size in parts.items()}
    host = held["states"] if offload else 0.0
    times = 3 if way == "zero3" else 2
    return Sharded(way, ranks, sum(held.values()) - host, times * parameters * (ranks - 1) / ranks, host)


def adapter_states(parameters: float, trained: float, ranks: int, way: str, base: float = 2.0) -> Sharded:
    """A frozen base and `trained` parameters beside it; `zero3` shards the base too."""
    divided = _divided(way)
    parts = {"weight": _WORKING * trained, "gradient": _GRADIENT * trained, "states": _STATES * trained}
    held = sum(size / ranks if name in divided else size for name, size in parts.items())
    frozen = base * parameters / (ranks if way == "zero3" else 1)
    sent = (2 * parameters + trained if way == "zero3" else 2 * trained) * (ranks - 1) / ranks
    return Sharded(way, ranks, frozen + held, sent)


def gathered(layer_parameters: float, ahead: int = 1, compute: float = 2.0) -> float:
    """Bytes of the unit in use and of those fetched ahead."""
    return compute * (1 + ahead) * layer_parameters


def idle_share(stages: int, microbatches: int, chunks: int = 1) -> float:
    """Of the total time; 1F1B has GPipe's bubble and less memory."""
    return (stages - 1) / (chunks * microbatches + stages - 1)


def ways(parameters: float, trained: float, ranks: int, base: float = 2.0) -> list[Sharded]:
    """Every way side by side, for whole training or an adapter."""
    if trained >= parameters:
        return [full_states(parameters, ranks, way) for way in WAYS]
    return [adapter_states(parameters, trained, ranks, way, base) for way in WAYS]


def fitting(found: list[Sharded], device_bytes: float) -> Sharded | None:
    """The first that fits: the least traffic first, so LoRA takes zero3 only where its base does not fit."""
    return next((one for one in found if one.device_bytes <= device_bytes), None)


def _divided(way: str) -> set[str]:
    if way not in WAYS:
        raise UsageError("no such way to share the states", value=way, remedy=f"one of {', '.join(WAYS)}")
    return {"ddp": set(), "zero1": {"states"}, "zero2": {"states", "gradient"}}.get(
        way, {"states", "gradient", "weight"}
    )
