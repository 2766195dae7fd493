"""A system of the race whose bytes are followed: Luthier's step from its own parts (bench/inside.py), in one process.

What lies there before the first step is counted as it is: frozen weights, buffers, and the room in which packed
matrices are unpacked. From then on every operation is followed, the optimizer's state with it. Not for timing.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from bench import luthier_worker, protocol
from bench.allocated import Allocated, held_bytes
from bench.inside import Inside


def steps(settings: dict[str, Any]) -> Generator[protocol.Reply, None, protocol.Reply]:
    from luthier.models.weights.packed import give_up_room

    inside = Inside(settings)
    give_up_room()  # it is taken again where the operations are followed
    yield {"plan": luthier_worker.plan(settings, settings["rows"])}
    with Allocated() as seen:
        for number in range(settings["steps"]):
            loss = inside.gradient(inside.batches(number))
            inside.update()
            yield {"loss": loss}
    return {"held": held_bytes(inside.model, seen)}


if __name__ == "__main__":
    protocol.serve(steps)
