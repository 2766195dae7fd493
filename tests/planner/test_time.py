"""Operations against the bench's own count of needed ones, rates given and measured, what limits."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files

import pytest
from bench.needed import Segment, Work, needed_gflop

from luthier.contracts.errors import UsageError
from luthier.planner.load import assumed
from luthier.planner.time import Device, device_named, known_devices, operations, this_cpu, time_of
from planner.rig import LLAMA_8B, SMALL, llama, planned

SHAPE = {
    "vocab_size": 32_000, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 1408,
}  # fmt: skip


@pytest.mark.parametrize(("method", "rank"), [("lora", 16), ("full", None)])
def test_operations_are_the_needed_ones_and_little_more(method: str, rank: int | None) -> None:
    """The bench leaves out what the last layer and the first adapter spare; a plan does not."""
    course = assumed(2048, 2048, 512, 0.6)
    found = planned(llama(512, 8, 1408, 8, num_key_value_heads=4), method, course)
    needed = 1e9 * needed_gflop(SHAPE, [Segment(512, round(512 * 0.6))] * 4, Work(rank=rank))
    total = sum(operations(found.shape, found.trained, found.setting, course).values())
    assert 1.0 < total / needed < 1.2


def test_recomputing_costs_a_third_and_tokens_pay_for_themselves() -> None:
    course = assumed(4096, 4096, 512, 0.6)
    plain = planned(LLAMA_8B, course=course)
    again = replace(plain, setting=replace(plain.setting, recompute_every=1))
    flops = [sum(operations(one.shape, one.trained, one.setting, course).values()) for one in (plain, again)]
    assert 1.25 < flops[1] / flops[0] < 1.55
    parts = [replace(plain, setting=replace(plain.setting, recompute_part=part)) for part in ("attention", "mlp")]
    found = [sum(operations(one.shape, one.trained, one.setting, course).values()) - flops[0] for one in parts]
    assert sum(found) == pytest.approx(flops[1] - flops[0]) and found[1] > found[0] > 0
    double = planned(LLAMA_8B, course=assumed(8192, 8192, 512, 0.6))
    assert sum(operations(double.shape, double.trained, double.setting, double.course).values()) == pytest.approx(
        2 * flops[0]
    )


def test_what_limits_follows_the_device() -> None:
    found = planned(SMALL)
    parts = found.shape, found.trained, found.setting, found.course
    quick = time_of(*parts, Device("wide", "cuda", 1e18, 1e9))
    slow = time_of(*parts, Device("narrow", "cuda", 1e9, 1e18))
    assert quick.limiting == "weights read" and slow.limiting == "linears"
    assert slow.tokens_per_second == pytest.approx(found.course.tokens_per_step / slow.step)


def test_devices() -> None:
    known = known_devices()
    assert all(one.memory and one.flops > 1e13 and one.bandwidth > 1e11 and not one.measured for one in known.values())
    assert device_named("h100-80gb") == known["h100-80gb"]
    table = json.loads(files("luthier.planner").joinpath("devices.json").read_text())["devices"]
    assert all(one["source"].endswith(("sheet", "whitepaper")) or "," in one["source"] or ":" in one["source"]
               for one in table.values())  # fmt: skip
    assert {"h100-80gb": 989, "a100-80gb": 312, "rtx-4090": 165, "l40s": 362}.items() <= {
        name: one["tflops"] for name, one in table.items()
    }.items(), "dense, not sparse"
    here = this_cpu()
    assert here.measured and here.kind == "cpu" and here.flops > 1e8
    with pytest.raises(UsageError, match="no such device"):
        device_named("abacus")
