"""The bench's ground: the same tokens as text and as ids, counts of needed operations, a worker through its pipes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import protocol, sft, table, work


def test_rows_are_the_same_as_text_and_as_ids(tmp_path: Path) -> None:
    tokenizer = work.make_tokenizer(1000)
    for row in work.make_rows(5, 1000):
        assert tuple(tokenizer(work.text(row.ids[:-1], 1000))["input_ids"]) == row.ids[:-1]
        assert row.ids[-1] == work.EOS and 30 <= len(row.ids) <= work.LONGEST and 4 <= row.prompt < len(row.ids)
    assert work.make_rows(5, 1000) == work.make_rows(5, 1000)


def test_needed_operations_grow_with_tokens_and_trained_ones() -> None:
    shape, row = work.SHAPES["tiny"], work.Row(tuple(range(5, 105)), 40)
    once = sft.needed_gflop(shape, [row])
    assert sft.needed_gflop(shape, [row, row]) == pytest.approx(2 * once)
    assert sft.needed_gflop(shape, [work.Row(row.ids, 10)]) > once


def test_adapters_are_filled_by_name() -> None:
    a, b = torch.zeros(4, 8), torch.zeros(8, 4)
    work.fill_adapter({"x.lora_A.weight": a, "x.lora_B.weight": b})
    again = torch.zeros(4, 8)
    work.fill_adapter({"x.lora_A.weight": again})
    assert torch.equal(a, again) and a.abs().max() <= 8**-0.5 and b.abs().sum() > 0


def test_a_trainer_that_owns_its_loop_is_paused() -> None:
    def train(paused: protocol.Paused) -> protocol.Reply:
        for step in range(2):
            paused.wait()
            paused.reach({"loss": float(step)})
        return {"tensors": "x"}

    paused = protocol.Paused(train)
    assert [paused.next(), paused.next(), paused.last()] == [{"loss": 0.0}, {"loss": 1.0}, {"tensors": "x"}]


def _result(out: Path, systems: list[str]) -> dict[str, object]:
    options = ["--model", "tiny", "--steps", "1", "--rows-per-step", "4", "--longest", "64", "--threads", "1"]
    command = [sys.executable, "-m", "bench.sft", *options, "--systems", *systems, "--out", str(out)]
    environment_root = protocol.ROOT
    subprocess.run(command, cwd=environment_root, check=True, capture_output=True, timeout=300)
    import json

    return dict(json.loads((out / "sft.json").read_text()))


@pytest.mark.nightly
def test_luthier_and_the_bare_loop_do_the_same(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    result = _result(tmp_path, ["luthier", "bare"])
    bare = result["systems"]["bare"]  # type: ignore[index]
    assert bare["loss_difference"] < 1e-5 and bare["adapter_difference"] < 1e-4
    assert "Luthier" in table.markdown(result)


@pytest.mark.nightly
def test_luthier_and_trl_do_the_same(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    result = _result(tmp_path, ["luthier", "trl", "trl_best"])
    for name in ("trl", "trl_best"):
        system = result["systems"][name]  # type: ignore[index]
        assert system["loss_difference"] < 1e-5 and system["adapter_difference"] < 1e-4
