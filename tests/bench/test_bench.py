"""The bench's ground: the same tokens as text and as ids, counts of needed operations, a worker through its pipes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.needed import Segment, Work, needed_gflop
from bench.summary import summarise

from bench import protocol, work

SHAPE = work.SHAPES["tiny"]


def test_rows_are_the_same_as_text_and_as_ids(tmp_path: Path) -> None:
    tokenizer = work.make_tokenizer(1000)
    for row in work.make_rows(5, 1000):
        assert tuple(tokenizer(work.text(row.ids[:-1], 1000))["input_ids"]) == row.ids[:-1]
        assert row.ids[-1] == work.EOS and 30 <= len(row.ids) <= work.LONGEST and 4 <= row.prompt < len(row.ids)
    assert work.make_rows(5, 1000) == work.make_rows(5, 1000)


def test_pairs_close_both_answers_and_share_what_they_say() -> None:
    for pair in work.make_pairs(5, 1000, longest=64):
        assert pair.chosen[-1] == pair.rejected[-1] == work.EOS
        assert len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= 64
    pair = work.shared_pairs(1, 1000, 0.75, tokens=64)[0]
    assert len(pair.prompt) == 48 and len(pair.chosen) == len(pair.rejected) == 16


def test_needed_operations_grow_with_tokens_and_trained_ones() -> None:
    row = Segment(100, 60)
    once = needed_gflop(SHAPE, [row])
    assert needed_gflop(SHAPE, [row, row]) == pytest.approx(2 * once)
    assert needed_gflop(SHAPE, [Segment(100, 90)]) > once
    assert needed_gflop(SHAPE, [row], Work(rank=None)) > once
    assert needed_gflop(SHAPE, [row], Work(reference=True)) > 1.2 * once


def test_needed_operations_are_those_that_a_dense_pass_counts() -> None:
    """Every position scored, nothing to spare: forward of the plain formula 2 T (weights + head) + attention."""
    width, layers, ffn, narrow, tokens = 128, 2, 256, 64, 50
    weights = layers * (2 * width * width + 2 * width * narrow + 3 * width * ffn)
    forward = 2 * tokens * (weights + width * 1000) + 4 * layers * width * tokens**2 / 2
    assert needed_gflop(SHAPE, [Segment(tokens, tokens)], Work(rank=None)) == pytest.approx(3 * forward / 1e9)


def test_a_shared_prompt_is_needed_once() -> None:
    shared = [Segment(60, 0), Segment(40, 40, 60), Segment(40, 40, 60)]
    whole = [Segment(100, 40), Segment(100, 40)]
    assert needed_gflop(SHAPE, shared) < needed_gflop(SHAPE, whole)


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


def test_figures_are_medians_of_what_each_step_gave() -> None:
    mine = {"seconds": [9.0, 1.0, 2.0, 4.0], "losses": [1.0, 1.0, 1.0, 1.0], "peak_bytes": 10}
    theirs = {"seconds": [1.0, 3.0, 4.0, 16.0], "losses": [1.0, 1.0, 1.5, 1.0], "peak_bytes": 40}
    result: dict[str, Any] = {
        "systems": {"luthier": mine, "other": theirs}, "useful_tokens": [8, 8, 8, 8],
        "needed_gflop": [1.0] * 4, "gemm_gflops": [2.0] * 4,
    }  # fmt: skip
    found = summarise(result)["systems"]
    assert found["other"]["luthier_is_faster_by"] == 3.0 and found["other"]["luthier_memory_share"] == 0.25
    assert found["other"]["loss_difference"] == 0.5 and found["luthier"]["tokens_per_second"] == 4.0
    assert found["luthier"]["share_of_gemm_peak"] == 0.25


@pytest.mark.nightly
def test_luthier_and_its_rivals_do_the_same_in_processes_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    options = ["--model", "tiny", "--steps", "1", "--rows-per-step", "4", "--longest", "64", "--threads", "1"]
    for bench, system in (("sft", "sft-tiny"), ("full", "full-tiny")):
        command = [sys.executable, "-m", f"bench.{bench}", *options, "--out", str(tmp_path)]
        subprocess.run(command, cwd=protocol.ROOT, check=True, capture_output=True, timeout=600)
        result = json.loads((tmp_path / f"{system}.json").read_text())
        assert {"luthier", "trl", "trl_best", "bare"} <= result["systems"].keys()
        for one in result["systems"].values():
            assert one["loss_difference"] < 1e-5 and one["tensor_difference"] < 1e-3
