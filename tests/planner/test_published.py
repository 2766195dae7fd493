"""Published tables: the presets give their numbers within rounding, sharing and pipelines those of the formulas."""

from __future__ import annotations

import pytest

from luthier.contracts.errors import UsageError
from luthier.planner import layout
from luthier.planner.presets import PRESETS, Column, preset

GB = 1e9


def columns(name: str) -> dict[str, Column]:
    return {column.name: column for column in preset(name).columns}


def gb(column: Column, term: str) -> float:
    return column.terms[term] / GB


def test_bf16_states_term_by_term() -> None:
    found = columns("bf16-states-7b")
    full, lora, qlora = found["full"], found["lora"], found["qlora"]
    assert [gb(full, term) for term in ("weights", "gradients", "optimizer")] == [14, 14, 28]
    assert gb(lora, "weights") == 14 and gb(qlora, "weights") == 3.5
    for column in (lora, qlora):
        assert [round(1e3 * gb(column, term)) for term in ("adapter", "gradients", "optimizer")] == [34, 34, 67]
    assert [round(column.total / GB, 1) for column in (full, lora, qlora)] == [56.0, 14.1, 3.6]


def test_mixed_states_term_by_term() -> None:
    found = columns("mixed-states-7b")
    assert [round(column.total / GB, 1) for column in found.values()] == [112.0, 14.3, 3.8]
    assert gb(found["full"], "optimizer") == 84 and round(gb(found["lora"], "optimizer"), 2) == 0.20


@pytest.mark.parametrize("name", ["bf16-states-7b", "mixed-states-7b"])
def test_totals_are_the_printed_ones(name: str) -> None:
    assert all(round(column.total / GB, 1) == column.published for column in preset(name).columns)


def test_by_size() -> None:
    found = columns("mixed-states-by-size")
    totals = {name: round(column.total / GB, 1) for name, column in found.items()}
    sizes = ("1.3B", "7B", "13B", "34B", "70B")
    assert [totals[f"{size} lora"] for size in sizes] == [4.3, 18.9, 33.7, 84.2, 164.8]
    assert [totals[f"{size} qlora"] for size in sizes] == [2.4, 8.4, 14.2, 33.2, 59.8]
    assert [round(found[f"{size} full"].total / GB) for size in sizes] == [21, 112, 208, 544, 1120]
    assert all(round(found[f"{size} full"].total / GB) == found[f"{size} full"].published for size in sizes)
    assert set(preset("mixed-states-by-size").unexplained) == {"lora", "qlora"}


def test_presets_say_what_they_assume() -> None:
    assert all(make().assumptions and make().name == name for name, make in PRESETS.items())
    with pytest.raises(UsageError, match="no such preset"):
        preset("none-such")


def test_sharing_of_seven_billion_by_eight() -> None:
    found = {way: layout.full_states(7e9, 8, way) for way in layout.WAYS}
    assert [one.device_bytes / GB for one in found.values()] == [112, 38.5, 26.25, 14]
    assert found["zero3"].sent_elements / found["ddp"].sent_elements == 1.5
    assert found["zero1"].sent_elements == found["zero2"].sent_elements == found["ddp"].sent_elements
    away = layout.full_states(7e9, 8, "zero1", offload=True)
    assert away.device_bytes / GB == 28 and away.host_bytes / GB == 10.5


def test_sharing_of_an_adapter() -> None:
    p, trained, ranks = 7e9, 4e7, 8
    zero2, zero3 = (layout.adapter_states(p, trained, ranks, way) for way in ("zero2", "zero3"))
    assert zero2.device_bytes == pytest.approx(2 * p + 2 * trained + 14 * trained / ranks)
    assert zero3.device_bytes == pytest.approx((2 * p + 16 * trained) / ranks)
    assert zero2.sent_elements < zero3.sent_elements / 100
    everything = layout.ways(p, trained, ranks)
    assert layout.fitting(everything, 16e9) == everything[0] and layout.fitting(everything, 4e9) == everything[-1]
    assert layout.fitting(everything, 1e9) is None
    with pytest.raises(UsageError, match="no such way"):
        layout.full_states(p, 2, "zero4")


@pytest.mark.parametrize(("microbatches", "chunks", "share"), [(4, 1, 42.9), (8, 1, 27.3), (32, 1, 8.6), (8, 2, 15.8)])
def test_pipelines_idle_as_published(microbatches: int, chunks: int, share: float) -> None:
    assert round(100 * layout.idle_share(4, microbatches, chunks), 1) == share
